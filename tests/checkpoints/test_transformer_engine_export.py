"""Geneformer with Transformer Engine's layers, as bionemo-recipes exports it: Hugging Face's numbers, in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from geneformer_fast import Encoder, EncoderConfig, Ragged, families, load, quantize, save
from geneformer_fast.errors import CheckpointError

CONFIG = EncoderConfig(2, 24, 3, 40, 60, 16)
_NAMES = (
    ("attention.output.dense.", "self_attention.proj."),
    ("attention.output.LayerNorm.", "layernorm."),
    ("intermediate.dense.", "layernorm_mlp.fc1."),
    ("output.dense.", "layernorm_mlp.fc2."),
    ("output.LayerNorm.", "layernorm_mlp.layer_norm."),
)


def hugging_face(folder: Path, head: str | None = "mlm") -> Path:
    """A folder of BERT with weights away from the trivial start."""
    torch.manual_seed(1)
    encoder = Encoder(CONFIG, head, n_classes=3)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return save(encoder.eval(), folder)


def exported(source: Path, folder: Path, *, is_fused: bool = True) -> Path:
    """The same as bionemo-recipes converts and exports it: query, key and value packed head by head."""
    tensors, settings = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".attention.self." in name:
            continue
        for theirs, ours in _NAMES:
            if f".{theirs}" in name and "encoder.layer" in name:
                name = name.replace(theirs, ours)
                break
        found[name] = tensor
    for layer in range(CONFIG.n_layers):
        at, to = f"bert.encoder.layer.{layer}.attention.self.", f"bert.encoder.layer.{layer}.self_attention.qkv."
        for kind in ("weight", "bias"):
            parts = [tensors[f"{at}{part}.{kind}"] for part in ("query", "key", "value")]
            if is_fused:
                packed = torch.cat(parts).view(3, CONFIG.n_heads, CONFIG.head_dim, *parts[0].shape[1:]).transpose(0, 1)
                found[f"{to}{kind}"] = packed.reshape(-1, *parts[0].shape[1:]).contiguous()
            else:
                for part, tensor in zip(("query", "key", "value"), parts, strict=True):
                    found[f"{to}{part}_{kind}"] = tensor
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in found.items()}, folder / "model.safetensors")
    auto = {"AutoConfig": "geneformer.TEBertConfig", "AutoModelForMaskedLM": "geneformer.BertForMaskedLM"}
    more = {"use_te_layers": True, "fuse_qkv_params": is_fused, "micro_batch_size": None, "framework": "pytorch"}
    (folder / "config.json").write_text(json.dumps({**settings, **more, "auto_map": auto, "torch_dtype": "float32"}))
    return folder


def numbers(path: Path) -> torch.Tensor:
    encoder = load(path, device="cpu", dtype="float64")
    cells = [torch.tensor([5, 7, 9, 11]), torch.tensor([3, 59])]
    hidden = encoder(Ragged.from_cells(cells))
    return hidden.values if encoder.head is None else encoder.logits(hidden)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("head", ["mlm", "cells", None])
def test_an_export_has_the_numbers_of_hugging_face(tmp_path: Path, head: str | None, is_fused: bool) -> None:
    source = hugging_face(tmp_path / "hf", head)
    if head is None:  # whose names have no prefix
        tensors = {f"bert.{name}": tensor for name, tensor in load_file(source / "model.safetensors").items()}
        save_file(tensors, source / "model.safetensors")
        (source / "SHA256SUMS").unlink()
    folder = exported(source, tmp_path / "te", is_fused=is_fused)
    family = families.recognise(folder)
    assert family is None or family.name == "geneformer"
    assert torch.equal(numbers(folder), numbers(source))
    again = save(load(folder, device="cpu"), tmp_path / "again")
    first, second = load_file(source / "model.safetensors"), load_file(again / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    said = json.loads((again / "config.json").read_text())
    assert not {"auto_map", "use_te_layers", "fuse_qkv_params", "framework", "micro_batch_size"} & said.keys()


def test_hugging_face_itself_loads_what_is_saved_of_an_export(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = exported(hugging_face(tmp_path / "hf"), tmp_path / "te")
    again = save(load(folder, device="cpu"), tmp_path / "again")
    model = transformers.BertForMaskedLM.from_pretrained(again).double().eval()
    ids = torch.tensor([[5, 7, 9, 11]])
    with torch.no_grad():
        logits = model(ids).logits[0]
    torch.testing.assert_close(numbers(folder)[:4], logits, atol=1e-9, rtol=0)


def test_extra_states_are_left_out_of_bin_files(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "hf")
    folder = exported(source, tmp_path / "te")
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.encoder.layer.0.self_attention.qkv._extra_state"] = torch.zeros(7, dtype=torch.uint8)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(numbers(folder), numbers(source))


def test_what_is_no_such_export_is_refused(tmp_path: Path) -> None:
    folder = exported(hugging_face(tmp_path / "hf"), tmp_path / "te")
    tensors = load_file(folder / "model.safetensors")

    def written(**changes: Any) -> Path:
        save_file({**tensors, **changes}, folder / "model.safetensors")
        return folder

    recipe = {"bert.encoder.layer.0.self_attention.layernorm_qkv.query_weight": torch.ones(24, 24)}
    with pytest.raises(CheckpointError, match="cells attend to the padding of their batch"):
        load(written(**recipe), device="cpu")
    with pytest.raises(CheckpointError, match="has no place in a block of Transformer Engine's"):
        load(written(**{"bert.encoder.layer.0.self_attention.other.weight": torch.ones(3)}), device="cpu")
    with pytest.raises(CheckpointError, match="is not of queries, keys and values of 3 heads"):
        load(written(**{"bert.encoder.layer.0.self_attention.qkv.bias": torch.ones(71)}), device="cpu")
    del tensors["bert.encoder.layer.1.layernorm.bias"]
    with pytest.raises(CheckpointError, match=r"attention.output.LayerNorm.bias' of shape .24. is missing"):
        load(written(), device="cpu")


def test_weights_of_eight_bits_are_made_of_an_export(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "hf")
    folder = exported(source, tmp_path / "te")
    quantize(folder, tmp_path / "int8 of te")
    quantize(source, tmp_path / "int8 of hf")
    first, second = (load_file(tmp_path / f"int8 of {name}" / "model.safetensors") for name in ("te", "hf"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
