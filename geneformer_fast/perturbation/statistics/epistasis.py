"""Pairs of genes: what both together do beyond the sum of what each does, cell by cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import ttest_1samp

from geneformer_fast.errors import InputError
from geneformer_fast.perturbation.statistics.bootstrap import drawn_deviations, interval
from geneformer_fast.perturbation.statistics.columns import Run, Values
from geneformer_fast.perturbation.statistics.effects import Settings
from geneformer_fast.perturbation.statistics.multiple import false_discovery_rates
from geneformer_fast.perturbation.statistics.names import Names

if TYPE_CHECKING:
    import pandas


def epistasis(
    run: Run, names: Names, settings: Settings, state: str = "", singles: Run | None = None
) -> pandas.DataFrame:
    """A row per pair: what it does, what the sum of its genes would be, and the difference.

    Of cosines the distance from one is what adds up. Only cells count in which all three were computed.

    Parameters
    ----------
    run
        With edits of two genes.
    names
        Of genes.
    settings
        How they are judged.
    state
        Whose shifts; empty where there are none.
    singles
        The run of single genes in the same cells; None where ``run`` has them too.

    Returns
    -------
    pandas.DataFrame
        ``first``, ``second`` (genes), ``first_symbol``, ``second_symbol``, ``n_cells``, ``together``, ``sum``,
        ``interaction`` with ``low`` and ``high``, ``p_value`` (one-sample t-test of the interaction, over cells) and
        ``q_value``; the largest interaction first.

    Raises
    ------
    InputError
        There are no pairs, or no single genes that they are made of.
    """
    import pandas as pd

    pairs = [number for number, edit in enumerate(run.edits) if len(edit) == 2]
    if not pairs:
        raise InputError("there are no pairs in the run; perturb with pairs to see interactions")
    single = run if singles is None else singles
    number = {edit[0]: at for at, edit in enumerate(single.edits) if len(edit) == 1}
    known = [at for at in pairs if all(token in number for token in run.edits[at])]
    if not known:
        raise InputError("none of the pairs has both of its genes perturbed alone; give that run beside the pairs")
    beyond, together, alone = _interactions(run, single, known, number, state)
    counts = beyond.counts
    drawn = drawn_deviations(beyond, len(run.cells), draws=settings.draws, seed=settings.seed)
    low, high = interval(drawn, counts, settings.confidence)
    means = beyond.means()
    p_values = np.full(len(known), np.nan)
    for at in np.flatnonzero(counts >= max(settings.min_cells, 2)):
        values = beyond.of(at).astype(np.float64)
        p_values[at] = ttest_1samp(values, 0).pvalue if np.ptp(values) else float(values[0] == 0)
    edits = [run.edits[at] for at in known]
    table = pd.DataFrame(
        {
            "first": [names.gene(edit[0]) for edit in edits],
            "second": [names.gene(edit[1]) for edit in edits],
            "first_symbol": [names.shown(edit[:1]) for edit in edits],
            "second_symbol": [names.shown(edit[1:]) for edit in edits],
            "n_cells": counts,
            "together": together,
            "sum": alone,
            "interaction": means,
            "low": means + low,
            "high": means + high,
            "p_value": p_values,
            "q_value": false_discovery_rates(p_values, settings.correction),
        }
    )[counts > 0]
    return table.iloc[np.argsort(-table["interaction"].abs().to_numpy(), kind="stable")].reset_index(drop=True)


def _interactions(
    run: Run, single: Run, pairs: list[int], number: dict[int, int], state: str
) -> tuple[Values, np.ndarray, np.ndarray]:
    """Of each pair and cell the interaction; and means of both together and of the sum, over the same cells."""
    values, alone = run.values[state], single.towards(state) if state else single.only
    cell_of = {int(cell): at for at, cell in enumerate(single.cells)}
    place = np.array([cell_of.get(int(cell), -1) for cell in run.cells], dtype=np.int64)
    kept, cells, starts = [], [], [0]
    sums, means = np.full(len(pairs), np.nan), np.full(len(pairs), np.nan)
    of_gene = np.full((2, len(single.cells)), np.nan)
    for at, pair in enumerate(pairs):
        here = slice(values.starts[pair], values.starts[pair + 1])
        both, where = values.values[here].astype(np.float64), values.cells[here]
        for row, token in zip(of_gene, run.edits[pair], strict=True):
            row[:] = np.nan
            edit = number[token]
            row[alone.cells[alone.starts[edit] : alone.starts[edit + 1]]] = alone.of(edit)
        first, second = np.where(place[where] >= 0, of_gene[:, place[where]], np.nan)
        if not state:
            both, first, second = 1 - both, 1 - first, 1 - second
        is_whole = ~np.isnan(first + second)
        kept.append((both - first - second)[is_whole].astype(np.float32))
        cells.append(where[is_whole])
        starts.append(starts[-1] + int(is_whole.sum()))
        if is_whole.any():
            means[at], sums[at] = both[is_whole].mean(), (first + second)[is_whole].mean()
    return Values(np.concatenate(kept), np.concatenate(cells), np.array(starts, dtype=np.int64)), means, sums
