"""Compiled loops over count blocks. Imported on first use, because numba takes a third of a second to load."""

from __future__ import annotations

import numpy as np
from numba import njit

BAD_INDEX = 1
BAD_VALUE = 2
DUPLICATE = 4


@njit(nogil=True, cache=True)
def check_entries(indptr, indices, data, n_genes, whole, stamp):  # type: ignore[no-untyped-def]
    """Return the sum of BAD_INDEX, BAD_VALUE and DUPLICATE found in a block, 0 for a good one.

    `whole` asks for integral values. `stamp` is int64 [n_genes], all -1; used only for cells with unsorted columns.
    """
    n_bad = 0
    for i in range(len(indices)):
        n_bad += (indices[i] < 0) | (indices[i] >= n_genes)
    if n_bad > 0:
        return BAD_INDEX
    n_bad = 0
    limit = np.inf
    if whole:
        for i in range(len(data)):
            x = data[i]
            n_bad += not ((x >= 0) & (x < limit) & (np.floor(x) == x))
    else:
        for i in range(len(data)):
            x = data[i]
            n_bad += not ((x >= 0) & (x < limit))
    status = BAD_VALUE if n_bad > 0 else 0
    for row in range(len(indptr) - 1):
        n_unsorted = 0
        for i in range(indptr[row] + 1, indptr[row + 1]):
            n_unsorted += indices[i] <= indices[i - 1]
        if n_unsorted > 0:
            for i in range(indptr[row], indptr[row + 1]):
                if stamp[indices[i]] == row:
                    return status | DUPLICATE
                stamp[indices[i]] = row
    return status


@njit(nogil=True, cache=True)
def count_nonzero_rows(dense, indptr):  # type: ignore[no-untyped-def]
    """Fill `indptr` int64 [n_rows + 1] for the non-zero (and NaN) values of `dense` [n_rows, n_columns]."""
    indptr[0] = 0
    for row in range(dense.shape[0]):
        n = 0
        for column in range(dense.shape[1]):
            n += dense[row, column] != 0
        indptr[row + 1] = indptr[row] + n


@njit(nogil=True, cache=True)
def fill_nonzero(dense, indptr, indices, data):  # type: ignore[no-untyped-def]
    """Write column and value of every non-zero of `dense`, in row order."""
    for row in range(dense.shape[0]):
        k = indptr[row]
        for column in range(dense.shape[1]):
            x = dense[row, column]
            if x != 0:
                indices[k] = column
                data[k] = x
                k += 1


@njit(nogil=True, cache=True)
def group_by_row(rows, columns, values, first_row, indptr, out_columns, out_values):  # type: ignore[no-untyped-def]
    """Stable counting sort of entries by row; fills `indptr` int64 [n_rows + 1] and both outputs."""
    n_rows = len(indptr) - 1
    indptr[:] = 0
    for i in range(len(rows)):
        indptr[rows[i] - first_row + 1] += 1
    for row in range(n_rows):
        indptr[row + 1] += indptr[row]
    cursor = indptr[:n_rows].copy()
    for i in range(len(rows)):
        row = rows[i] - first_row
        k = cursor[row]
        out_columns[k] = columns[i]
        out_values[k] = values[i]
        cursor[row] = k + 1


@njit(nogil=True, cache=True)
def keep_columns(indptr, indices, data, new_column):  # type: ignore[no-untyped-def]
    """Drop entries whose `new_column` is negative and renumber the others, in place; returns how many are left."""
    kept = 0
    begin = indptr[0]
    for row in range(len(indptr) - 1):
        end = indptr[row + 1]
        for i in range(begin, end):
            column = new_column[indices[i]]
            if column >= 0:
                indices[kept] = column
                data[kept] = data[i]
                kept += 1
        begin = end
        indptr[row + 1] = kept
    return kept


@njit(nogil=True, cache=True)
def row_totals(indptr, indices, data, is_counted):  # type: ignore[no-untyped-def]
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
