"""A folder's tensors, read one by one from every kind of file, as they are when they are read at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from layouts import KINDS, write
from safetensors.torch import load_file

from geneformer_fast import Encoder, EncoderConfig, save
from geneformer_fast.checkpoints import stored
from geneformer_fast.checkpoints.stored import stored_tensors
from geneformer_fast.errors import CheckpointError

CONFIG = EncoderConfig(n_layers=2, width=16, n_heads=2, ff_width=24, vocab_size=30, max_len=20)


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = load_file(save(Encoder(CONFIG, "mlm"), tmp_path / "model") / "model.safetensors")
    return {**found, "half": torch.randn(7, 3).half().T, "number": torch.tensor(3)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(tmp_path: Path, tensors: dict[str, torch.Tensor], kind: str, monkeypatch) -> None:
    monkeypatch.setattr(stored, "_MOST_MAPPED", 500)  # files are mapped anew meanwhile
    with stored_tensors(write(tmp_path / "other", kind, tensors)) as found:
        assert set(found) == set(tensors)
        assert len(found) == len(tensors)
        for name, tensor in tensors.items():
            assert found[name].is_meta
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found.read(name), tensor), name
            if tensor.ndim:
                assert torch.equal(found.read(name, 1, 3), tensor[1:3])
                place = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
                found.read_into(name, place)
                assert torch.equal(place, tensor)
        other = found.renamed({"half of it": "half"})
        assert [*other] == ["half of it"]
        assert torch.equal(other.read("half of it"), tensors["half"])


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found(tmp_path: Path, tensors: dict[str, torch.Tensor], kind: str) -> None:
    folder = write(tmp_path / "other", kind, tensors)
    file = sorted(path for path in folder.iterdir() if path.suffix != ".json")[0]
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"<html>no</html>"):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=file.name), stored_tensors(folder):
            pass
    if file.suffix == ".bin" and kind != "old.bin":  # a digit, which only the checksum within tells
        content = (tensor.numpy().tobytes() for tensor in tensors.values() if tensor.numel() > 100)
        place = next(whole.index(found) for found in content if found in whole)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError), stored_tensors(folder):
            pass
    file.unlink()
    with pytest.raises(CheckpointError, match=r"missing|has neither"), stored_tensors(folder):
        pass


def test_a_digit_that_changed_is_found(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder = tmp_path / "model"
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="is damaged or was changed"), stored_tensors(folder) as found:
        found.read("cls.predictions.bias")
    with stored_tensors(folder, verify=False) as found:
        found.read("cls.predictions.bias")


def test_shards_hold_what_the_index_says(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder = write(tmp_path / "other", "model.safetensors.index.json", tensors)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["another"] = index["weight_map"]["half"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="tensor 'another' is missing"), stored_tensors(folder):
        pass
