"""How sure a mean is: intervals by resampling cells, or donors.

All genes share the draws, so that differences between genes have intervals too. Intervals are percentiles at levels
that make up for small samples (Hesterberg, The American Statistician 69:371, 2015: "expanded percentiles"): plain ones
are too narrow there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import sparse
from scipy.stats import norm
from scipy.stats import t as students_t

from geneformer_fast.perturbation.statistics.columns import Values

#: Draws, and the most genes whose means in all draws are held at a time.
DRAWS, MOST_GENES = 1_000, 65_536
#: Of fewer values than these no percentile is far enough out: their intervals are Student's t times the standard error.
FEW = 8
# Weights of all cells in some draws: 64 MB.
_MOST_WEIGHTS = 16_000_000


def drawn_deviations(
    values: Values, n_cells: int, *, draws: int, seed: int, first: int = 0, last: int | None = None
) -> np.ndarray:
    """[genes, draws] mean of each gene's values less its mean, float32, over cells drawn with replacement.

    NaN where none of the cells that were drawn has the gene.

    Parameters
    ----------
    values
        By gene.
    n_cells
        Cells of the run.
    draws, seed
        How many, and what they are drawn by.
    first, last
        The genes, a slice.
    """
    last = len(values.starts) - 1 if last is None else last
    begin, end = values.starts[first], values.starts[last]
    starts = values.starts[first : last + 1] - begin
    means = values.means()[first:last]
    # Less the mean, float32 keeps seven digits of what varies; of cosines near one it would keep few of these.
    centred = (values.values[begin:end] - np.repeat(means, np.diff(starts))).astype(np.float32)
    shape = (last - first, n_cells)
    cells = values.cells[begin:end]
    of_values = sparse.csr_matrix((centred, cells, starts), shape=shape)
    of_cells = sparse.csr_matrix((np.ones(len(centred), dtype=np.float32), cells, starts), shape=shape)
    found = np.empty((last - first, draws), dtype=np.float32)
    at = 0
    for weights in _weights(n_cells, draws, seed):
        n = weights.shape[1]
        with np.errstate(invalid="ignore", divide="ignore"):
            found[:, at : at + n] = (of_values @ weights) / (of_cells @ weights)
        at += n
    return found


def drawn_deviations_of_groups(of_groups: np.ndarray, *, draws: int, seed: int) -> np.ndarray:
    """[genes, draws] the same over groups, such as donors, drawn with replacement, each of which counts alike.

    Parameters
    ----------
    of_groups
        [genes, groups] mean of each gene in each group; NaN where a group has none.
    draws, seed
        How many, and what they are drawn by.
    """
    is_there = ~np.isnan(of_groups)
    filled = np.where(is_there, of_groups - mean_of_groups(of_groups)[:, None], 0)
    found = np.empty((len(of_groups), draws))
    at = 0
    for weights in _weights(of_groups.shape[1], draws, seed):
        n = weights.shape[1]
        with np.errstate(invalid="ignore", divide="ignore"):
            found[:, at : at + n] = (filled @ weights) / (is_there.astype(np.float64) @ weights)
        at += n
    return found


def group_means(values: Values, group: np.ndarray, n_groups: int) -> np.ndarray:
    """[genes, groups] mean of each gene over the cells of each group, NaN where it has none; group -1 is no group."""
    of_values = group[values.cells]
    is_in = of_values >= 0
    place = values.edits[is_in].astype(np.int64) * n_groups + of_values[is_in]
    size = (len(values.starts) - 1) * n_groups
    counts = np.bincount(place, minlength=size)
    sums = np.bincount(place, weights=values.values[is_in].astype(np.float64), minlength=size)
    return np.divide(sums, counts, out=np.full(size, np.nan), where=counts > 0).reshape(-1, n_groups)


def mean_of_groups(of_groups: np.ndarray) -> np.ndarray:
    """[genes] mean over the groups that have each; NaN where none has."""
    counts = (~np.isnan(of_groups)).sum(axis=1)
    return np.divide(np.nansum(of_groups, axis=1), counts, out=np.full(len(counts), np.nan), where=counts > 0)


def interval(drawn: np.ndarray, n_units: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends [genes] of what was drawn.

    Parameters
    ----------
    drawn
        [genes, draws]; draws that lack a gene are NaN and do not count.
    n_units
        [genes] cells, or donors, that have each; below two there is no interval.
    confidence
        Share of such intervals that hold the mean, such as 0.95.
    """
    ordered = np.sort(drawn, axis=1)
    n_drawn = (~np.isnan(ordered)).sum(axis=1)
    level = expanded_level(n_units, confidence)
    half = _half_of_few(ordered, n_drawn, n_units, confidence)
    ends = []
    for share, sign in ((level, -1), (1 - level, 1)):
        place = share * np.maximum(n_drawn - 1, 0)
        low = np.floor(place).astype(np.int64)
        high = np.minimum(low + 1, np.maximum(n_drawn - 1, 0))
        rows = np.arange(len(ordered))
        end = ordered[rows, low] * (1 - (place - low)) + ordered[rows, high] * (place - low)
        end = np.where(n_units < FEW, sign * half, end)
        ends.append(np.where((n_units > 1) & (n_drawn > 0), end, np.nan))
    return ends[0], ends[1]


def _half_of_few(drawn: np.ndarray, n_drawn: np.ndarray, n_units: np.ndarray, confidence: float) -> np.ndarray:
    """[genes] half of the interval by Student's t, with the standard error of the draws."""
    is_few = (n_units < FEW) & (n_units > 1) & (n_drawn > 0)
    half, n = np.full(len(drawn), np.nan), n_units[is_few].astype(np.float64)
    error = np.nanstd(drawn[is_few], axis=1, dtype=np.float64) * np.sqrt(n / (n - 1))
    half[is_few] = students_t.ppf((1 + confidence) / 2, n - 1) * error
    return half


def expanded_level(n: np.ndarray, confidence: float) -> np.ndarray:
    """The percentile, from below, whose distance in a normal distribution is that of Student's t for n values."""
    n = np.maximum(n, 2).astype(np.float64)
    return norm.cdf(students_t.ppf((1 - confidence) / 2, n - 1) * np.sqrt(n / (n - 1)))


def _weights(n: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """[n, some draws] float32 how often each of n is drawn."""
    rng = np.random.default_rng(seed)
    step = max(1, min(draws, _MOST_WEIGHTS // max(n, 1)))
    for begin in range(0, draws, step):
        size = min(step, draws - begin)
        weights = np.empty((size, n), dtype=np.float32)
        for row in weights:
            row[:] = np.bincount(rng.integers(0, n, n), minlength=n)
        yield np.ascontiguousarray(weights.T)
