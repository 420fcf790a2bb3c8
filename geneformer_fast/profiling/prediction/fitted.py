"""Time as a function of work, fitted to measurements of one card or machine, with its error on what it has not seen.

The work of a measurement is known: operations, numbers that pass through memory (tokens x blocks x width), and, where a
host launches kernels, blocks x batches. Time is ``max(a operations + b numbers, c launches)``, with as many of these
terms as the measurements determine when any problem (a model on some cells) is left out. The error that is stated is
the largest over all problems, each left out in turn and predicted from the others. No form is chosen for its error:
with few problems that would make it look small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: An error up to which a prediction is called one.
GOOD_ENOUGH = 0.15


@dataclass(frozen=True)
class Work:
    """What is computed.

    Attributes
    ----------
    flops
        Operations.
    numbers
        Tokens x blocks x width; in training three times as many.
    launches
        Blocks x batches; in training three times as many.
    """

    flops: float
    numbers: float
    launches: float


@dataclass(frozen=True)
class Sample:
    """One measurement.

    Attributes
    ----------
    problem
        Of what: measurements of one problem are left out together.
    work
        What was computed.
    seconds
        How long it took.
    is_device_alone
        Whether the host had nothing to launch (one CUDA graph per batch): no launches then.
    """

    problem: str
    work: Work
    seconds: float
    is_device_alone: bool = False


# Terms of the forms, the richest first.
_FORMS: tuple[tuple[str, ...], ...] = (
    ("flops", "numbers", "launches"),
    ("flops", "numbers"),
    ("flops", "launches"),
    ("flops",),
)


@dataclass(frozen=True)
class MemorySample:
    """Peak memory of one measurement: ``fixed_bytes + c units``.

    Attributes
    ----------
    problem
        As in :class:`Sample`.
    fixed_bytes
        What is known: weights, and where there is a formula, batches.
    units
        Of what is not: numbers of a batch, or 1 for all that a process has besides.
    peak_bytes
        What was measured.
    """

    problem: str
    fixed_bytes: float
    units: float
    peak_bytes: float


def fit_memory(samples: Sequence[MemorySample]) -> tuple[float, float | None]:
    """(c, the largest relative error over problems that were left out; None where there is only one)."""
    errors = []
    for problem in sorted({sample.problem for sample in samples}):
        seen = [sample for sample in samples if sample.problem != problem]
        if not seen:
            return _bytes_per_unit(samples), None
        c = _bytes_per_unit(seen)
        errors += [
            abs((each.fixed_bytes + c * each.units) / each.peak_bytes - 1)
            for each in samples
            if each.problem == problem
        ]
    return _bytes_per_unit(samples), max(errors)


def _bytes_per_unit(samples: Sequence[MemorySample]) -> float:
    """Where the squares of relative errors of the peaks are least."""
    share = np.array([sample.units / sample.peak_bytes for sample in samples])
    left = np.array([1 - sample.fixed_bytes / sample.peak_bytes for sample in samples])
    return max(0.0, float((share * left).sum() / (share**2).sum()))


@dataclass(frozen=True)
class Fit:
    """Coefficients, and how far off they are.

    Attributes
    ----------
    coefficients
        Seconds per operation, per number and per launch; terms that are not used are absent.
    error
        The largest relative error over problems that were left out; None where there is only one problem.
    n_problems
        Problems that were measured.
    """

    coefficients: dict[str, float]
    error: float | None
    n_problems: int

    def seconds(self, work: Work, *, is_device_alone: bool = False) -> float:
        """Time of some work."""
        device = sum(self.coefficients.get(name, 0.0) * getattr(work, name) for name in ("flops", "numbers"))
        return device if is_device_alone else max(device, self.coefficients.get("launches", 0.0) * work.launches)


def interval(seconds: float, error: float | None) -> tuple[float, float] | None:
    """From the shortest to the longest time that an error allows; None where it is not known."""
    return None if error is None else (seconds / (1 + error), seconds * (1 + error))


def fit(samples: Sequence[Sample]) -> Fit:
    """Fit measurements of one machine, mode and precision.

    Parameters
    ----------
    samples
        At least one.
    """
    problems = sorted({sample.problem for sample in samples})
    for form in _FORMS:
        error = _error_left_out(samples, problems, form)
        if error is not None:
            return Fit(_coefficients(samples, form), error, len(problems))
    return Fit(_coefficients(samples, ("flops",)), None, len(problems))


def _error_left_out(samples: Sequence[Sample], problems: Sequence[str], form: tuple[str, ...]) -> float | None:
    """The largest error over problems that were left out; None where what is left does not tell all coefficients."""
    errors = []
    for problem in problems:
        seen = [sample for sample in samples if sample.problem != problem]
        if len({sample.problem for sample in seen}) < len([name for name in form if name != "launches"]):
            return None
        if "launches" in form and not any(sample.work.launches for sample in seen if not sample.is_device_alone):
            return None
        found = Fit(_coefficients(seen, form), None, len(problems))
        for sample in samples:
            if sample.problem == problem:
                said = found.seconds(sample.work, is_device_alone=sample.is_device_alone)
                errors.append(abs(math.log(max(said, 1e-300) / sample.seconds)))
    return math.expm1(max(errors))


def _coefficients(samples: Sequence[Sample], form: tuple[str, ...]) -> dict[str, float]:
    """None negative; the squares of relative errors are least.

    Without launches this is a linear problem. With them each measurement was bound by the device or by the host, and
    every such division is tried, since there are few: the one whose own prediction is closest is taken.
    """
    from scipy.optimize import nnls

    device = [name for name in form if name != "launches"]
    rows = np.array([[getattr(sample.work, name) for name in form] for sample in samples], dtype=np.float64)
    scaled = rows / np.array([[sample.seconds] for sample in samples])
    free = [place for place, sample in enumerate(samples) if not sample.is_device_alone]
    divisions = _divisions(free) if "launches" in form else [()]
    best: tuple[float, dict[str, float]] | None = None
    for bound_by_host in divisions:
        by_device = [place for place in range(len(samples)) if place not in bound_by_host]
        if not by_device:
            continue
        solved, _ = nnls(scaled[by_device][:, : len(device)], np.ones(len(by_device)))
        found = dict(zip(device, map(float, solved), strict=True))
        if bound_by_host:
            found["launches"] = 1 / max(float(scaled[list(bound_by_host), -1].mean()), 1e-300)
        tried = Fit(found, None, 0)
        off = sum(
            math.log(max(tried.seconds(each.work, is_device_alone=each.is_device_alone), 1e-300) / each.seconds) ** 2
            for each in samples
        )
        if best is None or off < best[0]:
            best = off, found
    assert best is not None
    return best[1]


def _divisions(places: Sequence[int]) -> list[tuple[int, ...]]:
    """Every choice among a few places, none included; of very many, only none and all."""
    if len(places) > 10:
        return [(), tuple(places)]
    return [chosen for n in range(len(places) + 1) for chosen in itertools.combinations(places, n)]
