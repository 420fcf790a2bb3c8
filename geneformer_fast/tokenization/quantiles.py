"""Exact medians of many streams of positive numbers at once, in passes of bounded memory.

Positive float64 numbers are ordered like their bits. Each pass counts, per gene, the values in each of many bins of an
interval of bits, and keeps the bin that holds the middle value. Where the two middle values of an even number fall
into different bins, one is the greatest value below the edge between them and the other the smallest above it, which
the next pass finds. When few values are left in the intervals they are collected and sorted. Nothing is approximated.
"""

from __future__ import annotations

import numba
import numpy as np

#: States of a gene.
OPEN, SPLIT, DONE = 0, 1, 2

_END = np.uint64(np.float64(np.inf).view(np.uint64))
# Normalised counts mostly lie here; what does not is counted below or above and costs a pass more.
_FIRST_LOW = np.uint64(np.float64(2.0**-12).view(np.uint64))
_FIRST_HIGH = np.uint64(np.float64(2.0**15).view(np.uint64))


class MedianSearch:
    """The state of the search for every gene's median.

    Parameters
    ----------
    n_genes
        Number of genes.
    memory_bytes
        For the bins, and again for the values collected at the end.

    Attributes
    ----------
    counts
        [n_genes] int64, values per gene, known after the first pass.
    medians
        [n_genes] float64, NaN where not known yet or where a gene has no values.
    """

    def __init__(self, n_genes: int, memory_bytes: int) -> None:
        n_bins = memory_bytes // (4 * max(n_genes, 1))
        self._n_bins = 1 << max(4, min(12, int(n_bins).bit_length() - 1))
        self._budget = memory_bytes // 8
        self.counts = np.zeros(n_genes, dtype=np.int64)
        self.medians = np.full(n_genes, np.nan)
        self._state = np.full(n_genes, OPEN, dtype=np.uint8)
        self._low = np.full(n_genes, _FIRST_LOW, dtype=np.uint64)
        self._high = np.full(n_genes, _FIRST_HIGH, dtype=np.uint64)
        self._below = np.zeros(n_genes, dtype=np.int64)
        self._inside = np.full(n_genes, np.iinfo(np.int64).max // max(n_genes, 1), dtype=np.int64)
        self._is_first = True
        self._begin()

    @property
    def is_done(self) -> bool:
        """Whether every median is known."""
        return bool((self._state == DONE).all())

    def _begin(self) -> None:
        """Prepare the next pass: binning, or collecting where that fits."""
        is_open = self._state == OPEN
        self._below_now = np.zeros_like(self._below)
        self._greatest = np.zeros(len(self.counts), dtype=np.uint64)
        self._smallest = np.full(len(self.counts), _END, dtype=np.uint64)
        self._is_collecting = not self._is_first and int(self._inside[is_open].sum()) <= self._budget
        if self._is_collecting:
            self._offsets = np.concatenate([[0], np.cumsum(np.where(is_open, self._inside, 0))])
            self._filled = self._offsets[:-1].copy()
            self._collected = np.empty(int(self._offsets[-1]), dtype=np.uint64)
            return
        width = self._high - self._low
        self._shift = np.zeros(len(width), dtype=np.uint64)
        while (wide := (width - np.uint64(1)) >> self._shift >= self._n_bins).any():
            self._shift[wide] += np.uint64(1)
        self._bins = np.zeros((len(width), self._n_bins), dtype=np.uint32)

    def add(self, genes: np.ndarray, values: np.ndarray) -> None:
        """Show the search some positive values, [n] gene indices and [n] float64. A pass shows all values once."""
        bits = values.view(np.uint64)
        if self._is_collecting:
            _collect(genes, bits, self._state, self._low, self._high, self._filled, self._collected)
            _find_edges(genes, bits, self._state, self._low, self._greatest, self._smallest)
            return
        if self._is_first:
            self.counts += np.bincount(genes, minlength=len(self.counts))
        _count(genes, bits, self._state, self._low, self._high, self._shift, self._bins, self._below_now)
        if not self._is_first:
            _find_edges(genes, bits, self._state, self._low, self._greatest, self._smallest)

    def end_pass(self) -> None:
        """Draw the conclusions of a pass, and prepare the next one."""
        split = self._state == SPLIT
        ends = np.stack([self._greatest[split], self._smallest[split]]).view(np.float64)
        self.medians[split] = ends.mean(axis=0)
        self._state[split] = DONE
        if self._is_first:
            self._state[self.counts == 0] = DONE
        if self._is_collecting:
            for gene in np.flatnonzero(self._state == OPEN):
                values = np.sort(self._collected[self._offsets[gene] : self._filled[gene]]).view(np.float64)
                first = (self.counts[gene] - 1) // 2 - self._below[gene]
                last = self.counts[gene] // 2 - self._below[gene]
                self.medians[gene] = values[first] if first == last else np.mean(values[[first, last]])
                self._state[gene] = DONE
        else:
            _narrow(
                self._state, self._low, self._high, self._shift, self._bins, self._below_now, self.counts, self._below,
                self._inside, self.medians.view(np.uint64),
            )  # fmt: skip
            del self._bins
        self._is_first = False
        if not self.is_done:
            self._begin()


@numba.njit(nogil=True, cache=True)
def _count(genes, bits, state, low, high, shift, bins, below):
    for i in range(genes.size):
        gene = genes[i]
        if state[gene] != OPEN:
            continue
        if bits[i] < low[gene]:
            below[gene] += 1
        elif bits[i] < high[gene]:
            bins[gene, (bits[i] - low[gene]) >> shift[gene]] += np.uint32(1)


@numba.njit(nogil=True, cache=True)
def _collect(genes, bits, state, low, high, filled, collected):
    for i in range(genes.size):
        gene = genes[i]
        if state[gene] == OPEN and low[gene] <= bits[i] < high[gene]:
            collected[filled[gene]] = bits[i]
            filled[gene] += 1


@numba.njit(nogil=True, cache=True)
def _find_edges(genes, bits, state, edge, greatest, smallest):
    """For split genes the greatest value below the edge and the smallest one not below it."""
    for i in range(genes.size):
        gene = genes[i]
        if state[gene] != SPLIT:
            continue
        if bits[i] < edge[gene]:
            greatest[gene] = max(greatest[gene], bits[i])
        else:
            smallest[gene] = min(smallest[gene], bits[i])


@numba.njit(nogil=True, cache=True)
def _narrow(state, low, high, shift, bins, below_now, counts, below, inside, medians):
    """Keep of every open gene's interval the bin with the middle; where the middle straddles an edge, the edge."""
    for gene in range(state.size):
        if state[gene] != OPEN:
            continue
        first, last = (counts[gene] - 1) // 2, counts[gene] // 2
        # Candidates from below: everything below the interval, the bins, everything above.
        start, stop = np.uint64(0), low[gene]
        before, count = np.int64(0), below_now[gene]
        for b in range(bins.shape[1] + 1):
            if before + count > first:
                break
            before += count
            start = stop
            if b < bins.shape[1] and start < high[gene]:
                stop = min(start + (np.uint64(1) << shift[gene]), high[gene])
                count = np.int64(bins[gene, b])
            else:
                stop, count = _END, counts[gene] - before
        if last >= before + count:
            state[gene], low[gene] = SPLIT, stop
        elif stop - start == np.uint64(1):
            state[gene], medians[gene] = DONE, start
        else:
            low[gene], high[gene], below[gene], inside[gene] = start, stop, before, count


@numba.njit(nogil=True, cache=True)
def normalised_values(indptr, indices, data, n_counts, is_wanted, gene_of, is_shared, n_genes):
    """The non-zero ``x / n_counts * 10000`` of a block's wanted rows: gene indices and values.

    Parameters
    ----------
    gene_of
        [columns] gene index, -1 for none.
    is_shared
        [columns] whether the gene has several columns, which are summed first.
    """
    genes, values = np.empty(indices.size, np.int32), np.empty(indices.size)
    sums, touched = np.zeros(n_genes), np.empty(n_genes, np.int32)
    n = 0
    for row in range(indptr.size - 1):
        if not is_wanted[row]:
            continue
        n_touched = 0
        for p in range(indptr[row], indptr[row + 1]):
            gene, x = gene_of[indices[p]], np.float64(data[p])
            if gene < 0 or x == 0:
                continue
            if is_shared[indices[p]]:
                if sums[gene] == 0:
                    touched[n_touched] = gene
                    n_touched += 1
                sums[gene] += x
                continue
            genes[n], values[n] = gene, x / n_counts[row] * 10000.0
            n += 1
        for i in range(n_touched):
            gene = touched[i]
            genes[n], values[n] = gene, sums[gene] / n_counts[row] * 10000.0
            sums[gene] = 0.0
            n += 1
    return genes[:n], values[:n]
