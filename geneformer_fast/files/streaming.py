"""Safetensors files that are read and written piece by piece, so that no more than a piece is in memory.

The library maps a file, whose pages then count as this process's memory, and writes all tensors at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from geneformer_fast.errors import GeneformerFastError
from geneformer_fast.files.tensors import not_readable

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
#: What one piece holds at most, unless a single row is longer. Whoever converts one has several copies of it for a
#: while, and the C library keeps what large ones leave behind: with 8 MB Geneformer V2-104M took 130 MB more.
PIECE_BYTES = 2 << 20


def pieces(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """First row and end of pieces of :data:`PIECE_BYTES`; a tensor without axes is one row."""
    n_rows = len(tensor) if tensor.ndim else 1
    row_bytes = max(1, tensor.numel() // max(1, n_rows) * tensor.itemsize)
    step = max(1, PIECE_BYTES // row_bytes)
    for start in range(0, n_rows, step):
        yield start, min(n_rows, start + step)


class TensorFile:
    """A safetensors file of which tensors, or rows of them, are read when they are asked for.

    Parameters
    ----------
    path
        The file. It is opened for every read.
    error, advice
        What to raise, and what to say at its end, where the file is damaged.

    Raises
    ------
    GeneformerFastError
        Of the class ``error``: the file is absent, damaged, or something else than safetensors.
    """

    def __init__(self, path: Path, error: type[GeneformerFastError], advice: str) -> None:
        from safetensors import SafetensorError, safe_open

        self.path, self._error, self._advice = path, error, advice
        try:
            with safe_open(path, framework="pt") as file:  # it holds the header against the file's size
                self.metadata: dict[str, str] = dict(file.metadata() or {})
            with open(path, "rb") as plain:
                length = int.from_bytes(plain.read(8), "little")
                header = json.loads(plain.read(length))
        except (SafetensorError, OSError, ValueError, KeyError) as reason:
            raise not_readable(path, reason, error, advice) from None
        header.pop("__metadata__", None)
        self._starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
        #: Every tensor on the meta device: its shape and dtype.
        self.described = {name: self._describe(name, entry) for name, entry in header.items()}

    def _describe(self, name: str, entry: Mapping[str, Any]) -> torch.Tensor:
        if entry["dtype"] not in _DTYPES:
            raise self._error(f"{self.path}: tensor {name!r} holds {entry['dtype']}, which nothing here reads")
        return torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """A tensor, or its rows from ``start`` to ``stop``, in memory of their own."""
        described = self.described[name]
        if described.ndim:
            stop = len(described) if stop is None else min(stop, len(described))
            shape = (stop - start, *described.shape[1:])
        else:
            start, shape = 0, ()
        tensor = torch.empty(shape, dtype=described.dtype)
        self.read_into(name, tensor, start)
        return tensor

    def read_into(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Fill a contiguous tensor with as many rows from ``start`` on."""
        described = self.described[name]
        row_bytes = described.numel() // len(described) * described.itemsize if start else 0
        memory, position = _bytes_of(tensor), self._starts[name] + start * row_bytes
        try:
            with open(self.path, "rb", buffering=0) as file:
                while memory:
                    n_read = os.preadv(file.fileno(), [memory], position)
                    if not n_read:
                        raise self._error(f"{self.path} ends within tensor {name!r}; {self._advice}")
                    memory, position = memory[n_read:], position + n_read
        except OSError as reason:
            raise not_readable(self.path, reason, self._error, self._advice) from None


class TensorWriter:
    """Writes a safetensors file whose tensors come in pieces, in any order.

    Use it as a context manager: it ends with an error where something was not written.

    Parameters
    ----------
    path
        A temporary name; the file is whole when the context ends.
    described
        Name to a tensor of its shape and dtype, which may be on the meta device.
    metadata
        Text that goes into the header.
    """

    def __init__(
        self, path: Path, described: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        # Long numbers come first, as the library has it: then all of them are aligned.
        order = sorted(described, key=lambda name: (-described[name].itemsize, name))
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        position, self._described, self._starts = 0, dict(described), {}
        for name in order:
            tensor = described[name]
            n_bytes = tensor.numel() * tensor.itemsize
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, position + n_bytes],
            }
            self._starts[name], position = position, position + n_bytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._beginning = len(text).to_bytes(8, "little") + text
        self._missing = {name: described[name].numel() for name in order if described[name].numel()}
        self._path, self._n_bytes, self._descriptor = path, position, -1

    def __enter__(self) -> TensorWriter:
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._write(memoryview(self._beginning), 0)
        os.ftruncate(self._descriptor, len(self._beginning) + self._n_bytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        if kind is None and self._missing:
            raise AssertionError(f"nobody wrote all of {next(iter(self._missing))!r}")

    def write(self, name: str, rows: torch.Tensor, start: int = 0) -> None:
        """Put rows in their place: the tensor's from ``start`` on."""
        described = self._described[name]
        if rows.dtype != described.dtype or rows.shape[1:] != described.shape[1:]:
            raise AssertionError(f"{name!r} is {described.dtype} {[*described.shape]}")
        row_bytes = described.numel() // len(described) * described.itemsize if start else 0
        place = len(self._beginning) + self._starts[name] + start * row_bytes
        self._write(_bytes_of(rows.detach().cpu().contiguous()), place)
        left = self._missing.pop(name, 0) - rows.numel()
        if left:
            self._missing[name] = left

    def _write(self, memory: memoryview, position: int) -> None:
        while memory:
            n_written = os.pwrite(self._descriptor, memory, position)
            memory, position = memory[n_written:], position + n_written


def write_pieces(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors one by one, so that none is copied but for being brought from a card; ``path`` is temporary."""
    with TensorWriter(path, tensors, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
