"""Pickles of effects, as the official perturber writes them: read without executing anything that is in them."""

from __future__ import annotations

import io
import math
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from geneformer_fast.errors import InputError
from geneformer_fast.tokenization.pickles import ATOMS, CheckedUnpickler, StandIn, checked_key, content_of, loaded

# How large one file may be, and how many parts of keys are hashed for each of its bytes.
_MAX_EFFECTS_BYTES = 1 << 32
_MAX_HASHED = 64
# How large a file of embeddings of states may be, and how many numbers one of them may have.
_MAX_STATES_BYTES, _MAX_WIDTH = 1 << 26, 1 << 20


def _of_factory(factory: object = None) -> dict[Any, Any]:
    # a defaultdict, which is filled by the instructions that follow
    if not isinstance(factory, StandIn | None):
        raise pickle.UnpicklingError("a dictionary has a default that is no kind of container")
    return {}


def _no_list(*_arguments: object) -> Any:
    raise pickle.UnpicklingError("a list is made by a call")


class _EffectsUnpickler(CheckedUnpickler):
    """Reads what the official perturber writes as well: dictionaries with a default, whose keys are tuples.

    A key is a pair, whose first part may be a tuple of numbers. One such tuple is in many keys, and is hashed in each:
    what all of that hashes is counted, so that it too stays within a multiple of the file's size.
    """

    _ALSO: ClassVar[dict[tuple[str, str], Callable[..., Any]]] = {
        ("collections", "defaultdict"): _of_factory,
        ("builtins", "list"): _no_list,
        ("__builtin__", "list"): _no_list,
    }

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._left = _MAX_HASHED * len(file.getbuffer())

    def find_class(self, module: str, name: str) -> Any:
        make = self._ALSO.get((module, name))
        return super().find_class(module, name) if make is None else StandIn(make)

    def _used_again(self) -> None:
        value = self.stack[-1]
        if type(value) is not tuple or not all(type(part) in ATOMS for part in value):
            super()._used_again()

    def _pairs(self, values: list[Any]) -> dict[Any, Any]:
        return {self._pair_key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}

    def _pair_key(self, key: Any) -> Any:
        if type(key) is not tuple:
            return checked_key(key)
        if len(key) != 2:
            raise pickle.UnpicklingError("a key is a tuple of other than two parts")
        for part in key:
            tokens = part if type(part) is tuple else (part,)
            self._left -= len(tokens)
            for token in tokens if self._left > 0 else ():
                checked_key(token)
        if self._left <= 0:
            raise pickle.UnpicklingError("its keys are far larger than the file")
        return key


def _storage(data: object) -> Any:
    """The numbers of one tensor, which torch's own restricted loader reads."""
    import torch

    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("a tensor is not made of bytes")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _vector(storage: object, offset: object, size: object, stride: object, *_others: object) -> np.ndarray:
    """A tensor of one vector as float32."""
    import torch

    if not isinstance(storage, torch.TypedStorage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise pickle.UnpicklingError("a tensor is not made of numbers and sizes")
    parts = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(part) is int and 0 <= part <= _MAX_WIDTH for part in parts):
        raise pickle.UnpicklingError("a tensor has sizes that no embedding has")
    if not storage.dtype.is_floating_point or math.prod(size) != max(size, default=0):
        raise pickle.UnpicklingError("a tensor is not one vector of numbers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch, about the class that files of its own hold
        flat = torch.tensor(storage.tolist(), dtype=storage.dtype).float().numpy()
    step = max((stride[axis] for axis in range(len(size)) if size[axis] > 1), default=1)
    places = int(offset) + step * np.arange(math.prod(size))  # type: ignore[call-overload]
    if len(places) and places[-1] >= len(flat):
        raise pickle.UnpicklingError("a tensor reaches beyond its numbers")
    return flat[places]


class _StatesUnpickler(CheckedUnpickler):
    """Reads what the official extractor of states writes: vectors of torch by name."""

    _ALSO: ClassVar[dict[tuple[str, str], Callable[..., Any]]] = {
        ("torch._utils", "_rebuild_tensor_v2"): _vector,
        ("torch.storage", "_load_from_bytes"): _storage,
    }

    def find_class(self, module: str, name: str) -> Any:
        make = self._ALSO.get((module, name))
        return super().find_class(module, name) if make is None else StandIn(make)


def read_state_vectors(path: str | Path) -> dict[str, np.ndarray]:
    """Load embeddings of states that the official extractor wrote: a vector by name, [C] float32.

    Raises
    ------
    InputError
        The file cannot be read, is truncated or corrupt, or refers to anything that would have to be imported.
    """
    data = content_of(Path(path), _MAX_STATES_BYTES, "are more than embeddings of states have", InputError)
    need = "embeddings of states need only names and vectors. Write the file again"
    content = loaded(Path(path), _StatesUnpickler(io.BytesIO(data)), need, InputError)
    is_right = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(vector, np.ndarray) for name, vector in content.items()
    )
    if not is_right or len({len(vector) for vector in content.values()}) != 1:
        raise InputError(f"{path} holds no vectors of one width by the names of states")
    return dict(content)


def read_effects(path: str | Path) -> dict[Any, Any]:
    """Load what the official perturber writes: a dictionary by (perturbed, affected), or one of these by state.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    dict
        Plain dictionaries; keys are text, or pairs of which the first part may be a tuple. numpy's numbers come back as
        Python's.

    Raises
    ------
    InputError
        The file cannot be read, is truncated or corrupt, or refers to anything that would have to be imported.
    """
    data = content_of(Path(path), _MAX_EFFECTS_BYTES, "are more than one file of effects has", InputError)
    need = "effects of perturbations need only numbers and a few names. Write the file again"
    content = loaded(Path(path), _EffectsUnpickler(io.BytesIO(data)), need, InputError)
    if type(content) is not dict:
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dictionary of effects")
    return content


def effects_bytes(effects: Mapping[Any, Any]) -> bytes:
    """What the official perturber would write of such a dictionary: one with a default, and each state's too."""
    is_nested = any(isinstance(value, Mapping) for value in effects.values())
    made = {name: defaultdict(list, values) for name, values in effects.items()} if is_nested else effects
    return pickle.dumps(made if is_nested else defaultdict(list, made), protocol=4)
