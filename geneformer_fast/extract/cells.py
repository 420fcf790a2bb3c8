"""Tokens of cells to embed, wherever they come from: an AnnData, files of counts, or a token folder."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from geneformer_fast.config import EncoderConfig
from geneformer_fast.data.identity import identity_of
from geneformer_fast.errors import InputError, UnsupportedError, VocabularyError
from geneformer_fast.tokenization.arrow import TokenFolder, open_tokens
from geneformer_fast.tokenization.manifest import STATE, UNFINISHED
from geneformer_fast.tokenization.run import TokenizedCells, tokenize, tokenize_anndata
from geneformer_fast.tokenization.sources import expand_inputs
from geneformer_fast.tokenization.vocabulary import Vocabulary


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
    """

    lengths: np.ndarray
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    rows: np.ndarray
    n_rows: int
    vocabulary: Mapping[str, Any]
    columns: Sequence[str]
    column: Callable[[str], pa.ChunkedArray]

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
    data: Any, vocabulary: Vocabulary | None, config: EncoderConfig, options: Mapping[str, Any], progress: bool | None
) -> Iterator[Cells]:
    """The cells of whatever was given; counts are tokenized first, files through a temporary token folder."""
    if config.inputs != "tokens":
        raise UnsupportedError("this encoder reads values, not ranked tokens; embed() serves encoders over tokens")
    if _is_token_folder(data):
        with open_tokens(data) as folder:
            yield _folder_cells(folder, identity_of(folder, config))
        return
    if isinstance(data, str | os.PathLike):
        expand_inputs(os.fspath(data))  # what is not there is said before what is missing to read it
    if vocabulary is None:
        raise VocabularyError(
            "counts need a gene dictionary to become tokens: pass dictionary= (--dictionary), the folder with "
            f"{config.vocabulary or 'the model'}'s token and median dictionaries"
        )
    config.check_vocabulary(vocabulary.identity())
    if is_anndata(data):
        cells = tokenize_anndata(data, vocabulary, **{name: options[name] for name in options if name != "obs"})
        yield _memory_cells(cells, data.n_obs, vocabulary)
        return
    with tempfile.TemporaryDirectory(prefix="geneformer-fast-") as scratch:
        tokens = Path(scratch) / "tokens"
        tokenize(data, tokens, vocabulary=vocabulary, progress=progress, **options)
        with open_tokens(tokens) as folder:
            yield _folder_cells(folder, vocabulary.identity(), follows_input=True)


def _folder_cells(folder: TokenFolder, identity: Mapping[str, Any], *, follows_input: bool = False) -> Cells:
    rows, n_rows = np.arange(folder.n_cells), folder.n_cells
    if follows_input and folder.manifest is not None:
        # Row i of the output is cell i of the input, also where cells in between were empty.
        sizes = [entry["n_cells"] for entry in folder.manifest["inputs"]]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        files = [np.asarray(chunk.indices) for chunk in folder.column("source_file").chunks]
        rows = starts[np.concatenate(files)] + folder.column("source_row").to_numpy()
        n_rows = int(starts[-1])
    columns = [name for name in folder.columns if name != "input_ids"]
    return Cells(folder.lengths(), folder.read, rows, n_rows, identity, columns, folder.column)


def _memory_cells(tokenized: TokenizedCells, n_rows: int, vocabulary: Vocabulary) -> Cells:
    values, cu_seqlens = tokenized.values, tokenized.cu_seqlens

    def read(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Windows are contiguous ranges of cells.
        start, stop = (int(cells[0]), int(cells[-1]) + 1) if len(cells) else (0, 0)
        return values[cu_seqlens[start] : cu_seqlens[stop]], cu_seqlens[start : stop + 1] - cu_seqlens[start]

    rows = tokenized.kept_rows
    columns = {"source_row": pa.chunked_array([pa.array(rows, pa.int64())])}
    return Cells(np.diff(cu_seqlens), read, rows, n_rows, vocabulary.identity(), list(columns), columns.__getitem__)


def labels_of(data: Any, cells: Cells, color: str | None) -> np.ndarray | None:
    """A value per cell to colour by, from obs or from the columns that tokens carry."""
    if color is None:
        return None
    if is_anndata(data):
        if color not in data.obs:
            raise InputError(f"obs has no column {color!r} to colour by; there are {', '.join(data.obs.columns)}")
        return np.asarray(data.obs[color])[cells.rows]
    if color not in cells.columns:
        raise InputError(f"the tokens carry no column {color!r} to colour by; there are {', '.join(cells.columns)}")
    column = cells.column(color)
    is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    return column.to_numpy() if is_number else np.asarray(column.to_pylist(), dtype=object)


def is_anndata(data: Any) -> bool:
    """Whether this is an AnnData; does not import anndata to find out."""
    module = sys.modules.get("anndata")
    return module is not None and isinstance(data, module.AnnData)


def _is_token_folder(data: Any) -> bool:
    if not isinstance(data, str | os.PathLike):
        return False
    return Path(data).is_dir() and any((Path(data) / name).exists() for name in (STATE, UNFINISHED))
