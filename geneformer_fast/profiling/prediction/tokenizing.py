"""Time of tokenizing on a machine that was measured: so much for each token, and the start of the process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geneformer_fast import families
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.profiling.figures import Figure, Missing, divided
from geneformer_fast.profiling.lengths import Lengths
from geneformer_fast.profiling.prediction.answer import ONE, Prediction, cells_like, notes_of_error
from geneformer_fast.profiling.prediction.energy import energy_of
from geneformer_fast.profiling.prediction.fitted import GOOD_ENOUGH, interval
from geneformer_fast.profiling.prediction.measurements import Machine, Tokenized, machine_named


@dataclass(frozen=True)
class PassFit:
    """What passes over counts take.

    Attributes
    ----------
    per_token, start
        Seconds; ``start`` is None where no whole process was measured.
    error
        The largest relative error over problems that were left out; None where what was left did not tell.
    bytes_per_cell, start_bytes
        The same of memory; None where nobody looked at it for two problems.
    memory_error
        As ``error``.
    """

    per_token: float
    start: float | None
    error: float | None
    bytes_per_cell: float | None
    start_bytes: float | None
    memory_error: float | None


def predict_tokenizing(
    card: str, n_cells: int, lengths: Lengths, *, preset: str | None = None, threads: int | None = None
) -> Prediction:
    """Predict from passes that were measured.

    Parameters
    ----------
    card
        Name of a machine that was measured.
    n_cells, lengths
        How many, and how many tokens each becomes.
    preset
        Whose dictionaries; None: those of most measurements.
    threads
        Workers; None: as many as were measured.

    Raises
    ------
    UnsupportedError
        Nothing like that was measured there.
    """
    machine = machine_named(card)
    chosen = chosen_passes(machine, preset, threads)
    first = chosen[0]
    most = families.layout(first.preset).max_len
    cells = cells_like(n_cells, lengths, most, what=f"that the dictionaries of {first.preset} leave of a cell")
    found = fit_passes(chosen)
    seconds = found.per_token * cells.n_tokens + (found.start or 0.0)
    bounds = interval(seconds, found.error)
    peak: Figure = Missing(f"memory of several numbers of cells was not measured on {machine.name}")
    if found.bytes_per_cell is not None and found.start_bytes is not None:
        peak = found.start_bytes + found.bytes_per_cell * cells.n
    dates, commits = (sorted({getattr(each, name) for each in chosen}) for name in ("date", "commit"))
    notes = [f"measured {' and '.join(dates)}, commit {', '.join(commits)}", *notes_of_error(found.error)]
    notes.append(
        "uncompressed counts in an .h5ad file that the system had in memory: a slow disk, or gzip, takes longer"
    )
    if found.start is None:
        notes.append("starting Python comes on top")
    return Prediction(
        machine.name, "tokenize", f"the dictionaries of {first.preset}", None, first.threads, cells.what, cells.n,
        round(cells.n_tokens), None, seconds, divided(cells.n, seconds, "the time"),
        ONE if bounds is None else bounds[0], ONE if bounds is None else bounds[1],
        ONE if found.error is None else found.error, found.error is not None and found.error <= GOOD_ENOUGH,
        peak, ONE if found.memory_error is None else found.memory_error,
        *energy_of([], machine.name, seconds, 0.0, None), len(chosen),
        sorted({each.source for each in chosen}), notes,
    )  # fmt: skip


def chosen_passes(machine: Machine, preset: str | None, threads: int | None) -> list[Tokenized]:
    """Passes of one preset: the one that is asked for, else that of which most problems were measured.

    Raises
    ------
    UnsupportedError
        Nothing like that was measured there.
    """
    kinds: dict[tuple[str, int], list[Tokenized]] = {}
    for each in machine.tokenized:
        kinds.setdefault((each.preset, each.threads), []).append(each)
    fitting = {
        kind: found
        for kind, found in kinds.items()
        if preset in (None, kind[0]) and threads in (None, kind[1])
    }  # fmt: skip
    if not fitting:
        there = ", ".join(f"{name} with {n} workers" for name, n in sorted(kinds)) or "nothing"
        asked = " ".join(filter(None, (preset, f"with {threads} workers" if threads else "")))
        raise UnsupportedError(
            f"{machine.name}: tokenizing {asked}".rstrip() + f" was not measured there; there is {there}"
        )
    return max(fitting.values(), key=lambda found: len({each.problem for each in found}))


def fit_passes(passes: Sequence[Tokenized]) -> PassFit:
    """Fit passes of one machine and preset."""
    of_time = [_Row(p.problem, float(p.is_whole_process), float(p.n_tokens), p.seconds) for p in passes]
    of_memory = [_Row(p.problem, 1.0, float(p.n_cells), float(p.peak_bytes)) for p in passes if p.peak_bytes]
    start, per_token = _solved(of_time)
    has_start = any(row.has_start for row in of_time)
    if len({row.problem for row in of_memory}) < 2:
        return PassFit(per_token, start if has_start else None, _error(of_time), None, None, None)
    start_bytes, per_cell = _solved(of_memory)
    return PassFit(
        per_token, start if has_start else None, _error(of_time), per_cell, start_bytes, _error(of_memory)
    )  # fmt: skip


@dataclass(frozen=True)
class _Row:
    """``found = has_start * start + amount * each``."""

    problem: str
    has_start: float
    amount: float
    found: float


def _solved(rows: Sequence[_Row]) -> tuple[float, float]:
    """(start, each): squares of relative errors are least, and none is negative."""
    from scipy.optimize import nnls

    scaled = np.array([[row.has_start / row.found, row.amount / row.found] for row in rows])
    size = np.maximum(scaled.max(0), 1e-300)
    solved, _ = nnls(scaled / size, np.ones(len(rows)))
    start, each = solved / size
    return float(start), float(each)


def _is_determined(rows: Sequence[_Row]) -> bool:
    """Whether start and each come apart."""
    return len({(row.has_start, row.amount) for row in rows}) > 1 or not any(row.has_start for row in rows)


def _error(rows: Sequence[_Row]) -> float | None:
    """The largest over problems that were left out; None where what is left does not tell both."""
    errors = []
    for problem in {row.problem for row in rows}:
        seen = [row for row in rows if row.problem != problem]
        if not seen or not _is_determined(seen):
            return None
        start, each = _solved(seen)
        for row in rows:
            if row.problem == problem:
                said = start * row.has_start + each * row.amount
                errors.append(abs(math.log(max(said, 1e-300) / row.found)))
    return math.expm1(max(errors)) if errors else None
