"""Reads Geneformer's pickled dictionaries without executing anything that is in them.

A pickle is a program. Here the interpreter may only build plain containers, strings and numbers; the handful of
names numpy needs for its scalars are replaced by harmless stand-ins, and every other name is refused.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from geneformer_fast.errors import VocabularyError

# Files whose digest is known need no look at their memo indices (see _check_memo); the official dictionaries are these.
_OFFICIAL_SHA256 = frozenset(
    {
        "ab9dc40973fa5224d77b793e2fd114cacf3d08423ed9c4c49caf0ba9c7f218f1",  # token_dictionary_gc30M
        "b3b589bb5ec75040d05fc44dd6bf0184cf87f3c362cf158d196a6ed3b7fe5f39",  # gene_median_dictionary_gc30M
        "eac0fb0b3007267871b6305ac0003ceba19d4f28d85686cb9067ecf142787869",  # ensembl_mapping_dict_gc30M
        "55e67962e79c0039a6c32d43c5c99f38e51964bbcfa32f736150ee1e285c438c",  # gene_name_id_dict_gc30M
        "67c445f4385127adfc48dcc072320cd65d6822829bf27dd38070e6e787bc597f",  # token_dictionary_gc95M = gc104M
        "a51c53f6a771d64508dfaf61529df70e394c53bd20856926117ae5d641a24bf5",  # gene_median_dictionary_gc95M = gc104M
        "0819bcbd869cfa14279449b037eb9ed1d09a91310e77bd1a19d927465030e95c",  # ensembl_mapping_dict_gc95M = gc104M
        "fabfa0c2f49c598c59ae432a32c3499a5908c033756c663b5e0cddf58deea8e1",  # gene_name_id_dict_gc95M = gc104M
    }
)

_SCALAR_CODES = {
    "b1": "?",
    "i1": "b",
    "i2": "h",
    "i4": "i",
    "i8": "q",
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "u8": "Q",
    "f2": "e",
    "f4": "f",
    "f8": "d",
}


class _ScalarType:
    """Stands in for numpy.dtype: knows how to turn the bytes of one scalar into a Python number."""

    def __init__(self, code: str, *_flags: object) -> None:
        self.code = _SCALAR_CODES.get(code) if isinstance(code, str) else None
        if self.code is None:
            raise pickle.UnpicklingError(f"numpy type {code!r} is not a plain number")
        self.unpack: Callable[[bytes], tuple[Any, ...]] = struct.Struct("<" + self.code).unpack

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":
            self.unpack = struct.Struct(f">{self.code}").unpack


def _scalar(dtype: _ScalarType, data: bytes) -> float | int | bool:
    return dtype.unpack(data)[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    # protocol 2 writes bytes as text plus a call of _codecs.encode
    return text.encode("latin1") if encoding in ("latin1", "latin-1") else text.encode("utf-8")


def _plain_dict(items: object = ()) -> dict[Any, Any]:
    return dict(items)  # type: ignore[call-overload]


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _ScalarType,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _plain_dict,
}


class _Unpickler(pickle.Unpickler):
    """Refuses every global except the stand-ins above; `forbidden` remembers what was refused."""

    forbidden: str | None = None

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            self.forbidden = f"{module}.{name}"
            raise pickle.UnpicklingError(f"global {module}.{name} is not allowed") from None


def _check_memo(data: bytes) -> None:
    """Refuse memo indices larger than the file: CPython allocates up to 64 GB for a single one."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "LONG_BINPUT" and argument is not None and argument > len(data):
            raise pickle.UnpicklingError(f"memo index {argument} in a file of {len(data)} bytes")


def read_pickle(path: str | Path) -> Any:
    """Load a pickle made of plain containers, strings and (numpy) numbers.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    object
        Dictionaries, lists, tuples, strings, bytes and Python numbers; numpy scalars come back as Python numbers.

    Raises
    ------
    VocabularyError
        The file cannot be read, is truncated or corrupt, or refers to anything that would have to be imported.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise VocabularyError(f"{path}: cannot be read ({error.strerror or error})") from None
    unpickler = _Unpickler(io.BytesIO(data))
    try:
        if sha256(data).hexdigest() not in _OFFICIAL_SHA256:
            _check_memo(data)
        return unpickler.load()
    except Exception as error:  # a corrupt pickle can raise nearly anything
        if unpickler.forbidden is not None:
            raise VocabularyError(
                f"{path}: refused. This pickle asks for the global {unpickler.forbidden}, and loading it could execute "
                "code; gene dictionaries need only strings and numbers. Get the file from its official source, or "
                "store it as JSON."
            ) from None
        raise VocabularyError(
            f"{path}: not a readable pickle, truncated or corrupt ({type(error).__name__}: {error}). "
            "A file of about 130 bytes is a Git LFS pointer: fetch it with `git lfs pull`."
        ) from None
