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
# What pyarrow and numpy raise on damaged content; an OSError is how Arrow calls an invalid flatbuffer.
_DAMAGE = (pa.ArrowException, ValueError, OSError, IndexError, OverflowError, MemoryError)


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
        except (*_DAMAGE, struct.error, TypeError) as error:
            self.close()
            raise OutputError(f"{path}: not a whole Arrow stream file ({error}); write the folder again") from None

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
            body = position + 8 + n_metadata
            if body > size:
                raise ValueError("it ends in the middle of a message")
            metadata = os.pread(self._descriptor, n_metadata, position + 8)
            message = _Table.root(metadata)
            kind, header, n_body = message.u8(1), message.table(2), message.i64(3)
            if not 0 <= n_body <= size - body:
                raise ValueError("a record batch is cut off")
            if kind == _SCHEMA and schema is None:
                if header.u8(0):
                    raise ValueError("its numbers are big-endian")
                schema = pa.ipc.read_schema(pa.py_buffer(prefix + metadata))
                self._first_buffer, self._first_node = _layout(schema)
            elif kind == _RECORD_BATCH and schema is not None:
                batches.append(self._batch(header, body, n_body))
            elif kind == _DICTIONARY_BATCH:
                raise ValueError("it holds dictionary batches, which token folders do not have")
            else:
                raise ValueError(f"byte {position} begins a message that does not belong there")
            position = body + n_body
        if schema is None:
            raise ValueError("it has no schema")
        return schema, batches

    def _batch(self, header: _Table, body: int, n_body: int) -> Batch:
        """A record batch whose buffers lie inside its body, and whose columns are as many and as long as it says."""
        if header.has(3):
            raise ValueError("it is compressed, which token folders are not")
        n_rows, nodes, buffers = header.i64(0), header.pairs(1), header.pairs(2)
        if len(nodes) != self._first_node[-1] or len(buffers) != self._first_buffer[-1]:
            raise ValueError("a record batch has other columns than the schema")
        if n_rows < 0 or any(nodes[first][0] != n_rows for first in self._first_node[:-1]):
            raise ValueError("a record batch has columns of different lengths")
        if not all(0 <= nulls <= length for length, nulls in nodes):
            raise ValueError("a record batch misses more values than it has")
        if not all(0 <= offset <= n_body and 0 <= n_bytes <= n_body - offset for offset, n_bytes in buffers):
            raise ValueError("a record batch names bytes that are not its own")
        places = tuple(Buffer(body + offset, n_bytes) for offset, n_bytes in buffers)
        return Batch(n_rows, tuple(nulls for _, nulls in nodes), places)

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
        """A column of one batch that is not nested: numbers, bool, text.

        Raises
        ------
        OutputError
            What is stored is no such column: offsets that lead elsewhere, text that is no UTF-8, too few values.
        """
        index = self.schema.get_field_index(name)
        kind = self.schema.field(index).type
        if pa.types.is_null(kind):
            return pa.nulls(batch.n_rows)
        if pa.types.is_nested(kind):
            raise OutputError(f"{self.path}: column {name} holds {kind}, not one value per cell")
        first = self._first_buffer[index]
        buffers = batch.buffers[first : first + _n_buffers(kind)]
        nulls = batch.null_counts[self._first_node[index]]
        parts = [pa.py_buffer(self.read(buffer)) for buffer in buffers]
        try:
            array = pa.Array.from_buffers(kind, batch.n_rows, [parts[0] if nulls else None, *parts[1:]], nulls)
            array.validate(full=True)
        except _DAMAGE as error:
            raise OutputError(f"{self.path}: column {name} is damaged ({error}); write the folder again") from None
        return array

    def list_column(self, batch: Batch, name: str) -> tuple[np.ndarray, Buffer]:
        """Of a column of lists of numbers: the offsets [rows + 1], and the buffer that holds the numbers.

        Raises
        ------
        OutputError
            Values are missing, or the offsets do not rise inside of the buffer.
        """
        index = self.schema.get_field_index(name)
        kind = self.schema.field(index).type
        first, node = self._first_buffer[index], self._first_node[index]
        if batch.null_counts[node] or batch.null_counts[node + 1]:
            raise OutputError(f"{self.path}: column {name} has missing values")
        width = 8 if pa.types.is_large_list(kind) else 4
        stored, values = batch.buffers[first + 1], batch.buffers[first + 3]
        if batch.n_rows == 0:
            return np.zeros(1, np.int64), values
        damaged = OutputError(f"{self.path}: the offsets of column {name} are damaged; write the folder again")
        if stored.n_bytes < width * (batch.n_rows + 1):
            raise damaged
        content = self.read(stored, n_bytes=width * (batch.n_rows + 1))
        offsets = content.view(f"<i{width}").astype(np.int64)
        n_values = values.n_bytes // (kind.value_type.bit_width // 8)
        if not 0 <= offsets[0] <= offsets[-1] <= n_values or (offsets[1:] < offsets[:-1]).any():
            raise damaged
        return offsets, values


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


def _n_nodes(kind: pa.DataType) -> int:
    """Entries of a type in a record batch's list of lengths, those of its children included."""
    return 1 + _n_nodes(kind.value_type) if pa.types.is_list(kind) or pa.types.is_large_list(kind) else 1


def _layout(schema: pa.Schema) -> tuple[list[int], list[int]]:
    """Index of the first buffer and of the first node of every field, and how many there are of both."""
    if len(set(schema.names)) != len(schema.names):
        raise ValueError("two of its columns have the same name")
    buffers, nodes = [0], [0]
    for field in schema:
        buffers.append(buffers[-1] + _n_buffers(field.type))
        nodes.append(nodes[-1] + _n_nodes(field.type))
    return buffers, nodes


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
        if n > len(self.data) // 16:
            raise ValueError("a list in its messages is longer than they are")
        values = struct.unpack_from(f"<{2 * n}q", self.data, position + 4)
        return list(zip(values[::2], values[1::2], strict=True))
