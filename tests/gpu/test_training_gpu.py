"""A training step on a card: the CPU's numbers, and not one wait for the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sample_encoders import config_of

from bench.gpu.models import random_encoder
from geneformer_fast import Encoder, Ragged
from geneformer_fast.data.batches import BatchPlan, Piece
from geneformer_fast.data.kinds import TokenKinds
from geneformer_fast.data.masking import MaskedBatch, Masking
from geneformer_fast.training.distributed import Ranks
from geneformer_fast.training.engine import Engine
from geneformer_fast.training.masked_genes import MaskedGenes
from geneformer_fast.training.recipe import Recipe

RECIPE = Recipe(batch_cells=8, token_budget=60, learning_rate=1e-3, weight_decay=0.1, masking=Masking(share=0.3))


def pieces_of(
    encoder: Encoder, objective: MaskedGenes, step: int, *, token_budget: int = RECIPE.token_budget
) -> list[tuple[Piece, MaskedBatch]]:
    """A step of a few cells in a few pieces."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 40, 16)
    cells = [torch.from_numpy(rng.integers(4, encoder.config.vocab_size, n)) for n in lengths]
    plan = BatchPlan(lengths, np.arange(16), batch_cells=RECIPE.batch_cells, token_budget=token_budget)
    return [
        (piece, objective.collate(Ragged.from_cells([cells[i] for i in piece.cells]), piece.cells, piece.random(0)))
        for piece in plan.pieces_of(plan.epoch(0), step)
    ]


def objective_for(encoder: Encoder) -> MaskedGenes:
    special = {"pad": 0, "mask": 1, "cls": 2, "eos": 3}
    return MaskedGenes(TokenKinds(1, special, encoder.config.vocab_size), RECIPE.masking)


def one_step(engine: Engine, pieces: list[tuple[Piece, MaskedBatch]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(totals, norm of the gradient), still on the device."""
    totals = engine.gradients(pieces)
    norm = engine.normalize(pieces[0][0].n_step_tokens, totals)
    engine.update(1e-3)
    return totals, norm


def engine_on(device: torch.device, name: str, where: str, **changes: Any) -> tuple[Engine, Encoder, MaskedGenes]:
    config = replace(config_of(name, where), dropout=0.0, attention_dropout=0.0)
    encoder = random_encoder(config, torch.device("cpu")).train().to(device)
    objective = objective_for(encoder)
    return Engine(encoder, objective.loss, replace(RECIPE, **changes), Ranks()), encoder, objective


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["small", "pre-norm"])
def test_two_steps_are_those_of_the_cpu_in_one_piece(name: str, where: str) -> None:
    expected_engine, expected, objective = engine_on(torch.device("cpu"), name, where, token_budget=10_000)
    engine, encoder, _ = engine_on(torch.device(where), name, where)
    for step in (0, 1):
        pieces = pieces_of(expected, objective, step)
        assert len(pieces) > 1
        totals, norm = one_step(engine, pieces)
        whole = pieces_of(expected, objective, step, token_budget=10_000)
        assert len(whole) == 1
        wanted_totals, wanted_norm = one_step(expected_engine, whole)
        torch.testing.assert_close(totals.cpu(), wanted_totals, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(norm.cpu(), wanted_norm, rtol=1e-3, atol=1e-4)
    for (key, found), wanted in zip(encoder.named_parameters(), expected.parameters(), strict=True):
        # Adam moves a weight by the rate whatever its gradient: two steps of 1e-3, where rounding decides the sign.
        assert (found.cpu() - wanted).abs().max() < 5e-3, key
        assert (found.cpu() - wanted).abs().mean() < 1e-4, key


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nobody_waits_for_the_card(card: torch.device, precision: str) -> None:
    engine, encoder, objective = engine_on(card, "small", "cuda", precision=precision)
    steps = [[(p, b.pin_memory()) for p, b in pieces_of(encoder, objective, step)] for step in (0, 1)]
    one_step(engine, steps[0])  # compiles kernels, which waits
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        totals, norm = one_step(engine, steps[1])
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.isfinite(totals).all()
    assert torch.isfinite(norm)
