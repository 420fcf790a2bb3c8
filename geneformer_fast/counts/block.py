"""Row blocks of counts, and what every kind of count matrix has to offer to be read as such."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

# Bounds a block whatever the number of genes per cell: 4 M entries are 32 MB of float32 counts and int32 indices.
MAX_ENTRIES = 4_000_000


@dataclass
class CountBlock:
    """Consecutive cells of one source in compressed sparse row form.

    Attributes
    ----------
    start
        Row of the first cell in the source.
    indptr
        int64 [n_cells + 1], starts at 0.
    indices
        int32 [n_entries], columns as stored, not necessarily sorted, never twice within a cell.
    data
        [n_entries] in the source's `value_dtype`. Stored zeros of sparse files are kept.
    is_view
        Whether the arrays belong to a matrix in memory, so that nobody may write to them.
    """

    start: int
    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    is_view: bool = False
    _buffers: tuple[np.ndarray, ...] = field(default=(), repr=False)
    _pool: BufferPool | None = field(default=None, repr=False)

    @property
    def n_cells(self) -> int:
        """Number of cells in the block."""
        return len(self.indptr) - 1

    def release(self) -> None:
        """Hand the memory back for the next block. Optional; after it `indices` and `data` must not be used."""
        if self._pool is not None:
            self._pool.give(self._buffers)
            self._pool = None
        self._buffers = ()


class BufferPool:
    """Keeps a few buffers for reuse: fresh pages cost as much time as reading a block from the page cache."""

    def __init__(self, keep: int = 8) -> None:
        self._free: list[np.ndarray] = []
        self._keep = keep
        self._lock = threading.Lock()

    def take(self, n_bytes: int) -> np.ndarray:
        """A uint8 buffer of at least `n_bytes`."""
        with self._lock:
            for i, buffer in enumerate(self._free):
                if len(buffer) >= n_bytes:
                    return self._free.pop(i)
        return np.empty(max(n_bytes, 1), dtype=np.uint8)

    def give(self, buffers: tuple[np.ndarray, ...]) -> None:
        """Take buffers back."""
        with self._lock:
            self._free.extend(buffers)
            del self._free[: -self._keep]


@dataclass
class Sample:
    """A few stored values of a matrix, to tell counts from other things; `indptr` where whole cells are known."""

    values: np.ndarray
    indptr: np.ndarray | None = None


class CountMatrix(Protocol):
    """Cells x genes, readable in row blocks.

    Attributes
    ----------
    is_one_pass
        Whether any rows, however few, cost a pass over all entries.
    """

    shape: tuple[int, int]
    value_dtype: np.dtype
    is_dense: bool
    is_one_pass: bool

    def sample(self) -> Sample:
        """Values from the beginning, the middle and the end."""

    def blocks(self, start: int, stop: int, rows: int) -> Iterator[CountBlock]:
        """Unchecked row blocks in order, at most `rows` cells and about MAX_ENTRIES entries each."""


def value_dtype(stored: np.dtype) -> np.dtype:
    """The native type in which values of a stored type are handed out.

    Raises
    ------
    TypeError
        The stored type is not a real number.
    """
    if stored.kind == "b":
        return np.dtype(np.uint8)
    if stored.kind == "f" and stored.itemsize == 2:
        return np.dtype(np.float32)
    if stored.kind in "iuf" and stored.itemsize <= 8:
        return stored.newbyteorder("=")
    raise TypeError(f"values of type {stored} are not counts; expected integers or floats")


def cut_rows(indptr: np.ndarray, start: int, stop: int, rows: int) -> Iterator[tuple[int, int]]:
    """Consecutive (first, end) row ranges with at most `rows` rows and MAX_ENTRIES entries, at least one row each."""
    first = start
    while first < stop:
        limit = int(np.searchsorted(indptr, indptr[first] + MAX_ENTRIES, side="right")) - 1
        end = min(stop, first + rows, max(limit, first + 1))
        yield first, end
        first = end


def sample_ranges(n_rows: int, rows: int = 32) -> list[tuple[int, int]]:
    """Row ranges at the beginning, in the middle and at the end, without overlap."""
    if n_rows <= 3 * rows:
        return [(0, n_rows)]
    middle = n_rows // 2
    return [(0, rows), (middle, middle + rows), (n_rows - rows, n_rows)]
