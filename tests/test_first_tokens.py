"""Hidden states of first tokens alone: what the whole forward pass gives, with a last block that does less."""

from __future__ import annotations

import pytest
import torch

import geneformer_fast as gf
from geneformer_fast.block import first_attention

LENGTHS = (1, 7, 1, 40, 23, 2)
POST = dict(norm="post", activation="relu", embedding_norm=True, final_norm=False)
PRE = dict(norm="pre", activation="swiglu", embedding_norm=False, final_norm=True)


def encoder_of(dtype: str = "float64", **changes) -> gf.Encoder:
    torch.manual_seed(1)
    config = gf.EncoderConfig(3, 32, 4, 48, vocab_size=60, max_len=64, init_std=0.3, **changes)
    return gf.Encoder(config).eval().cast(dtype)


def cells() -> gf.Ragged:
    torch.manual_seed(2)
    return gf.Ragged.from_cells([torch.randint(0, 60, (length,)) for length in LENGTHS])


@pytest.mark.parametrize("layer", ["embeddings", 0, "penultimate", "last"])
@pytest.mark.parametrize("kind", [POST, PRE], ids=["post", "pre"])
def test_first_tokens_are_those_of_the_whole_pass(kind, layer):
    encoder, tokens = encoder_of(**kind), cells()
    with torch.inference_mode():
        whole = encoder(tokens, layer=layer)
        first = encoder.first_tokens(tokens, layer=layer)
    assert first.shape == (len(LENGTHS), 32)
    torch.testing.assert_close(first, whole.values[whole.starts.long()], atol=1e-12, rtol=0)
    assert first.std() > 0.1


def test_scores_far_apart_do_not_overflow():
    torch.manual_seed(3)
    q, k, v = (torch.randn(n, 2, 16) for n in (1, 50, 50))
    from geneformer_fast.block import FirstTokens

    readers = FirstTokens(torch.zeros(1, dtype=torch.int64), torch.zeros(50, dtype=torch.int64), torch.tensor([50]))
    found = first_attention(q * 300, k, v, readers)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *((x * s).movedim(0, 1) for x, s in ((q, 300), (k, 1), (v, 1)))
    )
    torch.testing.assert_close(found, wanted.movedim(0, 1).flatten(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["int8", "int8-weights"])
def test_weights_of_eight_bits_give_the_same(scheme, tmp_path):
    torch.manual_seed(1)
    config = gf.EncoderConfig(3, 64, 4, 128, vocab_size=60, max_len=64, init_std=0.3)
    gf.save(gf.Encoder(config), tmp_path / "model")
    gf.quantize(tmp_path / "model", tmp_path / "small", scheme=scheme)
    encoder, tokens = gf.load(tmp_path / "small", device="cpu").eval(), cells()
    with torch.inference_mode():
        whole = encoder(tokens, layer="last")
        torch.testing.assert_close(
            encoder.first_tokens(tokens, layer="last"), whole.values[whole.starts.long()], atol=2e-5, rtol=0
        )


def repetitive() -> gf.Ragged:
    """A cell without one gene, without another, ..."""
    whole = torch.randperm(60)[:40]
    return gf.Ragged.from_cells([torch.cat([whole[:gene], whole[gene + 1 :]]) for gene in range(12)] + [whole[:0]])


@pytest.mark.parametrize("layer", ["embeddings", 0, "last"])
@pytest.mark.parametrize("kind", [POST, PRE], ids=["post", "pre"])
def test_what_depends_on_token_and_place_may_be_computed_once(kind, layer, monkeypatch):
    encoder, tokens = encoder_of(**kind), repetitive()
    seen: list[int] = []
    encoder.blocks[0].qkv.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    with torch.inference_mode():
        whole = encoder(tokens, layer=layer)
        once = encoder(tokens, layer=layer, is_repetitive=True)
        first = encoder.first_tokens(gf.Ragged.from_cells(tokens.cells()[:-1]), layer=layer, is_repetitive=True)
    torch.testing.assert_close(once.values, whole.values, atol=1e-12, rtol=0)
    torch.testing.assert_close(first, whole.values[whole.starts.long()[:-1]], atol=1e-12, rtol=0)
    if layer != "embeddings":
        assert seen[0] == tokens.n_tokens
        assert max(seen[1:]) == 11 + 39  # genes 0 to 10 in their places, genes 1 to 39 one place before
    # Cells that have little in common are computed one by one, and so is what has a gradient.
    seen.clear()
    with torch.inference_mode():
        encoder(cells(), is_repetitive=True)
    encoder(tokens, is_repetitive=True)
    assert seen == [sum(LENGTHS), tokens.n_tokens]
