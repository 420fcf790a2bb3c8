"""Loops that are profiled, and which of their steps are measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from geneformer_fast import Encoder, EncoderConfig, Ragged
from geneformer_fast.profiling.figures import Missing
from geneformer_fast.profiling.loop.phases import FIRST_STEPS
from geneformer_fast.profiling.run import Run

CONFIG = EncoderConfig(n_layers=2, width=32, n_heads=2, ff_width=48, vocab_size=97, max_len=64)

QUICK: dict[str, Any] = {"energy": False, "ceilings": False}

#: Steps of a loop that leave two for the window after those that are watched.
N_STEPS = 3 + FIRST_STEPS + 1 + 3 + 2


def batches(n: int = N_STEPS, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 40, rng.integers(2, 6)).tolist() for _ in range(n)]


def packed(lengths: list[int]) -> Ragged:
    return Ragged.from_lengths(torch.arange(sum(lengths)) % CONFIG.vocab_size, lengths)


def measured_of(lengths: list[Any], n_warmup: int = 3, n_active: int = 2) -> list[Any]:
    """The steps of the window, of a loop without an end."""
    after = n_warmup + FIRST_STEPS
    watched = 1 + (n_active + 1 if n_active else 0)
    return [*lengths[n_warmup:after], *lengths[after + watched :]]


def figure(value: Any) -> float:
    assert not isinstance(value, Missing), value
    return float(value)


def training(model: Encoder, given: list[list[int]], run: Run) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for lengths in given:
        tokens = packed(lengths)
        rows = torch.arange(0, tokens.n_tokens, 5)
        optimizer.zero_grad()
        model.mlm_loss(model(tokens), rows, tokens.values[rows]).backward()
        optimizer.step()
        run.step(head_rows=len(rows))
