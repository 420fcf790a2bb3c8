"""Folders of weights of eight bits: the same from a folder and from memory, and as they were when they come back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import KINDS, write
from safetensors.torch import load_file, save_file

from geneformer_fast import Encoder, EncoderConfig, load, save
from geneformer_fast.checkpoints.skeleton import skeleton
from geneformer_fast.errors import CheckpointError, OutputError
from geneformer_fast.layers import EightBits
from geneformer_fast.quantization.build import default_choices, hollow
from geneformer_fast.quantization.choices import Choice
from geneformer_fast.quantization.convert import quantize_folder
from geneformer_fast.quantization.quantize import quantize
from geneformer_fast.quantization.report import Report

BERT = EncoderConfig(n_layers=2, width=32, n_heads=2, ff_width=48, vocab_size=60, max_len=20)
CONFIGS = {
    "bert": BERT,
    "gelu": dataclasses.replace(BERT, activation="gelu", head_activation="gelu"),
    "untied": dataclasses.replace(BERT, tied_decoder=False),
    "bionemo": EncoderConfig.preset("bionemo-10m", n_layers=2, width=32, n_heads=2, ff_width=48, vocab_size=40),
    "aido": EncoderConfig.preset("aido-cell-3m", n_layers=1, width=32, n_heads=1, ff_width=48, max_len=20),
}
FILES = ("model.safetensors", "config.json", "SHA256SUMS")


def model_of(config: EncoderConfig, head: str | None = "mlm") -> Encoder:
    torch.manual_seed(1)
    encoder = Encoder(config, head, n_classes=3)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder.eval()


def measured(config: EncoderConfig) -> dict[str, Choice]:
    """Choices of every kind: smoothing that is folded and that is not, layers that are kept or of weights only."""
    torch.manual_seed(2)

    def smooth(width: int) -> torch.Tensor:
        return 2.0 ** torch.randint(-3, 4, (width,))

    return {
        "blocks.0.qkv": Choice("int8", smooth(config.width)),
        "blocks.0.out": Choice("int8", smooth(config.width)),
        "blocks.0.up": Choice("half", reason="for a test"),
        "blocks.0.down": Choice("int8", smooth(config.ff_width), 41.0),
        **({"blocks.1.qkv": Choice("half"), "blocks.1.out": Choice("int8-weights", smooth(config.width))}),
        **({"blocks.1.down": Choice("fp8")}),
    }


def assert_same_files(a: Path, b: Path) -> None:
    for name in FILES:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def assert_same_state(a: Encoder, b: Encoder) -> None:
    found, expected = a.state_dict(), b.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert a.quantization == b.quantization


@pytest.mark.parametrize(
    ("name", "head", "scheme"),
    [
        *(("bert", "mlm", scheme) for scheme in ("int8", "int8-weights", "fp8")),
        *(
            ("bert", "cells", "int8"),
            ("bert", "genes", "fp8"),
            ("bert", "pooler", "int8-weights"),
            ("bert", None, "int8"),
        ),
        *(("untied", "mlm", "int8"), ("bionemo", "mlm", "int8"), ("aido", "mlm", "fp8"), ("aido", "cells", "int8")),
    ],
)
def test_the_same_from_a_folder_and_from_memory(tmp_path: Path, name: str, head: str | None, scheme: str) -> None:
    folder = save(model_of(CONFIGS[name], head), tmp_path / "model")
    quantize(folder, tmp_path / "streamed", scheme=scheme)
    in_memory = quantize(load(folder), scheme=scheme)
    save(in_memory, tmp_path / "saved")
    assert_same_files(tmp_path / "streamed", tmp_path / "saved")
    again = load(tmp_path / "streamed")
    assert_same_state(again, in_memory)
    assert again.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in again.blocks.parameters())
    assert_same_files(save(again, tmp_path / "again"), tmp_path / "streamed")


@pytest.mark.parametrize("name", ["bert", "gelu", "bionemo"])
def test_what_was_chosen_per_layer(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    folder, choices = save(model_of(config), tmp_path / "model"), measured(config)
    report = quantize_folder(folder, tmp_path / "streamed", choices=choices)
    in_memory = quantize(load(folder), choices=choices)
    save(in_memory, tmp_path / "saved")
    assert_same_files(tmp_path / "streamed", tmp_path / "saved")
    again = load(tmp_path / "streamed")
    assert_same_state(again, in_memory)
    assert_same_files(save(again, tmp_path / "again"), tmp_path / "streamed")
    schemes = again.quantization.layers
    assert (schemes["blocks.1.out"], schemes["blocks.1.down"]) == ("int8-weights", "fp8")
    assert "blocks.0.up" not in schemes
    # The factor of the projection is in the values, that of ReLU's layer in the one before it.
    assert again.get_submodule("blocks.0.out").smooth is None
    assert (again.get_submodule("blocks.0.down").smooth is None) == (config.activation == "relu")
    assert torch.equal(again.get_submodule("blocks.0.qkv").smooth, choices["blocks.0.qkv"].smooth)
    assert Report.read(tmp_path / "streamed") == report
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["blocks.0.up"].bytes_before == by_name["blocks.0.up"].bytes_after
    assert by_name["blocks.0.up"].reason == "for a test"
    assert by_name["blocks.0.down"].is_smoothed


def test_a_folder_in_half_precision(tmp_path: Path) -> None:
    folder = save(model_of(BERT), tmp_path / "model")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "SHA256SUMS").unlink()
    quantize_folder(folder, tmp_path / "streamed", choices=measured(BERT))
    in_memory = quantize(load(folder), choices=measured(BERT))
    assert in_memory.dtype == torch.bfloat16
    save(in_memory, tmp_path / "saved")
    assert_same_files(tmp_path / "streamed", tmp_path / "saved")
    assert_same_files(save(load(tmp_path / "streamed"), tmp_path / "again"), tmp_path / "streamed")


def test_every_layout_gives_the_same(tmp_path: Path) -> None:
    folder = save(model_of(BERT), tmp_path / "model")
    quantize_folder(folder, tmp_path / "expected")
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.embeddings.position_ids"] = torch.arange(20)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    for kind in KINDS:
        other = write(tmp_path / kind, kind, tensors)
        (other / "config.json").write_text((folder / "config.json").read_text())
        quantize_folder(other, tmp_path / f"{kind}-out")
        found = load_file(tmp_path / f"{kind}-out" / "model.safetensors")
        assert torch.equal(found.pop("bert.embeddings.position_ids"), tensors["bert.embeddings.position_ids"])
        expected = load_file(tmp_path / "expected" / "model.safetensors")
        assert found.keys() == expected.keys()  # the decoder is the table, and not written again
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_compute_dtype_and_device_are_asked_for(tmp_path: Path) -> None:
    folder = save(quantize(model_of(BERT)), tmp_path / "model")
    for dtype in ("bfloat16", "float16", "float32"):
        found = load(folder, dtype=dtype)
        assert found.dtype == getattr(torch, dtype)
        assert found.get_submodule("blocks.0.qkv").weight_q.dtype == torch.int8
        assert found.get_submodule("blocks.0.qkv").weight_scale.dtype == torch.float32
        assert_same_files(save(load(folder), tmp_path / dtype), folder)


def test_what_lies_beside_a_model_is_kept(tmp_path: Path) -> None:
    folder = save(model_of(BERT, "cells"), tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"id2label": {"0": "a", "1": "b", "2": "c"}, "torch_dtype": "float32", "_name_or_path": "somewhere"}
    (folder / "config.json").write_text(json.dumps(settings))
    for name in ("vocabulary.json", "finetuned.json", "README.md", "optimizer.pt", "tf_model.h5", "training_args.bin"):
        (folder / name).write_text(f'{{"what": "{name}"}}')
    (folder / "runs").mkdir()
    quantize_folder(folder, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("config.json", "model.safetensors", "SHA256SUMS", "quantization.json"),
        *("vocabulary.json", "finetuned.json", "README.md"),
    }
    assert (tmp_path / "out" / "finetuned.json").read_text() == (folder / "finetuned.json").read_text()
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (said["id2label"], said["_name_or_path"]) == (settings["id2label"], "somewhere")
    assert said["dtype"] == "float32"
    assert "torch_dtype" not in said


def test_a_folder_that_is_taken(tmp_path: Path) -> None:
    folder, out = save(model_of(BERT), tmp_path / "model"), tmp_path / "out"
    quantize_folder(folder, out)
    first = (out / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="holds a model already"):
        quantize_folder(folder, out, scheme="int8-weights")
    assert (out / "model.safetensors").read_bytes() == first
    (out / "left.json").write_text("of the model before")
    quantize_folder(folder, out, scheme="int8-weights", overwrite=True)
    assert not (out / "left.json").exists()
    assert load(out).quantization.scheme == "int8-weights"
    for place in (folder, folder / "within", tmp_path):
        with pytest.raises(OutputError, match="is, holds or lies in"):
            quantize_folder(folder, place, overwrite=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("")
    with pytest.raises(OutputError, match="holds files and no model"):
        quantize_folder(folder, tmp_path / "notes", overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        quantize_folder(folder, tmp_path / "notes" / "a.txt")


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = model_of(BERT)
    with torch.no_grad():
        encoder.get_submodule("blocks.1.down").weight[3, 5] = torch.inf
    folder = save(encoder, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"layer\.1\.output\.dense\.weight' holds NaN or infinity"):
        quantize_folder(folder, tmp_path / "out")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # a digit that changed is found when all is converted
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError):
        quantize_folder(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("preset", "most"), [("geneformer-v2-104m", 0.27), ("geneformer-v2-316m", 0.27), ("geneformer-v1-10m", 0.30)]
)
def test_sizes_of_the_published_models(preset: str, most: float) -> None:
    encoder = skeleton(EncoderConfig.preset(preset))
    before = n_bytes(encoder)
    after = n_bytes(hollow(encoder, default_choices(encoder, "int8")))
    assert after <= most * before
    assert all(isinstance(block.qkv, EightBits) for block in encoder.blocks)


def n_bytes(encoder: Any) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in encoder.state_dict().values())
