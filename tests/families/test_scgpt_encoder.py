"""An encoder over genes and values: packed, on the fast paths of a CPU, in eight bits, counted, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from scgpt_folders import small

import geneformer_fast as gf
from geneformer_fast.decoders import ExpressionDecoder
from geneformer_fast.errors import InputError, UnsupportedError, VocabularyError
from geneformer_fast.families import family, scgpt
from geneformer_fast.profiling.flops.anatomy import anatomy, anatomy_of
from geneformer_fast.profiling.flops.work import encoder_flops, head_flops
from geneformer_fast.ragged import Ragged

CLS, N_GENES = 58, 57


def cells_of(*lengths: int, seed: int = 1) -> Ragged:
    """Cells of CLS and so many genes, each with a bin."""
    rng = np.random.default_rng(seed)
    cells = []
    for length in lengths:
        ids = rng.choice(N_GENES, length, replace=False)
        pairs = np.stack((np.append(CLS, ids), np.append(-2, rng.integers(1, 51, length))), axis=1)
        cells.append(torch.from_numpy(pairs.astype(np.float32)))
    return Ragged.from_cells(cells)


def test_cells_do_not_know_of_each_other_nor_of_the_order_of_genes() -> None:
    encoder, cells = small(), cells_of(40, 1, 17, 0)
    with torch.inference_mode():
        together = encoder(cells)
        for alone, found in zip(cells.cells(), together.cells(), strict=True):
            again = encoder(Ragged.from_cells([alone])).values
            torch.testing.assert_close(again, found, atol=2e-6, rtol=1e-5)
        shuffled = [
            cell[torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(len(cell) - 1)))]
            for cell in cells.cells()
        ]
        first = encoder.first_tokens(Ragged.from_cells(shuffled))
    torch.testing.assert_close(first, together.values[together.starts.long()], atol=2e-6, rtol=1e-5)


def test_every_way_of_reading_the_last_layer_agrees() -> None:
    encoder, cells = small(), cells_of(40, 3, 17)
    with torch.inference_mode():
        hidden = encoder(cells)
        first = hidden.values[hidden.starts.long()]
        torch.testing.assert_close(encoder.first_tokens(cells), first, atol=2e-6, rtol=1e-5)
        # Tokens and places cannot be counted where each is a pair of numbers.
        torch.testing.assert_close(encoder.first_tokens(cells, is_repetitive=True), first, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(encoder(cells, is_repetitive=True).values, hidden.values, atol=2e-6, rtol=1e-5)
        assert torch.equal(encoder.hidden_states(cells)[-1].values, hidden.values)
    torch.testing.assert_close(
        scgpt.cell_embeddings(encoder, cells), torch.nn.functional.normalize(first), atol=2e-6, rtol=1e-5
    )


@pytest.mark.parametrize("n_values", [1, 3, 100])
def test_a_value_that_comes_often_is_computed_as_any_other(n_values: int) -> None:
    inputs = small().double().embeddings
    values = (torch.arange(200) % n_values).double() - 2
    x = torch.relu(inputs.value1(values[:, None]))
    wanted = torch.nn.functional.layer_norm(
        inputs.value2(x), [64], inputs.value_norm.weight, inputs.value_norm.bias, 1e-5
    )
    torch.testing.assert_close(inputs.of_values(values), wanted, atol=1e-12, rtol=0)


def test_values_beyond_the_largest_are_the_largest() -> None:
    inputs = small().embeddings
    found = inputs.of_values(torch.tensor([512.0, 513.0, 1e6, 511.0]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


def test_dropout_is_of_values_alone() -> None:
    encoder, cells = small(dropout=0.5).train(), cells_of(30, 20)
    genes = encoder.embeddings.of_genes(cells.values[:, 0].long())
    values = encoder.embeddings.of_values(cells.values[:, 1])
    kept = (encoder(cells, layer="embeddings").values - genes) / values
    assert torch.allclose(kept.round(), kept, atol=1e-2)
    assert 0.4 < (kept.round() == 2).float().mean() < 0.6
    assert set(kept.round().unique().tolist()) == {0.0, 2.0}


def test_in_bfloat16() -> None:
    wide, cells = small(n_layers=3), cells_of(40, 5, 22)
    narrow = copy.deepcopy(wide).cast("bfloat16")
    assert narrow.embeddings.value2.weight.dtype == torch.float32
    with torch.inference_mode():
        cosine = torch.nn.functional.cosine_similarity(wide(cells).values, narrow(cells).values)
    assert cosine.min() > 0.999


@pytest.mark.parametrize("head", [None, "cells", "expression-mvc"])
def test_in_eight_bits(tmp_path: Path, head: str | None) -> None:
    """Blocks and the table of genes; layers of values and heads stay what they are. Saved under our own names."""
    encoder, cells = small(head, n_classes=3), cells_of(40, 5, 22)
    made = gf.quantize(encoder)
    layers = made.quantization.layers
    assert set(layers) == {
        "embeddings.token",
        *(f"blocks.{i}.{name}" for i in (0, 1) for name in ("qkv", "out", "up", "down")),
    }
    with torch.inference_mode():
        hidden = made(cells)
        cosine = torch.nn.functional.cosine_similarity(encoder(cells).values, hidden.values)
    assert cosine.min() > 0.995
    again = gf.load(gf.save(made, tmp_path / "int8"), device="cpu")
    with torch.inference_mode():
        assert torch.equal(again(cells).values, hidden.values)
        if head is not None:
            assert torch.equal(again.logits(hidden), made.logits(hidden))


def test_operations_are_counted() -> None:
    """By hand: 12 layers of 6 C^2 products, two of attention, and the layers of values; heads for their rows."""
    config = gf.EncoderConfig.preset("scgpt-whole-human")
    lengths, c = np.array([700, 1200]), 512
    tokens = int(lengths.sum())
    blocks = 12 * (2 * tokens * 6 * c * c + 4 * c * int((lengths**2).sum()))
    assert encoder_flops(config, tokens, (lengths**2).sum()) == blocks + 2 * tokens * (c + c * c)
    assert head_flops(config, 2, "cells", 10) == 2 * 2 * (2 * c * c + 10 * c)
    assert head_flops(config, tokens, "expression") == 2 * tokens * (2 * c * c + c)
    for head in ("cells", "expression"):
        assert anatomy_of(small(head, n_classes=4)) == anatomy(small().config, head=head, n_classes=4)
    assert anatomy_of(small(inputs="pairs-category")).inputs == ()


def test_the_gradient_screen_of_frozen_parts() -> None:
    """Nothing of the input learns where it is frozen, so that what comes before the blocks costs no gradient."""
    encoder = small("cells", n_classes=4)
    encoder.embeddings.requires_grad_(False)
    found = anatomy_of(encoder)
    assert not found.has_learning_inputs
    assert not any(layer.learns for layer in found.inputs)


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        (torch.tensor([58, 3]), InputError, r"reads genes and their values, \[T, 2\] floating point"),
        (torch.tensor([[58.0, 1, 2]]), InputError, "of the shape"),
        (torch.tensor([[60.0, 1]]), VocabularyError, "gene id 60 is outside the model's 60 tokens"),
        (torch.tensor([[-1.0, 1]]), VocabularyError, "gene id -1 is outside"),
        (torch.tensor([[float("nan"), 1]]), VocabularyError, "gene id nan is outside"),
        (torch.tensor([[1.5, 1]]), InputError, "no whole number"),
        (torch.tensor([[1.0, float("inf")]]), InputError, "NaN or infinite"),
    ],
)
def test_what_is_no_pair_of_gene_and_value(values: torch.Tensor, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        small()(Ragged.from_cells([values]))


def test_expression_from_cells_needs_its_head() -> None:
    encoder, cells = small("expression-mvc"), cells_of(4, 9)
    assert isinstance(encoder.head, ExpressionDecoder)
    found = scgpt.expression_of_cells(encoder, cells)
    one = scgpt.expression_of_cells(encoder, Ragged.from_cells([cells.cells()[1]]))
    torch.testing.assert_close(one.values, found.cells()[1], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="genes are asked for in 1 cells, of 2"):
        scgpt.expression_of_cells(encoder, cells, Ragged.from_cells([torch.tensor([1, 2])]))
    with pytest.raises(ValueError, match="has no decoder of cells"):
        scgpt.expression_of_cells(small("expression"), cells)
    with pytest.raises(UnsupportedError, match="came from a folder of scGPT"):
        scgpt.use_head(encoder, "cells")


def test_what_cannot_be_done_is_one_sentence() -> None:
    for name in ("perturb", "pretrain", "accelerate"):
        sentence = family("scgpt").refused[name]
        assert sentence
        assert "\n" not in sentence
