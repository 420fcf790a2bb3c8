"""Quantized encoders of every family: they compute what their weights say, the same in every situation."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from geneformer_kernels.dispatch import use_impl
from small_encoders import FAMILIES, cells_of, encoder_of

from geneformer_fast import Encoder, Ragged, quantize
from geneformer_fast.errors import UnsupportedError, VocabularyError
from geneformer_fast.layers import EightBits
from geneformer_fast.quantization.build import layers_of
from geneformer_fast.quantization.choices import Choice

families = pytest.mark.parametrize("family", FAMILIES)


def widened(encoder: Encoder, plain: Encoder) -> Encoder:
    """The encoder in floating point whose weights are what those of a quantized one stand for."""
    made, layers = copy.deepcopy(plain), layers_of(encoder)
    with torch.no_grad():
        for name, layer in layers_of(made).items():
            layer.weight.copy_(layers[name].weight)
    return made


def closeness(found: Ragged, expected: Ragged) -> float:
    """The least cosine."""
    with torch.no_grad():
        return float(F.cosine_similarity(found.values.double(), expected.values.double(), dim=-1).min())


@families
@pytest.mark.parametrize("scheme", ["int8-weights", "fp8"])
def test_weights_alone_are_rounded(family: str, scheme: str) -> None:
    plain = encoder_of(family)
    encoder, tokens = quantize(plain, scheme=scheme), cells_of(plain)
    with torch.no_grad():
        found, expected = encoder(tokens), widened(encoder, plain)(tokens)
        torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=2e-5)
        assert (found.values - plain(tokens).values).abs().max() > 1e-4
        assert closeness(found, plain(tokens)) > (0.999 if scheme == "int8-weights" else 0.98)


@families
def test_rows_are_rounded(family: str, multiplying: Callable[[str], None]) -> None:
    plain = encoder_of(family)
    encoder, tokens = quantize(plain), cells_of(plain)
    with torch.no_grad():
        multiplying("weight_only")
        wide = encoder(tokens)
        multiplying("dynamic")
        found = encoder(tokens)
        assert (found.values - wide.values).abs().max() > 1e-4
        assert closeness(found, plain(tokens)) > 0.998
        for layer in ("penultimate", "embeddings", 0):
            assert closeness(encoder(tokens, layer=layer), plain(tokens, layer=layer)) > 0.998
        states = encoder.hidden_states(tokens)
        assert torch.equal(states[-1].values, found.values)
        assert torch.equal(states[1].values, encoder(tokens, layer=0).values)
        weights, expected = encoder.attention_weights(tokens), plain.attention_weights(tokens)
        assert max(float((a - b).abs().max()) for a, b in zip(weights, expected, strict=True)) < 0.05


@families
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_changes_no_number(family: str, dtype: str, multiplying: Callable[[str], None]) -> None:
    """Without one LayerNorm writes rows of int8; with one the layers round what it writes in float32.

    By torch both add up a row in one order. Compiled loops have one of their own, so that now and then a number between
    two integers becomes the other one.
    """
    multiplying("dynamic")
    encoder = quantize(encoder_of(family)).cast(dtype)
    tokens = cells_of(encoder)
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.LayerNorm)]
    with torch.no_grad():
        fast = encoder(tokens)
    with use_impl("torch"):
        with torch.no_grad():
            expected = encoder(tokens).values
        for norm in norms:
            norm.requires_grad_(True)
        found = encoder(tokens).values
    assert found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert closeness(fast, tokens.with_values(found)) > 0.9995
    found.square().mean().backward()
    assert all(norm.weight.grad is not None and norm.weight.grad.isfinite().all() for norm in norms)


def test_gradients_are_those_of_the_widened_encoder() -> None:
    plain = encoder_of("geneformer")
    encoder, tokens = quantize(plain, scheme="int8-weights"), cells_of(plain)
    wide = widened(encoder, plain)
    for model in (encoder, wide):
        model.requires_grad_(False)
        model.embedding_norm.requires_grad_(True)
        model(tokens).values.square().mean().backward()
    torch.testing.assert_close(encoder.embedding_norm.weight.grad, wide.embedding_norm.weight.grad)


@families
def test_a_cell_alone_has_the_numbers_it_has_among_others(family: str, multiplying: Callable[[str], None]) -> None:
    """To the bit: products are of integers, and everything else is done row by row, or cell by cell.

    But for soft bins, whose products are of float32, by whichever of its ways the library takes for so many rows.
    """
    multiplying("dynamic")
    encoder = quantize(encoder_of(family))
    tokens = cells_of(encoder, (7, 1, 40, 3, 33))
    with torch.no_grad():
        together = encoder(tokens)
        for start, length in zip(tokens.starts.tolist(), tokens.lengths.tolist(), strict=True):
            alone = encoder(Ragged.from_cells([tokens.values[start : start + length]])).values
            tolerance = 0.0 if encoder.config.inputs == "tokens" else 0.01
            torch.testing.assert_close(alone, together.values[start : start + length], rtol=0.0, atol=tolerance)


KINDS = ("half", "int8", "int8-weights", "fp8")


@pytest.mark.parametrize("family", ["geneformer", "aido.cell"])
@pytest.mark.parametrize(("up", "down"), list(itertools.product(KINDS, KINDS)))
def test_any_mixture_of_layers(family: str, up: str, down: str, multiplying: Callable[[str], None]) -> None:
    multiplying("dynamic")
    plain = encoder_of(family)
    choices = {"blocks.0.up": Choice(up), "blocks.0.down": Choice(down), "blocks.1.up": Choice(down)}
    choices |= {"blocks.1.qkv": Choice(up), "blocks.0.out": Choice(down)}
    encoder, tokens = quantize(plain, choices=choices), cells_of(plain)
    kinds = {name: module.scheme for name, module in encoder.named_modules() if isinstance(module, EightBits)}
    assert [kinds.get(name, "half") for name in choices] == [choice.kind for choice in choices.values()]
    with torch.no_grad():
        assert closeness(encoder(tokens), plain(tokens)) > 0.97
    with use_impl("torch"):  # as below
        with torch.no_grad():
            found = encoder(tokens)
        encoder.blocks[0].attention_norm.requires_grad_(True)
        torch.testing.assert_close(encoder(tokens).values, found.values, rtol=1e-4, atol=1e-4)


@families
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_compute_dtype_is_another(family: str, dtype: str, each_mode: str) -> None:
    plain = encoder_of(family)
    encoder, tokens = quantize(plain).cast(dtype), cells_of(plain)
    assert encoder.dtype == getattr(torch, dtype)
    assert encoder.blocks[0].qkv.weight_scale.dtype == torch.float32
    assert encoder.blocks[0].ff_norm.weight.dtype == torch.float32
    with torch.no_grad():
        found = encoder(tokens)
        assert found.values.dtype == torch.float32
        assert closeness(found, plain(tokens)) > 0.995
        again = encoder.cast("float32")(tokens)
    assert torch.equal(again.values, quantize(plain)(tokens).values)


def test_autocast(each_mode: str) -> None:
    plain = encoder_of("geneformer")
    encoder, tokens = quantize(plain), cells_of(plain)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = encoder(tokens)
    with torch.no_grad():
        expected = encoder.cast("bfloat16")(tokens)
    assert torch.equal(found.values, expected.values)


def test_float64_is_refused_and_changes_nothing() -> None:
    encoder = quantize(encoder_of("geneformer"))
    for change in (lambda: encoder.cast("float64"), lambda: quantize(encoder_of("geneformer").cast("float64"))):
        with pytest.raises(UnsupportedError, match="float64"):
            change()
    assert {tensor.dtype for tensor in encoder.state_dict().values()} == {torch.float32, torch.int8}
    kept = quantize(encoder_of("geneformer"), keep_embeddings=True)  # its tables come first, and could change
    for change in (lambda: kept.to(torch.float64), kept.double):
        with pytest.raises(UnsupportedError, match="float64"):
            change()
    assert {tensor.dtype for tensor in kept.state_dict().values()} == {torch.float32, torch.int8}
    assert kept.half().dtype == torch.float16
    with pytest.raises(UnsupportedError, match="fresh weights"):
        encoder.reset_parameters()


@pytest.mark.parametrize("is_keeping", [False, True])
def test_ids_and_lengths_beyond_the_tables(is_keeping: bool) -> None:
    encoder = quantize(encoder_of("geneformer"), keep_embeddings=is_keeping)
    for cell in ([1, 60], [1, -1], [1] * 41):
        with pytest.raises(VocabularyError):
            encoder(Ragged.from_cells([cell]))
    nothing = encoder(Ragged.from_cells([[], []]))
    assert nothing.values.shape == (0, 32)


@pytest.mark.parametrize(
    ("family", "changes"), [("geneformer", {}), ("geneformer", {"tied_decoder": False}), ("bionemo", {})]
)
def test_masked_genes(family: str, changes: dict[str, object]) -> None:
    plain = encoder_of(family, "mlm", **changes)
    encoder, tokens = quantize(plain, scheme="int8-weights"), cells_of(plain)
    assert ("head.decoder" in encoder.quantization.layers) == ("tied_decoder" in changes)
    with torch.no_grad():
        wide, hidden = widened(encoder, plain), encoder(tokens)
        rows, targets = torch.tensor([0, 5, 9]), torch.tensor([3, -100, 8])
        torch.testing.assert_close(encoder.logits(hidden, rows), wide.logits(hidden, rows), rtol=1e-5, atol=1e-5)
        loss, expected = (model.mlm_loss(hidden, rows, targets) for model in (encoder, wide))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        assert F.cosine_similarity(encoder.logits(hidden), plain.logits(plain(tokens))).min() > 0.999
    torch.testing.assert_close(encoder.token_table.detach(), wide.token_table.detach())


@pytest.mark.parametrize("head", ["cells", "genes", "pooler", "mlm"])
@pytest.mark.parametrize("kind", ["half", "int8", "fp8"])
def test_heads(head: str, kind: str, each_mode: str) -> None:
    plain = encoder_of("geneformer", head)
    names = [name for name in layers_of(plain) if name.startswith("head.")]
    encoder = quantize(plain, choices={name: Choice(kind) for name in names}).cast("bfloat16")
    assert all((name in encoder.quantization.layers) == (kind != "half") for name in names)
    with torch.no_grad():
        tokens = cells_of(plain)
        found, expected = (model.logits(model(tokens)).float() for model in (encoder, plain))
    assert F.cosine_similarity(found, expected).min() > 0.98


def test_what_is_on_top_learns(each_mode: str) -> None:
    encoder = quantize(encoder_of("geneformer", "cells")).train()
    encoder.head.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    tokens, classes = cells_of(encoder), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.Adam([p for p in encoder.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(encoder.logits(encoder(tokens)), classes)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    changed = {name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("head.") for name in changed)


def test_blocks_are_computed_again(multiplying: Callable[[str], None]) -> None:
    """Activation checkpointing hands rows and tensors through."""
    multiplying("dynamic")
    encoder, gradients = quantize(encoder_of("geneformer", dropout=0.0, attention_dropout=0.0)).train(), []
    for encoder.is_recomputing in (False, True):
        for is_learning in (False, True):
            encoder.embedding_norm.requires_grad_(is_learning)
            encoder.zero_grad()
            out = encoder(cells_of(encoder)).values
            if is_learning:
                out.square().mean().backward()
                gradients.append(encoder.embedding_norm.weight.grad.clone())
            else:
                assert not out.requires_grad
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("scheme", "mode"),
    [
        ("int8", "dynamic"),
        pytest.param("int8", "weight_only", marks=pytest.mark.slow),
        pytest.param("fp8", "weight_only", marks=pytest.mark.slow),
    ],
)
def test_one_graph(scheme: str, mode: str, multiplying: Callable[[str], None]) -> None:
    """``fullgraph``: no break between tokens and logits."""
    multiplying(mode)
    torch._dynamo.reset()
    encoder = quantize(encoder_of("geneformer", "mlm", n_layers=1), scheme=scheme)

    def logits_of(tokens: Ragged) -> torch.Tensor:
        return encoder.logits(encoder(tokens))

    compiled = torch.compile(logits_of, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for lengths in ((7, 1, 12, 3), (5, 9)):
            tokens = cells_of(encoder, lengths)
            torch.testing.assert_close(compiled(tokens), logits_of(tokens))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled for the card here")
@pytest.mark.parametrize("family", ["geneformer", "aido.cell"])
def test_kernels_of_the_card_give_the_same(family: str, each_mode: str) -> None:
    encoder = quantize(encoder_of(family, "mlm", n_layers=1))
    tokens = cells_of(encoder)
    with torch.no_grad():
        expected = encoder.logits(encoder(tokens))
        with use_impl("triton"):
            found = encoder.logits(encoder(tokens))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
