"""The encoder in float32 by the compiled loops of a CPU with AVX2: every cell by itself, whatever is beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from geneformer_kernels import on_device
from geneformer_kernels.cpu import float32_block
from geneformer_kernels.dispatch import use_impl
from geneformer_kernels.target import Target, target_of
from tolerance import Witness, assert_as_good_as

from geneformer_fast import Encoder, EncoderConfig, Ragged, quantize
from geneformer_fast import block as block_module
from geneformer_fast.quantization.choices import Choice

pytestmark = pytest.mark.skipif(not target_of("cpu").has_float32_loops, reason="needs a CPU with AVX2")

GEOMETRY = dict(n_layers=2, width=32, n_heads=2, ff_width=48, vocab_size=50, max_len=400)
KINDS: dict[str, dict[str, Any]] = {
    "post-norm": dict(activation="relu"),
    "post-norm, erf": dict(activation="gelu"),
    "pre-norm": dict(norm="pre", activation="gelu_tanh", final_norm=True),
    "pre-norm, open end": dict(norm="pre", activation="swiglu", final_norm=False),
}
LENGTHS = (7, 1, 300, 95, 96, 97, 13)


@pytest.fixture
def loops() -> Iterator[None]:
    """What would run on a CPU that has AVX2 and nothing wider."""
    with use_impl("numba"):
        yield


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows every loop over a block was given."""
    rows: list[int] = []
    plain = float32_block.after_attention
    monkeypatch.setattr(
        float32_block, "after_attention", lambda context, *rest: rows.append(len(context)) or plain(context, *rest)
    )
    return rows


def model(kind: str) -> Encoder:
    torch.manual_seed(3)
    encoder = Encoder(EncoderConfig(**{**GEOMETRY, **KINDS[kind]}), head="mlm").eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 + (0.05 if parameter.ndim == 1 else 0.0))
    return encoder


def batch(*lengths: int) -> Ragged:
    generator = torch.Generator().manual_seed(7)
    return Ragged.from_cells([torch.randint(1, 50, (length,), generator=generator) for length in lengths])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", ["last", 0])
def test_against_float64(kind: str, layer: str | int, loops: None, blocks: list[int]) -> None:
    encoder, tokens = model(kind), batch(*LENGTHS)
    with torch.inference_mode():
        found = encoder(tokens, layer=layer).values
        assert blocks == [sum(LENGTHS)] * (2 if layer == "last" else 1)

        def by_torch(encoder: Encoder) -> torch.Tensor:
            with use_impl("reference"):
                return encoder(tokens, layer=layer).values

        exact = by_torch(model(kind).cast("float64"))

        assert_as_good_as(found, Witness(by_torch, encoder), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_one_loop_gives_the_numbers_of_its_steps(kind: str, loops: None, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, tokens = model(kind), batch(*LENGTHS)
    with torch.inference_mode():
        whole = encoder(tokens).values
        monkeypatch.setattr(block_module.Block, "_is_near_in_float32", lambda *arguments: False)
        assert torch.equal(encoder(tokens).values, whole)


@pytest.mark.parametrize("kind", ["post-norm", "pre-norm"])
def test_threads_and_other_cells_change_nothing(kind: str, loops: None) -> None:
    encoder, tokens = model(kind), batch(*LENGTHS)
    before = torch.get_num_threads()
    with torch.inference_mode():
        whole = encoder(tokens).values.split(list(LENGTHS))
        try:
            for n_threads in (1, 2, 3):
                torch.set_num_threads(n_threads)
                for found, expected in zip(encoder(tokens).values.split(list(LENGTHS)), whole, strict=True):
                    assert torch.equal(found, expected)
        finally:
            torch.set_num_threads(before)
        for cell, expected in zip(tokens.values.split(list(LENGTHS)), whole, strict=True):
            assert torch.equal(encoder(Ragged.from_cells([cell])).values, expected)


def test_who_looks_at_a_layer_sees_it(loops: None, blocks: list[int]) -> None:
    encoder, tokens, seen = model("post-norm"), batch(5, 9), []
    block = encoder.blocks[0]
    with torch.inference_mode():
        expected = encoder(tokens).values
        assert blocks == [14, 14]
        hook = block.out.register_forward_hook(lambda *call: seen.append("out"))
        assert torch.equal(encoder(tokens).values, expected)
        hook.remove()
        block.out.forward = lambda x: torch.zeros_like(x)
        assert not torch.equal(encoder(tokens).values, expected)
        del block.out.forward
        with torch.nn.modules.module.register_module_forward_hook(lambda *call: seen.append("global")):
            encoder(tokens)
    assert "out" in seen
    assert "global" in seen
    assert blocks == [14] * (2 + 1 + 1)


def test_blocks_of_wide_rows_are_torchs_where_nobody_chooses(
    blocks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_device, "target_of", lambda place: Target.cpu({"avx2", "fma"}))
    encoder = model("post-norm")
    with torch.inference_mode():
        encoder(batch(7, 5))
        assert blocks == [12, 12]
        monkeypatch.setattr(on_device, "WIDEST_OF_LOOPS", 47)  # of the feed-forward half, which is wider
        encoder(batch(7, 5))
        assert blocks == [12, 12]
        with use_impl("numba"):
            encoder(batch(7, 5))
    assert blocks == [12] * 4


def test_gradients_and_dropout_are_torchs() -> None:
    """Nobody asked by name: what the loops do not have is computed otherwise."""
    encoder, tokens = model("post-norm"), batch(5, 9)
    encoder(tokens).values.sum().backward()
    assert all(block.up.weight.grad is not None for block in encoder.blocks)
    frozen = model("post-norm").requires_grad_(False).train()
    with torch.inference_mode():
        assert not torch.equal(frozen(tokens).values, frozen(tokens).values)


def test_only_a_part_is_quantized(loops: None, blocks: list[int]) -> None:
    """A block of float32 before one that wants rows of int8."""
    encoder, tokens = model("post-norm"), batch(*LENGTHS)
    half = {f"blocks.0.{name}": Choice("half") for name in ("qkv", "out", "up", "down")}
    with torch.inference_mode():
        expected = encoder(tokens).values
        quantized = quantize(encoder, scheme="int8", choices=half)
        blocks.clear()
        found = quantized(tokens).values
    assert blocks == [sum(LENGTHS)]
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.99
