"""Training by stock parts: ``BertForMaskedLM`` on padded batches, in a plain loop."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from geneformer_fast.config import matmul_dtype
from geneformer_fast.data.batches import BatchPlan, Piece
from geneformer_fast.data.loader import load_pieces
from geneformer_fast.data.masking import MaskedBatch
from geneformer_fast.profiling.compare.quiet import ENGINE, quiet
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.request import SECONDS
from geneformer_fast.profiling.run import profile
from geneformer_fast.profiling.scenarios import Training
from geneformer_fast.profiling.scenarios.passes import N_ACTIVE
from geneformer_fast.profiling.scenarios.train import N_WARMUP, STEPS_AFTER
from geneformer_fast.ragged import Ragged

_IGNORED = -100


class StockTraining:
    """BertForMaskedLM on padded batches: forward, loss, backward, clipping, AdamW; the same cells and masks as ours.

    Parameters
    ----------
    ours
        What it is compared with.
    folder
        A Hugging Face folder of the same weights.
    """

    def __init__(self, ours: Training, folder: Path) -> None:
        from transformers import BertForMaskedLM

        self.ours, self.recipe = ours, ours.chosen_recipe(1)
        self.device = ours.encoder.device
        self.dtype = matmul_dtype(self.recipe.precision, self.device) or torch.float32
        with quiet():
            model = BertForMaskedLM.from_pretrained(folder, attn_implementation="sdpa")
        self.model: Any = model.float().to(self.device).train()
        if self.recipe.is_recomputing:
            self.model.gradient_checkpointing_enable()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.recipe.learning_rate, betas=self.recipe.betas, eps=self.recipe.eps,
            weight_decay=self.recipe.weight_decay,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def steps(self, n_steps: int) -> Iterator[dict[str, Any]]:
        """So many steps; what ``Run.step`` is to be told of each."""
        plan = BatchPlan(
            self.ours.cells.lengths(), self.ours.train_cells, batch_tokens=self.recipe.batch_tokens,
            token_budget=self.recipe.token_budget, seed=self.recipe.seed,
        )  # fmt: skip
        pieces = load_pieces(
            cast(Any, self.ours.cells), plan.pieces(0, n_steps), self.ours.objective.collate, seed=self.recipe.seed,
            workers=self.recipe.workers,
        )  # fmt: skip
        with contextlib.closing(pieces):
            for _, group in itertools.groupby(pieces, key=_place_of):
                batches = [batch for _, batch in group]
                self._step(batches)
                yield {
                    "lengths": np.concatenate([_longest_first(batch) for batch in batches]),
                    "head_rows": sum(len(batch.rows) for batch in batches),
                }

    def report(self, trace: Path | None = None) -> Report:
        """Measure it."""
        request = self.ours.request
        n_steps = request.steps or max(1, round((request.seconds or SECONDS) / self._seconds_of(1, N_WARMUP)))
        settings = {**self.ours.settings(), "attention": "sdpa", "logits": "of all positions"}
        with profile(
            self.model, name=self.ours.name, mode=self.ours.mode, engine=ENGINE, optimizer=self.optimizer,
            n_warmup=N_WARMUP, n_steps=n_steps, n_active=N_ACTIVE, trace=trace, tokens=self.ours.cells.what,
            settings=settings,
        ) as run:  # fmt: skip
            for told in self.steps(N_WARMUP + n_steps + STEPS_AFTER):
                run.step(**told)
                if run.is_complete:
                    break
        return run.report

    def cells_per_s(self) -> float:
        """Of a few steps, in a moment."""
        n_cells = 0
        begin = time.perf_counter()
        for place, told in enumerate(self.steps(3)):
            if place == 0:
                begin = time.perf_counter()
            else:
                n_cells += len(told["lengths"])
        return n_cells / (time.perf_counter() - begin)

    def _seconds_of(self, n_steps: int, n_warmup: int) -> float:
        """Of one step."""
        begin = time.perf_counter()
        for place, _ in enumerate(self.steps(n_steps + n_warmup), start=1):
            if place == n_warmup:
                begin = time.perf_counter()
        return max(1e-6, (time.perf_counter() - begin) / n_steps)

    def _step(self, batches: list[MaskedBatch]) -> None:
        """One optimizer step; padded pieces of no more positions than ours have tokens."""
        self.optimizer.zero_grad(set_to_none=True)
        n_masked = max(1, sum(len(batch.rows) for batch in batches))
        for batch in batches:
            for ids, mask, labels in self._padded(batch):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    logits = self.model(input_ids=ids, attention_mask=mask).logits
                    loss = F.cross_entropy(
                        logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, reduction="sum"
                    )
                self.scaler.scale(loss / n_masked).backward()
        self.scaler.unscale_(self.optimizer)
        if self.recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.device.type == "cuda":
            return
        # Where nobody computes ahead, the loss is looked at as ours is.
        loss.item()

    def _padded(self, batch: MaskedBatch) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """[B, L] ids, mask and labels of pieces, longest cells first."""
        labels = torch.full_like(batch.tokens.values, _IGNORED)
        labels[batch.rows] = batch.targets
        bounds = batch.tokens.cu_seqlens.tolist()
        order = np.argsort([first - last for first, last in itertools.pairwise(bounds)], kind="stable")
        start = 0
        while start < len(order):
            longest = bounds[order[start] + 1] - bounds[order[start]]
            chosen = order[start : start + max(1, self.recipe.token_budget // longest)]
            cut = [slice(bounds[i], bounds[i + 1]) for i in chosen]
            shown = Ragged.from_cells([batch.tokens.values[each] for each in cut])
            asked = Ragged.from_cells([labels[each] for each in cut])
            yield (
                shown.to_padded(self.model.config.pad_token_id).to(self.device),
                shown.mask().long().to(self.device),
                asked.to_padded(_IGNORED).to(self.device),
            )
            start += len(chosen)


def _place_of(pair: tuple[Piece, Any]) -> tuple[int, int]:
    return pair[0].epoch, pair[0].step


def _longest_first(batch: MaskedBatch) -> np.ndarray:
    """[B] lengths in the order in which cells are computed."""
    return -np.sort(-np.diff(batch.tokens.cu_seqlens.numpy()))
