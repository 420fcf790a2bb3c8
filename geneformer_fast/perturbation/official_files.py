"""Folders of pickles as the official perturber writes them: opened as any run, and written of one.

One file holds the values of one cell, or with a list of genes those of all cells. Where a file does not say which cell
a value is of, that stays open.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from geneformer_fast.errors import OutputError, UnsupportedError
from geneformer_fast.files.locks import folder_lock
from geneformer_fast.files.writing import whole_file
from geneformer_fast.perturbation.folder import OFFICIAL_SUFFIX as SUFFIX
from geneformer_fast.perturbation.official_rows import CELL_EMB, official_rows
from geneformer_fast.perturbation.pickles import effects_bytes
from geneformer_fast.perturbation.reading import Perturbations
from geneformer_fast.perturbation.rows import AFFECTED, CELL, STATE, TOKENS, VALUE
from geneformer_fast.tokenization.vocabulary import Vocabulary


def open_official(
    folder: str | os.PathLike[str],
    *,
    dictionary: str | os.PathLike[str] | Vocabulary | None = None,
    suffix: str = SUFFIX,
) -> Perturbations:
    """Open a folder of pickles that the official perturber wrote, as if it were one of ours.

    Nothing in the pickles is executed. All of them are read at once.

    Parameters
    ----------
    folder
        The folder.
    dictionary
        Folder of gene dictionaries, or a :class:`Vocabulary`, that names the genes; None leaves names out.
    suffix
        How the files end that are read.

    Returns
    -------
    Perturbations
        Its ``cell`` is the rank of the cell, since the files know no more; of genes' values of a list it is null.

    Raises
    ------
    InputError
        There is no such file, or one that holds something else.
    """
    return Perturbations([official_rows(folder, dictionary=dictionary, suffix=suffix)])


def write_official(
    perturbations: Perturbations, folder: str | os.PathLike[str], prefix: str = "perturbed", *, overwrite: bool = False
) -> list[Path]:
    """Write pickles that the official statistics read.

    Parameters
    ----------
    perturbations
        A run, whole or of some shards.
    folder
        Where; it is made if it is absent.
    prefix
        Part of the files' names.
    overwrite
        Whether files of the same prefix that are there are replaced.

    Returns
    -------
    list of Path
        The files: one for each cell and kind of value, and one for all cells where a list was perturbed together. What
        the official perturber divides by batch is in one file.

    Raises
    ------
    UnsupportedError
        Variants of one gene differ by something that a key does not say, such as a dose.
    OutputError
        Such files are there, or the system does not let them be written.
    """
    options = perturbations.manifest["plan"].get("options", {})
    # One dose alone is as good as none.
    is_told = [name for name in perturbations.extra_columns if name != "dose" or len(options.get("doses") or ()) != 1]
    if is_told:
        raise UnsupportedError(
            f"{perturbations.path}: keys of official pickles hold genes alone, and variants here differ by "
            f"{is_told[0]} too; read the Parquet files instead"
        )
    path, beginning = Path(folder), f"in_silico_{options.get('kind') or 'delete'}_{prefix}"
    has_anchor = options.get("anchor") is not None
    written = []
    with folder_lock(path):
        there = sorted(file.name for file in path.glob(f"{escape(beginning)}_*{SUFFIX}"))
        if there and not overwrite:
            raise OutputError(f"{path / there[0]} exists already; name another prefix, or pass overwrite=True")
        for name in there:
            (path / name).unlink()
        files = _by_list(perturbations) if options.get("together") else _by_cell(perturbations, has_anchor)
        for name, effects in files:
            file = path / f"{beginning}_{name}{SUFFIX}"
            with whole_file(file) as temporary:
                temporary.write_bytes(effects_bytes(effects))
            written.append(file)
    return written


def _by_list(perturbations: Perturbations) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Name and content of the files of a list that was perturbed together: a value for each cell under one key."""
    effects = _empty(perturbations.states)
    of_genes: dict[Any, list[float]] = {}
    key: Any = ()
    for row in _rows(perturbations):
        key = _key_of(row[TOKENS], has_anchor=False)
        _put(effects if row[AFFECTED] is None else of_genes, key, row)
    name = f"embs_dict_{list(key) if isinstance(key, tuple) else [key]}"
    yield f"cell_{name}", effects
    if of_genes:
        yield f"gene_{name}", of_genes


def _by_cell(perturbations: Perturbations, has_anchor: bool) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Name and content of the files of every cell, in the order in which they were processed."""
    rows = _rows(perturbations)
    row = next(rows, None)
    for rank, cell in enumerate(perturbations.cells[CELL].to_pylist()):
        effects = _empty(perturbations.states)
        of_genes: dict[Any, list[float]] = {}
        while row is not None and row[CELL] == cell:
            _put(effects if row[AFFECTED] is None else of_genes, _key_of(row[TOKENS], has_anchor), row)
            row = next(rows, None)
        yield f"dict_cell_embs_{rank}batch-1", effects
        if of_genes:
            yield f"dict_gene_embs_{rank}batch-1", of_genes


def _rows(perturbations: Perturbations) -> Iterator[dict[str, Any]]:
    for batch in perturbations.batches(columns=[CELL, TOKENS, AFFECTED, STATE, VALUE]):
        yield from batch.to_pylist()


def _empty(states: Sequence[str]) -> dict[Any, Any]:
    return {state: {} for state in states}


def _put(effects: dict[Any, Any], key: Any, row: Mapping[str, Any]) -> None:
    """One more value under a key; what there is no value of has none."""
    if row[VALUE] == row[VALUE]:
        of_state = effects if row[STATE] is None else effects[row[STATE]]
        affected = CELL_EMB if row[AFFECTED] is None else row[AFFECTED]
        of_state.setdefault((key, affected), []).append(row[VALUE])


def _key_of(tokens: Sequence[int], has_anchor: bool) -> int | tuple[int, ...]:
    """What stands in a key for what was perturbed: one gene by itself, and of an anchor and a gene the latter."""
    if has_anchor:
        return tokens[-1]
    return tokens[0] if len(tokens) == 1 else tuple(tokens)
