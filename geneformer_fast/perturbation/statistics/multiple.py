"""What many tests at once mean: false discovery rates by SciPy, of the tests that were made."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.stats import false_discovery_control

Method = Literal["bh", "by"]


def false_discovery_rates(p_values: np.ndarray, method: Method = "bh") -> np.ndarray:
    """Adjusted p-values, by Benjamini and Hochberg (1995), or Benjamini and Yekutieli (2001) under any dependence.

    A NaN is a test that was not made: it stays NaN and does not count among the others.
    """
    adjusted = np.full(len(p_values), np.nan)
    is_test = ~np.isnan(p_values)
    if is_test.any():
        adjusted[is_test] = false_discovery_control(p_values[is_test], method=method)
    return adjusted
