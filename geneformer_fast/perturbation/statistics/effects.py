"""What each gene does, how sure that is, and how it compares with genes like it: one row per gene and state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_fast.perturbation.statistics import bootstrap, null, power, responders
from geneformer_fast.perturbation.statistics.columns import Run, Values, mean_by
from geneformer_fast.perturbation.statistics.multiple import Method, false_discovery_rates
from geneformer_fast.perturbation.statistics.names import Names
from geneformer_fast.perturbation.statistics.versus_null import aligned

if TYPE_CHECKING:
    import pandas

#: Cells that must have a gene for it to be tested.
MIN_CELLS = 10


@dataclass(frozen=True)
class Settings:
    """How effects are judged.

    Attributes
    ----------
    min_cells
        Genes in fewer cells are listed and not tested.
    group
        The column whose cells stay together, such as donors; None where there is none.
    draws, confidence, seed
        Of the bootstrap.
    correction
        Of p-values: ``"bh"`` or ``"by"``.
    fdr
        The false discovery rate that is aimed at.
    """

    min_cells: int = MIN_CELLS
    group: str | None = None
    draws: int = bootstrap.DRAWS
    confidence: float = 0.95
    seed: int = 0
    correction: Method = "bh"
    fdr: float = 0.05


def effects(
    run: Run, names: Names, settings: Settings, states: Sequence[str] = ("",), *, control: Run | None = None,
    n_cells: int | None = None,
) -> pandas.DataFrame:  # fmt: skip
    """The table of effects; the guide says what its columns mean.

    Parameters
    ----------
    run
        The values.
    names
        Of genes.
    settings
        How they are judged.
    states
        Which states, in this order; one empty name where there are none.
    control
        A run of other cells, whose means stand beside.
    n_cells
        Cells that were perturbed, those without a value included; None counts those with one.
    """
    import pandas as pd

    total = n_cells or len(run.cells)
    first = run.values[states[0]]
    is_covered = first.counts >= settings.min_cells
    is_alike, rank = _alike(run, is_covered)
    for state in states:  # a gene without a mean (all of its cells without a group, say) is like no other
        is_alike &= ~np.isnan(_by_unit(run, run.values[state], settings)[0])
    matched = null.matched_genes(first.counts, rank, total, is_alike)
    share = responders.share_of_cells_moved_most([run.values[state] for state in states], is_shift=run.has_states)
    is_universal = is_covered & (share >= responders.UNIVERSAL)
    if control is not None:
        of_control = [aligned(control, run, state) for state in states]
        is_universal &= (
            responders.share_of_cells_moved_most(of_control, is_shift=run.has_states) >= responders.UNIVERSAL
        )
    tables = []
    for state in states:
        columns: dict[str, Any] = {
            "gene": list(map(names.ids, run.edits)),
            "symbol": [names.shown(edit) for edit in run.edits],
            "tokens": [" ".join(map(str, edit)) for edit in run.edits],
        }
        if run.has_states:
            columns["state"] = state
        columns |= {"coverage": first.counts / total, "rank": run.rank}
        columns |= _of_state(run, run.values[state], matched, is_covered, settings)
        columns |= {"top_share": share, "is_universal": is_universal}
        if control is not None:
            columns["control_mean"] = aligned(control, run, state).means()
            columns["beyond_control"] = columns["mean"] - columns["control_mean"]
        tables.append(pd.DataFrame(columns)[run.values[state].counts > 0])
    table = pd.concat(tables, ignore_index=True)
    table.attrs["matched"] = matched.size
    return table


def _alike(run: Run, is_covered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[E] which edits can be compared with each other, and their ranks; those of pairs that share no gene mean nothing.

    Single genes, or where there are hardly any what most edits are: pairs with an anchor, say.
    """
    sizes = np.array([len(edit) for edit in run.edits])
    n_single = int((is_covered & (sizes == 1)).sum())
    size = 1 if n_single > null.LEAST_MATCHED or not is_covered.any() else int(np.bincount(sizes[is_covered]).argmax())
    chosen = is_covered & (sizes == size)
    shared = set.intersection(*(set(run.edits[at]) for at in np.flatnonzero(chosen))) if chosen.any() else set()
    has_rank = size == 1 or len(shared) == size - 1
    return chosen, run.rank if has_rank else np.full(len(sizes), np.nan)


def _of_state(
    run: Run, values: Values, matched: null.MatchedGenes, is_covered: np.ndarray, settings: Settings
) -> dict[str, np.ndarray]:
    """Columns of one state."""
    counts, deviation = values.counts, spread(values)
    means, of_groups = _by_unit(run, values, settings)
    columns: dict[str, np.ndarray] = {"n_cells": counts, "mean": means, "sd": deviation}
    units, unit_sd = counts, deviation
    if of_groups is not None:
        units = (~np.isnan(of_groups)).sum(axis=1)
        unit_sd = _deviation_of_groups(of_groups, means, units)
        columns |= {"sd_cells": deviation, "sd": unit_sd, "n_groups": units}
    columns |= _intervals(values, of_groups, len(run.cells), matched, units, means, settings)
    if run.has_states:  # cosines are positive
        columns["same_sign"] = _same_sign(values, of_groups, means)
    test = null.against_like(means, matched)
    columns |= {
        "null_mean": test.mean,
        "null_sd": test.deviation,
        "effect_size": _divided(means - test.mean, test.deviation),
        "p_value": test.p_values,
        "p_by_order": test.by_order,
        "q_value": false_discovery_rates(test.p_values, settings.correction),
        "is_covered": is_covered,
    }
    level = settings.fdr / max(int(matched.has_null.sum()), 1)
    columns["detectable"] = power.detectable(units, level) * unit_sd
    columns["units_needed"] = power.needed(_divided(columns["difference"], unit_sd), level)
    return columns


def _by_unit(run: Run, values: Values, settings: Settings) -> tuple[np.ndarray, np.ndarray | None]:
    """[E] means over the units, and [E, groups] those of groups; None where cells are the units."""
    group, n_groups = groups_of(run, settings.group)
    if n_groups < 2:
        return values.means(), None
    of_groups = bootstrap.group_means(values, group, n_groups)
    return bootstrap.mean_of_groups(of_groups), of_groups


def _intervals(
    values: Values, of_groups: np.ndarray | None, n_cells: int, matched: null.MatchedGenes, units: np.ndarray,
    means: np.ndarray, settings: Settings,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Ends of the mean, by the unit and by cells, and of the difference from genes like it."""
    n_edits = len(values.starts) - 1
    drawing = {"draws": settings.draws, "seed": settings.seed}
    names = ["low", "high", "difference", "difference_low", "difference_high"]
    columns = {name: np.full(n_edits, np.nan) for name in names}
    if of_groups is not None:
        columns |= {"low_cells": np.full(n_edits, np.nan), "high_cells": np.full(n_edits, np.nan)}
    columns["difference"] = means - null.mean_of_like(means, matched)
    has_null = bool(matched.has_null.any()) and n_edits <= bootstrap.MOST_GENES
    for begin in range(0, n_edits, bootstrap.MOST_GENES):
        end = min(begin + bootstrap.MOST_GENES, n_edits)
        here = slice(begin, end)
        drawn = bootstrap.drawn_deviations(values, n_cells, **drawing, first=begin, last=end)
        if of_groups is not None:
            low, high = bootstrap.interval(drawn, values.counts[here], settings.confidence)
            columns["low_cells"][here], columns["high_cells"][here] = low, high
            drawn = bootstrap.drawn_deviations_of_groups(of_groups[here], **drawing)
        columns["low"][here], columns["high"][here] = bootstrap.interval(drawn, units[here], settings.confidence)
        if has_null:
            beyond = drawn - null.mean_of_like(np.nan_to_num(drawn), matched)
            low, high = bootstrap.interval(beyond, units, settings.confidence)
            columns["difference_low"], columns["difference_high"] = low, high
    centres = {"low": means, "high": means, "low_cells": values.means(), "high_cells": values.means()}
    centres |= {"difference_low": columns["difference"], "difference_high": columns["difference"]}
    return {name: column + centres.get(name, 0) for name, column in columns.items()}


def spread(values: Values) -> np.ndarray:
    """[E] standard deviation of each gene's values, of a sample: divided by n - 1; NaN below two."""
    means = values.means()
    squares = mean_by((values.values - np.repeat(means, values.counts)) ** 2, values.starts)
    return np.sqrt(squares * _divided(values.counts, np.where(values.counts > 1, values.counts - 1, np.nan)))


def groups_of(run: Run, group: str | None) -> tuple[np.ndarray, int]:
    """[C] number of each cell's group, -1 for none, and how many groups there are."""
    if group is None:
        return np.full(len(run.cells), -1, dtype=np.int64), 0
    column = run.obs[group]
    known = sorted({str(value) for value in column.tolist() if value is not None and value == value and value != ""})
    number = {name: code for code, name in enumerate(known)}
    return np.array([number.get(str(value), -1) for value in column.tolist()], dtype=np.int64), len(known)


def _deviation_of_groups(of_groups: np.ndarray, means: np.ndarray, n: np.ndarray) -> np.ndarray:
    squares = np.nansum((of_groups - means[:, None]) ** 2, axis=1)
    return np.sqrt(_divided(squares, np.where(n > 1, n - 1, np.nan)))


def _same_sign(values: Values, of_groups: np.ndarray | None, means: np.ndarray) -> np.ndarray:
    """[E] share of a gene's units whose value has the sign of the mean."""
    if of_groups is not None:
        is_there = ~np.isnan(of_groups)
        is_same = (np.sign(np.nan_to_num(of_groups)) == np.sign(means)[:, None]) & is_there
        return _divided(is_same.sum(axis=1), is_there.sum(axis=1))
    is_same = np.sign(values.values) == np.repeat(np.sign(means), values.counts)
    return mean_by(is_same.astype(np.float32), values.starts)


def _divided(above: Any, below: Any) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.asarray(below) != 0, np.asarray(above, dtype=np.float64) / below, np.nan)
