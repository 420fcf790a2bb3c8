"""Where the bytes of an Arrow stream file lie: columns read by position, without mapping or reading the rest.

A mapped file's pages count as this process's memory and a record batch holds every column, so tokens are read by pread
from the places that the stream's own message headers name. The headers are flatbuffers; the few fields needed are
looked up here (Arrow columnar format, "Encapsulated message format" and Message.fbs).
"""

from __future__ import annotations

import os
import struct
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from geneformer_fast.errors import OutputError
from geneformer_fast.files.checksums import sha256_of_open

_CONTINUATION = 0xFFFFFFFF
_SCHEMA, _DICTIONARY_BATCH, _RECORD_BATCH = 1, 2, 3


@dataclass(frozen=True)
class Buffer:
    """One buffer of one column: absolute position in the file, and size in bytes."""

    position: int
    n_bytes: int


@dataclass(frozen=True)
class Batch:
    """One record batch: its rows, and per buffer where it lies."""

    n_rows: int
    null_counts: tuple[int, ...]
    buffers: tuple[Buffer, ...]


class StreamFile:
    """One Arrow stream file, indexed.

    Parameters
    ----------
    path
        The file.

    Attributes
    ----------
    schema
        Its schema.
    batches
        Its record batches in order.

    Raises
    ------
    OutputError
        The file is not an uncompressed Arrow stream, or it is truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise OutputError(f"{path}: cannot be opened: {error.strerror}") from None
        # Unlike __del__ this also runs, in order, at the interpreter's exit.
        self._close = weakref.finalize(self, os.close, self._descriptor)
        try:
            self.schema, self.batches = self._index()
        except (struct.error, IndexError, pa.ArrowException, ValueError) as error:
            self.close()
            raise OutputError(f"{path}: not a whole Arrow stream file ({error}); write the folder again") from None
        self._first_buffer, self._first_node = _layout(self.schema)

    def close(self) -> None:
        """Close the file."""
        self._close()

    @property
    def n_rows(self) -> int:
        """Rows in all batches."""
        return sum(batch.n_rows for batch in self.batches)

    def _index(self) -> tuple[pa.Schema, list[Batch]]:
        size = os.fstat(self._descriptor).st_size
        position, schema, batches = 0, None, []
        while True:
            prefix = os.pread(self._descriptor, 8, position)
            if len(prefix) < 8:
                raise ValueError("it ends before its end mark")
            marker, n_metadata = struct.unpack("<Ii", prefix)
            if marker != _CONTINUATION or n_metadata < 0:
                raise ValueError(f"byte {position} begins no message")
            if n_metadata == 0:
                break
            metadata = os.pread(self._descriptor, n_metadata, position + 8)
            body = position + 8 + n_metadata
            message = _Table.root(metadata)
            kind, header, n_body = message.u8(1), message.table(2), message.i64(3)
            if body + n_body > size:
                raise ValueError("a record batch is cut off")
            if kind == _SCHEMA:
                schema = pa.ipc.read_schema(pa.py_buffer(prefix + metadata))
            elif kind == _RECORD_BATCH:
                batches.append(_batch(header, body))
            elif kind == _DICTIONARY_BATCH:
                raise ValueError("it holds dictionary batches, which token folders do not have")
            position = body + n_body
        if schema is None:
            raise ValueError("it has no schema")
        return schema, batches

    def read(self, buffer: Buffer, start: int = 0, n_bytes: int | None = None) -> np.ndarray:
        """``n_bytes`` of a buffer from ``start`` on (None: to its end)."""
        n_bytes = buffer.n_bytes - start if n_bytes is None else n_bytes
        content = np.empty(n_bytes, dtype=np.uint8)
        self.read_into(content, buffer.position + start)
        return content

    def read_into(self, target: np.ndarray, position: int) -> None:
        """Fill ``target``, bytes, with what lies from an absolute position on."""
        done = 0
        while done < len(target):  # one call reads at most 2 GB
            n_bytes = os.preadv(self._descriptor, [target[done:].data], position + done)
            if n_bytes == 0:
                raise OutputError(f"{self.path}: it became shorter while it was read")
            done += n_bytes

    def sha256(self) -> str:
        """SHA-256 of the whole file, as hex."""
        try:
            return sha256_of_open(self._descriptor)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be read: {error.strerror or error}") from None

    def column(self, batch: Batch, name: str) -> pa.Array:
        """A column of one batch that is not nested: numbers, bool, text."""
        index = self.schema.get_field_index(name)
        field = self.schema.field(index)
        first = self._first_buffer[index]
        buffers = batch.buffers[first : first + _n_buffers(field.type)]
        nulls = batch.null_counts[self._first_node[index]]
        parts = [pa.py_buffer(self.read(buffer)) for buffer in buffers]
        return pa.Array.from_buffers(field.type, batch.n_rows, [parts[0] if nulls else None, *parts[1:]], nulls)

    def list_column(self, batch: Batch, name: str) -> tuple[np.ndarray, Buffer]:
        """Of a column of lists of numbers: the offsets [rows + 1], and the buffer that holds the numbers."""
        index = self.schema.get_field_index(name)
        kind = self.schema.field(index).type
        first = self._first_buffer[index]
        if batch.null_counts[self._first_node[index]]:
            raise OutputError(f"{self.path}: column {name} has missing values")
        width = 8 if pa.types.is_large_list(kind) else 4
        content = self.read(batch.buffers[first + 1])[: width * (batch.n_rows + 1)]
        offsets = content.view(f"<i{width}").astype(np.int64)
        return (offsets if len(offsets) else np.zeros(1, np.int64)), batch.buffers[first + 3]


def _n_buffers(kind: pa.DataType) -> int:
    """Buffers of a type in a record batch, those of its children included."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return 2 + _n_buffers(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return 3
    if pa.types.is_null(kind):
        return 0
    if pa.types.is_primitive(kind) or pa.types.is_boolean(kind):
        return 2
    raise ValueError(f"columns of type {kind} are not understood")


def _layout(schema: pa.Schema) -> tuple[list[int], list[int]]:
    """Index of the first buffer and of the first node of every field."""
    buffers, nodes = [0], [0]
    for field in schema:
        is_list = pa.types.is_list(field.type) or pa.types.is_large_list(field.type)
        buffers.append(buffers[-1] + _n_buffers(field.type))
        nodes.append(nodes[-1] + 1 + is_list)
    return buffers[:-1], nodes[:-1]


def _batch(header: _Table, body: int) -> Batch:
    if header.has(3):
        raise ValueError("it is compressed, which token folders are not")
    nodes, buffers = header.pairs(1), header.pairs(2)
    return Batch(
        header.i64(0),
        tuple(nulls for _, nulls in nodes),
        tuple(Buffer(body + offset, n_bytes) for offset, n_bytes in buffers),
    )


@dataclass(frozen=True)
class _Table:
    """A flatbuffer table: fields by slot number."""

    data: bytes
    position: int

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, struct.unpack_from("<I", data, 0)[0])

    def _field(self, slot: int) -> int:
        """Position of a field, 0 where it is absent."""
        vtable = self.position - struct.unpack_from("<i", self.data, self.position)[0]
        if 4 + 2 * slot >= struct.unpack_from("<H", self.data, vtable)[0]:
            return 0
        offset = struct.unpack_from("<H", self.data, vtable + 4 + 2 * slot)[0]
        return self.position + offset if offset else 0

    def has(self, slot: int) -> bool:
        return self._field(slot) != 0

    def u8(self, slot: int) -> int:
        position = self._field(slot)
        return self.data[position] if position else 0

    def i64(self, slot: int) -> int:
        position = self._field(slot)
        return struct.unpack_from("<q", self.data, position)[0] if position else 0

    def table(self, slot: int) -> _Table:
        position = self._field(slot)
        if not position:
            raise ValueError("a message has no header")
        return _Table(self.data, position + struct.unpack_from("<I", self.data, position)[0])

    def pairs(self, slot: int) -> list[tuple[int, int]]:
        """A vector of structs of two 64-bit integers."""
        position = self._field(slot)
        if not position:
            return []
        position += struct.unpack_from("<I", self.data, position)[0]
        n = struct.unpack_from("<I", self.data, position)[0]
        values = struct.unpack_from(f"<{2 * n}q", self.data, position + 4)
        return list(zip(values[::2], values[1::2], strict=True))
