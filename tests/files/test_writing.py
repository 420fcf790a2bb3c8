"""Files and folders appear whole or not at all, under names nobody shares, with the permissions of their neighbours."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from geneformer_fast.errors import OutputError
from geneformer_fast.files.locks import file_lock
from geneformer_fast.files.writing import (
    hidden_name,
    is_leftover,
    remove_leftovers,
    whole_file,
    whole_folder,
    write_json,
    write_tensors,
)


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.suffix == ".txt"
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_share_no_temporary_name(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with whole_file(path) as one, whole_file(path) as other:
        one.write_text("one")
        other.write_text("other")
        assert one != other
    assert path.read_text() == "one"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for content in ("first", "second"):
        with whole_folder(path) as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / "a.txt").write_text(content)
            (temporary / f"{content}.txt").write_text(content)
    assert sorted(file.name for file in path.rglob("*.txt")) == ["a.txt", "second.txt"]
    with pytest.raises(ValueError, match="stop"), whole_folder(path):
        raise ValueError("stop")
    assert (path / "second.txt").exists()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})  # the library itself takes 0600
        write_json(tmp_path / "a.json", {"a": 1})
        with whole_folder(tmp_path / "f") as folder:
            write_tensors(folder / "a.safetensors", {"w": torch.ones(2)})
    finally:
        os.umask(before)
    for path in (tmp_path / "a.safetensors", tmp_path / "a.json", tmp_path / "f" / "a.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o777 & ~umask


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from geneformer_fast.errors import OutputError
from geneformer_fast.files.writing import whole_file, write_json, write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
folder = Path(sys.argv[1])
def arrow(path):
    import pyarrow as pa
    table = pa.table({"a": list(range(100_000))})
    with whole_file(path) as temporary, pa.ipc.new_file(str(temporary), table.schema) as writer:
        writer.write_table(table)
def hdf5(path):
    import h5py
    with whole_file(path) as temporary, h5py.File(temporary, "w") as file:
        file["a"] = list(range(100_000))
for name, write in {
    "a.json": lambda path: write_json(path, {"a": "x" * 100_000}),
    "a.safetensors": lambda path: write_tensors(path, {"w": torch.ones(100_000)}),
    "a.arrow": arrow,
    "a.h5": hdf5,
}.items():
    try:
        write(folder / name)
    except OutputError as error:
        print(error)
"""


def test_no_room_is_one_sentence_and_nothing_is_left(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        str(tmp_path / name) for name in ("a.json", "a.safetensors", "a.arrow", "a.h5")
    ]
    assert all("cannot be written: it is larger than the file system" in line for line in lines), lines
    assert not list(tmp_path.iterdir())


def test_an_error_about_another_file_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "out" / "a.txt"):
        Path("/nonexistent/input.txt").read_text()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written: a part of its path is a file: name another place"):
        write_json(tmp_path / "file" / "a.json", {})


def test_leftovers_are_known_and_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.json.x1.part").mkdir()
    (tmp_path / ".a.json.x1.part" / "a.json").write_text("{")
    (tmp_path / ".b[1].json.x1.part").mkdir()
    (tmp_path / "kept.part").mkdir()
    assert is_leftover(tmp_path / ".a.json.x1.part")
    assert not is_leftover(tmp_path / "kept.part")
    remove_leftovers(tmp_path, "b[1].json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.json.x1.part", "kept.part"]
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.part"]


def test_a_folder_whose_replacement_was_killed_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "a.txt").write_text("old")
    kept = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target) == path:
            raise KeyboardInterrupt
        kept(source, target)

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # a killed process tidies nothing
    with pytest.raises(KeyboardInterrupt), whole_folder(path):
        pass
    monkeypatch.undo()
    assert not path.exists()
    remove_leftovers(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert (path / "a.txt").read_text() == "old"


def test_threads_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    threads = [threading.Thread(target=write_json, args=(path, {"a": "x" * 10_000})) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(path.read_text()) > 10_000
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_a_longer_name_are_another_files(tmp_path: Path) -> None:
    names = (".z.npy.abc_12xy.part", ".z.npy.json.abc_12xy.part", ".z.npy.json.parquet.abc_12xy.part")
    for name in names:
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path, "z.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
    remove_leftovers(tmp_path, "z.npy.json")
    assert [path.name for path in tmp_path.iterdir()] == [names[2]]


def test_permissions_are_given_and_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.ones(2)}
    with whole_file(tmp_path / "shared") as temporary:  # where a folder's own rules let its group write
        temporary.write_text("x")
        temporary.chmod(0o666)
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o666

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    for name in ("chmod", "fchmod"):  # as on FAT and SMB
        monkeypatch.setattr(os, name, refuse)
    write_tensors(tmp_path / "a.safetensors", tensors)
    write_json(tmp_path / "a.json", {})
    with whole_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.safetensors", "folder", "shared"]


@pytest.mark.parametrize("letter", ["n", "細"])
def test_long_names_are_told_apart(tmp_path: Path, letter: str) -> None:
    name = letter * (200 // len(letter.encode()))
    one, two = tmp_path / f"{name}.npy", tmp_path / f"{name}.npy.json"
    with file_lock(one), file_lock(two), whole_file(one) as of_one, whole_file(two) as of_two:
        remove_leftovers(tmp_path, f"{name}.csv")
        of_one.write_text("1")
        of_two.write_text("2")
        (tmp_path / f".{hidden_name(one.name)}.killed.part").mkdir()
        remove_leftovers(tmp_path, two.name)
        assert len([path for path in tmp_path.iterdir() if path.name.endswith(".part")]) == 2
        of_two.parent.mkdir()
        of_two.write_text("2")
    assert (one.read_text(), two.read_text()) == ("1", "2")
