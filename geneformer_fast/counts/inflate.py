"""Compressed chunks, inflated to no more than is asked for: a few bytes may claim, or inflate to, any size."""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

COMPRESSORS = frozenset(("zlib", "gzip", "bz2", "lzma", "zstd", "lz4", "blosc"))

_LZMA_MEMORY = 256 << 20
# Writers make one; what is left is copied after each, which takes quadratic time.
_MAX_MEMBERS = 1000
_ZSTD_MAGIC = 0xFD2FB528


def inflated(raw: Any, n_bytes: int) -> bytes:
    """A zlib stream of at most ``n_bytes``.

    Raises
    ------
    ValueError
        It holds more, or ends too early.
    """
    stream = zlib.decompressobj()
    content = stream.decompress(raw, n_bytes + 1)
    if len(content) > n_bytes or not stream.eof:
        raise ValueError(f"a compressed chunk does not end within its {n_bytes} bytes; the file is corrupt")
    return content


def bounded(name: str, raw: Any, limit: int, decode: Callable[[Any], Any] | None) -> Any:
    """Decode what one of :data:`COMPRESSORS` wrote, if that is at most ``limit`` bytes.

    Parameters
    ----------
    name
        The compressor, as numcodecs calls it.
    raw
        The compressed bytes.
    limit
        Most bytes that may come out.
    decode
        What decodes the formats whose header says their size, after that was compared; None hands back None for them.

    Raises
    ------
    ValueError
        More would come out, or the content is damaged.
    """
    raw = np.ascontiguousarray(raw).view(np.uint8).data
    if name == "zlib":
        return inflated(raw, limit)
    if name == "gzip":
        return _members(raw, limit, lambda: zlib.decompressobj(wbits=31))
    if name == "bz2":
        return _members(raw, limit, bz2.BZ2Decompressor)
    if name == "lzma":
        return _members(raw, limit, lambda: lzma.LZMADecompressor(memlimit=_LZMA_MEMORY))
    claimed = {"blosc": _blosc_size, "lz4": _lz4_size, "zstd": _zstd_size}[name](raw)
    if claimed is None:
        return _zstd_stream(raw, limit)
    if claimed > limit:
        raise _too_large(limit, claimed)
    return decode(raw) if decode is not None else None


def _too_large(limit: int, claimed: int | None = None) -> ValueError:
    more = "more" if claimed is None else f"{claimed} bytes"
    return ValueError(f"a compressed chunk for {limit} bytes of values holds {more}; the store is corrupt")


def _members(raw: memoryview, limit: int, make: Callable[[], Any]) -> bytes:
    """Concatenated streams, as gzip, bz2 and xz allow them."""
    parts: list[bytes] = []
    n_bytes = 0
    rest: bytes | memoryview = raw
    while len(rest):
        if len(parts) == _MAX_MEMBERS:
            raise ValueError(f"a compressed chunk has more than {_MAX_MEMBERS} streams; the store is corrupt")
        stream = make()
        try:
            part = stream.decompress(rest, limit + 1 - n_bytes)
        except lzma.LZMAError as error:
            raise ValueError(f"a compressed chunk is damaged ({error})") from None
        n_bytes += len(part)
        if n_bytes > limit:
            raise _too_large(limit)
        if not stream.eof:
            raise ValueError("a compressed chunk ends too early")
        parts.append(part)
        rest = stream.unused_data.lstrip(b"\0")
    return b"".join(parts)


def _blosc_size(raw: memoryview) -> int:
    return struct.unpack_from("<I", raw, 4)[0]


def _lz4_size(raw: memoryview) -> int:
    return struct.unpack_from("<I", raw, 0)[0]


def _zstd_size(raw: memoryview) -> int | None:
    """Content size of a Zstandard frame (RFC 8878, section 3.1.1.1), None where its header does not say."""
    magic, descriptor = struct.unpack_from("<IB", raw, 0)
    if magic != _ZSTD_MAGIC:
        raise ValueError("a chunk said to be compressed with zstd is not")
    is_single = descriptor >> 5 & 1
    code = descriptor >> 6
    if code == 0 and not is_single:
        return None
    position = 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3]
    size = struct.unpack_from(("<B", "<H", "<I", "<Q")[code], raw, position)[0]
    return size + 256 if code == 1 else size


def _zstd_stream(raw: memoryview, limit: int) -> bytes:
    import pyarrow as pa

    try:
        with pa.CompressedInputStream(pa.BufferReader(pa.py_buffer(raw)), "zstd") as stream:
            content = stream.read(limit + 1)
    except pa.ArrowException as error:
        raise ValueError(f"a compressed chunk is damaged ({error})") from None
    if len(content) > limit:
        raise _too_large(limit)
    return content
