"""The training loop, for any objective on packed cells."""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from geneformer_fast.data.batches import BatchPlan, Piece, Sampler
from geneformer_fast.data.loader import load_pieces
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import InputError, TrainingError, UnsupportedError
from geneformer_fast.profiling.run import Run
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.training import distributed
from geneformer_fast.training.cells import check_lengths, checked_cells, checked_eval_cells
from geneformer_fast.training.checkpoint import checkpoints_in, load_checkpoint, save_checkpoint
from geneformer_fast.training.divergence import Divergence, not_finite_message
from geneformer_fast.training.engine import Engine, PendingStep
from geneformer_fast.training.evaluations import Evaluations
from geneformer_fast.training.history import History, LoopState, StepRecord, metrics_for_json, metrics_from
from geneformer_fast.training.identity import identity_of_run
from geneformer_fast.training.logs import Log, check_logs, logs_of
from geneformer_fast.training.objective import Objective
from geneformer_fast.training.profiled import Asked, checked_place, profiled, rows_of_head
from geneformer_fast.training.recipe import Recipe
from geneformer_fast.training.run_folder import RunFolder, writing_alone
from geneformer_fast.training.utilisation import Utilisation

SAVE_EVERY = 1000  # where a recipe leaves it open, so that an epoch of days does not hang on one process


def fit(
    model: nn.Module,
    tokens: TokenFolder,
    objective: Objective,
    recipe: Recipe,
    *,
    train_cells: np.ndarray,
    eval_cells: np.ndarray | None = None,
    eval_tokens: TokenFolder | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    sampler: Sampler | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_eval: Callable[[dict[str, float]], None] | None = None,
    begins_with: str | None = None,
    profile: Run | str | os.PathLike[str] | bool | None = None,
) -> History:
    """Train a model in place.

    A step's gradient is that of the mean loss over all its terms, whatever pieces and ranks they are in: losses of the
    pieces are summed, and divided by the summed weights. Seeds torch's generators with ``recipe.seed``.

    Parameters
    ----------
    model
        An :class:`Encoder`, or a module that holds one, with float32 parameters, on its device. Frozen parameters stay
        as they are. Left in evaluation mode.
    tokens
        The cells.
    objective
        What is learned.
    recipe
        How.
    train_cells, eval_cells
        [N] indices into ``tokens``. ``eval_cells`` None or empty: no evaluation.
    eval_tokens
        The folder of ``eval_cells``, where it is another one; None for ``eval_cells`` then means all of its cells.
    out
        Folder for checkpoints and logs; None keeps everything in memory.
    resume
        Continue from the last checkpoint in ``out``, if there is one.
    sampler
        Chooses the cells of every epoch; None shows each once, shuffled.
    on_step, on_eval
        Called on the first rank after every step (on a GPU one step later, so that nobody waits) and evaluation; an
        exception ends the run, the last checkpoint stays.
    begins_with
        What stands for the weights that the model has now when a run is continued: one that began with other weights is
        refused. None takes their fingerprint.
    profile
        Where a report of how fast it trains goes (:func:`geneformer_fast.profile`): a ``.json``, an ``.html``, or a
        folder for both; True: ``profile/`` in ``out``. Evaluations and checkpoints are left out. One that is there
        already is refused, or with ``resume`` stays and nothing is profiled. Or a run that is open already, which is
        told of every step.

    Returns
    -------
    History
        Losses and metrics.

    Raises
    ------
    InputError
        No cells, fewer than ranks, cells longer than the model has positions, or cells both in training and evaluation.
    OutputError
        ``out`` holds another run, or the same one and ``resume`` is False; another process trains into it; a report
        cannot go where ``profile`` says; or a file cannot be written (a full disk): what is there stays whole, and
        ``resume`` goes on.
    ProfileError
        ``profile`` is a run that is not open.
    TrainingError
        The loss is not finite. The last checkpoint stays.
    UnsupportedError
        The recipe cannot run here, nothing of the model learns, or ``profile`` is True and ``out`` None.
    """
    run = _Run(model, tokens, objective, recipe, train_cells, eval_cells, eval_tokens, sampler)
    place, device = None if out is None else Path(out), next(model.parameters()).device
    run.on_step, run.on_eval = on_step, on_eval
    run.profile = checked_place(profile, place, ranks=run.ranks, device=device, is_resuming=resume)
    with writing_alone(place, run.ranks, device), ExitStack() as stack:
        run.open(place, resume, stack, begins_with)
        run.train()
    return run.history


class _Run:
    """The state of one call of :func:`fit`."""

    on_step: Callable[[StepRecord], None] | None = None
    on_eval: Callable[[dict[str, float]], None] | None = None
    profile: Asked = None
    _measured: Run | None = None
    _shares: Utilisation | None = None

    def __init__(
        self,
        model: nn.Module,
        tokens: TokenFolder,
        objective: Objective,
        recipe: Recipe,
        train_cells: np.ndarray,
        eval_cells: np.ndarray | None,
        eval_tokens: TokenFolder | None,
        sampler: Sampler | None,
    ) -> None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UnsupportedError(
                "nothing of this model learns: weights of eight bits do not, and all else is frozen; train the model "
                "before it was quantized, or set requires_grad_() of a head"
            )
        self.model, self.tokens, self.objective, self.recipe = model, tokens, objective, recipe
        self.ranks = distributed.Ranks.current()
        self.eval_tokens = tokens if eval_tokens is None else eval_tokens
        self.train_cells = checked_cells(train_cells, tokens)
        self.eval_cells = checked_eval_cells(eval_cells, eval_tokens, self.train_cells, tokens)
        if recipe.patience is not None and not len(self.eval_cells):
            raise InputError("patience needs cells to evaluate on")
        lengths = tokens.lengths()
        self.plan = BatchPlan(
            lengths,
            self.train_cells,
            batch_cells=recipe.batch_cells,
            batch_tokens=recipe.batch_tokens,
            token_budget=recipe.token_budget,
            seed=recipe.seed,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            sampler=sampler,
        )
        check_lengths(model, tokens, lengths[self.train_cells])
        check_lengths(model, self.eval_tokens, self.eval_tokens.lengths()[self.eval_cells])
        self.n_steps = recipe.steps or self.plan.total_steps(recipe.epochs)
        self.schedule = recipe.schedule_for(self.n_steps, self.plan.n_steps())
        self.history = History()
        self.divergence = Divergence(getattr(objective, "chance_loss", None))
        self.step = 0
        self.folder: RunFolder | None = None
        self.logs: list[Log] = []
        self._pending: PendingStep | None = None
        self._begin = self._start = self._seconds_before = 0.0
        self._saved_step = 0
        for module in model.modules():
            if isinstance(module, Encoder):
                module.is_recomputing = recipe.is_recomputing

    def open(self, out: Path | None, resume: bool, stack: ExitStack, begins_with: str | None) -> None:
        """Make or find the run's folder, wrap the model, and go to the last checkpoint."""
        recipe, ranks = self.recipe, self.ranks
        check_logs(recipe)
        if out is not None:
            identity = identity_of_run(
                self.model, recipe, self.tokens, self.eval_tokens, self.train_cells, self.eval_cells, begins_with
            )
            self.folder = RunFolder(out, identity, is_resuming=resume, ranks=ranks)
        torch.manual_seed(recipe.seed + ranks.rank)  # dropout differs between ranks
        self.engine = Engine(self.model, self.objective.loss, recipe, ranks)
        self.evaluations = Evaluations(
            self.model, self.objective, recipe, self.engine, self.eval_tokens, self.eval_cells, self.history,
            self.folder, self._unmeasured,
        )  # fmt: skip
        if self.folder is not None and self.folder.last is not None:
            state = load_checkpoint(self.folder.last, self.model, self.engine.optimizer, ranks, LoopState)
            self.step = self._saved_step = state["step"]
            self.evaluations.n_worse, self._seconds_before = state["n_worse"], state["seconds"]
            self.history.evaluations, self.history.best = (
                metrics_from(state["evaluations"]),
                metrics_from(state["best"]),
            )
            self.history.is_stopped_early = self.evaluations.is_patience_over
            if state["scaler"]:  # a run may go on in float16 that did not begin in it
                self.engine.scaler.load_state_dict(state["scaler"])
        if ranks.is_first:
            self.logs += logs_of(recipe, self.n_steps, self.step, None if self.folder is None else self.folder.path)
        for log in self.logs:
            stack.callback(log.close)

    def train(self) -> None:
        """All steps from here on."""
        recipe, device = self.recipe, self.engine.device
        batches = load_pieces(
            self.tokens,
            self.plan.pieces(self.step, self.n_steps),
            self.objective.collate,
            seed=recipe.seed,
            workers=recipe.workers,
            is_pinned=device.type == "cuda",
        )
        self.model.train()
        if self.ranks.is_first and any(log.is_active for log in self.logs):
            self._shares = Utilisation(
                self.model, device, self.engine.dtype, is_recomputing=recipe.is_recomputing
            )  # which measures, and so comes before the first step
        measuring = profiled(
            self.profile, self.engine.step, out=None if self.folder is None else self.folder.path, recipe=recipe,
            ranks=self.ranks, name=type(self.model).__name__, dtype=str(self.engine.dtype).removeprefix("torch."),
            cells=f"{len(self.train_cells):,} cells of {self.tokens.path}",
        )  # fmt: skip
        self._begin = self._start = time.perf_counter()
        with closing(batches), measuring as self._measured:
            while (position := self._position()) < self.n_steps and not self.history.is_stopped_early:
                pieces = self._one_step(batches, self.recipe.learning_rate * self.schedule(position))
                self._after_step(pieces[-1])
        self._settle()
        self._finish()
        self.evaluations.restore_best()
        self.model.eval()

    def _position(self) -> float:
        """Steps done, or the same share of them as of the time, whichever is more."""
        if self.recipe.max_seconds is None:
            return self.step
        seconds = self.ranks.first(self._seconds(), self.engine.device)
        return max(self.step, self.n_steps * seconds / self.recipe.max_seconds)

    def _seconds(self) -> float:
        """Time spent on this run, with what was spent before a checkpoint."""
        return self._seconds_before + time.perf_counter() - self._start

    def _one_step(self, batches: Iterator[tuple[Piece, Any]], learning_rate: float) -> list[Piece]:
        """Compute and apply one step."""
        engine, pieces, rows = self.engine, [], list[int | None]()

        def own() -> Iterator[tuple[Piece, Any]]:
            for piece, batch in batches:
                pieces.append(piece)
                rows.append(rows_of_head(batch))
                yield piece, batch
                if piece.index + 1 == piece.n_pieces:
                    return

        totals = engine.gradients(own())
        grad_norm = engine.normalize(pieces[0].n_step_tokens, totals)
        # A GPU is not waited for: its numbers are looked at when the next step has been handed to it.
        self._settle()
        self._pending = PendingStep(self.step + 1, totals, grad_norm, learning_rate, pieces)
        if engine.device.type == "cpu":
            self._numbers(self._pending)  # nobody waits here, so that weights are never spoilt
        engine.update(learning_rate)
        self.step += 1
        if engine.device.type == "cpu":
            self._settle()
        if self._measured is not None:
            known = [n for n in rows if n is not None]
            self._measured.step(head_rows=sum(known) if len(known) == len(rows) else None)
        return pieces

    def _unmeasured(self) -> contextlib.AbstractContextManager[None]:
        """What is no training is no part of its report."""
        if self._measured is None or not self._measured.is_running:
            return contextlib.nullcontext()
        return self._measured.paused()

    def _numbers(self, pending: PendingStep) -> tuple[float, float, float]:
        """(loss, weight, norm of the gradient) of a step; an error if they are not finite."""
        (total, weight), norm = pending.totals.tolist(), float(pending.grad_norm)
        loss = total / weight if weight else 0.0
        is_scaled = self.engine.scaler.is_enabled()  # overflown gradients are part of float16, an infinite loss is not
        if not math.isfinite(loss) or not (is_scaled or math.isfinite(norm)):
            kept = checkpoints_in(self.folder.checkpoints) if self.folder is not None else []
            cells = [piece.cells for piece in pending.pieces if not piece.is_filler]
            raise TrainingError(not_finite_message(pending.step, loss, norm, cells, self.tokens.path, kept))
        return loss, weight, norm

    def _settle(self) -> None:
        """Look at the numbers of the last step, and tell everybody."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        loss, weight, norm = self._numbers(pending)
        now = time.perf_counter()
        first = pending.pieces[0]
        record = StepRecord(
            step=pending.step,
            epoch=first.epoch + (first.step + 1) / self.plan.n_steps(first.epoch),
            loss=loss,
            weight=weight,
            grad_norm=norm,
            learning_rate=pending.learning_rate,
            n_cells=first.n_step_cells,
            n_tokens=first.n_step_tokens,
            seconds=now - self._begin,
        )
        self._begin = now
        self.history.steps.append(record)
        if self.ranks.is_first:
            if said := self.divergence.look(record.step, record.loss):
                warnings.warn(said, stacklevel=2)
            if any(log.is_active for log in self.logs) and (
                record.step % self.recipe.log_every == 0 or record.step == self.n_steps
            ):
                values = asdict(record) | {"tokens_per_s": record.n_tokens / record.seconds}
                values |= self._utilisation(pending, record)
                for log in self.logs:
                    log.step(values)
            if self.on_step is not None:
                self.on_step(record)

    def _utilisation(self, pending: PendingStep, record: StepRecord) -> dict[str, float | None]:
        """MFU and HFU of this device in one step."""
        assert self._shares is not None
        lengths = self.plan.lengths[np.concatenate([piece.cells for piece in pending.pieces])]
        return self._shares.of(lengths, record.weight / self.ranks.world_size, record.seconds)

    def _after_step(self, piece: Piece) -> None:
        """Evaluate and save where it is time to."""
        recipe = self.recipe
        is_epoch_end = piece.step + 1 == self.plan.n_steps(piece.epoch)
        is_due = is_epoch_end if recipe.eval_every is None else self.step % recipe.eval_every == 0
        if is_due and len(self.eval_cells):
            self._settle()
            self._evaluate()
        is_due = self.step % (recipe.save_every or SAVE_EVERY) == 0 or (is_epoch_end and recipe.save_every is None)
        if is_due and self.folder is not None:
            self._settle()
            self._save(self.folder)

    def _finish(self) -> None:
        """Evaluate and save the end, where that has not just been done."""
        evaluations = self.history.evaluations
        if len(self.eval_cells) and not (evaluations and evaluations[-1]["step"] == self.step):
            self._evaluate()
        if self.folder is not None and self._saved_step != self.step:
            self._save(self.folder)

    def _evaluate(self) -> None:
        """Metrics of the evaluation cells, told to everybody."""
        metrics = self.evaluations.look(self.step)
        for log in self.logs:
            log.evaluation({**metrics, "step": self.step})
        if self.ranks.is_first and self.on_eval is not None:
            self.on_eval(metrics)
        self._begin = time.perf_counter()

    def _save(self, folder: RunFolder) -> None:
        state = {
            "evaluations": metrics_for_json(self.history.evaluations),
            "best": metrics_for_json(self.history.best),
            "n_worse": self.evaluations.n_worse,
            "seconds": self._seconds(),
            "scaler": self.engine.scaler.state_dict(),
        }
        with self._unmeasured():
            save_checkpoint(
                folder.checkpoints, self.step, self.model, self.engine.optimizer, state, self.ranks,
                keep=self.recipe.keep,
            )  # fmt: skip
        self._saved_step = self.step
        if self.ranks.is_first:
            folder.forget_all_but(self.history.best)
        self._begin = time.perf_counter()
