"""Measuring passes over cells: whole ones, because cells of one pass are computed longest first."""

from __future__ import annotations

import bisect
import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.run import profile
from geneformer_fast.profiling.scenarios.cells import ProfileCells, evenly

#: Steps that torch's profiler watches.
N_ACTIVE = 2
# A trial goes over so many batches, twice: what compiles, and what tells how fast it is.
_TRIAL_BATCHES = 2


class Passing(Protocol):
    """Something that goes over cells, batch by batch."""

    #: The cells it reads.
    cells: ProfileCells
    #: Most tokens of a batch.
    token_budget: int

    def steps(self, chosen: np.ndarray, *, is_alone: bool = False) -> Iterator[dict[str, Any]]:
        """One pass over some cells: after each batch, what ``Run.step`` is to be told of it.

        Parameters
        ----------
        chosen
            Cell numbers.
        is_alone
            One batch at a time, in the thread that asks: where somebody watches.
        """

    def n_steps(self, chosen: np.ndarray) -> int:
        """How many batches a pass over some cells has."""


@dataclass(frozen=True)
class Trial:
    """What a few batches showed.

    Attributes
    ----------
    chosen
        Their cells.
    first_step_s
        Of the very first batch, with all that is compiled for it.
    wall_s
        Of the second pass over them.
    """

    chosen: np.ndarray
    first_step_s: float
    wall_s: float

    @property
    def cells_per_s(self) -> float:
        """Of the second pass."""
        return len(self.chosen) / self.wall_s


def tried(passing: Passing, n_cells: int) -> Trial:
    """Go over a few batches, twice."""
    lengths = passing.cells.lengths()
    mean = max(1.0, float(lengths.mean()))
    chosen = evenly(lengths, min(n_cells, max(1, math.ceil(_TRIAL_BATCHES * passing.token_budget / mean))))
    begin, first = time.perf_counter(), math.nan
    for _ in passing.steps(chosen):
        first = time.perf_counter() - begin if math.isnan(first) else first
    begin = time.perf_counter()
    for _ in passing.steps(chosen):
        pass
    return Trial(chosen, first, time.perf_counter() - begin)


def chosen_cells(
    passing: Passing, trial: Trial, n_cells: int, *, steps: int | None, seconds: float
) -> tuple[np.ndarray, int]:
    """Which cells a pass goes over, and how many steps are measured.

    Parameters
    ----------
    passing
        What goes over them.
    trial
        What it showed.
    n_cells
        As many as there are, or as somebody asks for.
    steps, seconds
        How long is to be measured; ``steps`` None: about so many seconds, in whole passes.

    Notes
    -----
    A pass that is broken off leaves its shortest cells out, and looks slower than it is.
    """
    lengths = passing.cells.lengths()
    if steps is not None:
        return _of_steps(passing, lengths, n_cells, steps), steps
    wanted = trial.cells_per_s * seconds
    chosen = evenly(lengths, min(n_cells, max(len(trial.chosen), math.ceil(wanted))))
    n_passes = max(1, round(wanted / len(chosen)))
    return chosen, n_passes * passing.n_steps(chosen)


def _of_steps(passing: Passing, lengths: np.ndarray, n_cells: int, steps: int) -> np.ndarray:
    """As many cells as a pass of so many steps has room for; all, where they are fewer."""
    wanted = steps * passing.token_budget / max(1.0, float(lengths.mean()))
    most = min(n_cells, len(lengths), max(steps, math.ceil(wanted)))
    rooms = range(1, most + 1)
    n_fitting = bisect.bisect_right(rooms, steps, key=lambda n: passing.n_steps(evenly(lengths, n)))
    return evenly(lengths, max(1, n_fitting))


def measured(
    passing: Passing, n_cells: int, *, steps: int | None, seconds: float, trace: Path | None, **about: Any
) -> Report:
    """The report of passes over cells.

    Parameters
    ----------
    passing
        What goes over them.
    n_cells
        Most cells to take.
    steps, seconds
        How long to measure.
    trace
        Where torch's profiler writes.
    **about
        For :func:`geneformer_fast.profile`: the model, names, settings.
    """
    trial = tried(passing, n_cells)
    chosen, n_steps = chosen_cells(passing, trial, n_cells, steps=steps, seconds=seconds)
    n_warmup = passing.n_steps(trial.chosen)
    about["settings"] = {**about.get("settings", {}), "cells": len(chosen)}
    with profile(n_warmup=n_warmup, n_steps=n_steps, n_active=N_ACTIVE, trace=trace, **about) as run:
        for told in passing.steps(trial.chosen):
            run.step(**told)
        left = n_steps
        while left:
            for told in passing.steps(chosen):
                run.step(**told)
                left -= 1
                if not left:
                    break
        while not run.is_complete:
            for told in passing.steps(trial.chosen, is_alone=True):
                run.step(**told)
                if run.is_complete:
                    break
    report = run.report
    return dataclasses.replace(report, time=dataclasses.replace(report.time, first_step_s=trial.first_step_s))
