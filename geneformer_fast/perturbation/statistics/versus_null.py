"""The official mode ``vs_null``: each gene's cosines in one run against its own in another."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from geneformer_fast.perturbation.statistics.columns import Run, Values
from geneformer_fast.perturbation.statistics.goal_state_shift import SIGNIFICANT
from geneformer_fast.perturbation.statistics.multiple import false_discovery_rates
from geneformer_fast.perturbation.statistics.names import Names, columns_of
from geneformer_fast.perturbation.statistics.ranksum import two_samples

if TYPE_CHECKING:
    import pandas


def versus_null(run: Run, null: Run, names: Names, *, mend: Collection[str] = ()) -> pandas.DataFrame:
    """The table of all genes of ``run``, the official columns in their order.

    A gene that the null lacks has p = 1, and counts among the tests. ``mend`` with ``"ties"`` corrects the variance for
    ties.
    """
    import pandas as pd

    test, other = run.only, aligned(null, run)
    shown = np.flatnonzero(test.counts > 0)
    p_values = two_samples(test, other, has_ties="ties" in mend).p_values[shown]
    p_values = np.where(np.isnan(p_values), 1.0, p_values)
    rates = false_discovery_rates(p_values)
    means, null_means = test.means()[shown], other.means()[shown]
    table = pd.DataFrame(
        {
            **columns_of([run.edits[edit] for edit in shown], names),
            "Test_avg_shift": means,
            "Null_avg_shift": null_means,
            "Test_vs_null_avg_shift": means - null_means,
            "Test_vs_null_pval": p_values,
            "Test_vs_null_FDR": rates,
            "N_Detections_test": test.counts[shown],
            "N_Detections_null": other.counts[shown],
            "Sig": (rates < SIGNIFICANT).astype(np.int64),
        }
    )
    return table.sort_values(by=["Sig", "Test_vs_null_avg_shift", "Test_vs_null_FDR"], ascending=[False, False, True])


def aligned(other: Run, run: Run, state: str = "") -> Values:
    """Values of another run by the edits of this one; an edit that it lacks has none."""
    values = other.towards(state) if state else other.only
    place = {edit: number for number, edit in enumerate(other.edits)}
    at = np.array([place.get(edit, -1) for edit in run.edits], dtype=np.int64)
    counts = np.where(at >= 0, values.counts[at], 0)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    first = np.where(at >= 0, values.starts[at], 0)
    rows = np.repeat(first - starts[:-1], counts) + np.arange(starts[-1])
    return dataclasses.replace(values, values=values.values[rows], cells=values.cells[rows], starts=starts)
