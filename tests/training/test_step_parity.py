"""One whole training step beside transformers' BertForMaskedLM on the same masked batch: loss, gradients, weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from geneformer_fast import Ragged, load
from geneformer_fast.data.batches import BatchPlan
from geneformer_fast.data.kinds import TokenKinds
from geneformer_fast.data.masking import Masking
from geneformer_fast.training.distributed import Ranks
from geneformer_fast.training.engine import Engine
from geneformer_fast.training.masked_genes import MaskedGenes
from geneformer_fast.training.recipe import Recipe

transformers = pytest.importorskip("transformers")

GEOMETRY = dict(
    vocab_size=331, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
    max_position_embeddings=80, hidden_act="relu", layer_norm_eps=1e-12, pad_token_id=0,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
KINDS = TokenKinds(1, {"pad": 0, "mask": 1, "cls": 2, "eos": 3}, 331)
LENGTHS = [80, 1, 33, 57, 9, 21]


@pytest.fixture
def stock() -> torch.nn.Module:
    torch.manual_seed(5)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**GEOMETRY))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # away from 0 and 1, where mistakes hide
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


@pytest.mark.parametrize("token_budget", [1000, 90])
def test_one_step(stock: torch.nn.Module, tmp_path: Path, token_budget: int) -> None:
    stock.save_pretrained(tmp_path / "model")
    ours = load(tmp_path / "model").train()
    objective = MaskedGenes(KINDS, Masking())
    rng = np.random.default_rng(0)
    cells = [torch.from_numpy(rng.integers(4, 331, n)) for n in LENGTHS]
    plan = BatchPlan(np.array(LENGTHS), np.arange(6), batch_cells=6, token_budget=token_budget)
    pieces = plan.pieces_of(plan.epoch(0), 0)
    batches = [
        objective.collate(Ragged.from_cells([cells[i] for i in piece.cells]), piece.cells, piece.random(0))
        for piece in pieces
    ]
    recipe = Recipe(weight_decay=0.01, clip=1.0, learning_rate=1e-3)
    engine = Engine(ours, objective.loss, recipe, Ranks())
    totals = engine.gradients(zip(pieces, batches, strict=True))
    norm = engine.normalize(sum(LENGTHS), totals)

    # The same batch as Geneformer's users give it: padded, with labels of -100 elsewhere.
    whole = Ragged.from_cells([cell for batch in batches for cell in batch.tokens.cells()])
    labels = torch.full((sum(LENGTHS),), -100)
    offset = 0
    for batch in batches:
        labels[offset + batch.rows] = batch.targets
        offset += batch.n_tokens
    assert (labels != -100).sum() > 10
    inputs = dict(
        input_ids=whole.to_padded(0), attention_mask=whole.mask().long(),
        labels=whole.with_values(labels).to_padded(-100),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in stock.parameters() if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in stock.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    expected = stock(**inputs).loss
    expected.backward()
    expected_norm = torch.nn.utils.clip_grad_norm_(stock.parameters(), 1.0)

    assert float(totals[0] / totals[1]) == pytest.approx(expected.item(), rel=1e-5)
    assert float(norm) == pytest.approx(float(expected_norm), rel=1e-5)
    theirs = named_as_ours(stock, tmp_path / "grads", gradient=True)
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert found.keys() == theirs.keys()
    for name, gradient in found.items():
        assert gradient is not None
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-5, msg=name)
        # Not only small: each gradient agrees to a part in 10,000 of its own size.
        assert (gradient - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-8, name

    # A schedule's first step, and then the update.
    engine.update(1e-3)
    optimizer.step()
    weights = named_as_ours(stock, tmp_path / "weights", gradient=False)
    for name, parameter in ours.named_parameters():
        # Adam divides by the gradient's size, so that only gradients near 0 can differ in the update.
        is_clear = theirs[name].abs() > 1e-5
        torch.testing.assert_close(parameter[is_clear], weights[name][is_clear], atol=1e-5, rtol=1e-5, msg=name)


def named_as_ours(stock: torch.nn.Module, folder: Path, *, gradient: bool) -> dict[str, torch.Tensor]:
    """A stock model's weights or gradients under our names, through a checkpoint."""
    copy = transformers.BertForMaskedLM(stock.config)
    with torch.no_grad():
        for parameter, source in zip(copy.parameters(), stock.parameters(), strict=True):
            if gradient:
                # Rows of tables that nobody looked up have none, the second token type for example.
                parameter.copy_(torch.zeros_like(source) if source.grad is None else source.grad)
            else:
                parameter.copy_(source)
    copy.save_pretrained(folder)
    return {name: tensor.detach() for name, tensor in load(folder).named_parameters()}
