"""What so many cells, or donors, can show: the power of a two-sided t-test of a mean against a fixed value."""

from __future__ import annotations

import numpy as np
from scipy.stats import nct, norm
from scipy.stats import t as students_t

#: The power that is asked for.
POWER = 0.8
# Beyond so many units the t distribution is as good as normal.
_MANY = 200


def power(n: int, effect: float, alpha: float = 0.05) -> float:
    """Chance that n units show an effect.

    Parameters
    ----------
    n
        Cells, or donors.
    effect
        The mean's distance from what it is tested against, in standard deviations of the units.
    alpha
        Level of the test, two-sided.
    """
    if n < 2:
        return float("nan")
    border = students_t.ppf(1 - alpha / 2, n - 1)
    shift = abs(effect) * np.sqrt(n)
    # Far out on the other side SciPy has no number, where there is as good as no chance.
    return float(nct.sf(border, n - 1, shift) + np.nan_to_num(nct.cdf(-border, n - 1, shift)))


def detectable(n: np.ndarray, alpha: float = 0.05, wanted: float = POWER) -> np.ndarray:
    """[E] smallest effect, in standard deviations, that n units show with this power; NaN below two units."""
    n = np.asarray(n)
    z = norm.ppf(1 - alpha / 2) + norm.ppf(wanted)
    # The second term is the first by which t differs from the normal distribution.
    found = z / np.sqrt(np.maximum(n, 2)) * (1 + norm.ppf(1 - alpha / 2) ** 2 / (4 * np.maximum(n, 2)))
    table = _smallest(alpha, wanted, n[(n >= 2) & (n < _MANY)])
    for size, effect in table.items():
        found[n == size] = effect
    return np.where(n >= 2, found, np.nan)


def needed(effect: np.ndarray, alpha: float = 0.05, wanted: float = POWER) -> np.ndarray:
    """[E] units that show an effect, in standard deviations, with this power; infinite for none at all."""
    effect = np.abs(np.asarray(effect, dtype=np.float64))
    z = norm.ppf(1 - alpha / 2) + norm.ppf(wanted)
    with np.errstate(divide="ignore"):
        found = np.ceil((z / effect) ** 2 + norm.ppf(1 - alpha / 2) ** 2 / 2)
    sizes = np.arange(2, _MANY)
    borders = np.array([*_smallest(alpha, wanted, sizes).values()])
    is_few = effect >= borders[-1]
    found[is_few] = sizes[np.searchsorted(-borders, -effect[is_few])]
    return np.where(np.isnan(effect), np.nan, found)


def _smallest(alpha: float, wanted: float, sizes: np.ndarray) -> dict[int, float]:
    """Size -> smallest effect, by bisection for all sizes at once."""
    n = np.unique(sizes).astype(np.float64)
    if not len(n):
        return {}
    border = students_t.ppf(1 - alpha / 2, n - 1)
    low, high = np.zeros(len(n)), (border + 10) * 2
    for _ in range(60):
        middle = (low + high) / 2
        is_enough = nct.sf(border, n - 1, middle) >= wanted
        low, high = np.where(is_enough, low, middle), np.where(is_enough, middle, high)
    return dict(zip(n.astype(int).tolist(), (high / np.sqrt(n)).tolist(), strict=True))
