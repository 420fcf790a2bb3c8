"""Long batches in pieces: the same numbers as at once, hooks see whole batches, and soft bins of equal values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from geneformer_kernels.cpu.int8_products import instruction_set

from geneformer_fast import Encoder, EncoderConfig, Ragged, pieces, quantize
from geneformer_fast.layers import QuantizedLinear, Rows
from geneformer_fast.pieces import in_pieces

BASE = EncoderConfig(n_layers=3, width=64, n_heads=2, ff_width=96, vocab_size=50, max_len=60)
VARIANTS: dict[str, dict] = {
    "post": {},
    "pre": {"norm": "pre", "final_norm": True},
    "pre without a final norm": {"norm": "pre"},
    "swiglu": {"norm": "pre", "final_norm": True, "activation": "swiglu"},
}
LENGTHS = (40, 1, 23, 60, 11)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pieces of 16 rows; how many were computed is noted."""
    found: list[int] = []

    def noting(compute, *inputs):  # type: ignore[no-untyped-def]
        found.append(len(inputs[0]))
        return in_pieces(compute, *inputs)

    monkeypatch.setattr(pieces, "PIECE_ROWS", 16)
    monkeypatch.setattr("geneformer_fast.block.in_pieces", noting)
    return found


def filled(config: EncoderConfig) -> Encoder:
    torch.manual_seed(1)
    encoder = Encoder(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 + (0.1 if parameter.ndim == 1 else 0.0))
    return encoder


def cells() -> Ragged:
    generator = torch.Generator().manual_seed(2)
    return Ragged.from_cells([torch.randint(0, 50, (length,), generator=generator) for length in LENGTHS])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_pieces_are_the_whole(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch, small_pieces: list[int]) -> None:
    encoder, tokens = filled(replace(BASE, **VARIANTS[name])).cast(dtype), cells()
    with torch.inference_mode():
        found = encoder(tokens).values
        assert small_pieces == [sum(LENGTHS)] * 3
        monkeypatch.setattr(pieces, "PIECE_ROWS", 4096)
        expected = encoder(tokens).values
    assert len(small_pieces) == 3
    # A product may be added up in another order for another number of rows.
    tolerance = 1e-12 if dtype == "float64" else 0.05
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_rows_of_integers_in_pieces(monkeypatch: pytest.MonkeyPatch, small_pieces: list[int]) -> None:
    encoder = quantize(filled(replace(BASE, **VARIANTS["swiglu"])), scheme="int8")
    for layer in encoder.blocks.modules():
        if isinstance(layer, QuantizedLinear):
            layer.mode = "dynamic"
    tokens = cells()
    # Where loops compute all that follows attention, they are in pieces by themselves.
    monkeypatch.setattr("geneformer_fast.block.Block.loop_after_attention", lambda *_: None)
    with torch.inference_mode():
        found = encoder(tokens).values
        assert small_pieces
        monkeypatch.setattr(pieces, "PIECE_ROWS", 4096)
        expected = encoder(tokens).values
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert instruction_set() is None or len(small_pieces) == 3


def test_results_that_are_one_tensor_stay_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_ROWS", 4)
    x = torch.arange(20.0).view(10, 2)

    def one(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (made := rows + 1), made

    first, second = in_pieces(one, x)
    assert first is second
    assert torch.equal(first, x + 1)
    q = torch.arange(10, dtype=torch.int8)[:, None]
    _, rows = in_pieces(lambda x: (x, Rows(x.to(torch.int8), x[:, 0].float())), q)
    assert isinstance(rows, Rows)
    assert torch.equal(rows.q, q)
    assert torch.equal(rows.scale, q[:, 0].float())


def test_gradients_and_hooks_see_whole_batches(small_pieces: list[int]) -> None:
    encoder, tokens, seen = filled(BASE), cells(), []
    encoder(tokens).values.sum().backward()
    assert small_pieces == []
    handle = encoder.blocks[1].out.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    with torch.inference_mode():
        encoder(tokens)
    assert seen == [sum(LENGTHS)]
    assert len(small_pieces) in (0, 2)  # the other blocks, unless one loop computes all of each
    handle.remove()


AIDO = EncoderConfig.preset("aido-cell-3m", n_layers=1, width=32, n_heads=2, ff_width=48, max_len=400)


@pytest.mark.parametrize("share", [0.05, 0.9])
def test_soft_bins_of_equal_values_are_computed_once(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each was computed: most values 0, or hardly any; masked and padded genes among them."""
    encoder = filled(AIDO).double()
    torch.manual_seed(0)
    values = torch.where(torch.rand(400) < share, torch.rand(400) * 8, torch.zeros(400)).double()
    values[[3, 200, 399]], values[[5, 17]] = -1.0, -2.0
    tokens, rows = Ragged.from_cells([values]), []
    layer = encoder.embeddings
    plain = layer._embedded
    monkeypatch.setattr(pieces, "PIECE_ROWS", 32)
    monkeypatch.setattr(layer, "_embedded", lambda x: rows.append(len(x)) or plain(x))
    with torch.inference_mode():
        found = encoder(tokens, layer="embeddings").values
    assert max(rows) <= 32
    assert sum(rows) == (len(values.unique()) if share < 0.5 else 400)
    expected = encoder(tokens, layer="embeddings").values
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)
    place = layer.position.weight
    for i in (3, 200, 399):
        torch.testing.assert_close(found[i] - place[i], layer.mask_embedding.weight[0], atol=1e-12, rtol=0)
    for i in (5, 17):
        torch.testing.assert_close(found[i] - place[i], layer.pad_embedding.weight[0], atol=1e-12, rtol=0)
