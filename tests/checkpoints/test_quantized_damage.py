"""Folders that do not hold what they say, or hold what no quantizer writes: one clear error each."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from geneformer_fast import Encoder, EncoderConfig, load, quantize, save
from geneformer_fast.errors import CheckpointError, UnsupportedError
from geneformer_fast.quantization.choices import Choice

CONFIG = EncoderConfig(n_layers=2, width=16, n_heads=2, ff_width=24, vocab_size=30, max_len=20)
LAYER = "bert.encoder.layer.1.intermediate.dense"
Tensors, Settings = dict[str, torch.Tensor], dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    smooth = {"blocks.1.qkv": Choice("int8", torch.full((16,), 2.0))}
    return save(quantize(Encoder(CONFIG, "mlm"), choices=smooth), tmp_path / "model")


def change(folder: Path, tensors: Callable[[Tensors], Any] | None = None, settings: Any = None) -> None:
    """Change tensors and config.json in place."""
    if tensors is not None:
        found = load_file(folder / "model.safetensors")
        tensors(found)
        save_file({name: t.contiguous() for name, t in found.items()}, folder / "model.safetensors")
    if settings is not None:
        said = json.loads((folder / "config.json").read_text())
        settings(said)
        (folder / "config.json").write_text(json.dumps(said))
    (folder / "SHA256SUMS").unlink(missing_ok=True)


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def scale_of(row: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def changed(scale: torch.Tensor) -> torch.Tensor:
        scale[row] = value
        return scale

    return changed


def groups(said: Settings) -> Settings:
    return said["quantization_config"]["config_groups"]


TENSORS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no scale": (lambda t: t.pop(f"{LAYER}.weight_scale"), rf"{LAYER}\.weight_scale' of shape \[24, 1\] is missing"),
    "no weight": (lambda t: t.pop(f"{LAYER}.weight"), rf"{LAYER}\.weight' of shape \[24, 16\] is missing"),
    "no bias": (lambda t: t.pop(f"{LAYER}.bias"), rf"{LAYER}\.bias' of shape \[24\] is missing"),
    "scale of another shape": (
        put(f"{LAYER}.weight_scale", lambda s: s[1:]),
        r"is float32 \[23, 1\]; it should be floats",
    ),
    "scale per group": (put(f"{LAYER}.weight_scale", lambda s: s.repeat(1, 2)), r"is float32 \[24, 2\]; it should be"),
    "scale of whole numbers": (put(f"{LAYER}.weight_scale", lambda s: s.int()), r"is int32 \[24, 1\]; it should be"),
    "weight of another shape": (put(f"{LAYER}.weight", lambda w: w[:, 1:]), r"has shape \[24, 15\] but"),
    "NaN": (
        put(f"{LAYER}.weight_scale", scale_of(5, float("nan"))),
        "weight_scale' holds nan in row 5, but scales are",
    ),
    "infinity": (put(f"{LAYER}.weight_scale", scale_of(5, float("inf"))), "weight_scale' holds inf in row 5"),
    "negative": (put(f"{LAYER}.weight_scale", scale_of(0, -0.25)), "weight_scale' holds -0.25 in row 0"),
    "zero": (put(f"{LAYER}.weight_scale", scale_of(23, 0.0)), "weight_scale' holds 0 in row 23"),
    "one that is wide": (
        put(f"{LAYER}.weight", lambda w: w.float()),
        f"{LAYER}.weight' holds float32, but config.json",
    ),
    "another eight bits": (
        put(f"{LAYER}.weight", lambda w: w.to(torch.float8_e4m3fn)),
        "holds float8_e4m3fn, but config.json says int8",
    ),
    "bias of eight bits": (put(f"{LAYER}.bias", lambda b: b.to(torch.int8)), "bias' holds int8; it should hold floats"),
    "eight bits nobody speaks of": (
        put("cls.predictions.transform.dense.weight", lambda w: w.to(torch.int8)),
        "dense.weight' holds int8, but config.json does not say that",
    ),
    "another decoder": (put("cls.predictions.decoder.weight_scale", lambda s: s * 2), "differs from .*weight_scale"),
    "a tensor too many": (lambda t: t.update(more=torch.ones(3)), "tensor 'more' of shape .* has no place"),
    "smooth of one part": (
        lambda t: t.pop("bert.encoder.layer.1.attention.self.key.smooth"),
        r"key.smooth' of shape \[16\] is missing",
    ),
    "no smooth": (
        lambda t: [t.pop(name) for name in list(t) if name.endswith(".smooth")],
        r"query.smooth' of shape \[16\] is missing",
    ),
    "smooth that nobody speaks of": (
        lambda t: t.update({f"{LAYER}.smooth": torch.ones(16)}),
        "dense.smooth' is there, but config.json does not say so",
    ),
    "another smooth": (
        put("bert.encoder.layer.1.attention.self.key.smooth", lambda s: s * 2),
        "read the same rows, but differ in smooth",
    ),
    "negative smooth": (put("bert.encoder.layer.1.attention.self.key.smooth", lambda s: -s), "holds -2 in row 0"),
    "smooth where it is folded": (
        lambda t: t.update({"bert.encoder.layer.1.attention.output.dense.smooth": torch.ones(16)}),
        "output.dense.smooth' is there, but config.json does not say so",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit(folder: Path, name: str) -> None:
    damage, message = TENSORS[name]
    change(folder, damage)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def weights(**changes: Any) -> Callable[[Settings], None]:
    return lambda said: groups(said)["int8"]["weights"].update(changes)


def rows(**changes: Any) -> Callable[[Settings], None]:
    return lambda said: groups(said)["int8"]["input_activations"].update(changes)


SETTINGS: dict[str, tuple[Callable[[Settings], Any], str]] = {
    "four bits": (weights(num_bits=4), "int8: weights are 4-bit int per channel, format int-quantized"),
    "packed": (lambda said: groups(said)["int8"].update(format="pack-quantized"), "format pack-quantized"),
    "groups of columns": (weights(strategy="group"), "8-bit int per group"),
    "one scale": (weights(strategy="tensor"), "8-bit int per tensor"),
    "zero points": (weights(symmetric=False), "with a symmetric scale per channel"),
    "a static input": (rows(strategy="tensor", dynamic=False), "input 8-bit int per tensor"),
    "an input of four bits": (rows(num_bits=4), "input 4-bit int"),
    "float weights, int input": (weights(type="float"), "8-bit float per channel"),
    "a rounded output": (
        lambda said: groups(said)["int8"].update(output_activations={"num_bits": 8}),
        "rounded outputs are not supported",
    ),
    "rotations": (lambda said: said["quantization_config"].update(transform_config={"a": 1}), "has a transform_config"),
    "nothing of smooth": (
        lambda said: groups(said)["int8-smoothed"].update(format="int-quantized"),
        "query.smooth' is there, but config.json does not say so",
    ),
    "a cache": (lambda said: said["quantization_config"].update(kv_cache_scheme={"a": 1}), "has a kv_cache_scheme"),
    "sparse": (
        lambda said: said["quantization_config"].update(sparsity_config={"format": "sparse-24-bitmask"}),
        "the weights are sparse",
    ),
    "no expression": (lambda said: said["quantization_config"]["ignore"].append("re:("), "is no regular expression"),
    "no groups": (lambda said: said["quantization_config"].pop("config_groups"), "config_groups is missing"),
    "no targets": (lambda said: groups(said)["int8"].pop("targets"), "targets is missing"),
    "bits as text": (weights(num_bits="8"), 'num_bits is "8"'),
    "another method": (lambda said: said["quantization_config"].update(quant_method="awq"), "quant_method 'awq'"),
    "nothing said": (
        lambda said: said.pop("quantization_config"),
        "holds int8, so the weights are quantized or packed",
    ),
    "one too few": (
        lambda said: said["quantization_config"]["ignore"].append(LAYER),
        "but config.json does not say that",
    ),
    "one too many": (
        lambda said: said["quantization_config"].update(ignore=[]),
        "holds float32, but config.json says int8",
    ),
    "more layers": (lambda said: said.update(num_hidden_layers=3), "says 3 layers, but the weights have 2"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_configuration_that_does_not_fit(folder: Path, name: str) -> None:
    damage, message = SETTINGS[name]
    change(folder, settings=damage)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_float8(tmp_path: Path) -> None:
    folder = save(quantize(Encoder(CONFIG), scheme="fp8"), tmp_path / "model")

    def nan(weight: torch.Tensor) -> torch.Tensor:
        weight.view(torch.uint8)[3, 3] = 0xFF
        return weight

    name = "encoder.layer.0.output.dense.weight"
    change(folder, put(name, nan))
    with pytest.raises(CheckpointError, match=f"{name}' holds NaN"):
        load(folder)
    with pytest.raises(UnsupportedError, match="float64"):
        load(save(quantize(Encoder(CONFIG)), tmp_path / "other"), dtype="float64")


def test_floats_that_are_said_to_be_quantized(tmp_path: Path, folder: Path) -> None:
    plain = save(Encoder(CONFIG, "mlm"), tmp_path / "plain")
    said = json.loads((folder / "config.json").read_text())
    change(plain, settings=lambda settings: settings.update(quantization_config=said["quantization_config"]))
    with pytest.raises(CheckpointError, match=r"holds float32, but config\.json says int8"):
        load(plain)
    said["quantization_config"]["config_groups"] = {}
    change(plain, settings=lambda settings: settings.update(quantization_config=said["quantization_config"]))
    with pytest.raises(CheckpointError, match="says that weights are quantized, but none of them are"):
        load(plain)


def test_a_file_that_ends_too_soon(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    for verify in (True, False):
        with pytest.raises(CheckpointError, match=r"model\.safetensors (cannot be read|is damaged)"):
            load(folder, verify=verify)
    changed = bytearray(whole)
    changed[-1] ^= 1
    (folder / "model.safetensors").write_bytes(changed)
    with pytest.raises(CheckpointError, match="is damaged or was changed"):
        load(folder)


def test_a_configuration_that_changed_is_told(folder: Path) -> None:
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "layer_norm_eps": 1e-3}))
    with pytest.warns(UserWarning, match="was changed after the weights beside it were saved: eps"):
        load(folder)


def edited(folder: Path) -> None:
    """config.json says that rows of activations are not rounded, as anybody may write."""
    said = json.loads((folder / "config.json").read_text())
    for group in groups(said).values():
        group["input_activations"] = None
    (folder / "config.json").write_text(json.dumps(said))


def warnings_of_loading(folder: Path, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert load(folder, **options).quantization.scheme == "int8-weights"
    return [str(each.message) for each in said]


@pytest.mark.parametrize("family", ["bert", "bionemo"])
def test_another_scheme_than_weights_were_made_for_is_told(family: str, tmp_path: Path) -> None:
    """By what is noted beside the checksums, else by the report; where there is neither, config.json stands."""
    pre = EncoderConfig.preset("bionemo-10m", n_layers=2, width=32, n_heads=2, ff_width=48, vocab_size=40)
    encoder = Encoder(CONFIG if family == "bert" else pre, "mlm")
    save(encoder, tmp_path / "plain")
    for folder in (quantize(tmp_path / "plain", tmp_path / "a"), quantize(encoder, tmp_path / "b")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load(folder).quantization.scheme == "int8"
        edited(folder)
        (said,) = warnings_of_loading(folder)
        assert "config.json was changed after the weights beside it were saved: weights of Linear 'int8' then" in said
        assert "'int8-weights' now" in said
        assert not warnings_of_loading(folder, verify=False)
        (folder / "SHA256SUMS").unlink()
        (said,) = warnings_of_loading(folder)
        assert "config.json says that blocks.0.qkv is int8-weights, but it was made int8 (quantization.json)" in said
        assert not warnings_of_loading(folder, verify=False)
        report = folder / "quantization.json"
        report.write_text(report.read_text().replace("geneformer-fast quantization", "somebody's"))
        assert not warnings_of_loading(folder)
        report.unlink()
        assert not warnings_of_loading(folder)


def test_a_report_of_the_model_before_is_not_held_against_one_that_was_saved_over_it(tmp_path: Path) -> None:
    encoder = Encoder(CONFIG, "mlm")
    folder = quantize(encoder, tmp_path / "model")
    save(quantize(encoder, scheme="int8-weights"), folder, overwrite=True)
    assert not warnings_of_loading(folder)


def test_our_own_layout_says_the_same(tmp_path: Path) -> None:
    config = EncoderConfig.preset("bionemo-10m", n_layers=2, width=32, n_heads=2, ff_width=48, vocab_size=40)
    folder = save(quantize(Encoder(config, "mlm")), tmp_path / "model")
    whole = load_file(folder / "model.safetensors")
    for damage, message in (
        (lambda t: t.pop("blocks.1.qkv.weight_scale"), r"'blocks\.1\.qkv\.weight_scale' of shape \[96, 1\] is missing"),
        (lambda t: t.update(more=torch.ones(2)), "tensor 'more' has no place"),
        (put("blocks.1.qkv.weight_scale", lambda s: -s), "weight_scale' holds -"),
        (lambda t: t.pop("blocks.1.qkv.bias"), "'blocks.1.qkv.bias' has shape None"),
    ):
        save_file(whole, folder / "model.safetensors")
        change(folder, damage)
        with pytest.raises(CheckpointError, match=message):
            load(folder)
