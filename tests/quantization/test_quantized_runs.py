"""Quantized encoders where users meet them: embeddings of cells and genes, classifiers, heads that learn on top."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import toys

from geneformer_fast import Encoder, embed, open_tokens, quantize, tokenize
from geneformer_fast.data.identity import identity_of
from geneformer_fast.finetuning.models import freeze, pretrained, with_head
from geneformer_fast.finetuning.predictions import ClassifyingRun, probabilities_of, some_cells

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


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tokens of 9 cells."""
    folder = tmp_path_factory.mktemp("tokens") / "out"
    tokenize(toys.cells(9), folder, dictionary=toys.vocabulary())
    return folder


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_classes_of_cells_of_several_tasks(tokens: Path, scheme: str) -> None:
    """One matrix whose rows are dealt among the tasks; probabilities are those of the model before, nearly."""
    plain = with_head(toys.encoder(), "cells", 5)
    with torch.no_grad():
        plain.head.classifier.weight.mul_(10)
    found, expected = (run_of(model, tokens).to_memory() for model in (quantize(plain, scheme=scheme), plain))
    for ours, theirs in zip(probabilities_of(found, [2, 3]), probabilities_of(expected, [2, 3]), strict=True):
        np.testing.assert_allclose(ours.sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(ours, theirs, atol=0.05)
        assert ours.std(0).max() > 1e-3  # cells differ


def test_classes_of_genes(tokens: Path) -> None:
    plain = with_head(toys.encoder(), "genes", 3)
    codes = np.full(plain.config.vocab_size, -100)
    codes[5:40] = 0
    results = [run_of(model, tokens).gene_means(codes).result() for model in (quantize(plain), plain)]
    (ours, found, n_cells), (theirs, expected, _) = results
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert n_cells.sum() > 50


def run_of(model: Encoder, tokens: Path) -> ClassifyingRun:
    folder = open_tokens(tokens)
    return ClassifyingRun(model, some_cells(folder, np.arange(9), identity_of(folder, model.config)), None, False)
