"""What follows attention in a block of int8 on a CPU, row by row: the numbers of one step after the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from geneformer_kernels.dispatch import use_impl
from geneformer_kernels.target import target_of

import geneformer_fast as gf
from geneformer_fast.block import Block
from geneformer_fast.encoder import Encoder
from geneformer_fast.ragged import Ragged

TOKENS = Ragged.from_cells([torch.arange(3, 3 + length) for length in (41, 3, 70)])

pytestmark = pytest.mark.skipif(target_of("cpu").int8_instructions is None, reason="no loops for this CPU")


def quantized(activation: str = "relu", norm: str = "post", dtype: str = "float32", smooth: str = "") -> Encoder:
    config = gf.EncoderConfig(
        vocab_size=100, width=64, n_layers=2, n_heads=4, ff_width=112, max_len=80, activation=activation, norm=norm,
        embedding_norm=norm == "post", final_norm=norm == "pre", dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = Encoder(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    encoder = gf.quantize(encoder).cast(dtype).eval()
    for block in encoder.blocks:
        for layer in (block.qkv, block.out, block.up, block.down):
            layer.mode = "dynamic"
        if smooth:
            layer = getattr(block, smooth)
            layer.smooth = torch.rand(layer.in_features) + 0.5
    return encoder


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every block that goes row by row."""
    found: list[str] = []
    original = Block._by_rows

    def by_rows(self: Block, *arguments: Any) -> Any:
        found.append("row by row")
        return original(self, *arguments)

    monkeypatch.setattr(Block, "_by_rows", by_rows)
    return found


def one_by_one(encoder: Encoder, compute: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(Block, "_is_near", lambda *_: False)
        return compute()


@pytest.mark.parametrize(
    ("activation", "norm", "dtype", "smooth"),
    [
        ("relu", "post", "float32", ""),
        ("gelu", "post", "bfloat16", "out"),
        ("gelu_tanh", "pre", "float32", "up"),
        ("swiglu", "pre", "bfloat16", "qkv"),
        ("relu", "post", "bfloat16", "qkv"),
    ],
)
def test_same_bits_as_one_after_the_other(
    activation: str, norm: str, dtype: str, smooth: str, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every instruction set, on one thread and on two; the last LayerNorm of floats is another one on three."""
    from geneformer_kernels.cpu import int8_products

    encoder = quantized(activation, norm, dtype, smooth)

    @torch.inference_mode()
    def compute() -> list[torch.Tensor]:
        return [each.values for each in encoder.hidden_states(TOKENS)]

    expected = one_by_one(encoder, compute, monkeypatch)
    assert not taken
    n_threads = torch.get_num_threads()
    try:
        for name, threads in zip(int8_products.instruction_sets(), (1, 2, 1, 2), strict=False):
            torch.set_num_threads(threads)
            with int8_products.forced(name):
                found = compute()
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), name
    finally:
        torch.set_num_threads(n_threads)
    assert len(taken) == 2 * len(int8_products.instruction_sets())


@pytest.mark.parametrize("why", ["smooth down", "another implementation", "a hook", "float16", "a layer in floats"])
def test_where_rows_do_not_go_through_at_once(why: str, taken: list[str]) -> None:
    encoder = quantized(dtype="float16" if why == "float16" else "float32", smooth="down" if "down" in why else "")
    seen: list[int] = []
    for block in encoder.blocks:
        if why == "a hook":
            block.out.register_forward_hook(lambda *_: seen.append(1))
        if why == "a layer in floats":
            block.up.mode = "weight_only"
    with torch.inference_mode(), use_impl("torch", "int8_linear") if "another" in why else nullcontext():
        encoder(TOKENS)
    assert not taken
    assert len(seen) == (2 if why == "a hook" else 0)


def test_who_learns_gets_a_gradient(taken: list[str]) -> None:
    encoder = quantized(norm="pre").requires_grad_(False)
    norm = encoder.blocks[1].attention_norm.requires_grad_(True)  # which the first block computes
    encoder(TOKENS).values.square().sum().backward()
    assert norm.weight.grad.abs().max() > 0
    assert not taken
    with torch.no_grad():
        encoder(TOKENS)
    assert len(taken) == 2


def test_the_first_layer_rounds_its_rows_itself() -> None:
    """Without a pass of its own before the product."""
    encoder = quantized()
    x = torch.randn(40, 64)
    with torch.inference_mode():
        layer = encoder.blocks[0].qkv
        assert torch.equal(layer(x), layer(layer.rounded(x)))
