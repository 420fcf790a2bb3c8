"""Where embeddings go: .npy and Arrow files written row by row, or a copy of an .h5ad file.

A file is written under a temporary name and renamed when it is whole, with a ``.json`` file of provenance beside it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from geneformer_fast.errors import OutputError

SUFFIXES = (".npy", ".arrow", ".h5ad")


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
        """Fill up with NaN and put the file on the disk."""
        if not self._file.closed:
            while self._next < self._n_rows:
                count = min(self._n_rows - self._next, 65_536)
                self._file.write(np.full((count, self._width), np.nan, dtype=np.float32).data)
                self._next += count
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def abort(self) -> None:
        """Let go of the file."""
        self._file.close()


class ArrowWriter:
    """An Arrow file: one ``embedding`` list per cell beside the columns that name the cell."""

    def __init__(self, path: Path, width: int, columns: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        import pyarrow as pa

        self._columns = columns
        fields = [pa.field(name, column.type) for name, column in columns.items()]
        fields.append(pa.field("embedding", pa.list_(pa.float32(), width)))
        self._schema = pa.schema(fields, metadata=dict(metadata))
        self._writer = pa.ipc.new_file(str(path), self._schema)
        self._next = 0

    def write(self, rows: np.ndarray, embeddings: np.ndarray) -> None:
        """Append the next embeddings; columns are cut at the same cells, one after another."""
        import pyarrow as pa

        n = len(embeddings)
        arrays = [_one_array(column.slice(self._next, n)) for column in self._columns.values()]
        flat = pa.array(np.ascontiguousarray(embeddings, dtype=np.float32).reshape(-1))
        arrays.append(pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1]))
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._next += n

    def close(self) -> None:
        """Write the footer."""
        self._writer.close()

    def abort(self) -> None:
        """Let go of the file."""
        self._writer.close()


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
                        "read and write it with a current anndata first, or choose .npy or .arrow"
                    )
                if key in self._file[name]:
                    del self._file[name][key]
            write_elem(self._file["uns"], key, dict(provenance))
            self._rows = self._file["obsm"].create_dataset(key, (n_rows, width), np.float32, fillvalue=np.nan)
            self._rows.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        except BaseException:
            self._file.close()
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
        self._file.close()

    def abort(self) -> None:
        """Let go of the file."""
        self._file.close()


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


class WholeFile:
    """A path that appears when its content is whole: ``with WholeFile(path) as temporary: ...``.

    Raises
    ------
    OutputError
        The file is there already and may not be replaced, its folder is missing, or its suffix is unknown.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool, suffixes: tuple[str, ...] = SUFFIXES) -> None:
        self.path = Path(path)
        if self.path.suffix not in suffixes:
            raise OutputError(f"{self.path}: the name must end in one of {', '.join(suffixes)}")
        if self.path.exists() and not overwrite:
            raise OutputError(f"{self.path} exists already; choose another name or pass overwrite (--overwrite)")
        if not self.path.parent.is_dir():
            raise OutputError(f"{self.path.parent} is not a folder; make it first")
        self.temporary = self.path.with_name(f".{self.path.name}.part")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def write_provenance(path: Path, provenance: Mapping[str, Any]) -> None:
    """Put ``<path>.json`` beside a file."""
    partial = path.with_name(f".{path.name}.json.part")
    partial.write_text(json.dumps(provenance, indent=2) + "\n")
    os.replace(partial, path.with_name(f"{path.name}.json"))


def read_cells(path: Path, rows: np.ndarray, key: str) -> np.ndarray:
    """[n, C] embeddings of the cells in the given rows of a file that was written here."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")[rows]
    if path.suffix == ".h5ad":
        import h5py

        with h5py.File(path, "r") as file:
            return file["obsm"][key][:][rows]
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        column = pa.ipc.open_file(file).read_all().column("embedding").combine_chunks()
        return column.flatten().to_numpy().reshape(len(column), -1).copy()


def _one_array(column: Any) -> Any:
    """A contiguous array from a slice that may span chunks."""
    combined = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    return combined.chunk(0) if hasattr(combined, "chunk") else combined
