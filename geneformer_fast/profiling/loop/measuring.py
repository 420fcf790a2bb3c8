"""A loop that is being measured: its steps, phase by phase."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn

from geneformer_fast.errors import ProfileError
from geneformer_fast.profiling.loop.counting import Counting
from geneformer_fast.profiling.loop.hooks import Hooks
from geneformer_fast.profiling.loop.inputs import CallReader, Seen, passes_of_step, shapes_of
from geneformer_fast.profiling.loop.meters import Meters
from geneformer_fast.profiling.loop.phases import Options, Phase, phases
from geneformer_fast.profiling.loop.steps import StepClock, stamps_of
from geneformer_fast.profiling.loop.subject import Profiled
from geneformer_fast.profiling.loop.summary import Measured, report_of
from geneformer_fast.profiling.loop.tally import Tally
from geneformer_fast.profiling.loop.writing import write_report
from geneformer_fast.profiling.report import Report


class Run:
    """A loop that is being measured; made by :func:`geneformer_fast.profile`.

    Attributes
    ----------
    device
        Where it computes.
    """

    #: The one that measures now: hooks, counters and torch's profiler are there once in a process.
    _current: Run | None = None

    def __init__(
        self, about: Profiled, device: torch.device, optimizer: torch.optim.Optimizer | None, options: Options
    ) -> None:
        self.device = device
        self._about, self._options, self._optimizer = about, options, optimizer
        self._counting = Counting(about, options.n_layers, self._is_training)
        self._clock = StepClock(stamps_of(device))
        self._tally = Tally(self._counting.add)
        self._meters = Meters(about.model, optimizer, device, options)
        self._reader = None if about.model is None else CallReader(about.model, is_packed=self._counting.is_packed)
        self._phases = phases(options, has_count=self._counting.wants_a_step)
        self._phase, self._size, self._left = Phase.WARMUP, 0, 0
        self._passes: list[Seen] = []
        self._shapes: list[object] = []
        self._unread: ProfileError | None = None
        self._dtype = options.dtype
        self._is_running = self._is_paused = False
        self._n_steps, self._began, self._first_step_s = 0, 0.0, float("nan")
        self._hooks: Hooks | None = None
        self._report: Report | None = None
        self._fault: Exception | None = ProfileError("the run has not begun: enter it, with profile(...) as run: ...")

    @property
    def is_running(self) -> bool:
        """Whether its block is being run."""
        return self._is_running

    @property
    def is_complete(self) -> bool:
        """Whether all steps that were to be looked at are done; those of a window without an end never are."""
        return self._phase is Phase.AFTER

    @property
    def report(self) -> Report:
        """What it came to, once the block has been left.

        Raises
        ------
        ProfileError
            The block still runs, has ended with an error, or had too few steps.
        """
        if self._report is None:
            assert self._fault is not None
            raise self._fault
        return self._report

    def __enter__(self) -> Run:
        if self._is_running or self._report is not None or self._n_steps:
            raise ProfileError("a run is measured once: call profile(...) again for another")
        if Run._current is not None:
            raise ProfileError("another run is being measured: runs cannot be nested; leave its with-block first")
        self._meters.idle()
        Run._current = self
        self._is_running = True
        self._fault = ProfileError("the run still goes on: leave its with-block, then read the report")
        try:
            self._hooks = self._hooks_on(self._about.model)
            self._began = time.perf_counter()
            self._next_phase()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._leave(self._phase)
            self._phase = Phase.AFTER
        finally:
            self._stop()
        if error is not None:
            self._fault = ProfileError(f"the loop ended with an error ({type(error).__name__}), so there is no report")
            return
        try:
            self._report = self._summed_up()
        except ProfileError as fault:
            self._fault = fault
            if self._options.out is not None:
                raise
            return
        if self._options.out is not None:
            write_report(self._report, self._options.out, is_replacing=self._options.is_replacing)

    def step(
        self,
        lengths: Any = None,
        attention_mask: Any = None,
        n_cells: int | None = None,
        head_rows: int | None = None,
    ) -> None:
        """A batch is through; in training, the optimizer has stepped.

        Parameters
        ----------
        lengths
            [B] whole numbers: real tokens of each cell.
        attention_mask
            Instead: [B, L], 1 at tokens and 0 at padding, as the model was given it.
        n_cells
            Cells, where there are no tokens to speak of.
        head_rows
            Rows that the head was asked for: masked genes, say.

        Raises
        ------
        ProfileError
            The run has not begun or is over; lengths or mask are of another kind; or nobody says what cells there were.
        """
        if not self._is_running or self._is_paused:
            raise ProfileError(
                "step() is for within the with-block of its run"
                + (", and not for what is paused" if self._is_paused else "")
            )
        passes = passes_of_step(
            self._passes, lengths, attention_mask, n_cells, head_rows, is_packed=self._counting.is_packed,
            unread=self._unread,
        )  # fmt: skip
        self._passes = []
        if not self._n_steps:
            if self._phase is Phase.WARMUP:
                self._clock.wait()
            self._first_step_s = time.perf_counter() - self._began
        self._n_steps += 1
        if self._phase is Phase.WINDOW:
            self._tally.add(passes)
            self._counting.add_step(tuple(self._shapes))
        elif self._phase is Phase.WATCH:
            self._meters.watched(passes)
        self._clock.end_step()
        self._left -= 1
        if self._left == 0:
            self._leave(self._phase)
            self._next_phase()
        self._shapes = []

    def follow(self, module: nn.Module) -> None:
        """Take the forward passes of another module for the model's: of one around it that computes the loss too.

        Raises
        ------
        ProfileError
            The run is not open.
        """
        if self._hooks is None or not self._is_running:
            raise ProfileError("follow() is for within the with-block of its run")
        self._hooks.remove()
        self._hooks = self._hooks_on(module)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what runs in here, between two steps: an evaluation, or the saving of a checkpoint."""
        if not self._is_running or self._is_paused:
            raise ProfileError("paused() is for within the with-block of its run, and not within itself")
        left = self._left
        self._leave(self._phase)
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused, self._passes, self._shapes = False, [], []
            if self._is_running:
                if not self._n_steps:
                    self._began = time.perf_counter()
                self._enter(self._phase)
                if self._phase not in (Phase.MEMORY, Phase.WATCH):  # which begin anew
                    self._left = left

    def _hooks_on(self, module: nn.Module | None) -> Hooks:
        return Hooks(module, self._optimizer, self._mark, self._called, self._took)

    def _mark(self, part: str) -> None:
        """A part of a step begins."""
        if not self._is_paused:
            self._clock.mark(part)
            self._meters.mark(part)

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is about to compute."""
        if self._is_paused or self._reader is None:
            return
        if self._dtype is None:
            self._dtype = self._about.dtype()
        if self._counting.wants_a_step:
            self._shapes.append(shapes_of(args, kwargs))
        try:
            seen = self._reader.read(args, kwargs)
        except ProfileError as fault:
            self._unread = fault  # what is told in step() may do
            return
        if seen is not None:
            self._passes.append(seen)

    def _took(self, seconds: float) -> None:
        """A forward pass is over."""
        if not self._is_paused:
            self._clock.end_pass(seconds)

    def _is_training(self) -> bool:
        return self._options.mode == "train" or (self._hooks is not None and self._hooks.n_updates > 0)

    def _next_phase(self) -> None:
        """Begin the next phase that has steps."""
        self._phase, self._size = next(each for each in self._phases if each[1])
        self._enter(self._phase)

    def _enter(self, phase: Phase) -> None:
        self._left = self._size
        if phase is Phase.WINDOW:
            self._clock.wait()  # what a card still has to do is no part of the energy either
            self._meters.window_begins()
            self._clock.begin()
        elif phase is Phase.MEMORY:
            self._meters.memory_begins(None if self._hooks is None else self._hooks.optimizer)
        elif phase is Phase.WATCH:
            self._meters.watch_begins()
        elif phase is Phase.COUNT:
            self._counting.begin_step()

    def _leave(self, phase: Phase) -> None:
        """End a phase; what was seen of one that is broken off is thrown away, but for the window's."""
        if phase is Phase.WINDOW:
            self._clock.close()
            self._meters.window_ends(self._tally.n_told)
        elif phase is Phase.MEMORY:
            self._meters.memory_ends(is_whole=self._left == 0)
        elif phase is Phase.WATCH:
            self._meters.watch_ends(is_whole=self._left == 0)
        elif phase is Phase.COUNT:
            self._counting.end_step(tuple(self._shapes), is_whole=self._left == 0)

    def _stop(self) -> None:
        """Take everything out again; nothing of it is left in model, optimizer or process."""
        self._is_running = False
        self._counting.end_step(None, is_whole=False)
        if Run._current is self:
            Run._current = None
        if self._hooks is not None:
            self._hooks.remove()
        self._meters.stop()

    def _summed_up(self) -> Report:
        if not self._n_steps:
            raise ProfileError("no step was made: call run.step() after every batch, within the with-block")
        if not self._clock.n_steps:
            raise ProfileError(
                f"all {self._n_steps} steps were warm-up: make more of them, or take fewer for it (n_warmup=0)"
            )
        self._tally.settle()
        if self._tally.fault is not None:
            raise self._tally.fault
        self._clock.check()
        assert self._hooks is not None
        return report_of(
            Measured(
                self._about, self.device, self._options, self._dtype, self._clock, self._tally, self._counting,
                self._meters, self._hooks, self._first_step_s,
            )
        )  # fmt: skip
