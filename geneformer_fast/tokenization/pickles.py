"""Reads Geneformer's pickled dictionaries without executing anything that is in them.

A pickle is a program. Here the interpreter may only build plain containers, strings and numbers; the handful of
names numpy needs for its scalars are replaced by harmless stand-ins, and every other name is refused. Nothing that a
file does outlives its reading, and it cannot make the reader use more than a multiple of its size.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from geneformer_fast.errors import GeneformerFastError, VocabularyError

# Files whose digest is known are read ten times as fast, unchecked; the official dictionaries are these.
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


# A dictionary of genes is flat; scalars of numpy need two more levels.
_MAX_DEPTH = 16
_MAX_BYTES = 1 << 29
# Sixteen bytes hold every integer that means something here; longer ones take quadratic time to print.
_MAX_INT_BYTES = 16
# Integers from here on may all have the same hash, and take quadratic time as keys.
_MAX_INT_KEY = 1 << 60
# What protocol 2 writes as text and a call are the bytes of one scalar; a long text could be encoded again and again.
_MAX_ENCODED = 64
_SHOWN = 200


class _ScalarType:
    """Stands in for a numpy.dtype: knows how to turn the bytes of one scalar into a Python number."""

    __slots__ = ("code", "unpack")

    def __init__(self, code: str, *_flags: object) -> None:
        self.code = _SCALAR_CODES.get(code) if isinstance(code, str) else None
        if self.code is None:
            raise pickle.UnpicklingError(f"numpy type {str(code)[:_SHOWN]!r} is not a plain number")
        self.unpack: Callable[[bytes], tuple[Any, ...]] = struct.Struct("<" + self.code).unpack

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("a numpy type has a state that no numpy writes")
        if state[1] == ">":
            self.unpack = struct.Struct(f">{self.code}").unpack


def _scalar(dtype: object, data: object) -> float | int | bool:
    if not isinstance(dtype, _ScalarType) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a numpy scalar is not made of a type and bytes")
    return dtype.unpack(data)[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    # protocol 2 writes bytes as text plus a call of _codecs.encode
    if len(text) > _MAX_ENCODED:
        raise pickle.UnpicklingError(f"bytes made of {len(text)} characters, which no number needs")
    return text.encode("latin1") if encoding in ("latin1", "latin-1") else text.encode("utf-8")


def _plain_dict(items: object = ()) -> dict[Any, Any]:
    if not isinstance(items, tuple | list):
        raise pickle.UnpicklingError("a dictionary is made of something else than pairs")
    return {checked_key(key): value for key, value in items}


class StandIn:
    """What a global becomes: something that can be called, and nothing else.

    It is made anew for every read and has no attributes that a state could change.
    """

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a function is given a state")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _ScalarType,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _plain_dict,
}

#: What contains nothing else.
ATOMS = (str, bytes, int, float, bool, type(None))


def checked_key(value: Any) -> Any:
    """A key that is text or a number; a nested tuple as a key would be hashed, level by level."""
    if type(value) not in ATOMS:
        raise pickle.UnpicklingError(f"a key is a {type(value).__name__}, not text or a number")
    if type(value) is int and abs(value) >= _MAX_INT_KEY:
        raise pickle.UnpicklingError("a key is an integer of more than 60 bits")
    return value


def _standing_in(module: str, name: str) -> StandIn | None:
    make = _ALLOWED.get((module, name))
    return None if make is None else StandIn(make)


class _Official(pickle.Unpickler):
    """For files whose digest is known: the fast one, which trusts memo indices and whatever is nested."""

    forbidden: str | None = None

    def find_class(self, module: str, name: str) -> Any:
        if (found := _standing_in(module, name)) is None:
            raise pickle.UnpicklingError(f"global {module}.{name} is not allowed")
        return found


class CheckedUnpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Python's own interpreter of pickles, with fewer instructions.

    Only text, numbers, lists, tuples and dictionaries are built, and whatever contains others is used once: time and
    memory stay within a multiple of the file's size. `forbidden` remembers the global that was refused.
    """

    forbidden: str | None = None
    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (found := _standing_in(module, name)) is None:
            self.forbidden = f"{module}.{name}"[:_SHOWN]
            raise pickle.UnpicklingError(f"global {self.forbidden} is not allowed")
        return found

    def _used_again(self) -> None:
        value = self.stack[-1]
        if type(value) not in (*ATOMS, StandIn, _ScalarType) and value != ():
            raise pickle.UnpicklingError(f"a {type(value).__name__} is used twice, which no dictionary of genes needs")

    def _get(self, read: Callable[..., None]) -> None:
        read(self)
        self._used_again()

    def _long(self, read: Callable[..., None]) -> None:
        read(self)
        if self.stack[-1].bit_length() > 8 * _MAX_INT_BYTES:
            raise pickle.UnpicklingError("an integer of hundreds of digits")

    def _reduce(self) -> None:
        arguments, make = self.stack.pop(), self.stack[-1]
        if type(make) is not StandIn or type(arguments) is not tuple:
            raise pickle.UnpicklingError(f"a {type(make).__name__} is called")
        self.stack[-1] = make(*arguments)

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not _ScalarType:
            raise pickle.UnpicklingError(f"a {type(target).__name__} is given a state")
        target.__setstate__(state)

    def _append(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError(f"values are appended to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(values)

    def _set_items(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not dict:
            raise pickle.UnpicklingError(f"keys are given to a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(self._pairs(values))

    def _dict(self) -> None:
        pairs = self._pairs(self.pop_mark())  # type: ignore[attr-defined]
        self.stack.append(pairs)

    def _pairs(self, values: list[Any]) -> dict[Any, Any]:
        return {checked_key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


def _instructions() -> dict[int, Callable[..., None]]:
    """What :class:`CheckedUnpickler` does for each byte of a program; every other instruction is refused."""
    known = pickle._Unpickler.dispatch  # type: ignore[attr-defined]
    table: dict[int, Callable[..., None]] = {}
    for opcode in pickletools.opcodes:
        code, name = ord(opcode.code), opcode.name
        if name in _PLAIN:
            table[code] = known[code]
        elif name in ("GET", "BINGET", "LONG_BINGET", "DUP"):
            table[code] = lambda machine, read=known[code]: machine._get(read)
        elif name in ("LONG", "LONG1", "LONG4"):
            table[code] = lambda machine, read=known[code]: machine._long(read)
        else:
            table[code] = lambda machine, name=name: _refuse(name)
    table[pickle.REDUCE[0]] = CheckedUnpickler._reduce
    table[pickle.BUILD[0]] = CheckedUnpickler._build
    table[pickle.APPEND[0]] = lambda machine: machine._append([machine.stack.pop()])
    table[pickle.APPENDS[0]] = lambda machine: machine._append(machine.pop_mark())
    table[pickle.SETITEM[0]] = lambda machine: machine._set_items([machine.stack.pop(-2), machine.stack.pop()])
    table[pickle.SETITEMS[0]] = lambda machine: machine._set_items(machine.pop_mark())
    table[pickle.DICT[0]] = CheckedUnpickler._dict
    return table


def _refuse(name: str) -> None:
    raise pickle.UnpicklingError(f"the instruction {name}, which no dictionary of genes needs")


_PLAIN = frozenset(
    (
        *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
        *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "GLOBAL", "STACK_GLOBAL"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "EMPTY_DICT"),
    )
)
CheckedUnpickler.dispatch = _instructions()


def _check_depth(value: Any) -> None:
    """Refuse what is nested so deep that comparing or printing it would exhaust the stack."""
    level, depth = [value], 0
    while level:
        if depth > _MAX_DEPTH:
            raise pickle.UnpicklingError(f"values nested more than {_MAX_DEPTH} deep")
        inside: list[Any] = []
        for entry in level:
            if type(entry) is dict:
                inside += [held for held in entry.values() if type(held) in (dict, list, tuple)]
            elif type(entry) in (list, tuple):
                inside += [held for held in entry if type(held) in (dict, list, tuple)]
        level, depth = inside, depth + 1


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
    data = content_of(Path(path), _MAX_BYTES, "are no dictionary of genes", VocabularyError)
    is_official = sha256(data).hexdigest() in _OFFICIAL_SHA256
    unpickler = _Official(io.BytesIO(data)) if is_official else CheckedUnpickler(io.BytesIO(data))
    need = "gene dictionaries need only strings and numbers. Get the file from its official source, or store it as JSON"
    return loaded(Path(path), unpickler, need, VocabularyError)


def content_of(path: Path, most: int, told: str, error: type[GeneformerFastError]) -> bytes:
    """The bytes of a file of at most so many; what is told of a larger one follows their number."""
    try:
        if path.stat().st_size > most:
            raise error(f"{path}: {path.stat().st_size:,} bytes {told}")
        return path.read_bytes()
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror or reason})") from None


def loaded(path: Path, unpickler: Any, need: str, wrong: type[GeneformerFastError]) -> Any:
    """What an interpreter makes of its file, or one sentence about it."""
    try:
        content = unpickler.load()
        _check_depth(content)
        return content
    except Exception as error:  # a corrupt pickle can raise nearly anything
        if unpickler.forbidden is not None:
            raise wrong(
                f"{path}: refused. This pickle asks for the global {unpickler.forbidden}, and loading it could execute "
                f"code; {need}."
            ) from None
        raise wrong(
            f"{path}: not a readable pickle, truncated or corrupt ({type(error).__name__}: {str(error)[:_SHOWN]}). "
            "A file of about 130 bytes is a Git LFS pointer: fetch it with `git lfs pull`."
        ) from None
