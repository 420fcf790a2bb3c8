"""One writer at a time, however the last one ended."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from geneformer_fast.errors import OutputError
from geneformer_fast.files.locks import file_lock, folder_lock

HOLD = """
import sys, time
from geneformer_fast.files import locks
with getattr(locks, sys.argv[1])(sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("kind", [file_lock, folder_lock])
def test_another_process_is_refused_until_the_first_one_ends(tmp_path: Path, kind) -> None:
    path = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, kind.__name__, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=r"out is being written by another process"), kind(path):
            pass
        first.kill()
    leftover = tmp_path / ".out.x.part" if kind is file_lock else path / ".a.x.part"
    leftover.mkdir()
    with kind(path):
        assert not leftover.exists()


@pytest.mark.parametrize("kind", [file_lock, folder_lock])
def test_two_threads_are_two_writers(tmp_path: Path, kind) -> None:
    with kind(tmp_path / "out"), pytest.raises(OutputError, match="another process"), kind(tmp_path / "out"):
        pass
    with kind(tmp_path / "out"):
        pass


def test_a_file_lock_leaves_nothing(tmp_path: Path) -> None:
    with file_lock(tmp_path / "a.npy"):
        assert (tmp_path / ".a.npy.lock").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [file_lock, folder_lock])
def test_where_there_are_no_locks_one_writes_without_and_leaves_nothing(tmp_path: Path, kind, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")  # as some network file systems say

    monkeypatch.setattr(fcntl, "flock", refuse)
    with kind(tmp_path / "out"), kind(tmp_path / "out"):
        (tmp_path / "other").write_text("x")
    assert {path.name for path in tmp_path.iterdir()} - {"out"} == {"other"}
