"""Tokens of cells to embed, wherever they come from: an AnnData, files of counts, or a token folder."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from geneformer_fast import families
from geneformer_fast.config import EncoderConfig
from geneformer_fast.counts import expand_inputs
from geneformer_fast.data.identity import identity_of
from geneformer_fast.data.selection import Selection
from geneformer_fast.data.values import (
    SomeValueCells,
    ValueCells,
    cells_in_memory,
    check_model,
    check_ranked,
    preparation_in,
    values_of,
)
from geneformer_fast.errors import InputError, OutputError, UnsupportedError, VocabularyError
from geneformer_fast.extract.options import is_anndata, is_token_folder
from geneformer_fast.families.preparation import Stored
from geneformer_fast.files.writing import reason_of
from geneformer_fast.tokenization.arrow import TokenFolder, open_tokens
from geneformer_fast.tokenization.carried import carried_columns, cell_columns
from geneformer_fast.tokenization.inputs import ReadOptions
from geneformer_fast.tokenization.run import TokenizedCells, TokenizedValues, tokenize, tokenize_anndata, tokenize_rows
from geneformer_fast.tokenization.values import TOTAL, ValueGenes
from geneformer_fast.tokenization.vocabulary import Vocabulary

# What to do where files of ours in the folder for temporary files cannot be written.
_ABOUT_SCRATCH = "tokens of counts are kept there meanwhile: set TMPDIR to another folder, or tokenize first"


@dataclass(frozen=True)
class Cells:
    """Tokens of cells to embed, wherever they are, and the row of the output each belongs to.

    Attributes
    ----------
    lengths
        [n] tokens per cell.
    read
        Takes cell numbers, gives packed tokens and [n + 1] cumulative lengths.
    rows
        [n] ascending row numbers of the output.
    n_rows
        Rows of the output: more than cells where empty cells were left out.
    vocabulary
        Identity of the vocabulary, as in a token folder's manifest.
    columns
        Names of the columns that name the cells.
    column
        Takes one of these names, gives the Arrow column.
    of_every_row
        Gives all columns with a value for each of ``n_rows``; None where these are the cells.
    selection
        Which cells of the input these are, in plain values; empty where they are all.
    input_rows
        [n] ascending row of each cell in the input; None where ``rows`` are these.
    n_not_taken
        Rows of the output whose cells were not selected.
    values
        Which positions of cells are of genes that their files have, for families that read values; None for tokens.
    """

    lengths: np.ndarray
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    rows: np.ndarray
    n_rows: int
    vocabulary: Mapping[str, Any]
    columns: Sequence[str]
    column: Callable[[str], pa.ChunkedArray]
    of_every_row: Callable[[], dict[str, pa.ChunkedArray]] | None = None
    selection: Mapping[str, Any] = field(default_factory=dict)
    input_rows: np.ndarray | None = None
    n_not_taken: int = 0
    values: ValueCells | SomeValueCells | None = None

    @property
    def places(self) -> np.ndarray:
        """[n] ascending row of each cell in the input."""
        return self.rows if self.input_rows is None else self.input_rows

    def of_rows(self, chosen: np.ndarray, selection: Selection, *, is_compact: bool) -> Cells:
        """Those in some rows of the input, which are the rows of the output where it ``is_compact``."""
        kept = np.flatnonzero(np.isin(self.rows, chosen, assume_unique=True))
        is_all, whole, every = len(kept) == len(self.rows), self, self.of_every_row

        def of_chosen_rows() -> dict[str, pa.ChunkedArray]:
            assert every is not None
            return {name: column.take(pa.array(chosen)) for name, column in every().items()}

        made = replace(self, selection=selection.to_dict())
        if not is_all:
            made = replace(
                made, lengths=self.lengths[kept], rows=self.rows[kept], read=lambda cells: whole.read(kept[cells]),
                column=lambda name: whole.column(name).take(pa.array(kept)),
                values=None if self.values is None else self.values.of(kept),
            )  # fmt: skip
        if not is_compact:
            return replace(made, n_not_taken=self.n_rows - len(chosen))
        has_gaps = len(made.rows) < len(chosen)
        return replace(
            made, input_rows=made.rows, rows=np.searchsorted(chosen, made.rows), n_rows=len(chosen),
            of_every_row=of_chosen_rows if has_gaps and every is not None else None,
        )  # fmt: skip

    def table(self) -> pa.Table:
        """The columns, one row per row of the output."""
        if self.of_every_row is not None:
            return pa.table(self.of_every_row())
        return pa.table({name: self.column(name) for name in self.columns})

    @property
    def special_ids(self) -> list[int]:
        """Ids of special tokens, which no mean over genes includes."""
        return sorted(self.vocabulary["special"].values())

    @property
    def cls_id(self) -> int | None:
        """Id of the token put before the genes, if there is one."""
        return self.vocabulary["special"].get("cls")


@contextlib.contextmanager
def open_cells(
    data: Any,
    vocabulary: Vocabulary | ValueGenes | None,
    config: EncoderConfig,
    options: Mapping[str, Any],
    progress: bool | None,
    selection: Selection | None = None,
    *,
    is_compact: bool = True,
) -> Iterator[Cells]:
    """The cells of whatever was given; counts are tokenized first, files through a temporary token folder.

    Of a ``selection`` the rows of the output are the cells that it takes, or without ``is_compact`` all of the input.
    """
    if is_token_folder(data):
        if vocabulary is not None:
            config.check_vocabulary(vocabulary.identity())
        with open_tokens(data) as folder:
            chosen = None if selection is None else selection.cells_of(folder)
            cells = _folder_cells(folder, identity_of(folder, config), options["obs"])
            yield _selected(cells, chosen, selection, is_compact)
        return
    if isinstance(data, Sequence) and not isinstance(data, str) and (folders := list(filter(is_token_folder, data))):
        raise UnsupportedError(
            f"{folders[0]} holds tokens: one folder of tokens is taken at a time, and none beside counts; tokenize all "
            "inputs into one folder, or go through them one by one"
        )
    if isinstance(data, str | os.PathLike):
        expand_inputs(os.fspath(data))  # what is not there is said before what is missing to read it
    family = families.family_of(config)
    if vocabulary is None:
        what = "the folder with the token and median dictionaries of"
        whose = config.vocabulary or "the model"
        if family is not None and family.preparation is not None:
            what, whose = "the gene list of", family.name
        raise VocabularyError(
            f"counts need a gene dictionary to become tokens: pass dictionary= (--dictionary), {what} {whose}"
        )
    if isinstance(vocabulary, ValueGenes):
        check_model(vocabulary.identity(), config)
    else:
        check_ranked(vocabulary.identity(), config)
        config.check_vocabulary(vocabulary.identity())
    if config.max_len < vocabulary.max_len:
        options = {**options, "max_len": config.max_len}
    reading = ReadOptions(
        layer=options["counts_layer"], carried=carried_columns(options["obs"]),
        **{name: options[name] for name in options if name not in ("counts_layer", "obs")},
    )  # fmt: skip
    is_object = is_anndata(data)
    rows = chosen = None
    if selection is not None:
        rows, chosen = selection.rows_of([data] if is_object else expand_inputs(data), reading)
    if is_object:
        if rows is None:
            tokenized = tokenize_anndata(data, vocabulary, **{name: options[name] for name in options if name != "obs"})
        else:
            tokenized = tokenize_rows(data, vocabulary, reading, rows)  # type: ignore[assignment]
        yield _selected(_memory_cells(tokenized, data, vocabulary, reading), chosen, selection, is_compact)
        return
    with _scratch() as scratch:
        tokens = Path(scratch) / "tokens"
        try:
            if rows is None:
                tokenize(data, tokens, dictionary=vocabulary, progress=progress, **options)
            else:
                tokenize_rows(data, vocabulary, reading, rows, tokens, progress=progress)
        except OutputError as error:
            raise OutputError(f"{error}; {_ABOUT_SCRATCH}") from error
        with open_tokens(tokens) as folder:
            cells = _input_cells(folder, identity_of(folder, config), data, reading)
            yield _selected(cells, chosen, selection, is_compact)


def _selected(cells: Cells, chosen: np.ndarray | None, selection: Selection | None, is_compact: bool) -> Cells:
    return cells if selection is None or chosen is None else cells.of_rows(chosen, selection, is_compact=is_compact)


def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for tokens that are needed for a while."""
    try:
        return tempfile.TemporaryDirectory(prefix="geneformer-fast-")
    except OSError as error:
        place = error.filename or "the folder for temporary files"
        raise OutputError(f"{place} cannot be written: {reason_of(error)}; {_ABOUT_SCRATCH}") from error


def _columns_of(folder: TokenFolder) -> list[str]:
    """Columns of one value per cell, those aside that only a rule of values needs."""
    own = () if preparation_in(folder) is None else (TOTAL,)
    return [field.name for field in folder.schema if not pa.types.is_nested(field.type) and field.name not in own]


def _folder_cells(folder: TokenFolder, identity: Mapping[str, Any], asked: Mapping[str, str]) -> Cells:
    """Cells of a token folder, with all columns of one value per cell that it carries, named as asked for."""
    there = _columns_of(folder)
    absent = next((name for name in asked if name not in there), None)
    if absent is not None:
        raise InputError(
            f"{folder.path} carries no column {absent!r}, of one value per cell; there are "
            f"{', '.join(there) or 'none'}. Carry it along with tokenize --obs {absent}"
        )
    names = [asked.get(name, name) for name in there]
    stored = dict(zip(names, there, strict=True))
    if len(stored) < len(names):
        taken = next(name for name in names if names.count(name) > 1)
        raise InputError(
            f"the name {taken!r} is taken twice among the columns that {folder.path} carries; choose another"
        )
    if "length" not in names:  # so that a table has the cells as rows, whatever the folder lacks
        names.append("length")

    def column(name: str) -> pa.ChunkedArray:
        return folder.column(stored[name]) if name in stored else _chunked(pa.array(folder.lengths()))

    rows = np.arange(folder.n_cells)
    return Cells(
        folder.lengths(), folder.read, rows, len(rows), identity, names, column, values=values_of(folder)
    )  # fmt: skip


def _input_cells(folder: TokenFolder, identity: Mapping[str, Any], data: Any, reading: ReadOptions) -> Cells:
    """Cells of files that were just tokenized: row i of the output is cell i of the input."""
    assert folder.manifest is not None
    files = [entry["path"] for entry in folder.manifest["inputs"]]
    sizes = np.array([entry["n_cells"] for entry in folder.manifest["inputs"]], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    file_of = np.concatenate([np.asarray(chunk.indices) for chunk in folder.column("source_file").chunks])
    rows, n_rows = starts[file_of] + folder.column("source_row").to_numpy(), int(starts[-1])

    def of_every_row() -> dict[str, pa.ChunkedArray]:
        # Cells that were left out have no tokens, and so are in no column of the folder.
        file_of_row = np.repeat(np.arange(len(files)), sizes)
        return {
            **cell_columns(expand_inputs(data), reading),
            "length": _lengths_of_rows(folder.lengths(), rows, n_rows),
            "source_file": _chunked(pa.array(files, pa.string()).take(pa.array(file_of_row))),
            "source_row": _chunked(pa.array(np.arange(n_rows) - starts[file_of_row], pa.int64())),
        }

    columns = _columns_of(folder)
    is_whole = n_rows == len(rows)
    return Cells(
        folder.lengths(), folder.read, rows, n_rows, identity, columns, folder.column,
        None if is_whole else of_every_row, values=values_of(folder),
    )  # fmt: skip


def _memory_cells(
    tokenized: TokenizedCells, adata: Any, vocabulary: Vocabulary | ValueGenes, reading: ReadOptions
) -> Cells:
    values, cu_seqlens = tokenized.values, tokenized.cu_seqlens
    of_values = None
    if isinstance(vocabulary, ValueGenes):
        assert isinstance(tokenized, TokenizedValues)
        stored = Stored(values, tokenized.amounts, cu_seqlens, tokenized.totals)
        of_values = cells_in_memory(stored, vocabulary, tokenized.report["inputs"])
    lengths = np.diff(cu_seqlens) if of_values is None else of_values.lengths
    rows, n_rows = tokenized.kept_rows, adata.n_obs

    def read(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Windows are contiguous ranges of cells.
        start, stop = (int(cells[0]), int(cells[-1]) + 1) if len(cells) else (0, 0)
        return values[cu_seqlens[start] : cu_seqlens[stop]], cu_seqlens[start : stop + 1] - cu_seqlens[start]

    @functools.cache
    def of_every_row() -> dict[str, pa.ChunkedArray]:
        return {
            **cell_columns([adata], reading),
            "length": _lengths_of_rows(lengths, rows, n_rows),
            "source_row": _chunked(pa.array(np.arange(n_rows), pa.int64())),
        }

    columns = [*reading.carried.values(), "length", "source_row"]
    return Cells(
        lengths, read if of_values is None else of_values, rows, n_rows, vocabulary.identity(), columns,
        lambda name: of_every_row()[name].take(pa.array(rows)), of_every_row, values=of_values,
    )  # fmt: skip


def _lengths_of_rows(lengths: np.ndarray, rows: np.ndarray, n_rows: int) -> pa.ChunkedArray:
    """Tokens per row, 0 where there is no cell."""
    placed = np.zeros(n_rows, dtype=np.int64)
    placed[rows] = lengths
    return _chunked(pa.array(placed))


def _chunked(array: pa.Array) -> pa.ChunkedArray:
    return pa.chunked_array([array])


def asked_columns(obs: str | Mapping[str, str] | Sequence[str] | None, color: str | None = None) -> dict[str, str]:
    """{column of obs: name in the result} for what a user asks for, a column to colour by among them."""
    names = [obs] if isinstance(obs, str) else obs or ()
    asked = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    if color is not None and color not in (*asked, *asked.values()):
        asked[color] = color
    return asked


def labels_of(data: Any, cells: Cells, color: str | None, asked: Mapping[str, str]) -> np.ndarray | None:
    """A value per cell to colour by, from obs or from the columns that tokens carry, whatever they are to be called."""
    if color is None:
        return None
    if is_anndata(data):
        if color not in data.obs:
            raise InputError(f"obs has no column {color!r} to colour by; there are {', '.join(data.obs.columns)}")
        return np.asarray(data.obs[color])[cells.places]
    color = asked.get(color, color)
    if color not in cells.columns:
        raise InputError(f"the tokens carry no column {color!r} to colour by; there are {', '.join(cells.columns)}")
    column = cells.column(color)
    is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    return column.to_numpy() if is_number else np.asarray(column.to_pylist(), dtype=object)


def copy_of(adata: Any) -> Any:
    """A copy in memory, also of an AnnData that is backed by a file."""
    return adata.to_memory(copy=True) if adata.isbacked else adata.copy()
