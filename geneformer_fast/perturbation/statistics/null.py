"""Genes that a gene is to be compared with: found in as many cells, and as high in them.

Deleting what stands first moves a cell more than deleting what stands last, whatever the gene, and a mean over few
cells varies more than one over many. A gene that is unusual among all genes may be quite usual among those like it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import t as students_t

#: Genes that each is compared with, at most; of fewer than 250 a fifth, so that they are more alike than all are; and
#: the fewest that say anything.
MATCHED, SHARE, LEAST_MATCHED = 50, 5, 10
_PIECE = 4_096


@dataclass(frozen=True)
class MatchedGenes:
    """Which genes are like which; found once for a run, used for all states.

    Attributes
    ----------
    like
        [E, K] int32, the most alike first; rows of -1 where there are none.
    """

    like: np.ndarray

    @property
    def size(self) -> int:
        """Genes that each is compared with."""
        return self.like.shape[1]

    @property
    def has_null(self) -> np.ndarray:
        """[E] whether there are any."""
        return self.like[:, 0] >= 0 if self.like.shape[1] else np.zeros(len(self.like), dtype=bool)


@dataclass(frozen=True)
class NullTest:
    """Each gene among its like: their mean and standard deviation, the p-value, and by order alone."""

    mean: np.ndarray
    deviation: np.ndarray
    p_values: np.ndarray
    by_order: np.ndarray


def matched_genes(
    n_cells: np.ndarray, rank: np.ndarray, total: int, is_taken: np.ndarray, size: int | None = None
) -> MatchedGenes:
    """The genes nearest to each in detection (log odds of being in a cell) and mean rank, both in standard deviations.

    Parameters
    ----------
    n_cells
        [E] cells that each gene is in.
    rank
        [E] mean place in them, 0 first to 1 last; where all are NaN, detection alone counts.
    total
        Number of cells.
    is_taken
        [E] genes that are matched, and matched with; the others are in too few cells, or more than one gene.
    size
        How many; None takes 50, or of fewer genes a fifth, but not below 10.
    """
    at = np.flatnonzero(is_taken)
    size = min(max(min(MATCHED, len(at) // SHARE), LEAST_MATCHED) if size is None else size, len(at) - 1)
    like = np.full((len(n_cells), max(size, 0)), -1, dtype=np.int32)
    if size < LEAST_MATCHED:
        return MatchedGenes(like[:, :0])
    odds = np.log((n_cells[at] + 0.5) / (np.maximum(total - n_cells[at], 0) + 0.5))
    features = [odds] if np.isnan(rank[at]).all() else [odds, np.nan_to_num(rank[at], nan=0.5)]
    points = np.stack([(each - each.mean()) / (each.std() or 1.0) for each in features], axis=1)
    # Of genes at one point those that come first would be everybody's; a millionth of a deviation makes it a matter
    # of chance, the same in every run.
    points = points + np.random.default_rng(0).uniform(-1e-6, 1e-6, points.shape)
    found = cKDTree(points).query(points, size + 1)[1]
    is_other = found != np.arange(len(at))[:, None]
    is_other[is_other.all(axis=1), -1] = False
    like[at] = at[found[is_other].reshape(len(at), size)]
    return MatchedGenes(like)


def against_like(values: np.ndarray, matched: MatchedGenes) -> NullTest:
    """Each gene's value among those of the genes like it.

    The p-value is of Student's t for one more value from where the others are from (mean and deviation estimated from
    them); ``by_order`` is the share of values, the gene's own included, that lie as far from their median.
    """
    n, size = matched.like.shape
    mean, deviation, order = (np.full(n, np.nan) for _ in range(3))
    has_null = matched.has_null
    for begin in range(0, n, _PIECE):
        rows = begin + np.flatnonzero(has_null[begin : begin + _PIECE])
        if not len(rows):
            continue
        others = values[matched.like[rows]]
        mean[rows], deviation[rows] = others.mean(axis=1), others.std(axis=1, ddof=1)
        middle = np.median(others, axis=1)
        is_far = np.abs(others - middle[:, None]) >= np.abs(values[rows] - middle)[:, None]
        order[rows] = (is_far.sum(axis=1) + 1) / (size + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = np.abs(values - mean) / (deviation * np.sqrt(1 + 1 / max(size, 1)))
        p_values = 2 * students_t.sf(distance, max(size - 1, 1))
    p_values = np.where(has_null & ~np.isnan(values) & np.isnan(distance), 1.0, p_values)  # all alike, and this one too
    return NullTest(mean, deviation, np.where(has_null, p_values, np.nan), order)


def mean_of_like(values: np.ndarray, matched: MatchedGenes) -> np.ndarray:
    """[E, ...] means of [E, ...] values over the genes like each; NaN where there are none."""
    found = np.full(values.shape, np.nan, dtype=values.dtype)
    for begin in range(0, len(values), _PIECE):
        rows = begin + np.flatnonzero(matched.has_null[begin : begin + _PIECE])
        if len(rows):
            total = np.zeros((len(rows), *values.shape[1:]))
            for column in matched.like[rows].T:  # [rows, K, draws] at once would be gigabytes
                total += values[column]
            found[rows] = total / matched.like.shape[1]
    return found
