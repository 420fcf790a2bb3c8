"""Folders of torchao's int8: names and headers as torchao 0.18 and transformers 5.23 write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from geneformer_fast import Encoder, EncoderConfig, load, save
from geneformer_fast.errors import CheckpointError

CONFIG = EncoderConfig(n_layers=2, width=32, n_heads=2, ff_width=48, vocab_size=60, max_len=20)
ROWS = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {
        "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "reduce_range": False,
    },
}


def header_of(width: int, rows: Any) -> dict[str, Any]:
    return {
        "_type": "Int8Tensor",
        "_data": {
            "act_quant_kwargs": rows,
            "reduce_range": False,
            "block_size": [1, width],
            "dtype": {"_type": "torch.dtype", "_data": "float32"},
        },
        "_tensor_data_names": ["zero_point", "qdata", "scale"],
    }


def write(
    folder: Path, rows: Any = None, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None] | None = None
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder, and the tensors of the model before."""
    torch.manual_seed(0)
    save(Encoder(CONFIG, "mlm"), folder)
    plain, taken_apart, header = load_file(folder / "model.safetensors"), {}, {}
    for name, tensor in plain.items():
        header[name] = {"_type": "Tensor"}
        if tensor.ndim < 2 or not (name.endswith("dense.weight") or ".self." in name):
            taken_apart[name] = tensor
            continue
        base, scale = name.removesuffix(".weight"), tensor.abs().amax(1, keepdim=True) / 127.5
        header[name] = header_of(tensor.shape[1], rows)
        taken_apart[f"{base}._weight_qdata"] = (tensor / scale).round().clamp(-128, 127).to(torch.int8)
        taken_apart[f"{base}._weight_scale"] = scale
        taken_apart[f"{base}._weight_zero_point"] = torch.zeros_like(scale, dtype=torch.int8)
    if change is not None:
        change(taken_apart, header)
    metadata = {name: json.dumps(said) for name, said in header.items()}
    metadata |= {"tensor_names": json.dumps(list(plain)), "format": "pt"}
    save_file({name: t.contiguous() for name, t in taken_apart.items()}, folder / "model.safetensors", metadata)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {
        "include_input_output_embeddings": False,
        "modules_to_not_convert": None,
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"group_size": None}}},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "SHA256SUMS").unlink()
    return folder, plain


@pytest.mark.parametrize(("rows", "scheme"), [(None, "int8-weights"), (ROWS, "int8")])
def test_its_weights_are_ours(tmp_path: Path, rows: Any, scheme: str) -> None:
    folder, plain = write(tmp_path / "model", rows)
    encoder = load(folder)
    layers = [f"blocks.{i}.{name}" for i in range(2) for name in ("qkv", "out", "up", "down")]
    assert encoder.quantization.layers == dict.fromkeys([*layers, "head.dense"], scheme)
    layer, stored = encoder.get_submodule("blocks.1.qkv"), load_file(folder / "model.safetensors")
    names = [f"bert.encoder.layer.1.attention.self.{part}" for part in ("query", "key", "value")]
    assert torch.equal(layer.weight_q, torch.cat([stored[f"{name}._weight_qdata"] for name in names]))
    assert torch.equal(layer.weight_scale, torch.cat([stored[f"{name}._weight_scale"][:, 0] for name in names]))
    expected = torch.cat([plain[f"{name}.weight"] for name in names])
    assert (layer.weight - expected).abs().max() < expected.abs().max() / 200
    again = load(save(encoder, tmp_path / "again"))  # as a folder of compressed-tensors
    assert again.quantization == encoder.quantization
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_what_else_torchao_can_do_is_refused(tmp_path: Path) -> None:
    base = "bert.encoder.layer.0.output.dense"

    def said(**changes: Any) -> Callable[[dict, dict], None]:
        def change(tensors: dict, header: dict) -> None:
            header[f"{base}.weight"] |= {key: value for key, value in changes.items() if key == "_type"}
            header[f"{base}.weight"]["_data"] |= {key: value for key, value in changes.items() if key != "_type"}

        return change

    tensorwise = json.loads(json.dumps(ROWS).replace("PerRow", "PerTensor"))
    asymmetric = json.loads(json.dumps(ROWS).replace("SYMMETRIC", "ASYMMETRIC"))
    cases = (
        (said(_type="IntxUnpackedToInt8Tensor"), "as IntxUnpackedToInt8Tensor in blocks of .*; only Int8Tensor"),
        (said(block_size=[1, 16]), r"as Int8Tensor in blocks of \[1, 16\]"),
        (said(act_quant_kwargs=tensorwise), "rounded by torchao as PerTensor"),
        (said(act_quant_kwargs=asymmetric), "PerRow, ASYMMETRIC"),
        (said(act_quant_kwargs="?"), "as None, None"),
        (lambda tensors, _: tensors[f"{base}._weight_zero_point"].fill_(3), "zero_point' is not zero"),
        (lambda tensors, _: tensors.update({f"{base}._weight_act_pre_scale": torch.ones(2)}), "part of no int8 weight"),
        (lambda tensors, _: tensors.pop(f"{base}._weight_scale"), r"weight_scale' of shape \[32, 1\] is missing"),
        (lambda tensors, _: tensors.pop(f"{base}._weight_qdata"), r"dense\.weight' of shape \[32, 48\] is missing"),
        (lambda tensors, _: tensors[f"{base}._weight_scale"].neg_(), "weight_scale' holds -"),
        (lambda _, header: header.pop(f"{base}.weight"), "is quantized by torchao as None"),
        (lambda _, header: header.update({f"{base}.weight": [1]}), "is quantized by torchao as None"),
    )
    for i, (change, message) in enumerate(cases):
        folder, _ = write(tmp_path / str(i), change=change)
        with pytest.raises(CheckpointError, match=message):
            load(folder)


def test_whatever_header_a_file_has(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.0.attention.output.dense.weight"  # the first that is looked at
    save_file(tensors, folder / "model.safetensors", {name: "{not JSON"})
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        load(folder)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is quantized by torchao as None"):
        load(folder)
