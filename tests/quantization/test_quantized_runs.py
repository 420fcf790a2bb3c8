"""Quantized encoders where users meet them: embeddings of cells and genes, classifiers, heads that learn on top."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toys

from geneformer_fast import embed, quantize
from geneformer_fast.finetuning.models import freeze, pretrained, with_head

KEY = "X_geneformer"


@pytest.mark.parametrize("scheme", ["int8", "int8-weights", "fp8"])
def test_embeddings_of_cells(scheme: str) -> None:
    words, plain = toys.vocabulary(), toys.encoder()
    found, expected = toys.cells(9), toys.cells(9)
    embed(expected, plain, dictionary=words)
    embed(found, quantize(plain, scheme=scheme), dictionary=words, token_budget=60)
    cosine = torch.nn.functional.cosine_similarity(*(torch.from_numpy(a.obsm[KEY]) for a in (found, expected)))
    assert cosine.min() > (0.99 if scheme == "fp8" else 0.999)
    assert (expected.uns[KEY]["quantization"], found.uns[KEY]["quantization"]) == ("none", scheme)


def test_embeddings_of_genes() -> None:
    words, plain = toys.vocabulary(), toys.encoder()
    found, expected = (
        embed(toys.cells(9), model, dictionary=words, pool="gene", copy=True).varm[KEY]
        for model in (quantize(plain), plain)
    )
    seen = ~np.isnan(expected[:, 0])
    np.testing.assert_array_equal(np.isnan(found[:, 0]), ~seen)
    np.testing.assert_allclose(found[seen], expected[seen], atol=0.1)


@pytest.mark.parametrize("kind", ["cells", "genes"])
def test_a_fresh_classifier_learns_on_what_is_frozen(kind: str) -> None:
    """What fine-tuning does before its first step."""
    base = quantize(toys.encoder(), scheme="int8-weights")
    start = pretrained(base)
    assert start.quantization == base.quantization
    made = with_head(start, kind, 4)
    freeze(made, 2, embeddings=True)
    assert {name for name, p in made.named_parameters() if p.requires_grad} == {
        f"head.{name}" for name, _ in made.head.named_parameters()
    }
    assert made.quantization.layers == base.quantization.layers
    assert torch.equal(made.blocks[0].qkv.weight_q, base.blocks[0].qkv.weight_q)
