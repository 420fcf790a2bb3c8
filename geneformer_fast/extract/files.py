"""Writers of embeddings, row by row: .npy, tables (.arrow, .parquet, .csv), a copy of an .h5ad file, memory."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from geneformer_fast.errors import InputError, OutputError

#: Name of the column of embeddings in .arrow and .parquet; in .csv its dimensions follow an underscore.
EMBEDDING = "embedding"
TABLES = (".arrow", ".parquet", ".csv")


class RowWriter(Protocol):
    """Takes embeddings in order of rows."""

    def write(self, rows: np.ndarray, embeddings: np.ndarray) -> None:
        """Append embeddings [n, C] for ascending row numbers [n]."""

    def close(self) -> None:
        """Complete what is written."""

    def abort(self) -> None:
        """Let go of what is written."""


class NpyWriter:
    """A float32 .npy file [n_rows, width]; rows that are never written, such as empty cells, are NaN."""

    def __init__(self, path: Path, n_rows: int, width: int) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close() or abort()
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, {**header, "shape": (n_rows, width)})
        self._n_rows, self._width, self._next = n_rows, width, 0

    def write(self, rows: np.ndarray, embeddings: np.ndarray) -> None:
        """Append embeddings for ascending row numbers, filling gaps with NaN."""
        if not len(rows):
            return
        first, count = self._next, int(rows[-1]) + 1 - self._next
        block = np.full((count, self._width), np.nan, dtype=np.float32)
        block[rows - first] = embeddings
        self._file.write(block.data)
        self._next += count

    def close(self) -> None:
        """Fill up with NaN."""
        if not self._file.closed:
            while self._next < self._n_rows:
                count = min(self._n_rows - self._next, 65_536)
                self._file.write(np.full((count, self._width), np.nan, dtype=np.float32).data)
                self._next += count
            self._file.close()

    def abort(self) -> None:
        """Let go of the file."""
        with contextlib.suppress(OSError):
            self._file.close()


class TableWriter:
    """A table of the cells that have embeddings: the columns that name them, then their embeddings.

    ``.arrow`` and ``.parquet`` have one column ``embedding`` of fixed-size lists; ``.csv`` one column per dimension,
    ``embedding_0`` and on, and text in quotes.
    """

    def __init__(self, path: Path, width: int, columns: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        self._is_text = path.suffix == ".csv"
        kept = dict(columns)
        if path.suffix != ".arrow":
            kept = {name: plain(column) for name, column in kept.items()}
        self._columns = list(kept.values())
        names = embedding_names(path.suffix, width)
        kind = pa.float32() if self._is_text else pa.list_(pa.float32(), width)
        fields = [pa.field(name, column.type) for name, column in kept.items()]
        self._schema = pa.schema([*fields, *(pa.field(name, kind) for name in names)], metadata=dict(metadata))
        self._writer = _writer_of(path, self._schema)
        self._next = 0

    def write(self, rows: np.ndarray, embeddings: np.ndarray) -> None:
        """Append the next embeddings; columns are cut at the same cells, one after another."""
        if not len(embeddings):
            return
        arrays = [_one_array(column.slice(self._next, len(embeddings))) for column in self._columns]
        values = np.ascontiguousarray(embeddings, dtype=np.float32)
        if self._is_text:
            arrays += [pa.array(np.ascontiguousarray(dimension)) for dimension in values.T]
        else:
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]))
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._next += len(embeddings)

    def close(self) -> None:
        """Write the end of the file."""
        self._writer.close()

    def abort(self) -> None:
        """Let go of the file."""
        with contextlib.suppress(OSError, pa.ArrowException):
            self._writer.close()


def embedding_names(suffix: str, width: int) -> list[str]:
    """What the columns of embeddings are called in a table."""
    return [f"{EMBEDDING}_{i}" for i in range(width)] if suffix == ".csv" else [EMBEDDING]


def check_columns(columns: Sequence[str], own: Sequence[str]) -> None:
    """Refuse columns of a user that are called as a column of ours, before anything is computed.

    Raises
    ------
    InputError
        Names the column.
    """
    taken = next((name for name in columns if name in set(own)), None)
    if taken is not None:
        raise InputError(
            f"a column that names the cells is called {taken!r}, and so is one of the result; carry it under another "
            f"name (--obs another_name={taken})"
        )


def _writer_of(path: Path, schema: pa.Schema) -> Any:
    """What takes record batches: an Arrow file, or Parquet, or CSV."""
    if path.suffix == ".arrow":
        return pa.ipc.new_file(str(path), schema)
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.ParquetWriter(str(path), schema)
    from pyarrow import csv

    return csv.CSVWriter(str(path), schema)


class H5adWriter:
    """A copy of an .h5ad file with embeddings in ``obsm`` and provenance in ``uns``; rows never written are NaN."""

    def __init__(
        self, source: Path, path: Path, key: str, n_rows: int, width: int, provenance: Mapping[str, Any]
    ) -> None:
        import h5py
        from anndata.io import write_elem

        shutil.copyfile(source, path)
        self._file = h5py.File(path, "r+")
        try:
            for name in ("obsm", "uns"):
                if name not in self._file:
                    write_elem(self._file, name, {})
                if not isinstance(self._file[name], h5py.Group):
                    raise OutputError(
                        f"{source}: its {name} is stored as anndata before 0.7 did, which cannot be added to; "
                        "read and write it with a current anndata first, or choose another output than .h5ad"
                    )
                if key in self._file[name]:
                    del self._file[name][key]
            write_elem(self._file["uns"], key, dict(provenance))
            self._rows = self._file["obsm"].create_dataset(key, (n_rows, width), np.float32, fillvalue=np.nan)
            self._rows.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        except BaseException:
            self.abort()
            raise

    def write(self, rows: np.ndarray, embeddings: np.ndarray) -> None:
        """Put embeddings into their rows, NaN between them."""
        if len(rows):
            first = int(rows[0])
            block = np.full((int(rows[-1]) + 1 - first, embeddings.shape[1]), np.nan, dtype=np.float32)
            block[rows - first] = embeddings
            self._rows[first : first + len(block)] = block

    def close(self) -> None:
        """Complete the file."""
        with hdf5_closing():
            self._file.close()

    def abort(self) -> None:
        """Let go of the file."""
        with contextlib.suppress(OSError, RuntimeError):
            self._file.close()


@contextlib.contextmanager
def hdf5_closing() -> Any:
    """What HDF5 says of a disk that is full while a file is closed is a RuntimeError; here it is an OSError."""
    try:
        yield
    except RuntimeError as error:
        if "errno" not in str(error):
            raise
        full = f"errno = {errno.ENOSPC}" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from None


class ArrayWriter:
    """Embeddings in memory [n_rows, width], NaN where nothing is written."""

    def __init__(self, n_rows: int, width: int) -> None:
        self.array = np.full((n_rows, width), np.nan, dtype=np.float32)

    def write(self, rows: np.ndarray, embeddings: np.ndarray) -> None:
        """Put embeddings into their rows."""
        self.array[rows] = embeddings

    def close(self) -> None:
        """Nothing to complete."""

    def abort(self) -> None:
        """Nothing to let go of."""


def _one_array(column: Any) -> Any:
    """A contiguous array from a slice that may span chunks."""
    combined = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    return combined.chunk(0) if hasattr(combined, "chunk") else combined


def plain(column: Any) -> Any:
    """A column of file names, which are stored by number, as text."""
    return column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column
