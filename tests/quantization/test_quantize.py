"""quantize() in memory: which layers become what, smoothing, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from small_encoders import FAMILIES, cells_of, encoder_of
from torch import nn

from geneformer_fast import Encoder, EncoderConfig, quantize
from geneformer_fast.checkpoints.skeleton import skeleton
from geneformer_fast.errors import CheckpointError, UnsupportedError
from geneformer_fast.quantization.build import all_choices, default_choices, hollow, layers_of
from geneformer_fast.quantization.choices import Choice, folds_into


def test_the_given_encoder_stays_as_it_is() -> None:
    plain = encoder_of("geneformer", "mlm")
    before, layers = {name: tensor.clone() for name, tensor in plain.state_dict().items()}, layers_of(plain)
    smooth = torch.rand(32) + 0.5
    made = quantize(plain, choices={"blocks.0.out": Choice("int8", smooth), "blocks.1.qkv": Choice("half")})
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    assert all(layers_of(plain)[name] is layer for name, layer in layers.items())
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert not any(parameter.requires_grad for parameter in made.parameters())
    places = {tensor.data_ptr() for tensor in plain.state_dict().values()}
    assert not any(tensor.data_ptr() in places for tensor in made.state_dict().values())
    assert made.config == plain.config
    assert not made.training


@pytest.mark.parametrize("head", [None, "mlm", "cells"])
def test_which_layers_become_what(head: str | None) -> None:
    encoder = quantize(encoder_of("geneformer", head))
    names = [f"blocks.{i}.{name}" for i in range(2) for name in ("qkv", "out", "up", "down")]
    tables = ["embeddings.token", "embeddings.position"]
    assert encoder.quantization.scheme == "int8"
    assert encoder.quantization.layers == {**dict.fromkeys(tables, "int8-weights"), **dict.fromkeys(names, "int8")}
    json.dumps(asdict(encoder.quantization))
    kept = quantize(encoder_of("geneformer", head), scheme="fp8", keep_embeddings=True).quantization
    assert (kept.scheme, sorted(kept.layers)) == ("fp8", sorted(names))
    assert encoder_of("geneformer").quantization is None
    choices = default_choices(encoder_of("geneformer", head), "int8")
    assert all(choice.reason for choice in choices.values())
    assert set(choices) == set(layers_of(encoder_of("geneformer", head)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_an_empty_encoder_takes_what_another_holds(family: str, scheme: str) -> None:
    """Which is how a folder is loaded: nothing is ever there in full precision."""
    plain = encoder_of(family, "mlm")
    smooth = {name: Choice(scheme, torch.rand(32) + 0.5) for name in ("blocks.0.qkv", "blocks.1.up", "blocks.1.out")}
    choices = all_choices(plain, scheme, smooth)
    encoder = quantize(plain, scheme=scheme, choices=smooth)
    made = hollow(skeleton(plain.config, "mlm"), choices)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in made.state_dict().items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in encoder.state_dict().items()
    }
    made.load_state_dict(encoder.state_dict(), assign=True)
    assert made.quantization == encoder.quantization
    assert not any(parameter.requires_grad for parameter in made.parameters())
    with torch.no_grad():
        tokens = cells_of(plain)
        assert torch.equal(made.eval()(tokens).values, encoder(tokens).values)


@pytest.mark.parametrize(("name", "most"), [("geneformer-v1-10m", 0.30), ("geneformer-v2-104m", 0.27)])
def test_bytes_of_published_models(name: str, most: float) -> None:
    plain = skeleton(EncoderConfig.preset(name), "mlm")
    n_bytes = sum(tensor.nbytes for tensor in plain.state_dict().values())
    made = hollow(plain, default_choices(plain, "int8"))
    assert 0.25 < sum(tensor.nbytes for tensor in made.state_dict().values()) / n_bytes < most


def with_outliers(family: str) -> Encoder:
    """One column in 32 of what each layer reads is 60 times as large, and its weights are as much smaller."""
    encoder = encoder_of(family)
    norms = [module for name, module in encoder.named_modules() if name.endswith(("attention_norm", "ff_norm"))]
    if encoder.config.norm == "post":
        norms.append(encoder.embedding_norm)
    with torch.no_grad():
        for norm in norms:
            norm.weight[3] *= 60
            norm.bias[3] *= 60
        for block in encoder.blocks:
            for column, reader, rows in ((3, block.qkv, None), (5, block.out, block.qkv), (3, block.up, None)):
                reader.weight[:, column] /= 60
                if rows is not None:
                    rows.weight[2 * 32 + column] *= 60
                    rows.bias[2 * 32 + column] *= 60
            block.up.weight[-7] *= 60
            block.up.bias[-7] *= 60
            block.down.weight[:, -7] /= 60
    return encoder


def smoothed(encoder: Encoder, scheme: str) -> dict[str, Choice]:
    choices = {}
    for name, layer in layers_of(encoder).items():
        if name.startswith("blocks."):
            smooth = torch.ones(layer.in_features)
            column = {"out": 5, "down": layer.in_features - 7}.get(name.rpartition(".")[2], 3)
            smooth[column] = 1 / 64
            choices[name] = Choice(scheme, smooth)
    return choices


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_takes_outliers_out_of_rows(family: str, multiplying: Callable[[str], None]) -> None:
    multiplying("dynamic")
    plain = with_outliers(family)
    choices, tokens = smoothed(plain, "int8"), cells_of(plain)
    with torch.no_grad():
        others = torch.arange(32) != 3
        exact = plain(tokens).values[:, others]
        errors = [
            float((encoder(tokens).values[:, others] - exact).square().mean().sqrt())
            for encoder in (quantize(plain), quantize(plain, choices=choices))
        ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_moves_scales_and_changes_nothing_else(family: str) -> None:
    """By powers of two, so that no rounding differs where weights are rounded row by row and rows are not."""
    plain = encoder_of(family)
    names = {name: layer for name, layer in layers_of(plain).items() if name.startswith("blocks.")}
    choices = {
        name: Choice("int8-weights", torch.exp2(torch.arange(layer.in_features) % 3 - 1.0))
        for name, layer in names.items()
    }
    # One source of a folded factor stays in floating point.
    choices["blocks.0.qkv"] = choices["blocks.1.up"] = Choice("half")
    encoder = quantize(plain, choices=choices)
    for name, choice in choices.items():
        folded = folds_into(name, plain.config)
        has_smooth = choice.smooth is not None and folded is None
        layer = encoder.get_submodule(name)
        assert (getattr(layer, "smooth", None) is not None) == has_smooth
        if folded and choice.smooth is not None:
            source, rows = folded
            norms = [model.get_submodule(source).weight[rows].norm(dim=1) for model in (encoder, plain)]
            torch.testing.assert_close(norms[0] / norms[1], choice.smooth, rtol=0.05, atol=0.0)
    tokens = cells_of(plain)
    with torch.no_grad():
        found, exact = encoder(tokens).values, plain(tokens).values
        assert torch.nn.functional.cosine_similarity(found, exact).min() > 0.998


def test_where_a_factor_goes() -> None:
    configs = {name: encoder_of(name).config for name in ("geneformer", "geneformer, gelu", "aido.cell")}
    found = {
        (kind, layer): folds_into(f"blocks.3.{layer}", config)
        for kind, config in configs.items()
        for layer in ("qkv", "out", "up", "down")
    }
    values = ("blocks.3.qkv", slice(64, 96))
    assert {key: place for key, place in found.items() if place is not None} == {
        ("geneformer", "out"): values, ("geneformer, gelu", "out"): values, ("aido.cell", "out"): values,
        ("geneformer", "down"): ("blocks.3.up", slice(0, 48)),
        ("aido.cell", "down"): ("blocks.3.up", slice(48, 96)),
    }  # fmt: skip


def test_what_cannot_be_quantized() -> None:
    plain = encoder_of("geneformer")
    with pytest.raises(UnsupportedError, match=r"quantized already \(int8-weights\)"):
        quantize(quantize(plain, scheme="int8-weights"))
    with pytest.raises(UnsupportedError, match="scheme must be one of int8, int8-weights, fp8, not 'int4'"):
        quantize(plain, scheme="int4")
    for bad in (float("nan"), float("inf")):
        broken = copy.deepcopy(plain)
        with torch.no_grad():
            broken.blocks[1].down.weight[3, 2] = bad
        for scheme in ("int8", "fp8"):
            with pytest.raises(CheckpointError, match=r"blocks\.1\.down\.weight holds NaN or infinity"):
                quantize(broken, scheme=scheme)


@pytest.mark.parametrize(
    ("name", "choice", "said"),
    [
        ("blocks.9.qkv", Choice("half"), "'blocks.9.qkv', but this encoder has no such layer"),
        ("blocks.0.qkv", Choice("int8", torch.ones(3)), r"smooth \[3\] must be \[32\]"),
        ("blocks.0.qkv", Choice("int8", torch.zeros(32)), "finite and positive"),
        ("blocks.0.qkv", Choice("int8", torch.full((32,), torch.nan)), "finite and positive"),
        ("blocks.0.qkv", Choice("half", torch.ones(32)), "kept as it is"),
        ("embeddings.token", Choice("int8", torch.ones(32)), "a table"),
    ],
)
def test_choices_that_fit_no_layer(name: str, choice: Choice, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        quantize(encoder_of("geneformer"), choices={name: choice})
    with pytest.raises(UnsupportedError, match="one of int8, int8-weights, fp8, half, not 'int3'"):
        Choice("int3")


def test_a_table_keeps_its_padding() -> None:
    plain = encoder_of("geneformer")
    plain.embeddings.token = nn.Embedding.from_pretrained(plain.token_table.detach(), padding_idx=0)
    assert quantize(plain).embeddings.token.padding_idx == 0


def test_cells_to_measure_on() -> None:
    """A bar that nothing passes keeps all layers; one that all pass, none."""
    plain = encoder_of("geneformer")
    measured = dict(calibrate=cells_of(plain), least_cosine=0.5)
    assert quantize(plain, bar=300.0, **measured).quantization is None
    assert quantize(plain, bar=0.0, keep_embeddings=True, **measured).quantization.layers == {
        f"blocks.{i}.{name}": "int8" for i in range(2) for name in ("qkv", "out", "up", "down")
    }
    for options, said in (
        ({"bar": 20.0}, r"bar \(--bar\) is about"), ({"max_cells": 3}, r"max_cells \(--max-cells\) is"),
        ({"choices": {}, **measured}, "leave one of them out"),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match=said):
            quantize(plain, **options)
