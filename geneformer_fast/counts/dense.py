"""Dense matrices, handed out as sparse row blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from geneformer_fast.counts.block import CountBlock, Sample, sample_ranges, value_dtype

# One read of a dense matrix: 64 MB, unless a single row of chunks is larger.
_READ_BYTES = 64 << 20
_MOST_COLUMNS = 1 << 24


class DenseMatrix:
    """A two-dimensional array (numpy, h5py, zarr), cells in rows or, as in loom files, in columns.

    Parameters
    ----------
    array
        Has `shape`, `dtype` and slices.
    cells_in_columns
        True where the array is genes x cells.
    """

    is_dense, is_one_pass = True, False

    def __init__(self, array: Any, *, cells_in_columns: bool = False) -> None:
        if len(array.shape) != 2:
            raise ValueError(f"a matrix has two dimensions, this array has shape {tuple(array.shape)}")
        self._array = array
        self._transposed = cells_in_columns
        n_rows, n_columns = (int(n) for n in array.shape)
        self.shape = (n_columns, n_rows) if cells_in_columns else (n_rows, n_columns)
        if self.shape[1] > _MOST_COLUMNS:  # a row is read at a time
            raise ValueError(f"{self.shape[1]} columns are more genes than there are")
        self.value_dtype = value_dtype(np.dtype(array.dtype))
        chunks = getattr(array, "chunks", None)
        self._chunk_rows = int(chunks[1 if cells_in_columns else 0]) if chunks else 1

    def _rows(self, first: int, end: int) -> np.ndarray:
        part = self._array[:, first:end].T if self._transposed else self._array[first:end]
        return np.ascontiguousarray(part, dtype=self.value_dtype)

    def sample(self) -> Sample:
        rows = [self._rows(first, end) for first, end in sample_ranges(self.shape[0], rows=16)]
        values = np.concatenate(rows)
        indptr = np.zeros(len(values) + 1, dtype=np.int64)
        np.cumsum(np.count_nonzero(values, axis=1), out=indptr[1:])
        return Sample(values[values != 0], indptr)

    def blocks(self, start: int, stop: int, rows: int) -> Iterator[CountBlock]:
        row_bytes = max(1, self.shape[1] * self.value_dtype.itemsize)
        step = max(1, min(rows, _READ_BYTES // row_bytes))
        # cut between chunks where possible, so that no chunk is inflated twice
        if self._chunk_rows <= step:
            step -= step % self._chunk_rows
        first = start
        while first < stop:
            end = min(stop, first + step - first % step)
            yield to_csr(self._rows(first, end), first)
            first = end


def to_csr(dense: np.ndarray, start: int) -> CountBlock:
    """The non-zero values of a dense block [n_cells, n_genes]."""
    from geneformer_fast.counts import loops

    indptr = np.empty(len(dense) + 1, dtype=np.int64)
    loops.count_nonzero_rows(dense, indptr)
    indices = np.empty(int(indptr[-1]), dtype=np.int32)
    data = np.empty(int(indptr[-1]), dtype=dense.dtype)
    loops.fill_nonzero(dense, indptr, indices, data)
    return CountBlock(start, indptr, indices, data)
