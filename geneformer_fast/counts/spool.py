"""Matrices stored by gene or in no order, regrouped by cell through a scratch file in bounded memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np

from geneformer_fast.counts.block import MAX_ENTRIES, CountBlock, Sample, cut_rows, value_dtype
from geneformer_fast.counts.sparse import checked_indptr
from geneformer_fast.counts.vectors import Vector, read, read_exactly

# Entries regrouped at a time: about 50 MB with their sorting order.
_PIECE = MAX_ENTRIES // 4

# (rows, columns, values) of some entries, in any order
Entries = tuple[np.ndarray, np.ndarray, np.ndarray]


def csc_entries(
    data: Vector, indices: Vector, indptr: np.ndarray, shape: tuple[int, int]
) -> Callable[[], Iterator[Entries]]:
    """Entries of a compressed sparse column matrix, read in pieces of bounded size."""
    indptr = checked_indptr(indptr, shape[1], len(data), len(indices))

    def entries() -> Iterator[Entries]:
        for low in range(0, len(data), _PIECE):
            high = min(low + _PIECE, len(data))
            first = int(np.searchsorted(indptr, low, side="right")) - 1
            last = int(np.searchsorted(indptr, high, side="left"))
            edges = np.clip(indptr[first : last + 1], low, high)
            columns = np.repeat(np.arange(first, last, dtype=np.int32), np.diff(edges))
            yield read(indices, low, high), columns, read(data, low, high)

    return entries


class SpooledMatrix:
    """Cells x genes from a stream of entries.

    Entries are sorted into buckets of neighbouring cells, which a temporary file holds (in the system's folder for
    temporary files, TMPDIR) where they are more than fit into one block; then every bucket is sorted by cell.

    Parameters
    ----------
    entries
        Called once per pass, yields pieces of (rows, columns, values).
    shape
        (n_cells, n_genes).
    dtype
        Type of the stored values.
    n_entries
        How many there are.
    data
        All values as a vector where there is one, to look at a sample without a pass.
    """

    is_dense, is_one_pass = False, True

    def __init__(
        self,
        entries: Callable[[], Iterator[Entries]],
        shape: tuple[int, int],
        dtype: np.dtype,
        n_entries: int,
        data: Vector | None = None,
    ) -> None:
        self._entries = entries
        self.shape = shape
        self.value_dtype = value_dtype(np.dtype(dtype))
        self._data = data
        n_buckets = max(1, -(-n_entries // MAX_ENTRIES))
        self._rows_per_bucket = max(1, -(-shape[0] // n_buckets))

    def sample(self) -> Sample:
        if self._data is None:
            return Sample(next(self._entries())[2][:4096])
        n, part = len(self._data), 2048
        places = [(0, n)] if n <= 3 * part else [(0, part), (n // 2, n // 2 + part), (n - part, n)]
        return Sample(np.concatenate([read(self._data, low, high) for low, high in places]))

    def blocks(self, start: int, stop: int, rows: int) -> Iterator[CountBlock]:
        with tempfile.TemporaryFile(prefix="geneformer_fast_") as scratch:
            extents = self._distribute(scratch, start, stop)
            for bucket, parts in enumerate(extents):
                first = max(start, bucket * self._rows_per_bucket)
                end = min(stop, (bucket + 1) * self._rows_per_bucket)
                if first < end:
                    yield from self._bucket_blocks(self._load(scratch, parts), first, end, rows)

    def _distribute(self, scratch: IO[bytes], start: int, stop: int) -> list[list[tuple[int, int]]]:
        """Append the entries of rows start..stop to `scratch`; returns per bucket (position, count) of its pieces."""
        extents: list[list[tuple[int, int]]] = [[] for _ in range(-(-self.shape[0] // self._rows_per_bucket))]
        for rows, columns, values in self._entries():
            if len(rows) == 0:
                continue
            if int(rows.min()) < 0 or int(rows.max()) >= self.shape[0]:
                raise ValueError(f"row index outside 0..{self.shape[0] - 1}; the matrix is corrupt")
            if int(columns.min()) < 0 or int(columns.max()) >= self.shape[1]:
                raise ValueError(f"column index outside 0..{self.shape[1] - 1}; the matrix is corrupt")
            bucket = rows // self._rows_per_bucket
            if len(extents) <= 2**16:
                bucket = bucket.astype(np.uint16)  # numpy's stable sort is a radix sort for 16 bits
            order = np.argsort(bucket, kind="stable") if len(extents) > 1 else slice(None)
            bucket, rows, columns, values = bucket[order], rows[order], columns[order], values[order]
            edges = np.searchsorted(bucket, np.arange(len(extents) + 1))
            for b in np.flatnonzero(np.diff(edges)):
                if (b + 1) * self._rows_per_bucket <= start or b * self._rows_per_bucket >= stop:
                    continue
                part = slice(int(edges[b]), int(edges[b + 1]))
                extents[b].append((scratch.tell(), part.stop - part.start))
                scratch.write(np.ascontiguousarray(rows[part], dtype=np.int32).data)
                scratch.write(np.ascontiguousarray(columns[part], dtype=np.int32).data)
                scratch.write(np.ascontiguousarray(values[part], dtype=self.value_dtype).data)
        scratch.flush()
        return extents

    def _load(self, scratch: IO[bytes], parts: list[tuple[int, int]]) -> Entries:
        total = sum(count for _, count in parts)
        rows, columns = np.empty(total, dtype=np.int32), np.empty(total, dtype=np.int32)
        values = np.empty(total, dtype=self.value_dtype)
        done = 0
        for position, count in parts:
            for out in (rows, columns, values):
                piece = out[done : done + count]
                read_exactly(scratch.fileno(), piece.data.cast("B"), position)
                position += piece.nbytes
            done += count
        return rows, columns, values

    def _bucket_blocks(self, entries: Entries, first: int, end: int, rows: int) -> Iterator[CountBlock]:
        from geneformer_fast.counts import loops

        if first % self._rows_per_bucket or (end % self._rows_per_bucket and end != self.shape[0]):
            wanted = (entries[0] >= first) & (entries[0] < end)
            entries = (entries[0][wanted], entries[1][wanted], entries[2][wanted])
        indptr = np.empty(end - first + 1, dtype=np.int64)
        columns, values = np.empty_like(entries[1]), np.empty_like(entries[2])
        loops.group_by_row(*entries, first, indptr, columns, values)
        for low, high in cut_rows(indptr, 0, end - first, rows):
            part = slice(int(indptr[low]), int(indptr[high]))
            yield CountBlock(first + low, indptr[low : high + 1] - indptr[low], columns[part], values[part])
