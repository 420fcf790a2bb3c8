"""One-dimensional arrays of a file, read piece by piece into memory the caller owns.

HDF5 keeps one global lock, so whatever can be read without the library is: a contiguous dataset is a range of the
file, and a gzip chunk is a range of the file that zlib can inflate outside Python's lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from geneformer_fast.counts.hdf5_storage import OwnBytes
from geneformer_fast.counts.inflate import inflated
from geneformer_fast.counts.stored import readable

Job = Callable[[], None]

# Chunks of a few kilobytes are inflated in groups, so that handing out work costs nothing beside doing it.
_GROUP_BYTES = 1 << 19
_GZIP, _SHUFFLE, _FLETCHER32 = 1, 2, 3
_CACHED_CHUNKS = 4


class Vector(Protocol):
    """A typed array on disk. `jobs` returns independent pieces of work that together fill `out`."""

    dtype: np.dtype

    def __len__(self) -> int: ...

    def jobs(self, start: int, out: np.ndarray) -> list[Job]:
        """Work that fills `out` with the values from `start` on."""


def read(vector: Vector, start: int, stop: int) -> np.ndarray:
    """Values `start` to `stop` of a vector in a new array."""
    out = np.empty(stop - start, dtype=vector.dtype)
    for job in vector.jobs(start, out):
        job()
    return out


class SlicedVector:
    """Anything that has `shape`, `dtype` and slices (h5py, zarr), read through its own library."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.dtype = np.dtype(array.dtype).newbyteorder("=")

    def __len__(self) -> int:
        return int(self._array.shape[0])

    def jobs(self, start: int, out: np.ndarray) -> list[Job]:
        def job() -> None:
            out[:] = self._array[start : start + len(out)]

        return [job] if len(out) else []


class ContiguousVector:
    """A dataset that lies in the file as it is: read with pread, straight into the caller's memory."""

    def __init__(self, fd: int, offset: int, dtype: np.dtype, length: int) -> None:
        self._fd = fd
        self._offset = offset
        self._length = length
        self.dtype = dtype

    def __len__(self) -> int:
        return self._length

    def jobs(self, start: int, out: np.ndarray) -> list[Job]:
        view = out.data.cast("B") if len(out) else None
        position = self._offset + start * self.dtype.itemsize

        def job() -> None:
            read_exactly(self._fd, view, position)

        return [job] if view is not None else []


def read_exactly(fd: int, view: memoryview | None, position: int) -> None:
    """Fill `view` from the file, or raise EOFError where the file is shorter."""
    while view:
        n = os.preadv(fd, [view], position)
        if n == 0:
            raise EOFError("the file ends in the middle of its data; it is truncated")
        view = view[n:]
        position += n


class ChunkedVector:
    """A dataset of gzip (and shuffle) chunks, inflated with zlib."""

    def __init__(self, fd: int, dataset: Any, filters: tuple[int, ...]) -> None:
        self._fd = fd
        self._length = int(dataset.shape[0])
        self.dtype = dataset.dtype
        self._chunk = int(dataset.chunks[0])
        self._filters = filters
        n_chunks = -(-self._length // self._chunk)
        self._offsets = np.zeros(n_chunks, dtype=np.int64)
        self._sizes = np.zeros(n_chunks, dtype=np.int64)
        self._skipped = np.zeros(n_chunks, dtype=np.uint32)
        dataset.id.chunk_iter(self._note_chunk)
        self._lock = threading.Lock()
        self._cache: dict[int, np.ndarray] = {}

    def _note_chunk(self, info: Any) -> None:
        i = info.chunk_offset[0] // self._chunk
        if i < len(self._offsets):
            self._offsets[i] = info.byte_offset
            self._sizes[i] = info.size
            self._skipped[i] = info.filter_mask

    def __len__(self) -> int:
        return self._length

    def jobs(self, start: int, out: np.ndarray) -> list[Job]:
        stop = start + len(out)
        if start == stop:
            return []
        per_job = max(1, _GROUP_BYTES // (self._chunk * self.dtype.itemsize))
        first, last = start // self._chunk, (stop - 1) // self._chunk
        return [
            self._job(range(i, min(i + per_job, last + 1)), start, stop, out) for i in range(first, last + 1, per_job)
        ]

    def _job(self, chunks: range, start: int, stop: int, out: np.ndarray) -> Job:
        def job() -> None:
            for i in chunks:
                begin = i * self._chunk
                low, high = max(start, begin), min(stop, begin + self._chunk)
                # a chunk cut by the range is needed again by the next range
                values = self._cut_chunk(i) if high - low < self._chunk else self._inflate(i)
                out[low - start : high - start] = values[low - begin : high - begin]

        return job

    def _cut_chunk(self, i: int) -> np.ndarray:
        with self._lock:
            values = self._cache.get(i)
        if values is None:
            values = self._inflate(i)
            with self._lock:
                while len(self._cache) >= _CACHED_CHUNKS:
                    del self._cache[next(iter(self._cache))]
                self._cache[i] = values
        return values

    def _inflate(self, i: int) -> np.ndarray:
        size = int(self._sizes[i])
        if size == 0:
            raise ValueError(f"chunk {i} is not in the file; the file is corrupt")
        n_bytes = self._chunk * self.dtype.itemsize
        if size > 2 * n_bytes + 1024:
            raise ValueError(f"chunk {i} claims {size} bytes for {n_bytes} bytes of values; the file is corrupt")
        raw = os.pread(self._fd, size, int(self._offsets[i]))
        if len(raw) != size:
            raise EOFError("the file ends in the middle of its data; it is truncated")
        skipped = int(self._skipped[i])
        shuffled = False
        # filters were applied in order, so they are undone backwards; a set bit says the filter was left out
        for position in range(len(self._filters) - 1, -1, -1):
            if skipped >> position & 1:
                continue
            if self._filters[position] == _GZIP:
                raw = inflated(raw, n_bytes)
            elif self._filters[position] == _SHUFFLE:
                shuffled = True
        if len(raw) != n_bytes:
            raise ValueError(f"chunk {i} has {len(raw)} bytes, expected {n_bytes}; the file is corrupt")
        if not shuffled:
            return np.frombuffer(raw, dtype=self.dtype)
        planes = np.frombuffer(raw, dtype=np.uint8).reshape(self.dtype.itemsize, self._chunk)
        return np.ascontiguousarray(planes.T).reshape(-1).view(self.dtype)


def hdf5_vector(dataset: Any, own: OwnBytes | None) -> Vector:
    """The fastest reader for a one-dimensional HDF5 dataset; ``own`` are the bytes of the opened file.

    Without it, and for what does not lie in that file (links, virtual data sets), everything goes through h5py.
    """
    dataset = readable(dataset)
    if len(dataset.shape) != 1:
        raise ValueError(f"{dataset.name} has shape {tuple(dataset.shape)}, expected one dimension")
    if own is None or not dataset.dtype.isnative or dataset.dtype.kind not in "iuf" or not own.hold(dataset):
        return SlicedVector(dataset)
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        return (
            SlicedVector(dataset) if offset is None else ContiguousVector(own.fd, offset, dataset.dtype, len(dataset))
        )
    properties = dataset.id.get_create_plist()
    filters = tuple(properties.get_filter(i)[0] for i in range(properties.get_nfilters()))
    if all(code in (_GZIP, _SHUFFLE) for code in filters) and hasattr(dataset.id, "chunk_iter"):
        return ChunkedVector(own.fd, dataset, filters)
    return SlicedVector(dataset)
