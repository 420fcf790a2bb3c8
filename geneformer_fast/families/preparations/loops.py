"""Compiled loops of the rules. Imported on first use, because numba takes a third of a second to load."""

from __future__ import annotations

import numpy as np
from numba import njit

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_THIRTY, _TWENTY_SEVEN, _THIRTY_ONE, _ELEVEN = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_ONE = np.uint64(1)
MIDDLE, UPPER, RANDOM = 0, 1, 2


@njit(nogil=True, cache=True)
def collapse(indptr, indices, data, column_to_gene, n_genes, bounds, ids, counts):  # type: ignore[no-untyped-def]
    """Counts per gene: columns of one gene are summed, genes come in ascending order, zeros are left out.

    Fills ``bounds`` int64 [n + 1]; returns how many entries of ``ids`` and ``counts`` are filled.
    """
    sums = np.zeros(n_genes)
    filled = 0
    bounds[0] = 0
    for row in range(len(indptr) - 1):
        least, most = n_genes, -1
        for p in range(indptr[row], indptr[row + 1]):
            gene = column_to_gene[indices[p]]
            if gene >= 0:
                sums[gene] += np.float64(data[p])
                least, most = min(least, gene), max(most, gene)
        for gene in range(least, most + 1):
            if sums[gene] != 0.0:
                ids[filled] = gene
                counts[filled] = sums[gene]
                sums[gene] = 0.0
                filled += 1
        bounds[row + 1] = filled
    return filled


@njit(nogil=True, cache=True)
def _mixed(bits):  # type: ignore[no-untyped-def]
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014)."""
    bits = (bits ^ (bits >> _THIRTY)) * _FIRST
    bits = (bits ^ (bits >> _TWENTY_SEVEN)) * _SECOND
    return bits ^ (bits >> _THIRTY_ONE)


@njit(nogil=True, cache=True)
def _drawn(key, number):  # type: ignore[no-untyped-def]
    """64 random bits of a cell's key and a gene's number."""
    return _mixed(key + (np.uint64(number) + _ONE) * _GAMMA)


@njit(nogil=True, cache=True)
def _n_below(edges, x, is_equal_too):  # type: ignore[no-untyped-def]
    """How many ascending edges are below ``x``, or at it."""
    low, high = 0, len(edges)
    while low < high:
        middle = (low + high) // 2
        if edges[middle] < x or (is_equal_too and edges[middle] == x):
            low = middle + 1
        else:
            high = middle
    return low


@njit(nogil=True, cache=True)
def bin_cells(bounds, ids, values, shares, ties, keys, bins):  # type: ignore[no-untyped-def]
    """Bins of float32 values by the quantiles of each cell, as numpy's ``quantile`` and ``digitize`` compute them.

    ``shares`` are the quantiles asked for. A value at one or several edges lies in any of the bins that meet there:
    ``ties`` says which. ``keys`` uint64 [n] are read for RANDOM only. Fills ``bins`` float32.
    """
    edges = np.empty(len(shares))
    for row in range(len(bounds) - 1):
        start, stop = bounds[row], bounds[row + 1]
        if start == stop:
            continue
        ordered = np.sort(values[start:stop])
        last = len(ordered) - 1
        for i in range(len(shares)):
            place = last * shares[i]
            below = int(np.floor(place))
            if place >= last:
                edges[i] = np.float64(ordered[last])
                continue
            share = place - below
            # Counts are float32 there, and so is the difference; what is made of it is float64.
            apart = np.float64(np.float32(ordered[below + 1] - ordered[below]))
            if share >= 0.5:
                edges[i] = np.float64(ordered[below + 1]) - apart * (1.0 - share)
            else:
                edges[i] = np.float64(ordered[below]) + apart * share
        for p in range(start, stop):
            x = np.float64(values[p])
            upper = _n_below(edges, x, True)
            if ties == UPPER:
                bins[p] = upper
                continue
            lower = _n_below(edges, x, False)
            share = 0.5
            if ties == RANDOM:
                share = np.float64(_drawn(keys[row], ids[p]) >> _ELEVEN) * 2.0**-53
            bins[p] = np.ceil(share * (lower - upper) + upper)


@njit(nogil=True, cache=True)
def choose_genes(bounds, ids, counts, most, keys, kept):  # type: ignore[no-untyped-def]
    """Mark in ``kept`` at most ``most`` genes of each cell.

    Those with the largest counts, of equal ones the smaller numbers; or where there are ``keys`` any, by chance.
    """
    for row in range(len(bounds) - 1):
        start, stop = bounds[row], bounds[row + 1]
        if stop - start <= most:
            kept[start:stop] = True
            continue
        if len(keys):
            drawn = np.empty(stop - start, dtype=np.uint64)
            for p in range(start, stop):
                drawn[p - start] = _drawn(keys[row], ids[p])
            order = np.argsort(drawn, kind="mergesort")
        else:
            order = np.argsort(-counts[start:stop], kind="mergesort")
        for i in range(most):
            kept[start + order[i]] = True
