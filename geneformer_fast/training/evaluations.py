"""Looking at held-out cells: metrics, the best so far and its weights, and whether to stop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import closing

import numpy as np
import torch
from torch import nn

from geneformer_fast.data.batches import evaluation_pieces
from geneformer_fast.data.loader import load_pieces
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.training import distributed
from geneformer_fast.training.checkpoint import load_weights, save_weights
from geneformer_fast.training.engine import Engine
from geneformer_fast.training.history import History
from geneformer_fast.training.objective import Objective
from geneformer_fast.training.recipe import Recipe
from geneformer_fast.training.run_folder import RunFolder


class Evaluations:
    """The evaluations of one run.

    Parameters
    ----------
    model, objective, recipe, engine
        Of the run.
    tokens, cells
        What is held out.
    history
        Which is told of each.
    folder
        Where weights of the best one go; None keeps them in memory.
    unmeasured
        What an evaluation runs in: it is no part of a report of the training.

    Attributes
    ----------
    n_worse
        Evaluations since the best one.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        recipe: Recipe,
        engine: Engine,
        tokens: TokenFolder,
        cells: np.ndarray,
        history: History,
        folder: RunFolder | None,
        unmeasured: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self.model, self.objective, self.recipe, self.engine = model, objective, recipe, engine
        self.tokens, self.cells, self.history, self.folder = tokens, cells, history, folder
        self.n_worse = 0
        self._unmeasured = unmeasured
        self._best_weights: dict[str, torch.Tensor] | None = None

    def look(self, step: int) -> dict[str, float]:
        """Metrics after a step; keeps the weights where they are the best, and says in the history whether to stop."""
        found = {name: float(value) for name, value in self._measured().items()}
        metrics = {"step": float(step), **found}
        history, recipe = self.history, self.recipe
        history.evaluations.append(metrics)
        if recipe.monitor not in metrics:
            known = ", ".join(name for name in metrics if name != "step")
            raise UnsupportedError(f"there is no metric {recipe.monitor!r} to monitor; there are {known}")
        # What the first process found decides, so that all stop at the same step.
        value = self.engine.ranks.first(metrics[recipe.monitor], self.engine.device)
        best = math.nan if history.best is None else history.best[recipe.monitor]
        is_better = value > best if recipe.is_greater_better else value < best
        if is_better or math.isnan(best):
            history.best, self.n_worse = metrics, 0
            if recipe.is_best_restored:
                self._keep_best()
        else:
            self.n_worse += 1
        history.is_stopped_early = self.is_patience_over
        return metrics

    @property
    def is_patience_over(self) -> bool:
        """Whether there have been so many evaluations without a better one that training stops."""
        return self.recipe.patience is not None and self.n_worse >= self.recipe.patience

    def restore_best(self) -> None:
        """Give the model the weights of the best evaluation, where the recipe asks for them and there was one."""
        if not self.recipe.is_best_restored or self.history.best is None:
            return
        if self.folder is not None:
            load_weights(self.folder.weights_of(self.history.best), self.model)
        elif self._best_weights is not None:
            self.model.load_state_dict(self._best_weights)

    def _measured(self) -> dict[str, float]:
        """What the objective measures on the held-out cells."""
        lengths, recipe = self.tokens.lengths(), self.recipe
        is_sharing = getattr(self.objective, "is_sharing_evaluation", False)
        ranks = self.engine.ranks if is_sharing else distributed.Ranks()
        pieces = evaluation_pieces(
            lengths, self.cells, recipe.token_budget, rank=ranks.rank, world_size=ranks.world_size
        )  # fmt: skip
        batches = load_pieces(
            self.tokens, pieces, self.objective.collate, seed=recipe.seed, workers=recipe.workers
        )  # fmt: skip
        self.model.eval()
        try:
            with self._unmeasured(), closing(batches), torch.no_grad(), self.engine.autocast():
                return self.objective.metrics(self.model, (batch.to(self.engine.device) for _, batch in batches))
        finally:
            self.engine.reshard()
            self.model.train()

    def _keep_best(self) -> None:
        if self.folder is not None:
            save_weights(self.folder.weights_of(self.history.best), self.model, self.engine.ranks)
        else:
            self._best_weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
