"""Compressed sparse row matrices on disk, read in row blocks with bounded look-ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from geneformer_fast.counts.block import (
    BufferPool,
    CountBlock,
    Sample,
    cut_rows,
    sample_ranges,
    value_dtype,
)
from geneformer_fast.counts.vectors import Vector, read

_MAX_THREADS = 8


class CsrMatrix:
    """Cells x genes as indptr, indices and data.

    Parameters
    ----------
    data, indices
        Entries in row order.
    indptr
        [n_cells + 1], checked for consistency with the other two.
    shape
        (n_cells, n_genes).

    Raises
    ------
    ValueError
        The three arrays do not fit each other or the shape.
    """

    is_dense, is_one_pass = False, False

    def __init__(self, data: Vector, indices: Vector, indptr: np.ndarray, shape: tuple[int, int]) -> None:
        self._data = data
        self._indices = indices
        self.shape = shape
        self.value_dtype = value_dtype(data.dtype)
        if indices.dtype.kind not in "iu":
            raise ValueError(f"column indices have type {indices.dtype}, expected integers")
        self._indptr = checked_indptr(indptr, shape[0], len(data), len(indices))

    def sample(self) -> Sample:
        values, lengths = [], [np.zeros(1, dtype=np.int64)]
        for first, end in sample_ranges(self.shape[0]):
            end = next(iter(cut_rows(self._indptr, first, end, end - first)))[1] if end > first else end
            values.append(read(self._data, int(self._indptr[first]), int(self._indptr[end])))
            lengths.append(np.diff(self._indptr[first : end + 1]))
        return Sample(np.concatenate(values), np.cumsum(np.concatenate(lengths)))

    def blocks(self, start: int, stop: int, rows: int) -> Iterator[CountBlock]:
        n_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
        buffers = BufferPool()
        executor = ThreadPoolExecutor(n_threads, thread_name_prefix="read-counts")
        pending: deque[tuple[CountBlock, list[Future[None]]]] = deque()
        try:
            for first, end in cut_rows(self._indptr, start, stop, rows):
                pending.append(self._begin(first, end, buffers, executor))
                if len(pending) > 1:
                    yield self._finish(*pending.popleft())
            while pending:
                yield self._finish(*pending.popleft())
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def _begin(
        self, first: int, end: int, pool: BufferPool, executor: ThreadPoolExecutor
    ) -> tuple[CountBlock, list[Future[None]]]:
        low, high = int(self._indptr[first]), int(self._indptr[end])
        n = high - low
        raw = (pool.take(n * self._indices.dtype.itemsize), pool.take(n * self._data.dtype.itemsize))
        indices = raw[0][: n * self._indices.dtype.itemsize].view(self._indices.dtype)
        data = raw[1][: n * self._data.dtype.itemsize].view(self._data.dtype)
        jobs = [*self._indices.jobs(low, indices), *self._data.jobs(low, data)]
        block = CountBlock(first, self._indptr[first : end + 1] - low, indices, data, False, raw, pool)
        return block, [executor.submit(job) for job in jobs]

    def _finish(self, block: CountBlock, futures: list[Future[None]]) -> CountBlock:
        for future in futures:
            future.result()
        if block.data.dtype != self.value_dtype:
            block.data = block.data.astype(self.value_dtype)
        return block


def checked_indptr(indptr: np.ndarray, n_rows: int, n_data: int, n_indices: int) -> np.ndarray:
    """`indptr` as int64, or ValueError where it does not describe `n_rows` rows of `n_data` entries."""
    if indptr.ndim != 1 or indptr.dtype.kind not in "iu" or len(indptr) != n_rows + 1:
        raise ValueError(f"indptr has shape {indptr.shape} and type {indptr.dtype}, expected {n_rows + 1} integers")
    if n_data != n_indices:
        raise ValueError(f"{n_data} values but {n_indices} column indices")
    indptr = indptr.astype(np.int64, copy=False)
    if indptr[0] != 0 or indptr[-1] != n_data or (n_rows and np.diff(indptr).min() < 0):
        raise ValueError(f"indptr does not rise from 0 to the number of values ({n_data}); the matrix is corrupt")
    return indptr


class MemoryCsr:
    """A scipy CSR matrix in memory: blocks are views, nothing is copied."""

    is_dense, is_one_pass = False, False

    def __init__(self, matrix: Any) -> None:
        self._data = matrix.data
        self._indices = matrix.indices.astype(matrix.indices.dtype.newbyteorder("="), copy=False)
        self.shape = (int(matrix.shape[0]), int(matrix.shape[1]))
        self.value_dtype = value_dtype(matrix.data.dtype)
        self._indptr = checked_indptr(matrix.indptr, self.shape[0], len(matrix.data), len(matrix.indices))

    def sample(self) -> Sample:
        values, lengths = [], [np.zeros(1, dtype=np.int64)]
        for first, end in sample_ranges(self.shape[0]):
            values.append(self._data[self._indptr[first] : self._indptr[end]])
            lengths.append(np.diff(self._indptr[first : end + 1]))
        return Sample(np.concatenate(values), np.cumsum(np.concatenate(lengths)))

    def blocks(self, start: int, stop: int, rows: int) -> Iterator[CountBlock]:
        for first, end in cut_rows(self._indptr, start, stop, rows):
            low, high = self._indptr[first], self._indptr[end]
            data = self._data[low:high].astype(self.value_dtype, copy=False)
            yield CountBlock(first, self._indptr[first : end + 1] - low, self._indices[low:high], data, is_view=True)
