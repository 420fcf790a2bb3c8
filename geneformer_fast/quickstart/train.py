"""A small encoder learns, for a moment, to name masked genes: the plainest possible training loop.

Tokens stay packed throughout, and the head sees masked rows only, so that neither padding nor unmasked genes cost
anything. Masking follows Devlin et al., arXiv:1810.04805: of the genes asked for, 80 % show ``<mask>``, 10 % a random
gene and 10 % themselves. More genes are asked for than their 15 %, because training is short (Wettig et al.,
arXiv:2202.08005).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from geneformer_fast.encoder import Encoder
from geneformer_fast.ragged import Ragged

IGNORED = -100  # label of a position that is not asked for


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes
    ----------
    n_steps, max_seconds
        Training ends after this many steps or seconds, whichever comes first; the learning rate follows whichever
        is further along.
    cells_per_batch, tokens_per_cell
        A batch; longer cells are cut to their highest ranks.
    learning_rate, weight_decay, warmup
        AdamW; ``warmup`` is the share of training during which the rate rises, before it falls to zero as a cosine.
    masked, seed
        Share of genes asked for; random seed.
    """

    n_steps: int = 500
    max_seconds: float = 90.0
    cells_per_batch: int = 48
    tokens_per_cell: int = 48
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    masked: float = 0.3
    seed: int = 0


@dataclass
class Progress:
    """What happened: the loss of every step, and how much was done in how long."""

    losses: list[float] = field(default_factory=list)
    n_tokens: int = 0
    n_cells: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class TokenSet:
    """Tokens of many cells in memory: values [T], cu_seqlens [B + 1], and what the special ids are."""

    values: torch.Tensor
    cu_seqlens: np.ndarray
    special_ids: tuple[int, ...]
    mask_id: int
    n_tokens: int

    def batch(self, cells: np.ndarray, max_len: int) -> Ragged:
        """The given cells, each cut to ``max_len`` tokens, as one packed batch."""
        starts, stops = self.cu_seqlens[cells], self.cu_seqlens[cells + 1]
        stops = np.minimum(stops, starts + max_len)
        return Ragged.from_cells([self.values[start:stop] for start, stop in zip(starts, stops, strict=True)])


def train(
    model: Encoder,
    tokens: TokenSet,
    cells: np.ndarray,
    recipe: Recipe | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Progress:
    """Train a model with an MLM head in place.

    Parameters
    ----------
    model
        An encoder with ``head="mlm"``; left in evaluation mode.
    tokens, cells
        The tokens of all cells, and the indices of the cells to learn from.
    recipe
        How; None takes the defaults.
    on_step
        Called after every step.

    Returns
    -------
    Progress
        Losses in nats, and the tokens, cells and seconds spent.
    """
    recipe = recipe or Recipe()
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
    )
    progress = Progress()
    begin = time.perf_counter()
    model.train()
    for chosen in _endless(cells, recipe.cells_per_batch, recipe.seed):
        done = max(len(progress.losses) / recipe.n_steps, progress.seconds / recipe.max_seconds)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(done, recipe.warmup)
        batch = tokens.batch(chosen, recipe.tokens_per_cell)
        shown, labels = mask_genes(batch.values, tokens, recipe.masked, generator)
        loss = mlm_loss(model, batch.with_values(shown), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.losses.append(loss.item())
        progress.n_tokens += batch.n_tokens
        progress.n_cells += batch.n_cells
        progress.seconds = time.perf_counter() - begin
        if on_step is not None:
            on_step(progress)
    model.eval()
    return progress


@contextmanager
def best_threads(model: Encoder, tokens: TokenSet, cells: np.ndarray, recipe: Recipe) -> Iterator[int]:
    """Within the block, torch uses one thread or all of them, whichever is faster here.

    Matrices this small gain little from more threads, and where cores are shared with other work the threads wait for
    each other: on 2 such cores, two threads trained at 1,700 tokens/s and one at 22,000.
    """
    n_all = torch.get_num_threads()
    batch = tokens.batch(cells[: recipe.cells_per_batch], recipe.tokens_per_cell)
    shown, labels = mask_genes(batch.values, tokens, recipe.masked, torch.Generator().manual_seed(recipe.seed))
    best = {}
    for n_threads in {1, n_all}:
        torch.set_num_threads(n_threads)
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            mlm_loss(model, batch.with_values(shown), labels).backward()
            times.append(time.perf_counter() - begin)
        best[n_threads] = sorted(times)[1]
    model.zero_grad(set_to_none=True)
    try:
        chosen = min(best, key=lambda n_threads: best[n_threads])
        torch.set_num_threads(chosen)
        yield chosen
    finally:
        torch.set_num_threads(n_all)


def schedule(done: float, warmup: float) -> float:
    """Factor on the learning rate when a share ``done`` of training is over: a linear rise, then half a cosine."""
    if done < warmup:
        return (done + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def mlm_loss(model: Encoder, shown: Ragged, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats at the positions of ``labels`` [T] that are not ``IGNORED``."""
    rows = (labels != IGNORED).nonzero().squeeze(1)
    return F.cross_entropy(model.logits(model(shown), rows).float(), labels[rows])


def mask_genes(
    values: torch.Tensor, tokens: TokenSet, masked: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """What to show and what to ask for, [T] each; special tokens are neither hidden nor asked for."""
    is_gene = ~torch.isin(values, torch.tensor(tokens.special_ids))
    is_asked = is_gene & (torch.rand(len(values), generator=generator) < masked)
    if not is_asked.any():
        # A batch that asks nothing has no loss: ask for its first gene.
        is_asked[is_gene.nonzero()[:1]] = True
    fate = torch.rand(len(values), generator=generator)
    shown = values.clone()
    shown[is_asked & (fate < 0.8)] = tokens.mask_id
    is_random = is_asked & (fate >= 0.9)
    first_gene = max(tokens.special_ids) + 1
    shown[is_random] = torch.randint(first_gene, tokens.n_tokens, (int(is_random.sum()),), generator=generator)
    return shown, torch.where(is_asked, values, IGNORED)


@torch.inference_mode()
def held_out_loss(model: Encoder, tokens: TokenSet, cells: np.ndarray, recipe: Recipe) -> float:
    """Mean masked-gene loss, in nats, on cells the model has not seen, with one fixed mask."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    total, n_asked = 0.0, 0
    for start in range(0, len(cells), recipe.cells_per_batch):
        batch = tokens.batch(cells[start : start + recipe.cells_per_batch], recipe.tokens_per_cell)
        shown, labels = mask_genes(batch.values, tokens, recipe.masked, generator)
        n = int((labels != IGNORED).sum())
        total += float(mlm_loss(model, batch.with_values(shown), labels)) * n
        n_asked += n
    return total / n_asked


def frequency_loss(tokens: TokenSet, seen: np.ndarray, unseen: np.ndarray, recipe: Recipe) -> float:
    """The loss, in nats, of guessing every gene of unseen cells by its frequency in the seen ones."""
    specials = torch.tensor(tokens.special_ids)
    counts = torch.ones(tokens.n_tokens, dtype=torch.float64)
    values = tokens.batch(seen, recipe.tokens_per_cell).values
    counts += torch.bincount(values, minlength=tokens.n_tokens)
    counts[specials] = 0
    asked = tokens.batch(unseen, recipe.tokens_per_cell).values
    asked = asked[~torch.isin(asked, specials)]
    return float(-(counts / counts.sum()).log()[asked].mean())


def _endless(cells: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of cells, each pass over all of them in a new order."""
    rng = np.random.default_rng(seed)
    size = min(size, len(cells))
    while True:
        order = rng.permutation(cells)
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]
