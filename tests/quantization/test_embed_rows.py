"""Embedding tables of int8 looked up by one loop on a CPU: the numbers of one step after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from geneformer_fast import EncoderConfig, Ragged, quantize
from geneformer_fast.embeddings import RankTokens
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import VocabularyError

LENGTHS = (7, 1, 0, 40, 0, 19)


def encoder_of(width: int = 48, scheme: str = "int8", **changes: object) -> Encoder:
    torch.manual_seed(3)
    config = EncoderConfig(vocab_size=60, width=width, n_layers=1, n_heads=2, ff_width=32, max_len=40, **changes)
    encoder = Encoder(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2 + 0.1)
    return quantize(encoder, scheme=scheme).eval()


def cells_of(dtype: torch.dtype = torch.int64, lengths: tuple[int, ...] = LENGTHS) -> Ragged:
    generator = torch.Generator().manual_seed(5)
    return Ragged.from_lengths(torch.randint(0, 60, (sum(lengths),), generator=generator).to(dtype), lengths)


def looked_up(encoder: Encoder, tokens: Ragged, dtype: torch.dtype = torch.float32, *, by_rows: bool = True) -> tuple:
    embeddings, norm, reader = encoder.embeddings, encoder.embedding_norm, encoder.blocks[0].qkv
    with torch.no_grad():
        assert embeddings._is_by_rows(tokens, norm, 0.0) == by_rows
        return embeddings(tokens, norm, 0.0, dtype, reader)


def in_float64(encoder: Encoder, tokens: Ragged) -> torch.Tensor:
    embeddings, norm = encoder.embeddings, encoder.embedding_norm
    token, position = (
        t.weight_q.double() * t.row_scale.double()[:, None] for t in (embeddings.token, embeddings.position)
    )
    places = torch.cat([torch.arange(length) for length in tokens.lengths.tolist()])
    hidden = token[tokens.values.long()] + position[places]
    if embeddings.token_type is not None:
        hidden += embeddings.token_type.weight[0].double()
    return hidden if norm is None else F.layer_norm(
        hidden, hidden.shape[-1:], norm.weight.double(), norm.bias.double(), norm.eps
    )  # fmt: skip


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, {"n_token_types": 0}, {"norm": "pre", "embedding_norm": False}], ids=str)
@torch.no_grad()
def test_against_float64(changes: dict[str, object], out_dtype: torch.dtype) -> None:
    encoder = encoder_of(**changes)
    expected = in_float64(encoder, cells_of())
    for ids in (torch.int32, torch.int64):
        stream, x = looked_up(encoder, cells_of(ids), out_dtype)
        torch.testing.assert_close(stream.double(), expected, rtol=3e-6, atol=3e-6)
        assert stream.dtype == torch.float32
        assert x.dtype == out_dtype
        assert torch.equal(x, stream.to(out_dtype))


@pytest.mark.parametrize("n_token_types", [0, 2])
def test_sums_are_torchs_to_the_bit(n_token_types: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, tokens = encoder_of(norm="pre", embedding_norm=False, n_token_types=n_token_types), cells_of()
    found, _ = looked_up(encoder, tokens)
    monkeypatch.setattr(RankTokens, "_is_by_rows", lambda *_: False)
    expected, _ = looked_up(encoder, tokens, by_rows=False)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def test_threads_and_other_cells_change_no_bit() -> None:
    encoder, tokens = encoder_of(), cells_of(lengths=(3, 40, 0, 33, 1, 25))
    n_threads = torch.get_num_threads()
    try:
        one, two = (torch.set_num_threads(n) or looked_up(encoder, tokens)[0] for n in (1, 2))
    finally:
        torch.set_num_threads(n_threads)
    assert torch.equal(one, two)
    for cell, rows in zip(tokens.cells(), tokens.with_values(one).cells(), strict=True):
        if len(cell):
            assert torch.equal(looked_up(encoder, Ragged.from_cells([cell]))[0], rows)


def test_no_cells_and_no_tokens() -> None:
    encoder = encoder_of()
    for lengths in ((), (0, 0)):
        stream, x = looked_up(encoder, cells_of(lengths=lengths), torch.bfloat16)
        assert stream.shape == x.shape == (0, 48)


@torch.no_grad()
def test_what_is_left_to_torch() -> None:
    tokens = cells_of()
    for encoder in (encoder_of(width=50), encoder_of(width=34, n_token_types=0)):
        stream, _ = looked_up(encoder, tokens, by_rows=False)
        torch.testing.assert_close(stream.double(), in_float64(encoder, tokens), rtol=3e-6, atol=3e-6)
    encoder = encoder_of()
    embeddings, norm = encoder.embeddings, encoder.embedding_norm
    assert embeddings._is_by_rows(tokens, norm, 0.0)
    assert not embeddings._is_by_rows(tokens, norm, 0.1)
    norm.requires_grad_(True)
    with torch.enable_grad():
        assert not embeddings._is_by_rows(tokens, norm, 0.0)
    seen: list[torch.Tensor] = []
    with embeddings.token.register_forward_hook(lambda module, inputs, output: seen.append(output)):
        looked_up(encoder, tokens, by_rows=False)
    assert len(seen) == 1


@pytest.mark.parametrize(("scheme", "is_asked"), [("int8", True), ("int8-weights", True), ("fp8", False)])
def test_numba_is_not_loaded_for_the_lookup_alone(scheme: str, is_asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 110 MB; loops multiply or widen weights of int8, and none has anything to do with float8."""
    looked: list[bool] = []
    monkeypatch.setattr(RankTokens, "_is_by_rows", lambda *_: looked.append(True) or False)
    with torch.no_grad():
        encoder_of(scheme=scheme)(cells_of())
    assert looked == [True] * is_asked


@pytest.mark.parametrize("wrong", [-1, 60])
def test_ids_are_checked(wrong: int) -> None:
    encoder = encoder_of()
    with pytest.raises(VocabularyError, match="outside the model's 60 tokens"):
        encoder.embeddings(Ragged.from_cells([[1, wrong]]), encoder.embedding_norm, 0.0, torch.float32)
