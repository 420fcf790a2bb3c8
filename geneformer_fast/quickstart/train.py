"""A small encoder learns, for a moment, to name masked genes, and what its loss is to be compared with.

More genes are masked than their usual 15 %, because training is short (Wettig et al., arXiv:2202.08005).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from time import perf_counter

import numpy as np
import torch

from geneformer_fast.data.batches import BatchPlan, evaluation_pieces
from geneformer_fast.data.identity import identity_of
from geneformer_fast.data.kinds import TokenKinds
from geneformer_fast.data.loader import load_pieces, read_ragged
from geneformer_fast.data.masking import Masking
from geneformer_fast.encoder import Encoder
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.training.masked_genes import MaskedGenes
from geneformer_fast.training.recipe import Recipe

RECIPE = Recipe(
    steps=500,
    max_seconds=90.0,
    batch_cells=48,
    learning_rate=3e-3,
    schedule="cosine",
    warmup_share=0.1,
    weight_decay=0.01,
    betas=(0.9, 0.98),
    masking=Masking(share=0.3),
    seed=0,
    progress=False,
)


def objective_of(model: Encoder, tokens: TokenFolder, recipe: Recipe) -> MaskedGenes:
    """Masked genes of these tokens."""
    return MaskedGenes(TokenKinds.of(identity_of(tokens, model.config), model.config), recipe.masking)


@contextmanager
def best_threads(model: Encoder, tokens: TokenFolder, cells: np.ndarray, recipe: Recipe) -> Iterator[int]:
    """Within the block, torch uses one thread or all of them, whichever is faster here.

    Matrices this small gain little from more threads, and where cores are shared with other work the threads wait for
    each other: on 2 such cores, two threads trained at 1,700 tokens/s and one at 22,000.
    """
    n_all = torch.get_num_threads()
    objective = objective_of(model, tokens, recipe)
    plan = BatchPlan(tokens.lengths(), cells, batch_cells=recipe.batch_cells, token_budget=recipe.token_budget)
    piece = plan.pieces_of(plan.epoch(0), 0)[0]
    batch = objective.collate(read_ragged(tokens, piece.cells), piece.cells, piece.random(recipe.seed))
    best = {}
    for n_threads in {1, n_all}:
        torch.set_num_threads(n_threads)
        times = []
        for _ in range(3):
            begin = perf_counter()
            objective.loss(model, batch)[0].backward()
            times.append(perf_counter() - begin)
        best[n_threads] = sorted(times)[1]
    model.zero_grad(set_to_none=True)
    try:
        chosen = min(best, key=lambda n_threads: best[n_threads])
        torch.set_num_threads(chosen)
        yield chosen
    finally:
        torch.set_num_threads(n_all)


@torch.inference_mode()
def held_out_loss(model: Encoder, tokens: TokenFolder, cells: np.ndarray, recipe: Recipe) -> float:
    """Mean masked-gene loss, in nats, on cells the model has not seen, with one fixed mask."""
    objective = objective_of(model, tokens, recipe)
    pieces = evaluation_pieces(tokens.lengths(), cells, recipe.token_budget)
    with closing(load_pieces(tokens, pieces, objective.collate, seed=recipe.seed)) as batches:
        return objective.metrics(model, (batch for _, batch in batches))["loss"]


def frequency_loss(model: Encoder, tokens: TokenFolder, seen: np.ndarray, unseen: np.ndarray) -> float:
    """The loss, in nats, of guessing every gene of unseen cells by its frequency in the seen ones."""
    kinds = TokenKinds.of(identity_of(tokens, model.config), model.config)
    counts = np.bincount(tokens.read(seen)[0], minlength=kinds.n_tokens)[kinds.gene_ids] + 1.0
    asked = np.bincount(tokens.read(unseen)[0], minlength=kinds.n_tokens)[kinds.gene_ids]
    return float(-(asked * np.log(counts / counts.sum())).sum() / asked.sum())
