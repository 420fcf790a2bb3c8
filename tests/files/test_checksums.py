"""Checksums as sha256sum writes them; fingerprints that depend on content alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from geneformer_fast.errors import CheckpointError
from geneformer_fast.files.checksums import (
    SUMS,
    VERIFY,
    check_digest,
    check_file,
    fingerprint_of_tensors,
    is_verifying,
    read_sums,
    sha256_of,
    sha256_of_open,
    unverified,
    with_digest,
    write_sums,
)


def test_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    (tmp_path / "b c.bin").write_bytes(bytes(3_000_000))
    write_sums(tmp_path, ["b c.bin", "a.bin"])
    with open(tmp_path / "b c.bin", "rb") as file:
        file.seek(17)
        assert sha256_of_open(file.fileno()) == sha256_of(tmp_path / "b c.bin")
        assert file.tell() == 17
    assert read_sums(tmp_path, CheckpointError)["a.bin"] == hashlib.sha256(b"abc").hexdigest()
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=tmp_path, check=True)


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    before = sha256_of(path)
    check_file(path, before, CheckpointError, "copy it again")
    path.write_bytes(b"abd")
    with pytest.raises(CheckpointError, match=r"a\.bin is damaged.*copy it again"):
        check_file(path, before, CheckpointError, "copy it again")


@pytest.mark.parametrize(
    "line",
    ["x", "0" * 64, "0" * 64 + " a", "0" * 64 + "  ", "g" * 64 + "  a", "0" * 63 + "  a", "SHA256 (a) = " + "0" * 64],
)
def test_other_lines_are_refused(tmp_path: Path, line: str) -> None:
    assert read_sums(tmp_path, CheckpointError) == {}
    (tmp_path / SUMS).write_text(line + "\n")
    with pytest.raises(CheckpointError, match=SUMS):
        read_sums(tmp_path, CheckpointError)


def test_lists_of_other_programs_are_read_as_far_as_they_are_of_this_folder(tmp_path: Path) -> None:
    one, two = "1" * 63 + "a", "2" * 64
    (tmp_path / SUMS).write_text(f"# theirs\n{one.upper()}  ./a.bin\n{two} *b.bin\n{one}  ../c.bin\n\n{one}  d/e.bin\n")
    assert read_sums(tmp_path, CheckpointError) == {"a.bin": one, "b.bin": two}


def test_a_fingerprint_depends_on_names_shapes_dtypes_and_values() -> None:
    one, two = torch.arange(6.0), torch.ones(2, dtype=torch.bfloat16)
    expected = fingerprint_of_tensors({"a": one, "b": two})
    assert fingerprint_of_tensors({"b": two.clone(), "a": one.reshape(2, 3).reshape(6)}) == expected
    others = (
        {"a": one, "c": two},
        {"a": one.reshape(2, 3), "b": two},
        {"a": one.view(torch.int32), "b": two},
        {"a": one + torch.tensor([0.0, 0, 0, 0, 0, 1e-6]), "b": two},
        {"a": one},
    )
    assert all(fingerprint_of_tensors(other) != expected for other in others)
    assert fingerprint_of_tensors({"a": torch.arange(12.0)[::2]}) == fingerprint_of_tensors({"a": one * 2})
    assert fingerprint_of_tensors({"a": torch.tensor(3)}) != fingerprint_of_tensors({"a": torch.tensor([3])})


def test_the_environment_decides_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VERIFY, raising=False)
    assert is_verifying()
    with unverified():
        assert not is_verifying()
        assert is_verifying(True)
    assert is_verifying()
    assert not is_verifying(False)
    for value, expected in (("0", False), ("no", False), ("False", False), ("1", True), ("yes", True)):
        monkeypatch.setenv(VERIFY, value)
        assert is_verifying() == expected
        with unverified():
            pass
        assert os.environ[VERIFY] == value


def test_a_digest_is_of_all_that_is_said(tmp_path: Path) -> None:
    content = with_digest({"b": [1, 2.5, None], "a": {"é": True}})
    again = json.loads(json.dumps(content, indent=3, sort_keys=True))
    check_digest(again, tmp_path, CheckpointError, "restore it")
    check_digest({"no": "digest"}, tmp_path, CheckpointError, "restore it")
    for other in (
        {**again, "b": [1, 2.6, None]},
        {**again, "c": 1},
        {**again, "sha256": 7},
        {"sha256": again["sha256"]},
    ):
        with pytest.raises(CheckpointError, match=r"is damaged or was changed.*restore it"):
            check_digest(other, tmp_path, CheckpointError, "restore it")
    assert with_digest(content) == content
