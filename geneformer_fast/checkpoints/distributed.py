"""Folders of ``torch.distributed.checkpoint``, as Megatron and NeMo 2 write them: sharded tensors, put together.

``.metadata`` is a pickle that says which piece of which tensor lies where in which file; it is read by an interpreter
that builds our own records and knows no other class. The pieces themselves are streams of ``torch.save``, read with
``weights_only``.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from geneformer_fast.checkpoints.pytorch import ADVICE, read_stream
from geneformer_fast.errors import CheckpointError
from geneformer_fast.files.writing import is_plain_name
from geneformer_fast.tokenization.pickles import ATOMS, CheckedUnpickler, StandIn, checked_key, content_of, loaded

METADATA = ".metadata"
_MAX_METADATA_BYTES = 1 << 28
_MAX_AXES, _MAX_LENGTH, _MAX_PIECES = 8, 1 << 40, 4096
_NEED = "a distributed checkpoint needs only names, shapes and places of tensors. Get it from its official source"
_DTYPES = {f"torch.{name}": getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
_FLOATS = ", ".join(name.removeprefix("torch.") for name in _DTYPES)


@dataclass(frozen=True)
class Piece:
    """One piece of a tensor: where it begins in the tensor, its shape, and where its stream lies."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    n_bytes: int


@dataclass(frozen=True)
class ShardedTensor:
    """What the metadata say of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class _Kind:
    """Stands in for a class of torch's; its instances are records of ours."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _Record:
    """An instance of such a class: its name and whatever state the file gives it."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: Any = {}

    def __getitem__(self, field: str) -> Any:
        return self.state.get(field) if isinstance(self.state, dict) else None


def _size(lengths: object = ()) -> tuple[int, ...]:
    if type(lengths) not in (tuple, list):
        raise pickle.UnpicklingError("a shape is made of something else than lengths")
    return _lengths(tuple(lengths))  # type: ignore[arg-type]


def _lengths(value: object) -> tuple[int, ...]:
    is_right = type(value) is tuple and len(value) <= _MAX_AXES
    if not is_right or not all(type(part) is int and 0 <= part < _MAX_LENGTH for part in value):  # type: ignore[attr-defined]
        raise pickle.UnpicklingError("a shape has lengths that no tensor has")
    return value  # type: ignore[return-value]


def _nothing(*_arguments: object) -> None:
    """What says nothing of numbers: memory formats, layouts, paths of whoever saved."""
    return


_HOME = "torch.distributed.checkpoint"
_OLD = "torch.distributed._shard.sharded_tensor.metadata"
_KINDS = {
    **{
        (f"{_HOME}.metadata", name): name
        for name in (
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            *("TensorProperties", "MetadataIndex", "StorageMeta"),
        )
    },
    (_OLD, "TensorProperties"): "TensorProperties",
    (f"{_HOME}.filesystem", "_StorageInfo"): "_StorageInfo",
}
_CALLED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): _size,
    (f"{_HOME}.metadata", "_MEM_FORMAT_ENCODING"): _nothing,
    (_OLD, "MEM_FORMAT_ENCODING"): _nothing,
    ("torch.serialization", "_get_layout"): _nothing,
    # Some versions of Python ask for a constant of an Enum by its name.
    ("builtins", "getattr"): _nothing,
    ("pathlib", "PosixPath"): _nothing,
    ("pathlib._local", "PosixPath"): _nothing,
}
_CONSTANTS = {("torch", name): f"torch.{name}" for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}


class _MetadataUnpickler(CheckedUnpickler):
    """Reads what torch.distributed.checkpoint writes: records of a few classes, whose states are plain values."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(CheckedUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if kind := _KINDS.get((module, name)):
            return _Kind(kind)
        if make := _CALLED.get((module, name)):
            return StandIn(make)
        return _CONSTANTS.get((module, name)) or super().find_class(module, name)

    def _used_again(self) -> None:
        value = self.stack[-1]
        is_flat = type(value) is tuple and len(value) <= _MAX_AXES and all(type(part) in ATOMS for part in value)
        if type(value) not in (_Kind, _Record) and not is_flat:
            super()._used_again()

    def _new(self) -> None:
        arguments, kind = self.stack.pop(), self.stack[-1]
        if type(kind) is not _Kind or arguments != ():
            raise pickle.UnpicklingError(f"a {type(kind).__name__} is made")
        self.stack[-1] = _Record(kind.name)

    def _state(self) -> None:
        if type(self.stack[-2]) is not _Record:
            CheckedUnpickler._build(self)
            return
        state = self.stack.pop()
        if type(state) not in (dict, tuple):
            raise pickle.UnpicklingError(f"the state of a record is a {type(state).__name__}")
        self.stack[-1].state = state

    def _pairs(self, values: list[Any]) -> dict[Any, Any]:
        return {_key_of(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


_MetadataUnpickler.dispatch[pickle.NEWOBJ[0]] = _MetadataUnpickler._new
_MetadataUnpickler.dispatch[pickle.BUILD[0]] = _MetadataUnpickler._state


def _key_of(key: Any) -> Any:
    """A key of a dictionary; what is looked up by name and place becomes a pair of these."""
    if type(key) is not _Record:
        return checked_key(key)
    name, offset = key["fqn"], key["offset"]
    if key.kind != "MetadataIndex" or type(name) is not str:
        raise pickle.UnpicklingError(f"a key is a {key.kind}")
    return name, None if offset is None else _lengths(offset)


def read_metadata(folder: Path) -> dict[str, ShardedTensor]:
    """The tensors of a folder by name, without what is in them.

    Raises
    ------
    CheckpointError
        ``.metadata`` is missing, damaged, refers to what would have to be executed, or does not fit together.
    """
    path = folder / METADATA
    content = content_of(path, _MAX_METADATA_BYTES, "are more than a list of tensors has", CheckpointError)
    found = loaded(path, _MetadataUnpickler(io.BytesIO(content)), _NEED, CheckpointError)
    try:
        if type(found) is not _Record or found.kind != "Metadata":
            raise pickle.UnpicklingError("it holds no Metadata")
        described, places = found["state_dict_metadata"], found["storage_data"]
        if type(described) is not dict or type(places) is not dict:
            raise pickle.UnpicklingError("it lists no tensors, or does not say where they are")
        return {
            name: _described(name, entry, places)
            for name, entry in described.items()
            if type(entry) is _Record and entry.kind == "TensorStorageMetadata"
        }
    except pickle.UnpicklingError as reason:
        raise CheckpointError(f"{path} cannot be read ({reason}); {ADVICE}") from None


def _described(name: Any, entry: _Record, places: Mapping[Any, Any]) -> ShardedTensor:
    """One tensor; what is wrong with it is said by an UnpicklingError."""
    properties, chunks = entry["properties"], entry["chunks"]
    if type(name) is not str or type(chunks) is not list or type(properties) is not _Record:
        raise pickle.UnpicklingError(f"what it says of {str(name)[:80]!r} is incomplete")
    state = properties.state
    dtype = state[0] if type(state) is tuple and state else properties["dtype"]
    pieces = []
    for chunk in chunks:
        if type(chunk) is not _Record:
            raise pickle.UnpicklingError(f"a piece of {name!r} is a {type(chunk).__name__}")
        offsets, shape = _lengths(chunk["offsets"]), _lengths(chunk["sizes"])
        place = places.get((name, offsets))
        if type(place) is not _Record or place.kind != "_StorageInfo":
            raise pickle.UnpicklingError(f"it does not say where a piece of {name!r} is")
        if place["transform_descriptors"]:
            raise pickle.UnpicklingError(f"{name!r} is packed by an extension of torch, which nothing here unpacks")
        pieces.append(Piece(offsets, shape, *_place_of(name, place)))
    return ShardedTensor(name, str(dtype), _lengths(entry["size"]), tuple(pieces))


def _place_of(name: str, place: _Record) -> tuple[str, int, int]:
    file, start, n_bytes = place["relative_path"], place["offset"], place["length"]
    if type(file) is not str or not is_plain_name(file):
        raise pickle.UnpicklingError(f"a piece of {name!r} lies in {str(file)[:80]!r}, which is no file of this folder")
    if not all(type(number) is int and 0 <= number < _MAX_LENGTH for number in (start, n_bytes)):
        raise pickle.UnpicklingError(f"a piece of {name!r} lies nowhere")
    return file, start, n_bytes


def read_sharded(folder: Path, tensors: Iterable[ShardedTensor], *, verify: bool = False) -> dict[str, torch.Tensor]:
    """Tensors put together out of their pieces, each of which is in memory beside them for as long as it is copied.

    With ``verify`` the checksums of every piece are looked at.

    Raises
    ------
    CheckpointError
        A file is missing, truncated or damaged; pieces do not cover a tensor, or have another shape or dtype.
    """
    tensors = list(tensors)
    n_bytes = sum(math.prod(tensor.shape) * _dtype_of(folder, tensor).itemsize for tensor in tensors)
    names = {piece.file for tensor in tensors for piece in tensor.pieces}
    if n_bytes > sum((folder / name).stat().st_size for name in names if (folder / name).is_file()):
        missing = sorted(name for name in names if not (folder / name).is_file())
        told = f"{missing[0]} is missing" if missing else "its files are truncated"
        raise CheckpointError(
            f"{folder}: {METADATA} lists more than the files beside it hold; {told}, download them again"
        )
    return {tensor.name: _assembled(folder, tensor, verify) for tensor in tensors}


def _dtype_of(folder: Path, tensor: ShardedTensor) -> torch.dtype:
    if tensor.dtype not in _DTYPES:
        kind = tensor.dtype.removeprefix("torch.")
        raise CheckpointError(f"{folder}: tensor {tensor.name!r} holds {kind}; read are {_FLOATS}")
    return _DTYPES[tensor.dtype]


def _assembled(folder: Path, tensor: ShardedTensor, verify: bool) -> torch.Tensor:
    dtype = _dtype_of(folder, tensor)
    _check_cover(folder, tensor)
    whole = torch.empty(0)
    for number, piece in enumerate(tensor.pieces):
        found = _read_piece(folder, tensor, piece, dtype, verify)
        if piece.shape == tensor.shape:
            return found
        if not number:  # only now is it known that there are as many bytes as are to be filled
            whole = torch.empty(tensor.shape, dtype=dtype)
        place = tuple(slice(start, start + n) for start, n in zip(piece.offsets, piece.shape, strict=True))
        whole[place] = found
    return whole


def _check_cover(folder: Path, tensor: ShardedTensor) -> None:
    """See that pieces lie within their tensor, do not overlap, and leave nothing out."""
    where = f"{folder / METADATA}: the pieces of {tensor.name!r}"
    if len(tensor.pieces) > _MAX_PIECES:
        raise CheckpointError(f"{where} are more than {_MAX_PIECES:,}, which no model's are")
    for piece in tensor.pieces:
        if not len(piece.offsets) == len(piece.shape) == len(tensor.shape):
            raise CheckpointError(f"{where} have another number of axes than it has; {ADVICE}")
        ends = (start + n for start, n in zip(piece.offsets, piece.shape, strict=True))
        if any(end > length for end, length in zip(ends, tensor.shape, strict=True)):
            raise CheckpointError(f"{where} reach beyond its shape {list(tensor.shape)}; {ADVICE}")
    if sum(math.prod(piece.shape) for piece in tensor.pieces) != math.prod(tensor.shape):
        raise CheckpointError(f"{where} do not make up its shape {list(tensor.shape)}; a file of the folder is missing")
    ordered = sorted(tensor.pieces, key=lambda piece: piece.offsets)
    for first, second in itertools.combinations(ordered, 2):
        spans = zip(first.offsets, first.shape, second.offsets, second.shape, strict=True)
        if all(a < b + n and b < a + m for a, m, b, n in spans):
            raise CheckpointError(f"{where} overlap; {ADVICE}")


def _read_piece(folder: Path, tensor: ShardedTensor, piece: Piece, dtype: torch.dtype, verify: bool) -> torch.Tensor:
    path = folder / piece.file
    where = f"{path}: a piece of {tensor.name!r}"
    if math.prod(piece.shape) * dtype.itemsize > piece.n_bytes:
        raise CheckpointError(f"{where} has fewer bytes than its shape needs; {ADVICE}")
    try:
        with open(path, "rb") as file:
            file.seek(piece.start)
            content = file.read(min(piece.n_bytes, path.stat().st_size))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: {piece.file} named by {METADATA} is missing; download all of its files"
        ) from None
    except OSError as reason:
        raise CheckpointError(f"{path} cannot be read ({reason.strerror or reason})") from None
    if len(content) != piece.n_bytes:
        raise CheckpointError(f"{path} ends within {tensor.name!r}; {ADVICE}")
    found = read_stream(io.BytesIO(content), piece.n_bytes, where, verify=verify)
    if not isinstance(found, torch.Tensor) or found.layout != torch.strided:
        raise CheckpointError(f"{where} is no plain tensor; {ADVICE}")
    if tuple(found.shape) != piece.shape or found.dtype != dtype:
        kind = str(found.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{where} has shape {list(found.shape)} of {kind}, {METADATA} says {list(piece.shape)} of "
            f"{tensor.dtype.removeprefix('torch.')}; its files do not belong together"
        )
    return found
