"""scGPT's encoder through every kernel: on a card, and line by line in Triton's interpreter."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from geneformer_fast import Encoder, EncoderConfig, Ragged

#: Of the largest hidden state: products of float32 on tensor cores in three passes; of halves.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2}


def encoder_of(place: Any) -> Encoder:
    small = {"n_layers": 2, "width": 64, "n_heads": 2, "ff_width": 64, "vocab_size": 90, "max_len": 90, "pad_id": 87}
    large = {"n_layers": 2}
    torch.manual_seed(0)
    config = EncoderConfig.preset(
        "scgpt-whole-human", dropout=0.0, attention_dropout=0.0, **(large if place.name == "cuda" else small)
    )
    return Encoder(config, "cells", n_classes=3)


def cells_of(encoder: Encoder, *lengths: int) -> Ragged:
    """Cells of <cls> and so many genes."""
    rng, n_genes = np.random.default_rng(0), encoder.config.pad_id
    cells = []
    for length in lengths:
        ids = np.append(n_genes + 1, rng.choice(n_genes, length - 1, replace=False))
        cells.append(
            torch.from_numpy(np.stack((ids, np.append(-2, rng.integers(1, 51, length - 1))), 1).astype(np.float32))
        )
    return Ragged.from_cells(cells)


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_hidden_states_and_gradients(kind: str, place: Any) -> None:
    if place.name == "cpu" and kind == "float16":
        pytest.skip("CPUs compute in float32 or bfloat16")
    encoder = encoder_of(place)
    cells = cells_of(encoder, *((1200, 1, 333, 64) if place.name == "cuda" else (17, 1, 40)))
    truth = copy.deepcopy(encoder).double()
    wanted = truth.logits(truth(cells))
    wanted.square().sum().backward()
    ours = copy.deepcopy(encoder).to(place.device).train()
    with place.ours(), torch.autocast(place.device.type, torch.float16, enabled=kind == "float16"):
        found = ours.logits(ours(cells.to(place.device)))
        found.float().square().sum().backward()
    allowed = TOLERANCE[kind]
    assert (found.double().cpu() - wanted).abs().max() <= allowed * wanted.abs().max()
    gradients = dict(truth.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = gradients[name].grad
        error = (parameter.grad.double().cpu() - expected).abs().max()
        assert error <= 10 * allowed * expected.abs().max() + 1e-9, name
