"""Folders of eight bits, loaded by transformers with the package compressed-tensors, and its folders loaded here."""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from geneformer_fast import Encoder, EncoderConfig, Ragged, load, save
from geneformer_fast.checkpoints.described import kinds_in
from geneformer_fast.quantization.choices import Choice
from geneformer_fast.quantization.convert import quantize_folder

transformers = pytest.importorskip("transformers")
# Found, not imported: every worker loads this file, and one of them runs it.
if find_spec("compressed_tensors") is None:
    pytest.skip("the package compressed-tensors reads what is written here", allow_module_level=True)

CONFIG = EncoderConfig(n_layers=2, width=64, n_heads=2, ff_width=96, vocab_size=70, max_len=30)
CLASSES = {"mlm": "BertForMaskedLM", "cells": "BertForSequenceClassification", "genes": "BertForTokenClassification"}


def model_of(head: str | None, config: EncoderConfig = CONFIG) -> Encoder:
    torch.manual_seed(1)
    encoder = Encoder(config, head, n_classes=3)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder.eval()


def converted(tmp_path: Path, head: str | None, **options: Any) -> Path:
    quantize_folder(save(model_of(head), tmp_path / "model"), tmp_path / "out", **options)
    return tmp_path / "out"


def theirs(folder: Path, name: str) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, told = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def cells(n: int = 4, length: int = 12) -> torch.Tensor:
    return torch.randint(1, CONFIG.vocab_size, (n, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def assert_alike(folder: Path, name: str, least_db: float) -> None:
    """Hidden states, and logits, of both."""
    ids = cells()
    model, encoder = theirs(folder, name), load(folder)
    out = model(ids, output_hidden_states=True)
    tokens = Ragged.from_cells([row.tolist() for row in ids])
    states = encoder.hidden_states(tokens)
    for found, expected in zip(states, out.hidden_states, strict=True):
        assert sqnr(expected.reshape(-1, CONFIG.width), found.values) >= least_db
    logits = encoder.logits(states[-1])
    expected = out.logits.reshape(logits.shape)
    assert sqnr(expected - expected.mean(), logits - expected.mean()) >= least_db - 12
    assert out.hidden_states[0].reshape(-1, CONFIG.width).sub(states[0].values).abs().max() < 1e-5


def sqnr(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (expected - found).square().sum().clamp_min(1e-30)))


# What both do alike leaves float32's rounding, 100 dB and more. Where rows are rounded, theirs go to 127.5 and ours to
# 127 steps: two roundings of the same rows, 40 dB apart at int8, 30 at e4m3, a little less after two blocks.
@pytest.mark.parametrize(("scheme", "least_db"), [("int8-weights", 100), ("int8", 35), ("fp8", 25)])
@pytest.mark.parametrize("head", CLASSES)
def test_transformers_gives_our_numbers(tmp_path: Path, head: str, scheme: str, least_db: float) -> None:
    assert_alike(converted(tmp_path, head, scheme=scheme), CLASSES[head], least_db)


def test_tables_that_stay_and_layers_that_stay(tmp_path: Path) -> None:
    choices = {"blocks.0.qkv": Choice("half"), "blocks.1.down": Choice("half"), "blocks.1.up": Choice("int8")}
    folder = converted(tmp_path, "mlm", scheme="int8-weights", keep_embeddings=True, choices=choices)
    assert_alike(folder, "BertForMaskedLM", 35)


def test_factors_that_are_folded_are_nobodys_business(tmp_path: Path) -> None:
    smooth = {"blocks.0.out": 64, "blocks.1.down": 96}
    choices = {name: Choice("int8-weights", 2.0 ** torch.randint(-2, 3, (k,))) for name, k in smooth.items()}
    assert_alike(converted(tmp_path, "mlm", scheme="int8-weights", choices=choices), "BertForMaskedLM", 100)


def test_factors_that_are_not_are_refused_by_transformers(tmp_path: Path) -> None:
    choices = {"blocks.0.qkv": Choice("int8", torch.full((64,), 2.0))}
    folder = converted(tmp_path, "mlm", choices=choices)
    with pytest.raises(ValueError, match=r"geneformer-fast-smoothed|Input should be"):
        theirs(folder, "BertForMaskedLM")
    assert load(folder).get_submodule("blocks.0.qkv").smooth is not None


@torch.no_grad()
def test_only_the_encoder(tmp_path: Path) -> None:
    """With and without the prefix of BertFor..., and with heads that the folder does not have."""
    folder, ids = converted(tmp_path, "mlm", scheme="int8-weights"), cells()
    expected = theirs(folder, "BertForMaskedLM")(ids, output_hidden_states=True).hidden_states[-1]
    for options in ({}, {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}):
        model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False, **options).eval()
        assert torch.allclose(model(ids).last_hidden_state, expected, atol=1e-5)
    model = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=4).eval()
    assert torch.allclose(model(ids, output_hidden_states=True).hidden_states[-1], expected, atol=1e-5)
    assert model.classifier.weight.dtype == model.bert.pooler.dense.weight.dtype == torch.float32


@torch.no_grad()
def test_what_the_package_makes_is_read(tmp_path: Path) -> None:
    """Compressed by the package itself, in its own words: other steps, other names of groups, scales in bfloat16."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    folder = save(model_of("cells"), tmp_path / "model")
    model = transformers.BertForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16).eval()
    weights = {"num_bits": 8, "strategy": "channel", "symmetric": True}
    rows = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": rows}
    config = QuantizationConfig(config_groups={"W8A8": group}, ignore=["classifier", "re:.*pooler.*"])
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.weight_scale.data = module.weight.data.abs().amax(1, keepdim=True) / 127.5
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "theirs")
    compressor.update_config(tmp_path / "theirs")
    found = load(tmp_path / "theirs")
    assert set(found.quantization.layers.values()) == {"int8"}
    assert len(found.quantization.layers) == 8
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    assert stored["bert.encoder.layer.0.attention.self.query.weight_scale"].dtype == torch.bfloat16
    layer = found.get_submodule("blocks.1.up")
    name = "bert.encoder.layer.1.intermediate.dense"
    assert torch.equal(layer.weight_q, stored[f"{name}.weight"])
    assert torch.equal(layer.weight_scale, stored[f"{name}.weight_scale"][:, 0].float())
    assert_same_tensors(load_file(save(found, tmp_path / "again") / "model.safetensors"), stored)


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_layers_are_named_as_the_package_names_them(tmp_path: Path) -> None:
    """Which layers a configuration is about, by our reading and by the package's."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_named_modules, match_targets

    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
        )
    )
    scheme = {"weights": {"strategy": "channel"}, "format": "int-quantized"}
    rows = {"strategy": "token", "dynamic": True}
    groups = {
        "a": {"targets": ["Linear", "embeddings.word_embeddings"], **scheme},
        "b": {"targets": ["re:.*layer.1.*dense", "encoder.layer.0.output.dense"], **scheme, "input_activations": rows},
        "c": {"targets": ["encoder.layer.1.output.dense"], **scheme},
    }
    ignore = ["pooler.dense", "re:.*query", "LayerNorm"]
    said = {"quantization_config": {"config_groups": groups, "ignore": ignore}}
    ours = kinds_in(json.loads(json.dumps(said)), Path("config.json"))
    config = QuantizationConfig.model_validate(said["quantization_config"])
    targets = {target: group for group in config.config_groups.values() for target in group.targets}
    matched = {}
    for name, module in match_named_modules(bert, targets, config.ignore):
        group = targets[match_targets(name, module, targets)[0]]
        matched[name] = "int8" if group.input_activations else "int8-weights"
    kinds = {torch.nn.Linear: "Linear", torch.nn.Embedding: "Embedding"}
    found = {name: ours.kind_of(name, kinds[type(m)]) for name, m in bert.named_modules() if type(m) in kinds}
    assert {name: scheme for name, scheme in found.items() if scheme} == matched
    assert len(set(matched.values())) == 2


def test_shards_of_a_quantized_folder(tmp_path: Path) -> None:
    folder = converted(tmp_path, "mlm", scheme="int8-weights")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "SHA256SUMS").unlink()
    places = {}
    for i, part in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_alike(folder, "BertForMaskedLM", 100)
