"""What pickles of the official perturber hold, as rows of ours.

One file holds the values of one cell, or with a list of genes those of all cells. Where a file does not say which cell
a value is of, that stays open.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from geneformer_fast.errors import InputError
from geneformer_fast.files.writing import is_leftover
from geneformer_fast.perturbation.folder import OFFICIAL_SUFFIX as SUFFIX
from geneformer_fast.perturbation.parts import Source
from geneformer_fast.perturbation.pickles import read_effects
from geneformer_fast.perturbation.rows import CELL, OWN, CellRows, RowSchema
from geneformer_fast.tokenization.vocabulary import Vocabulary

#: What stands in a key for the cell itself.
CELL_EMB = "cell_emb"
# in_silico_delete_PREFIX_dict_cell_embs_12batch-1_raw.pickle, and of a list ..._cell_embs_dict_[3, 5]_raw.pickle.
_OF_CELL = re.compile(r"in_silico_([a-z]+)_.*_dict_(cell|gene)_embs_(\d+)batch(-?\d+)")
_OF_LIST = re.compile(r"in_silico_([a-z]+)_.*_(cell|gene)_embs_dict_\[.*\]")
# Tokens and ranks fit the columns that they get.
_MOST = 2**31 - 1
_MOST_VALUE = float(np.finfo(np.float32).max)
_AFTER_ALL_CELLS = 1 << 62
_ROWS_AT_ONCE = 65_536

Row = tuple[int, tuple[int, ...], int, float]


def official_rows(
    folder: str | os.PathLike[str],
    *,
    dictionary: str | os.PathLike[str] | Vocabulary | None = None,
    suffix: str = SUFFIX,
) -> Source:
    """The rows of a folder of pickles that the official perturber wrote; see ``official_files.open_official``."""
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder of official effects")
    names = sorted(file.name for file in path.iterdir() if file.name.endswith(suffix) and not is_leftover(file))
    if not names:
        raise InputError(f"{path}: no file's name ends with {suffix!r}; say with suffix how they end")
    known = Vocabulary.from_folder(Path(dictionary)) if isinstance(dictionary, str | os.PathLike) else dictionary
    return _OfficialFolder(path, names, known)


class _OfficialFolder(Source):
    """The rows of all pickles of a folder, in order of the cells."""

    def __init__(self, path: Path, names: Sequence[str], vocabulary: Vocabulary | None) -> None:
        self.path = path
        ids = None if vocabulary is None else _ids(vocabulary)
        kinds: set[str] = set()
        states: list[str] = []
        pieces: list[tuple[tuple[int, int, int], pa.Table]] = []
        n_cells, is_list = 0, False
        for name in names:
            kind, rank, what, batch = _said_by(name)
            kinds.add(kind)
            is_list |= rank < 0
            effects = _Effects(path / name, read_effects(path / name), rank)
            states += [state for state in effects.states if state not in states]
            for of_cell, table in effects.tables(ids):
                pieces.append(((_AFTER_ALL_CELLS if of_cell < 0 else of_cell, what, batch), table))
                n_cells = max(n_cells, of_cell + 1)
            n_cells = max(n_cells, rank + 1)
        pieces.sort(key=lambda piece: piece[0])
        self.schema = pa.schema([pa.field(column, kind) for column, kind in OWN.items()])
        self._table = pa.concat_tables([self.schema.empty_table(), *(table for _, table in pieces)])
        self.n_rows = self._table.num_rows
        ranks = pa.array(np.arange(n_cells, dtype=np.int64))
        self.cells = pa.table({"rank": ranks, "cell": ranks, "length": pa.nulls(n_cells, pa.int64())})
        options = {"kind": " and ".join(sorted(kinds - {""})) or None, "together": is_list, "official": True}
        self.manifest = {"states": states, "plan": {"options": options}, "report": {}}

    def batches(self, columns: Sequence[str], places: np.ndarray | None) -> Iterator[pa.RecordBatch]:
        """Rows in order of the cells; those that nobody knows the cell of come last."""
        yield from self._table.select(list(columns)).combine_chunks().to_batches(max_chunksize=_ROWS_AT_ONCE)


class _Effects:
    """What one pickle holds.

    Parameters
    ----------
    path
        The file, for messages.
    content
        Its dictionary.
    rank
        The cell it is of; -1 where it is of all cells, one value each.
    """

    def __init__(self, path: Path, content: Mapping[Any, Any], rank: int) -> None:
        self._path, self._rank = path, rank
        is_nested = bool(content) and all(type(key) is str for key in content)
        self.states: list[str] = list(content) if is_nested else []
        self._of_states = list(content.values()) if is_nested else [content]
        if any(type(effects) is not dict for effects in self._of_states):
            self._refuse("a state without a dictionary of effects")

    def tables(self, ids: Sequence[str | None] | None) -> Iterator[tuple[int, pa.Table]]:
        """Rank and rows of every cell; rank -1 where nobody knows it."""
        of_cells: dict[int, list[Row]] = {}
        for state, effects in enumerate(self._of_states):
            for key, values in effects.items():
                perturbed, affected = self._key(key)
                for item, value in enumerate(self._values(values)):
                    # With a list of genes the nth value is the nth cell's; a gene's is only of cells that have it.
                    rank = self._rank if self._rank >= 0 else item if affected < 0 else -1
                    of_cells.setdefault(rank, []).append((state, perturbed, affected, value))
        schema = RowSchema(states=self.states, names=ids)
        for rank, rows in of_cells.items():
            table = schema.table(rank, self._rows(rows, ids), {})
            if rank < 0:
                table = table.set_column(0, CELL, pa.nulls(len(rows), pa.int64()))
            yield rank, table

    def _rows(self, rows: Sequence[Row], ids: Sequence[str | None] | None) -> CellRows:
        numbers: dict[tuple[int, ...], int] = {}
        variant = [numbers.setdefault(perturbed, len(numbers)) for _, perturbed, _, _ in rows]
        most = max(token for perturbed in numbers for token in perturbed)
        if ids is not None and most >= len(ids):
            raise InputError(f"{self._path}: token {most} is none of the dictionary; give the one it was made with")
        return CellRows.of(
            list(numbers), [value for *_, value in rows], variant=variant,
            affected=[affected for _, _, affected, _ in rows],
            state=[state for state, *_ in rows] if self.states else None,
        )  # fmt: skip

    def _key(self, key: Any) -> tuple[tuple[int, ...], int]:
        """Perturbed tokens, and the affected one, -1 for the cell itself."""
        if type(key) is not tuple:
            self._refuse(f"a key {key!r}"[:80])
        first, affected = key
        perturbed = first if type(first) is tuple else (first,)
        if affected == CELL_EMB:
            affected = -1
        elif not _is_token(affected):
            self._refuse(f"a key of {affected!r}"[:80])
        if not perturbed or not all(map(_is_token, perturbed)):
            self._refuse(f"a key of {first!r}"[:80])
        return perturbed, affected

    def _values(self, values: Any) -> list[float]:
        if type(values) is not list or not all(
            type(value) is float and not abs(value) > _MOST_VALUE for value in values
        ):
            self._refuse("something else than a list of float32 numbers under a key")
        return values

    def _refuse(self, what: str) -> NoReturn:
        raise InputError(
            f"{self._path}: holds {what}, and no effects of perturbations; leave it out, or say with suffix how files "
            "of effects end"
        )


def _said_by(name: str) -> tuple[str, int, int, int]:
    """What a file's name says: kind, rank (-1 for all cells), 0 for cells and 1 for genes, and batch."""
    if found := _OF_CELL.match(name):
        kind, what, rank, batch = found.groups()
        if int(rank) <= _MOST and abs(int(batch)) <= _MOST:
            return kind, int(rank), int(what == "gene"), int(batch)
    if found := _OF_LIST.match(name):
        return found[1], -1, int(found[2] == "gene"), 0
    return "", -1, 0, 0


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _ids(vocabulary: Vocabulary) -> list[str | None]:
    """Ensembl id of every token, None where it has none."""
    ids: list[str | None] = [None] * vocabulary.n_tokens
    for gene, token in vocabulary.token_ids.items():
        ids[token] = gene
    return ids
