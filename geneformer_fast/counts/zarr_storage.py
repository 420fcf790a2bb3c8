"""What must hold of a zarr array before its values are read: known codecs, bounded chunks, and all of them there.

A store chooses its codecs by name, and among those a library knows may be one that executes what it decodes (the
``pickle`` of numcodecs). So they are compared with a list before the first chunk is read, and those that inflate are
held to the size that the array's shape and type give a chunk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.abc import Codec
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import vlen_utf8

from geneformer_fast.counts.inflate import COMPRESSORS, bounded
from geneformer_fast.errors import InputError

# Names in format 2 (and, after "numcodecs.", in format 3) that turn bytes into plain values and nothing else.
_FILTERS = frozenset(
    (
        *("vlen-utf8", "vlen-bytes", "delta", "shuffle", "packbits", "astype", "fixedscaleoffset", "quantize"),
        *("bitround", "crc32", "crc32c", "adler32", "fletcher32", "jenkins_lookup3"),
    )
)
_TEXTS = frozenset(("vlen-utf8", "vlen-bytes"))
_FORMAT_3 = frozenset(("bytes", "transpose", "gzip", "zstd", "blosc", "crc32c"))
_SHARDING = "sharding_indexed"
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")
# A chunk of texts says how many, not how long: 64 MB, and as much again per 16 Ki of them.
_TEXT_BYTES, _BYTES_PER_TEXT = 64 << 20, 4096
# Chunks may be larger than a small array, which later grows into them.
_LARGE_CHUNK = 256 << 20
# What checksums and filters of fixed size may add.
_SLACK = 1024


def checked_array(array: Any) -> Any:
    """A zarr array whose codecs are known, and whose chunks inflate to no more than they may.

    Raises
    ------
    InputError
        A codec that is not on the list; it is not run.
    """
    import zarr

    metadata = array.metadata
    where = f"{store_name(array)}: {array.path}"
    dtype = _native(metadata.dtype)
    chunk, whole = _limit(array.chunks, dtype), _limit(array.shape, dtype)
    if chunk > max(_LARGE_CHUNK, 4 * whole):
        raise ValueError(f"{array.path} has chunks of {chunk} bytes for an array of {whole}; the store is corrupt")
    if metadata.zarr_format == 2:
        for codec in (*(metadata.filters or ()), metadata.compressor):
            if codec is not None:
                _check_name(codec.codec_id, where, _FILTERS | COMPRESSORS)
        compressor, filters, n = metadata.compressor, metadata.filters or (), int(np.prod(array.chunks, dtype=object))
        limit = max(chunk, 8 * n) + _SLACK if filters else chunk  # filters may widen numbers
        compressor = None if compressor is None else _Limited(compressor, limit)
        filters = [_CountedTexts(codec, n) if codec.codec_id in _TEXTS else codec for codec in filters]
        limited = replace(metadata, compressor=compressor, filters=filters or None)
    else:
        limited = replace(metadata, codecs=_limited_codecs(metadata.codecs, where))
    inner = getattr(array, "async_array", None) or array._async_array
    config = getattr(inner, "config", None) or inner._config
    return zarr.Array(type(inner)(metadata=limited, store_path=inner.store_path, config=config))


def store_name(array: Any) -> str:
    """The folder of an array's store, or what else it is."""
    store = array.store_path.store
    return str(getattr(store, "root", store))


def _native(dtype: Any) -> np.dtype:
    return dtype.to_native_dtype() if hasattr(dtype, "to_native_dtype") else np.dtype(dtype)


def _limit(shape: Iterable[int], dtype: np.dtype) -> int:
    n = int(np.prod(tuple(shape), dtype=object))
    return _TEXT_BYTES + _BYTES_PER_TEXT * n if dtype.kind in "OT" else n * dtype.itemsize


def _check_name(name: str, where: str, allowed: Iterable[str]) -> None:
    if name not in allowed:
        raise InputError(
            f"{where}: is stored with the codec {name!r}, which is not among those that are read here, since a codec "
            "can execute code. Get the data from its source as .h5ad, or write it again with zstd or blosc compression"
        )


def _limited_codecs(codecs: Iterable[Any], where: str) -> list[Any]:
    """Codecs of format 3, those that inflate with a limit, also inside shards."""
    limited = []
    for codec in codecs:
        described = codec.to_dict()
        name = str(described["name"])
        if name == _SHARDING:
            _limited_codecs(codec.index_codecs, where)
            limited.append(
                type(codec)(
                    chunk_shape=codec.chunk_shape,
                    codecs=_limited_codecs(codec.codecs, where),
                    index_codecs=codec.index_codecs,
                    index_location=codec.index_location,
                )
            )
            continue
        if name in _TEXTS:
            limited.append(VLenUTF8Codec() if name == "vlen-utf8" else VLenBytesCodec())
            continue
        plain = name.removeprefix("numcodecs.")
        _check_name(name, where, _FORMAT_3 if plain == name else (f"numcodecs.{x}" for x in _FILTERS | COMPRESSORS))
        limited.append(_LimitedCodec(codec, plain) if plain in COMPRESSORS else codec)
    return limited


class _Limited(Codec):
    """A compressor of format 2 that refuses to inflate to more than a chunk."""

    codec_id = "limited"

    def __init__(self, codec: Any, limit: int) -> None:
        self._codec = codec
        self._limit = limit

    def decode(self, buf: Any, out: Any = None) -> Any:
        return bounded(self._codec.codec_id, buf, self._limit, self._codec.decode)

    def encode(self, buf: Any) -> Any:
        return self._codec.encode(buf)

    def get_config(self) -> dict[str, Any]:
        return self._codec.get_config()


@dataclass(frozen=True)
class _LimitedCodec(BytesBytesCodec):
    """The same in format 3, where a codec is told the shape and type of the chunk it decodes."""

    inner: Any
    name: str
    is_fixed_size = False

    def to_dict(self) -> dict[str, Any]:
        return self.inner.to_dict()

    def evolve_from_array_spec(self, array_spec: Any) -> _LimitedCodec:
        return replace(self, inner=self.inner.evolve_from_array_spec(array_spec))

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        return self.inner.compute_encoded_size(input_byte_length, chunk_spec)

    async def _encode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return await self.inner._encode_single(chunk_bytes, chunk_spec)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        limit = _limit(chunk_spec.shape, _native(chunk_spec.dtype)) + _SLACK
        content = bounded(self.name, chunk_bytes.as_numpy_array(), limit, None)
        if content is not None:
            return chunk_spec.prototype.buffer.from_bytes(content)
        return await self.inner._decode_single(chunk_bytes, chunk_spec)


def _check_count(raw: Any, most: int) -> None:
    """Compare the number of texts that a chunk announces, whose places are made first, with what it may hold."""
    head = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)[:4]
    if len(head) == 4 and (n := int(head.view("<u4")[0])) > most:
        raise ValueError(f"a chunk of {most} texts announces {n}; the store is corrupt")


class _CountedTexts(Codec):
    """What decodes texts in format 2, of no more texts than a chunk has."""

    codec_id = "vlen-utf8"

    def __init__(self, codec: Any, most: int) -> None:
        self.codec_id = codec.codec_id
        self._codec = codec
        self._most = most

    def decode(self, buf: Any, out: Any = None) -> Any:
        _check_count(buf, self._most)
        return self._codec.decode(buf, out)

    def encode(self, buf: Any) -> Any:
        return self._codec.encode(buf)

    def get_config(self) -> dict[str, Any]:
        return self._codec.get_config()


class VLenUTF8Codec(vlen_utf8.VLenUTF8Codec):
    """The same in format 3, under the name by which zarr knows what decodes texts."""

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        _check_count(chunk_bytes.as_numpy_array(), int(np.prod(chunk_spec.shape, dtype=object)))
        return await super()._decode_single(chunk_bytes, chunk_spec)


class VLenBytesCodec(vlen_utf8.VLenBytesCodec):
    """The same for bytes."""

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        _check_count(chunk_bytes.as_numpy_array(), int(np.prod(chunk_spec.shape, dtype=object)))
        return await super()._decode_single(chunk_bytes, chunk_spec)


def n_absent(array: Any) -> tuple[int, int]:
    """How many chunks of an array are not in its store, shards where it has those, and how many there are."""
    unit = array.shards or array.chunks if array.metadata.zarr_format == 3 else array.chunks
    grid = [-(-extent // size) if size else 0 for extent, size in zip(array.shape, unit, strict=True)]
    total = int(np.prod(grid, dtype=object)) if grid else 1
    if total == 0 or not grid:
        return 0, 0
    names = _stored_names(array)
    if names is None:
        return 0, total
    return total - len({place for name in names if (place := _place(name, grid)) is not None}), total


def _stored_names(array: Any) -> Iterable[str] | None:
    """Names of everything stored below an array; None where the store is no folder and has only its own count."""
    store = array.store_path.store
    root = getattr(store, "root", None)
    if isinstance(root, Path):
        folder = root / array.store_path.path
        return (
            os.path.relpath(os.path.join(place, name), folder) for place, _, files in os.walk(folder) for name in files
        )
    from zarr.core.sync import sync

    async def listed() -> list[str]:
        prefix = f"{array.store_path.path}/" if array.store_path.path else ""
        return [name.removeprefix(prefix) async for name in store.list_prefix(prefix)]

    return sync(listed())


def _place(name: str, grid: list[int]) -> tuple[int, ...] | None:
    """Where the chunk stored under a name lies, in any of the spellings 0.1, 0/1, c.0.1 and c/0/1."""
    parts = name.replace("/", ".").split(".")
    if parts[0] == "c":
        parts = parts[1:]
    if len(parts) != len(grid) or not all(
        part.isascii() and part.isdigit() and str(int(part)) == part for part in parts
    ):
        return None
    place = tuple(map(int, parts))
    return place if all(i < n for i, n in zip(place, grid, strict=True)) else None
