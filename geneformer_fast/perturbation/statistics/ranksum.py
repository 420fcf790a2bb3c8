"""Wilcoxon's rank-sum test of every gene's values against a pool, all genes at once.

The normal approximation with average ranks: what ``scipy.stats.ranksums(pool, values)`` gives. Ranks come from two
binary searches in the sorted pool, so that no gene is ranked anew.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from geneformer_fast.perturbation.statistics.columns import Values

#: Of a larger pool the official tool draws so many, by the seed 42.
MOST_IN_POOL = 100_000
_SEED = 42
# Values are looked up in pieces, so that their places (8 bytes each, twice) take a bounded part of memory.
_PIECE = 4_000_000


@dataclass(frozen=True)
class RankSum:
    """Of each edit: two-sided p-value, and the chance that a value of it is above one of the pool (ties half)."""

    p_values: np.ndarray
    above: np.ndarray


def drawn(pool: np.ndarray) -> np.ndarray:
    """What the official tool draws from a pool that it finds too large."""
    if len(pool) <= MOST_IN_POOL:
        return pool
    return pool[random.Random(_SEED).sample(range(len(pool)), MOST_IN_POOL)]


def against(pool: np.ndarray, values: Values, *, has_ties: bool = False) -> RankSum:
    """Each edit's values against a pool that is the same for all.

    Parameters
    ----------
    pool
        [m] values.
    values
        By edit.
    has_ties
        Whether the variance is corrected for ties, which the official tool does not do.
    """
    pool, counts = np.sort(pool), values.counts
    wins = _wins(pool, values)
    ties = _ties_with_pool(pool, values) if has_ties else np.zeros(len(counts))
    return _tested(wins, counts, np.full(len(counts), len(pool)), ties)


def against_the_others(values: Values, *, has_ties: bool = False) -> RankSum:
    """Each edit's values against those of all other edits: a gene is not compared with itself."""
    pool, counts = np.sort(values.values), values.counts
    # Against itself an edit wins half of its comparisons.
    wins = _wins(pool, values) - counts.astype(np.float64) ** 2 / 2
    tie = _cubes(np.unique(pool, return_counts=True)[1]).sum() if has_ties else 0.0
    return _tested(wins, counts, len(pool) - counts, np.full(len(counts), float(tie)))


def two_samples(first: Values, second: Values, *, has_ties: bool = False) -> RankSum:
    """Each edit's values in one run against its values in another; edits are the same, in the same order."""
    n, m = first.counts, second.counts
    wins = np.zeros(len(n))
    ties = np.zeros(len(n))
    for edit in np.flatnonzero((n > 0) & (m > 0)):
        x, y = first.of(edit), np.sort(second.of(edit))
        wins[edit] = (np.searchsorted(y, x, "left") + np.searchsorted(y, x, "right")).sum() / 2
        if has_ties:
            ties[edit] = _cubes(np.unique(np.concatenate([x, y]), return_counts=True)[1]).sum()
    return _tested(wins, n, m, ties)


def _wins(pool: np.ndarray, values: Values) -> np.ndarray:
    """[E] pairs (value, value of the sorted pool) where the first is above; ties count half."""
    n, total = len(values.values), np.zeros(len(values.starts) - 1)
    for begin in range(0, n, _PIECE):
        piece = values.values[begin : begin + _PIECE]
        twice = np.searchsorted(pool, piece, "left") + np.searchsorted(pool, piece, "right")
        edges = np.clip(values.starts, begin, begin + len(piece)) - begin
        sums = np.concatenate([[0], np.cumsum(twice, dtype=np.int64)])
        total += (sums[edges[1:]] - sums[edges[:-1]]) / 2
    return total


def _ties_with_pool(pool: np.ndarray, values: Values) -> np.ndarray:
    """[E] sum of t^3 - t over the values of the pool and an edit's own, which are put beside it once more."""
    found, n_in_pool = np.unique(pool, return_counts=True)
    base = _cubes(n_in_pool).sum()
    ties = np.full(len(values.starts) - 1, float(base))
    order = np.lexsort((values.values, values.edits))
    edits, own = values.edits[order], values.values[order]
    if not len(own):
        return ties
    is_first = np.concatenate([[True], (edits[1:] != edits[:-1]) | (own[1:] != own[:-1])])
    at = np.flatnonzero(is_first)
    n_own = np.diff(np.append(at, len(own)))
    place = np.clip(np.searchsorted(found, own[at]), 0, len(found) - 1)
    before = np.where(found[place] == own[at], n_in_pool[place], 0)
    ties += np.bincount(edits[at], weights=_cubes(before + n_own) - _cubes(before), minlength=len(ties))
    return ties


def _tested(wins: np.ndarray, n: np.ndarray, m: np.ndarray, ties: np.ndarray) -> RankSum:
    n, m = n.astype(np.float64), m.astype(np.float64)
    size = n + m
    with np.errstate(invalid="ignore", divide="ignore"):
        correction = np.where(size > 1, ties / (size * (size - 1)), 0)
        spread = np.sqrt(n * m * (size + 1 - correction) / 12)
        z = (wins - n * m / 2) / spread
        p_values = 2 * norm.sf(np.abs(z))
        above = wins / (n * m)
    # All values alike: nothing speaks against their being so.
    p_values = np.where((n > 0) & (m > 0) & ~np.isfinite(z), 1.0, p_values)
    return RankSum(np.where((n > 0) & (m > 0), p_values, np.nan), np.where((n > 0) & (m > 0), above, np.nan))


def _cubes(counts: np.ndarray) -> np.ndarray:
    counts = counts.astype(np.float64)
    return counts**3 - counts
