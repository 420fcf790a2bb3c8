"""Checksums as sha256sum writes them; fingerprints that depend on content alone."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from geneformer_fast.errors import CheckpointError
from geneformer_fast.files.checksums import (
    SUMS,
    check_file,
    fingerprint_of_tensors,
    read_sums,
    sha256_of,
    write_sums,
)


def test_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    (tmp_path / "b c.bin").write_bytes(bytes(3_000_000))
    write_sums(tmp_path, ["b c.bin", "a.bin"])
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
    ["x", "0" * 64, "0" * 64 + " a", "0" * 64 + "  ../a", "0" * 64 + "  b/a", "g" * 64 + "  a", "0" * 63 + "  a"],
)
def test_other_lines_are_refused(tmp_path: Path, line: str) -> None:
    assert read_sums(tmp_path, CheckpointError) == {}
    (tmp_path / SUMS).write_text(line + "\n")
    with pytest.raises(CheckpointError, match=SUMS):
        read_sums(tmp_path, CheckpointError)


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
