"""Files and folders that appear when they are whole.

Whatever is written gets a temporary name of its own in a hidden folder beside its place, is brought onto the disk, and
is renamed. Two runs never share a temporary name, a library that writes for us may write as it likes, and a full disk
leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_fast.errors import OutputError

if TYPE_CHECKING:
    import torch

#: What temporary folders are called: ``.NAME.`` and something of their own before this.
PARTIAL = ".part"
_OLD = "old."
# What the system says where the user can help: what it means, and what to do.
_REASONS = {
    errno.ENOSPC: "the disk is full: make room",
    errno.EDQUOT: "your quota of the disk is used up: make room",
    errno.EROFS: "the file system is read-only: name another place",
    errno.EACCES: "there is no permission to write there: name another place",
    errno.EPERM: "there is no permission to write there: name another place",
    errno.ENOTDIR: "a part of its path is a file: name another place",
    errno.EEXIST: "a part of its path is a file: name another place",
    errno.EFBIG: "it is larger than the file system, or a limit of this process, allows: name another place",
    errno.EIO: "the disk failed: look at it before anything else is written there",
}

# What is about writing whatever file the system names.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path that appears when its content is whole: ``with whole_file(path) as temporary: ...``.

    Parameters
    ----------
    path
        Where the file will be; one that is there is replaced. Missing parent folders are made.

    Yields
    ------
    Path
        Where to write. It has the suffix of ``path``.

    Raises
    ------
    OutputError
        The system does not let it be written; nothing is left.
    """
    path = Path(path)
    with _partial_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        settle(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that appears when all of its files are whole; one that is there is replaced. A link is followed.

    Yields
    ------
    Path
        An empty folder to write into.

    Raises
    ------
    OutputError
        The system does not let it be written; nothing is left.
    """
    path = followed(Path(path))
    with _partial_folder(path) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                settle(file)
            else:
                sync_folder(file)
        sync_folder(temporary)
        if path.exists():
            # A folder cannot be exchanged in one step; the old one is kept until the new one has its name, and comes
            # back by remove_leftovers where the process is killed in between.
            os.replace(path, folder / f"{_OLD}{path.name}")
        os.replace(temporary, path)
        sync_folder(path.parent)


def write_json(path: Path, content: Mapping[str, Any], *, indent: int | None = 1, sort_keys: bool = False) -> None:
    """Write a JSON file that is there whole or not at all, also after a power cut."""
    text = json.dumps(content, indent=indent, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that is there whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        try:
            save_file(plain, temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:  # the system's reasons come as its text
            if _code_of(error) is None:
                raise
            raise OSError(str(error)) from None


@contextlib.contextmanager
def system_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the system says about writing ``path`` into one sentence.

    Raises
    ------
    OutputError
        In place of an OSError, but for one about a file that lies elsewhere, such as one that is read meanwhile.
    """
    path = Path(path)
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, str | os.PathLike) else None
        if named is not None and _code_of(error) not in _FULL and not _is_near(Path(named), path):
            raise
        raise OutputError(f"{_final(path)} cannot be written: {reason_of(error)}") from error


def reason_of(error: OSError) -> str:
    """What the system said, and what to do about it."""
    reason = _REASONS.get(_code_of(error) or 0)
    return reason or f"{error.strerror or error}: name another place"


def _code_of(error: Exception) -> int | None:
    """The system's number of an error; libraries have it in their text (safetensors, HDF5, Arrow)."""
    code = getattr(error, "errno", None)
    if code is None:
        code = next((int(found) for found in re.findall(r"(?:os error|errno) ?=? ?(\d+)", str(error), re.I)), None)
    return code


def _final(path: Path) -> Path:
    """Where something unfinished will be: the path without the hidden folders it lies in meanwhile."""
    return Path(*(part for part in path.parts if not (part.startswith(".") and part.endswith(PARTIAL))))


def _is_near(path: Path, target: Path) -> bool:
    """Whether a path is the target, beside it, in it, or above it."""
    path, target = (Path(os.path.abspath(place)) for place in (path, target))
    return path.is_relative_to(target.parent) or target.is_relative_to(path)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed runs left of unfinished files. Only who has the lock of the folder, or file, may do this."""
    short = hidden_name(name)
    for leftover in folder.glob(f".{name if name == '*' else escape(short)}.*{PARTIAL}"):
        if name != "*" and "." in leftover.name[len(short) + 2 : -len(PARTIAL)]:
            continue  # of a file with a longer name (a.json of a), which another process may be writing
        if leftover.is_dir() and not leftover.is_symlink():
            for old in leftover.glob(f"{_OLD}*"):
                if not (folder / old.name.removeprefix(_OLD)).exists():
                    os.replace(old, folder / old.name.removeprefix(_OLD))
            shutil.rmtree(leftover, ignore_errors=True)


def followed(path: Path) -> Path:
    """Where a link leads: what is written is to lie there, on another disk maybe. Other paths stay as they are."""
    return path.resolve() if path.is_symlink() else path


def hidden_name(name: str) -> str:
    """What stands for a file in hidden names beside it, which are longer and may have 255 bytes as any other."""
    return name if len(os.fsencode(name)) <= 100 else sha256(os.fsencode(name)).hexdigest()[:32]


def is_leftover(path: Path) -> bool:
    """Whether a path is something unfinished, or a lock, of ours: no content of the folder it lies in."""
    return path.name.startswith(".") and path.name.endswith((PARTIAL, ".lock"))


def is_plain_name(name: str) -> bool:
    """Whether a name that some file gives is of a file beside it, here and on other systems. That may be a link."""
    return bool(name) and Path(name).name == name and not set(name) & set("/\\:\0") and name not in (".", "..")


def settle(path: Path) -> None:
    """Bring a file onto the disk, with at least the permissions that other files get here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _permit(descriptor, 0o666)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames within a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems know no such thing
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside a path, removed in the end with what is in it."""
    with system_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{hidden_name(path.name)}.", suffix=PARTIAL, dir=path.parent))
        try:
            _permit(folder, 0o777)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _permit(place: int | Path, most: int) -> None:
    """Give what a library made for its owner alone the permissions that others have here; nobody loses any.

    The owner of a file may always do this, so that who may not is on a file system without permissions (FAT, SMB).
    """
    mode, wanted = stat.S_IMODE(os.stat(place).st_mode), most & ~_umask()
    if wanted & ~mode:
        with contextlib.suppress(OSError):
            os.chmod(place, mode | wanted)


def _umask() -> int:
    """The permissions that new files do without; asking for them any other way sets them for all threads."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1], 8) for line in status if line.startswith("Umask:"))
    except (OSError, StopIteration, ValueError):
        mask = os.umask(0o022)
        os.umask(mask)
        return mask
