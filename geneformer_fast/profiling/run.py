"""``geneformer_fast.profile``: a report of whatever loop runs within it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from geneformer_fast.arguments import checked
from geneformer_fast.config import usable_device
from geneformer_fast.errors import ProfileError
from geneformer_fast.profiling.loop.counting import Counting
from geneformer_fast.profiling.loop.hooks import Hooks
from geneformer_fast.profiling.loop.inputs import CallReader, Seen, passes_of_step, shapes_of
from geneformer_fast.profiling.loop.meters import Meters
from geneformer_fast.profiling.loop.phases import MODES, Options, Phase, phases
from geneformer_fast.profiling.loop.steps import StepClock, stamps_of
from geneformer_fast.profiling.loop.subject import Profiled, device_of, profiled
from geneformer_fast.profiling.loop.summary import Measured, report_of
from geneformer_fast.profiling.loop.tally import Tally
from geneformer_fast.profiling.loop.writing import check_place, write_report
from geneformer_fast.profiling.report import Report


@checked
def profile(
    model: nn.Module | None = None,
    *,
    name: str | None = None,
    device: str | torch.device | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    n_warmup: int = 3,
    n_steps: int | None = None,
    n_active: int = 2,
    trace: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    energy: bool = True,
    ceilings: bool = True,
    tokens: str = "",
    mode: str = "loop",
    engine: str | None = None,
    dtype: str | None = None,
    n_layers: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Measure a loop of one's own, of training or of inference, around any torch module.

    ``with profile(model) as run:`` around the loop, ``run.step()`` after every batch (in training after the optimizer's
    step), and then ``run.report``. The cells of a step are read from what the model is called with (a
    :class:`geneformer_fast.Ragged`, or ``attention_mask`` and ``input_ids`` as transformers have them), or told to
    :meth:`Run.step`.

    Parameters
    ----------
    model
        The outermost module that the loop calls, so that all of the forward pass lies within it; wrapped (DDP, FSDP,
        ``torch.compile``) or not. None: nothing is known of parts of a step, of operations and of weights.
    name
        What to call it; None: its class.
    device
        Where it computes; None: where its weights are.
    optimizer
        Whose steps end a training step, and whose state is told apart in memory; None: every optimizer of torch.
    n_warmup
        Steps that are left out, because things are compiled and allocated in them.
    n_steps
        Steps of the window; later ones, up to ``n_active`` + 2, are for memory and for torch's profiler (one more to
        count the work of a model that is no BERT), and all others are not measured. None: the window is five steps and,
        after those for memory and the profiler, all that follow.
    n_active
        Steps that torch's profiler watches, which are no part of the window; 0 for none.
    trace
        Where to write what it saw, for Perfetto or ``chrome://tracing``: a ``.json.gz``.
    out
        Where the report goes: a ``.json``, an ``.html``, or a folder for both. None: nowhere.
    energy
        Whether to read counters of energy, where there are any. Idle power takes two seconds before the loop.
    ceilings
        Whether to measure what products and copies reach here, after the loop; without, there is no MFU.
    tokens
        In words, where the cells come from.
    mode
        ``"embed"``, ``"train"``, ``"tokenize"`` or ``"loop"``; ``"train"`` says that gradients are computed where no
        optimizer of torch shows it.
    engine
        Who computes; None: as the model looks.
    dtype
        Of matrix products, such as ``"bfloat16"`` or ``"int8"``; None: as the first forward pass runs.
    n_layers
        Blocks that are computed, where not all of them are.
    settings
        What else was chosen, for the report.

    Returns
    -------
    Run
        To be entered by ``with``, once.

    Raises
    ------
    ProfileError
        The model lies elsewhere than ``device`` says; a number is negative; there is no such mode.
    OutputError
        ``out`` names a folder where a file should be, or the other way round.
    UnsupportedError
        torch cannot use ``device``; or what draws a page is not installed.

    Notes
    -----
    The device is waited for at the beginning and the end of the window only, and outside of watched steps nothing costs
    more than some marks of a clock. Definitions of all figures are in :mod:`geneformer_fast.profiling.figures`.
    """
    if mode not in MODES:
        raise ProfileError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    for what, number, least in (
        ("n_warmup", n_warmup, 0), ("n_active", n_active, 0), ("n_steps", n_steps, 1), ("n_layers", n_layers, 0),
    ):  # fmt: skip
        if number is not None and number < least:
            raise ProfileError(f"{what} must be at least {least}, not {number}")
    if out is not None:
        check_place(Path(out))
    place = device_of(model, None if device is None else usable_device(device))
    options = Options(
        name, mode, engine, dtype, tokens, dict(settings or {}), n_layers, int(n_warmup),
        None if n_steps is None else int(n_steps), int(n_active), None if trace is None else Path(trace),
        None if out is None else Path(out), bool(energy), bool(ceilings),
    )  # fmt: skip
    return Run(profiled(model), place, optimizer, options)


class Run:
    """A loop that is being measured; made by :func:`profile`.

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
            self._hooks = Hooks(self._about.model, self._optimizer, self._mark, self._called)
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
            write_report(self._report, self._options.out)

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
        self._hooks = Hooks(module, self._optimizer, self._mark, self._called)

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
