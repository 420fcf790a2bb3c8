"""What runs beside the loop: processor time, energy, memory, and torch's profiler over its few steps."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

import torch
from torch import nn
from torch.autograd import profiler as autograd_profiler

from geneformer_fast.profiling.figures import KINDS, Energy, Figure, Memory, Missing, Series
from geneformer_fast.profiling.loop.inputs import Seen
from geneformer_fast.profiling.loop.phases import WATCH_WARMUP, Options
from geneformer_fast.profiling.loop.steps import DATA, OTHER
from geneformer_fast.profiling.meters.energy import Meter, energy_meter
from geneformer_fast.profiling.meters.memory import MemoryWatch
from geneformer_fast.profiling.meters.operations import OperationWatch, Watched


class Meters:
    """Starts and stops what measures beside the loop, and keeps what it found.

    Parameters
    ----------
    model, optimizer
        Whose memory is told apart.
    device
        Where they are.
    options
        What was asked for.

    Attributes
    ----------
    cpu_s
        Processor time of this process and its workers, within the window.
    energy, memory, series, seen
        What was found, or why there is nothing.
    watched_passes
        Forward passes of the watched steps.
    """

    def __init__(
        self, model: nn.Module | None, optimizer: torch.optim.Optimizer | None, device: torch.device, options: Options
    ) -> None:
        self._model, self._optimizer, self._device, self._options = model, optimizer, device, options
        self.cpu_s: Figure = 0.0
        self.seen = Watched()
        self.watched_passes: list[Seen] = []
        self.energy = no_energy("the window was never begun" if options.has_energy else "energy was not asked for")
        self.memory = no_memory("the loop ended before the step whose memory is looked at")
        self.series = Series()
        self._operations: OperationWatch | None = None
        self._blocks: MemoryWatch | None = None
        self._range: Any = None
        self._thread = threading.get_ident()
        self._cpu_began, self._n_before = 0.0, 0
        self._meter: Meter | None = None
        self._longest_s = -1.0

    @property
    def why_unwatched(self) -> str:
        """Why torch's profiler saw nothing."""
        if self._options.n_active == 0:
            return "torch's profiler was not asked for (n_active is 0)"
        return self.seen.notes[0] if self.seen.notes else "the loop ended before torch's profiler had watched a step"

    def idle(self) -> None:
        """Before the loop: what the device draws when it has nothing to do."""
        if self._options.has_energy:
            self._meter = energy_meter(self._device)
            self._meter.idle()

    def window_begins(self) -> None:
        """Steps are measured from here on."""
        self._cpu_began = cpu_seconds()
        if self._meter is not None:
            self._meter.start()

    def window_ends(self, n_cells: int) -> None:
        """Until here.

        Parameters
        ----------
        n_cells
            Of all that was measured so far.
        """
        if self._meter is not None:
            self._keep(self._meter.stop(n_cells - self._n_before), self._meter.series)
        self._n_before = n_cells
        assert not isinstance(self.cpu_s, Missing)
        self.cpu_s += cpu_seconds() - self._cpu_began

    def _keep(self, energy: Energy, series: Series) -> None:
        """Of several stretches the longest one."""
        window_s = 0.0 if isinstance(energy.window_s, Missing) else energy.window_s
        if window_s > self._longest_s:
            self.energy, self.series, self._longest_s = energy, series, window_s

    def memory_begins(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """The next step's memory is looked at, with the state of an optimizer that stepped where none was given."""
        self._blocks = MemoryWatch(self._model, self._optimizer or optimizer, self._device)
        self._blocks.__enter__()

    def memory_ends(self, *, is_whole: bool) -> None:
        """That step is over."""
        watch, self._blocks = self._blocks, None
        if watch is not None:
            watch.__exit__(None, None, None)
            if is_whole:
                self.memory = watch.memory()

    def watch_begins(self) -> None:
        """torch's profiler starts."""
        self.watched_passes = []
        self._operations = OperationWatch(
            self._device, n_warmup=WATCH_WARMUP, n_active=self._options.n_active, trace=self._options.trace
        )
        self._operations.start()
        self.mark(DATA)

    def watched(self, passes: list[Seen]) -> None:
        """A step of those that the profiler is on for."""
        if self._operations is None:
            return
        self._end_range()
        if self._operations.is_recording:
            self.watched_passes += passes
        self._operations.step()
        self.mark(DATA)

    def watch_ends(self, *, is_whole: bool) -> None:
        """The profiler stops."""
        self._end_range()
        watch, self._operations = self._operations, None
        if watch is not None:
            found = watch.finish()
            if is_whole or found.n_steps:
                self.seen = found

    def mark(self, part: str) -> None:
        """A part of a step begins: the profiler gets a range of that name."""
        if self._operations is None or threading.get_ident() != self._thread:
            return
        self._end_range()
        if part != OTHER and autograd_profiler._is_profiler_enabled:
            self._range = autograd_profiler.record_function(part)
            self._range.__enter__()

    def stop(self) -> None:
        """End whatever still runs."""
        self._end_range()
        self.memory_ends(is_whole=False)
        watch, self._operations = self._operations, None
        if watch is not None:
            watch.__exit__(None, None, None)
        meter, self._meter = self._meter, None
        if meter is not None:
            meter.close()

    def _end_range(self) -> None:
        opened, self._range = self._range, None
        if opened is not None:
            opened.__exit__(None, None, None)


def cpu_seconds() -> float:
    """Processor time of this process and its workers, those that have ended included."""
    import psutil

    times = os.times()
    total = time.process_time() + times.children_user + times.children_system
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            spent = child.cpu_times()
            total += spent.user + spent.system
    return total


def no_memory(why: str) -> Memory:
    """No figure of memory, and why."""
    missing = Missing(why)
    return Memory(dict.fromkeys(KINDS, missing), missing, missing, missing, missing, [])


def no_energy(why: str) -> Energy:
    """No figure of energy, and why."""
    missing = Missing(why)
    return Energy("", missing, missing, missing, missing, missing, missing, missing, {})
