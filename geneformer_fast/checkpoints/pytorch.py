"""Files and streams of ``torch.save``, read by ``torch.load`` with ``weights_only``: nothing in them is executed."""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch

from geneformer_fast.errors import CheckpointError
from geneformer_fast.files.foreign import foreign_kind

_AGAIN = "download or copy it again"
ADVICE = f"the file is truncated or damaged; {_AGAIN}"
# torch stores tensors as they are; who packed them again gains less than this.
_MOST_INFLATED = 64
_ZIP = b"PK\x03\x04"


def is_archive(path: Path) -> bool:
    """Whether a PyTorch file is a zip archive; older ones are not, and have no checksums."""
    with open(path, "rb") as file:
        return file.read(4) == _ZIP


@contextlib.contextmanager
def _archive(file: Path | BinaryIO, n_bytes: int, where: str) -> Iterator[zipfile.ZipFile]:
    """An open PyTorch file whose records have names of their own, and sizes that its own size bears out."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if len({record.filename for record in records}) < len(records):
                raise CheckpointError(f"{where} is damaged: two of its records have one name; {_AGAIN}")
            if sum(record.file_size for record in records) > _MOST_INFLATED * n_bytes:
                raise CheckpointError(f"{where} unpacks to more than {_MOST_INFLATED} times its size; {_AGAIN}")
            yield archive
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{where} cannot be read ({error}); {ADVICE}") from None


def check_records(path: Path) -> None:
    """Compare the records of a zip archive with their checksums, which torch.load does not look at.

    Raises
    ------
    CheckpointError
        One does not fit.
    """
    with _archive(path, path.stat().st_size, str(path)) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} does not fit; {_AGAIN}")


def read_pytorch(path: Path, *, mmap: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a file of ``torch.save`` by name; mapped, their numbers are read when they are looked at.

    Raises
    ------
    CheckpointError
        The file is damaged, something else, or holds more than tensors.
    """
    tensors = read_saved(path, mmap=mmap)
    is_plain = isinstance(tensors, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    )
    if not is_plain:
        raise CheckpointError(f"{path} is not a state dict of tensors by name")
    return dict(tensors)


def read_saved(path: Path, *, mmap: bool = False) -> Any:
    """What a file of ``torch.save`` holds: tensors, and plain values around them.

    Raises
    ------
    CheckpointError
        The file is damaged, something else, or holds what would have to be executed.
    """
    # Older PyTorch files begin like other pickles, and archives like any: these are what is expected here.
    what = foreign_kind(path)
    if what is not None and "torch.save" not in what:
        raise CheckpointError(f"{path} is {what}")
    if is_archive(path):
        with _archive(path, path.stat().st_size, str(path)):
            pass
    return _loaded(path, str(path), mmap)


def read_stream(file: BinaryIO, n_bytes: int, where: str, *, verify: bool = False) -> Any:
    """:func:`read_saved` for a stream of so many bytes, such as a member of an archive; ``where`` names it.

    With ``verify`` the checksums of its records are looked at.
    """
    begins = file.read(len(_ZIP))
    file.seek(0)
    if begins == _ZIP:
        with _archive(file, n_bytes, where) as archive:
            damaged = archive.testzip() if verify else None
        if damaged is not None:
            raise CheckpointError(f"{where} is damaged: the checksum of {damaged} does not fit; {_AGAIN}")
        file.seek(0)
    return _loaded(file, where, mmap=False)


def _loaded(file: Path | BinaryIO, where: str, mmap: bool) -> Any:
    source: Any = os.fspath(file) if isinstance(file, Path) else file
    try:
        # Transformer Engine once kept a layer's extra state in a buffer of bytes, which is as harmless as bytes.
        with torch.serialization.safe_globals([io.BytesIO]):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{where} is damaged or holds more than weights, and was not loaded ({_first_line(error)})"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{where} cannot be read ({_first_line(error)}); {ADVICE}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
