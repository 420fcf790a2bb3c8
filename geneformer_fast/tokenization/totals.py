"""Sums per cell over a block of counts."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(nogil=True, cache=True)
def row_totals(indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, is_counted: np.ndarray) -> np.ndarray:
    """Total counts of every row over the columns where ``is_counted``, float64.

    Summed in twice float64's precision (Knuth's two-sum), so that the order of a file's columns does not matter.
    """
    totals = np.empty(indptr.size - 1)
    for row in range(indptr.size - 1):
        total, error = 0.0, 0.0
        for p in range(indptr[row], indptr[row + 1]):
            if is_counted[indices[p]]:
                addend = np.float64(data[p])
                next_total = total + addend
                part = next_total - total
                error += (total - (next_total - part)) + (addend - part)
                total = next_total
        totals[row] = total + error
    return totals
