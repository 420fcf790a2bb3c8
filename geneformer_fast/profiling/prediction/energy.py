"""Energy as time and operations cost it, fitted to measurements of one card, with its error on what it has not seen.

A card draws some power while anything runs, and more for what it computes: ``joules = a seconds + b operations``. Where
fewer than three problems were measured only the first term is fitted, a mean power. The error is the largest over all
problems, each left out in turn and predicted from the others, at the time that was measured of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geneformer_fast.profiling.figures import Figure, Missing
from geneformer_fast.profiling.prediction.answer import ONE, kwh

# Problems that must be left to tell the second term apart.
_TERMS = ("seconds", "flops")


@dataclass(frozen=True)
class EnergySample:
    """Energy of one measurement.

    Attributes
    ----------
    problem
        Measurements of one problem are left out together.
    seconds, flops
        Time that was measured, and operations.
    joules
        What was measured.
    """

    problem: str
    seconds: float
    flops: float
    joules: float


@dataclass(frozen=True)
class EnergyFit:
    """Coefficients, and how far off they are.

    Attributes
    ----------
    watts
        Joules per second.
    per_flop
        Joules per operation; 0 where too few problems were measured to tell.
    error
        The largest relative error over problems that were left out; None where there is only one.
    """

    watts: float
    per_flop: float
    error: float | None

    def joules(self, seconds: float, flops: float) -> float:
        """Energy of some work that takes so long."""
        return self.watts * seconds + self.per_flop * flops


def fit_energy(samples: Sequence[EnergySample]) -> EnergyFit:
    """Fit at least one measurement of one machine, mode and precision."""
    problems = sorted({sample.problem for sample in samples})
    n_terms = 2 if len(problems) >= 3 else 1
    errors = []
    for problem in problems:
        seen = [sample for sample in samples if sample.problem != problem]
        if not seen:
            break
        found = _coefficients(seen, n_terms)
        errors += [
            abs(found.joules(each.seconds, each.flops) / each.joules - 1) for each in samples if each.problem == problem
        ]
    fitted = _coefficients(samples, n_terms)
    return EnergyFit(fitted.watts, fitted.per_flop, max(errors) if errors else None)


def _coefficients(samples: Sequence[EnergySample], n_terms: int) -> EnergyFit:
    """None negative; the squares of relative errors are least."""
    from scipy.optimize import nnls

    rows = np.array([[getattr(sample, name) / sample.joules for name in _TERMS[:n_terms]] for sample in samples])
    # Operations are of the order of 10**12 per second; equal magnitudes keep the solver exact.
    scale = rows.max(axis=0)
    scale[scale == 0] = 1.0
    solved, _ = nnls(rows / scale, np.ones(len(samples)))
    watts, per_flop = (*(solved / scale), 0.0)[:2]
    return EnergyFit(float(watts), float(per_flop), None)


def energy_of(
    samples: Sequence[EnergySample], machine: str, seconds: float, flops: float, time_error: float | None
) -> tuple[Figure, Figure]:
    """Joules of some work whose time was predicted, and the relative error, that of time included.

    Parameters
    ----------
    samples
        Measurements with energy; none where it was never measured.
    machine
        Its name.
    seconds, flops
        Predicted time, and operations.
    time_error
        Of the predicted time; None where it is not known.
    """
    if not samples:
        missing = Missing(f"no energy was measured on {machine}; geneformer-fast profile measures it there")
        return missing, missing
    found = fit_energy(samples)
    known = found.error is not None and time_error is not None
    error = (1 + found.error) * (1 + time_error) - 1 if known else ONE  # type: ignore[operator]
    return found.joules(seconds, flops), error


def note_of_limit(limit_w: float | None, seconds: Figure, joules: Figure) -> list[str]:
    """What can be said where energy was not measured: more than its limit of power a card does not draw for long."""
    if limit_w is None or isinstance(seconds, Missing) or not isinstance(joules, Missing):
        return []
    return [f"energy is at most {kwh(limit_w * seconds)}, at the card's limit of {limit_w:.0f} W all the time"]
