"""Safetensors files piece by piece: what is written is what the library reads, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from geneformer_fast.errors import CheckpointError
from geneformer_fast.files import streaming
from geneformer_fast.files.streaming import TensorFile, TensorWriter, pieces, write_pieces


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    wide = torch.randn(37, 13)
    return {
        "b.weight": wide,
        "a.half": wide[:5].bfloat16(),
        "q": (wide * 20).to(torch.int8),
        "eight": wide[:, :3].to(torch.float8_e4m3fn),
        "ids": torch.arange(9)[None],
        "number": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.empty(0, 4, dtype=torch.float16),
        "flag": torch.tensor([True, False, True]),
        "ü": torch.ones(3, 2, 2),
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist(), name


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_pieces(path, tensors(), {"format": "pt"})
    assert_same(load_file(path), tensors())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    header.pop("__metadata__")
    assert length % 8 == 0
    for entry in header.values():  # so that nobody has to copy what is mapped
        size = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(entry["dtype"], 1)
        assert entry["data_offsets"][0] % size == 0


@pytest.mark.parametrize("piece_bytes", [1, 60, 1 << 20])
def test_rows_in_any_order_and_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(streaming, "PIECE_BYTES", piece_bytes)
    path, expected = tmp_path / "a.safetensors", tensors()
    described = {name: tensor.to("meta") for name, tensor in expected.items()}
    with TensorWriter(path, described) as writer:
        for name, tensor in reversed(expected.items()):
            for start, stop in reversed(list(pieces(tensor))):
                writer.write(name, tensor[start:stop] if tensor.ndim else tensor, start)
    assert_same(load_file(path), expected)
    file = TensorFile(path, CheckpointError, "copy it again")
    assert_same({name: file.read(name) for name in file.described}, expected)
    for start, stop in pieces(expected["b.weight"]):
        assert torch.equal(file.read("b.weight", start, stop), expected["b.weight"][start:stop])
    assert list(pieces(torch.empty(0, 3))) == []


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    path, expected = tmp_path / "a.safetensors", tensors()
    save_file(expected, path, metadata={"x": "y"})
    file = TensorFile(path, CheckpointError, "copy it again")
    assert file.metadata == {"x": "y"}
    assert_same({name: file.read(name) for name in file.described}, expected)
    assert all(tensor.is_meta for tensor in file.described.values())


def written_in_part(path: Path) -> None:
    with TensorWriter(path, {"a": torch.ones(2), "b": torch.ones(4, 2)}) as writer:
        writer.write("a", torch.ones(2))
        writer.write("b", torch.ones(3, 2), 1)


def test_a_file_that_is_not_whole_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(AssertionError, match="nobody wrote all of 'b'"):
        written_in_part(path)
    with TensorWriter(path, {"b": torch.ones(4, 2)}) as writer:
        with pytest.raises(AssertionError, match=r"'b' is torch\.float32 \[4, 2\]"):
            writer.write("b", torch.ones(4, 2).bfloat16())
        writer.write("b", torch.ones(4, 2))


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors(), path)
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:20], b"\xff" * 40, b""):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"a\.safetensors (cannot be read|is empty)"):
            TensorFile(path, CheckpointError, "copy it again")
    path.write_bytes(whole)
    file = TensorFile(path, CheckpointError, "copy it again")
    path.write_bytes(whole[: len(whole) // 2])  # after it was opened
    last = max(file.described, key=lambda name: (-file.described[name].itemsize, name))
    with pytest.raises(CheckpointError, match=rf"ends within tensor '{last}'; copy it again"):
        file.read(last)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        file.read("q")
