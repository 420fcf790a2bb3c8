"""Tar archives of model files, packed or not: members are read where they lie, none is unpacked by its own name."""

from __future__ import annotations

import contextlib
import gzip
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from geneformer_fast.errors import GeneformerFastError
from geneformer_fast.files.foreign import foreign_kind

_GZIP = b"\x1f\x8b"
_AGAIN = "the file is truncated or damaged; download or copy it again"
# Weights hardly shrink, so an archive that grows more is made to fill a disk.
_MOST_INFLATED = 64
_MOST_MEMBERS, _SMALL = 10_000, 16 << 20
_PIECE = 1 << 20


@dataclass(frozen=True)
class Archive:
    """An open archive.

    Attributes
    ----------
    path
        Where it is.
    sizes
        Bytes of every file in it, by its name without ``./`` in front.
    """

    path: Path
    sizes: Mapping[str, int]
    _tar: tarfile.TarFile
    _error: type[GeneformerFastError]

    def open(self, name: str) -> BinaryIO:
        """A member as a stream that can be read from any place."""
        file = self._tar.extractfile(_member_of(self._tar, name))
        assert file is not None  # files only are named
        return file  # type: ignore[return-value]

    def read(self, name: str, most: int) -> bytes:
        """The bytes of a member, of which there may be so many.

        Raises
        ------
        GeneformerFastError
            It is larger, or ends too early.
        """
        if self.sizes[name] > most:
            raise self._error(f"{self.path}: {name} has {self.sizes[name]:,} bytes, which it never needs")
        try:
            return self.open(name).read()
        except (tarfile.TarError, OSError) as reason:
            raise self._error(f"{self.path}: {name} cannot be read ({reason}); {_AGAIN}") from None

    def copy(self, name: str, place: Path) -> None:
        """Copy a member to a file, whose name is the caller's."""
        try:
            with self.open(name) as source, open(place, "wb") as target:
                shutil.copyfileobj(source, target, _PIECE)
        except (tarfile.TarError, OSError) as reason:
            raise self._error(f"{self.path}: {name} cannot be read ({reason}); {_AGAIN}") from None


@contextlib.contextmanager
def opened_archive(path: Path, error: type[GeneformerFastError]) -> Iterator[Archive]:
    """Open a tar archive for reading; one packed by gzip is unpacked as a whole into a private folder meanwhile.

    Parameters
    ----------
    path
        The archive.
    error
        What to raise.

    Raises
    ------
    GeneformerFastError
        Of the class ``error``: it is no such archive, is truncated, unpacks to many times its size, or holds what leads
        out of it: names with ``..`` or from the root, links, devices.
    """
    with contextlib.ExitStack() as stack:
        try:
            file: BinaryIO = stack.enter_context(open(path, "rb"))
            begins = file.read(2)
            file.seek(0)
            if begins == _GZIP:
                file = stack.enter_context(_unpacked(path, file, error))
            tar = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
            n_bytes = file.seek(0, 2)
            sizes = _checked(path, tar, n_bytes, error)
        except (tarfile.TarError, zlib.error, EOFError, OSError) as reason:
            what = foreign_kind(path)
            told = f"is {what}" if what else f"cannot be read as a tar archive ({reason}); {_AGAIN}"
            raise error(f"{path} {told}") from None
        yield Archive(path, sizes, tar, error)


@contextlib.contextmanager
def _unpacked(path: Path, file: BinaryIO, error: type[GeneformerFastError]) -> Iterator[BinaryIO]:
    """The tar archive inside a gzip file, in a temporary file that nobody else can name."""
    left = max(_MOST_INFLATED * path.stat().st_size, _SMALL)
    with tempfile.TemporaryFile(prefix="geneformer-fast-") as plain, gzip.open(file) as packed:
        while piece := packed.read(_PIECE):
            left -= len(piece)
            if left < 0:
                raise error(f"{path} unpacks to more than {_MOST_INFLATED} times its size, which no weights do")
            plain.write(piece)
        plain.seek(0)
        yield plain  # type: ignore[misc]


def _checked(path: Path, tar: tarfile.TarFile, n_bytes: int, error: type[GeneformerFastError]) -> dict[str, int]:
    """Sizes of files by name, after looking at every member."""
    sizes: dict[str, int] = {}
    for n_members, member in enumerate(tar):
        name = _plain(member.name)
        if n_members >= _MOST_MEMBERS:
            raise error(f"{path} has more than {_MOST_MEMBERS:,} members, which no model has")
        if PurePosixPath(member.name).is_absolute() or ".." in PurePosixPath(member.name).parts or "\\" in member.name:
            raise error(f"{path}: the member {member.name!r} leads out of the archive; it was not read")
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            kind = "a link" if member.issym() or member.islnk() else "no plain file"
            raise error(f"{path}: the member {member.name!r} is {kind}, which no model needs; it was not read")
        if name in sizes:
            raise error(f"{path} has two members of the name {name!r}; {_AGAIN}")
        if member.size > n_bytes - member.offset_data:
            raise error(f"{path} ends within {name!r}, which should have {member.size:,} bytes; {_AGAIN}")
        sizes[name] = member.size
    if not sizes:
        raise error(f"{path} holds no files; {_AGAIN}")
    return sizes


def _plain(name: str) -> str:
    return str(PurePosixPath(name))


def _member_of(tar: tarfile.TarFile, name: str) -> tarfile.TarInfo:
    return next(member for member in tar.getmembers() if _plain(member.name) == name)


@dataclass(frozen=True)
class Unpacked:
    """A folder that such an archive was unpacked into, with what an :class:`Archive` has."""

    path: Path
    _error: type[GeneformerFastError]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file in it and one or two folders below, by its path from here."""
        files = (path for pattern in ("*", "*/*") for path in self.path.glob(pattern) if path.is_file())
        return {path.relative_to(self.path).as_posix(): path.stat().st_size for path in files}

    def open(self, name: str) -> BinaryIO:
        """A file as a stream that can be read from any place."""
        return open(self.path / name, "rb")

    def read(self, name: str, most: int) -> bytes:
        """The bytes of a file, of which there may be so many."""
        if self.sizes[name] > most:
            raise self._error(f"{self.path}: {name} has {self.sizes[name]:,} bytes, which it never needs")
        return (self.path / name).read_bytes()

    def copy(self, name: str, place: Path) -> None:
        """Copy a file to another, whose name is the caller's."""
        shutil.copyfile(self.path / name, place)
