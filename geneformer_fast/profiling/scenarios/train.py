"""Training on masked genes, as ``geneformer-fast pretrain`` does it: one step after another, none of them saved."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from geneformer_fast.data.batches import BatchPlan
from geneformer_fast.data.kinds import TokenKinds
from geneformer_fast.encoder import Encoder
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.request import SECONDS, TRAIN, Request
from geneformer_fast.profiling.run import Run, profile
from geneformer_fast.profiling.scenarios.cells import ProfileCells
from geneformer_fast.profiling.scenarios.passes import N_ACTIVE
from geneformer_fast.training.history import StepRecord
from geneformer_fast.training.loop import fit
from geneformer_fast.training.masked_genes import MaskedGenes
from geneformer_fast.training.recipe import RECIPES, Recipe

if TYPE_CHECKING:
    from geneformer_fast.tokenization.arrow import TokenFolder

#: Steps before those that are measured: the first compiles and allocates, the second still allocates.
N_WARMUP = 2
# A trial is so many steps after those.
_TRIAL_STEPS = 2
#: After the window: more than are needed for memory and for those that are watched.
STEPS_AFTER = 20 + N_ACTIVE


class Training:
    """One encoder on the cells of a request.

    Parameters
    ----------
    request
        What was asked for.
    encoder
        With a head for masked genes, on its device; its weights change.
    cells
        What it is trained on.
    """

    mode = TRAIN

    def __init__(self, request: Request, encoder: Encoder, cells: ProfileCells) -> None:
        self.request, self.encoder, self.cells = request, encoder, cells
        self.recipe = RECIPES.get(str(request.model), Recipe())
        self.token_budget = request.token_budget or self.recipe.token_budget
        n_cells = min(request.cells or cells.n_cells, cells.n_cells)
        self.train_cells = np.sort(np.random.default_rng(0).choice(cells.n_cells, n_cells, replace=False))

    def with_budget(self, token_budget: int) -> Training:
        """The same with steps of so many tokens."""
        other = copy.copy(self)
        other.token_budget = token_budget
        return other

    @property
    def name(self) -> str:
        """The model, as it was named."""
        return str(self.request.model)

    @property
    def objective(self) -> MaskedGenes:
        """What is learned."""
        return MaskedGenes(TokenKinds.of(self.cells.identity, self.encoder.config), self.recipe.masking)

    def step_tokens(self) -> int:
        """Tokens of a step on average: an epoch is cut into whole steps, as ``pretrain`` cuts it."""
        lengths = self.cells.lengths()
        size = self.token_budget
        n_steps = BatchPlan(lengths, self.train_cells, batch_tokens=size, token_budget=size).n_steps()
        return round(int(lengths[self.train_cells].sum()) / n_steps)

    def chosen_recipe(self, n_steps: int) -> Recipe:
        """The model's recipe, with steps of about ``token_budget`` tokens, each computed in one piece."""
        longest = int(self.cells.lengths()[self.train_cells].max())
        return Recipe.from_dict(
            {
                **self.recipe.to_dict(), "steps": n_steps, "batch_cells": None, "batch_tokens": self.token_budget,
                # A step ends with the cell that reaches its size: there is room for all of that cell.
                "token_budget": self.step_tokens() + longest,
                "precision": self.request.dtype or "auto", "is_recomputing": self.request.recompute,
                "progress": False,
            }
        )  # fmt: skip

    def train(self, n_steps: int, *, run: Run | None = None, on_step: Callable[[StepRecord], None]) -> None:
        """So many steps, or fewer where ``on_step`` raises :class:`Enough`."""
        with contextlib.suppress(Enough):
            fit(
                self.encoder,
                cast("TokenFolder", self.cells),  # which is read as one
                self.objective,
                self.chosen_recipe(n_steps),
                train_cells=self.train_cells,
                on_step=on_step,
                profile=run,
            )

    def settings(self) -> dict[str, Any]:
        """What was chosen, for the report."""
        recipe = self.chosen_recipe(1)
        return {
            "token_budget": self.token_budget, "step_tokens": self.step_tokens(), "clip": recipe.clip,
            "recomputing": recipe.is_recomputing, "workers": recipe.workers, "masked_share": recipe.masking.share,
            "cells": len(self.train_cells),
        }  # fmt: skip

    def report(self, trace: Path | None = None) -> Report:
        """Measure it."""
        n_steps, first_s = self.request.steps, None
        if n_steps is None:
            seconds = self.request.seconds or SECONDS
            trial = self._tried(most_s=seconds / 2)
            first_s, n_steps = trial[0].seconds, max(1, round(seconds / max(trial[-1].seconds, 1e-6)))
        with profile(
            self.encoder, name=self.name, mode=self.mode, n_warmup=N_WARMUP, n_steps=n_steps, n_active=N_ACTIVE,
            trace=trace, tokens=self.cells.what, settings=self.settings(),
        ) as run:  # fmt: skip

            def look(step: StepRecord) -> None:
                if run.is_complete:
                    raise Enough

            self.train(N_WARMUP + n_steps + STEPS_AFTER, run=run, on_step=look)
        report = run.report
        if first_s is None:
            return report
        return dataclasses.replace(report, time=dataclasses.replace(report.time, first_step_s=first_s))

    def cells_per_s(self) -> float:
        """Of a few steps, in a moment."""
        steps = self._tried()[N_WARMUP:]
        return sum(step.n_cells for step in steps) / sum(step.seconds for step in steps)

    def _tried(self, most_s: float = math.inf) -> list[StepRecord]:
        """A few steps; fewer where one takes longer than ``most_s`` once everything is compiled."""
        steps: list[StepRecord] = []

        def look(step: StepRecord) -> None:
            steps.append(step)
            if len(steps) >= N_WARMUP and step.seconds > most_s:
                raise Enough

        self.train(N_WARMUP + _TRIAL_STEPS, on_step=look)
        return steps


class Enough(Exception):
    """Ends training."""
