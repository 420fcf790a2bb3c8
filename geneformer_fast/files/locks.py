"""Who writes a file or folder. The operating system lets go of a lock when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from geneformer_fast.errors import OutputError
from geneformer_fast.files.writing import hidden_name, remove_leftovers, system_errors


@contextlib.contextmanager
def file_lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Nobody else writes this file meanwhile: the lock is a hidden file beside it, gone in the end.

    What killed runs left of the same file is removed.

    Raises
    ------
    OutputError
        Another process is writing it.
    """
    path = Path(path)
    with system_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{hidden_name(path.name)}.lock")
        while True:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            is_locked = _flock(descriptor, path)
            if not is_locked or _is_same(descriptor, lock):
                break
            os.close(descriptor)  # its last owner removed it between the two steps
    try:
        if is_locked:
            remove_leftovers(path.parent, path.name)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def folder_lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Nobody else writes into this folder meanwhile. The folder is made if it is absent.

    What killed runs left of unfinished files in it is removed.

    Raises
    ------
    OutputError
        Another process is writing into it.
    """
    folder = Path(folder)
    with system_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        is_locked = _flock(descriptor, folder)
    try:
        if is_locked:
            remove_leftovers(folder)
        yield
    finally:
        os.close(descriptor)


def _flock(descriptor: int, path: Path) -> bool:
    """Take a lock at once or not at all. Returns whether there is one: some systems and file systems know none."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(
            f"{path} is being written by another process; wait until it has ended, or name another place"
        ) from None
    except OSError:
        return False
    return True


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
