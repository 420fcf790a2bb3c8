"""Genes that move whatever cell they are in, and whichever way: universal responders, which say little of a state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from geneformer_fast.perturbation.statistics.columns import Values, mean_by

#: A gene is strong in a cell where it is among this share of the genes that move the cell most ...
STRONG = 0.1
#: ... and a universal responder where it is so in this share of its cells, for every state.
UNIVERSAL = 0.8


def share_of_cells_moved_most(states: Sequence[Values], *, is_shift: bool) -> np.ndarray:
    """[E] share of each gene's cells that it moves more than nine tenths of their genes do, towards every state.

    Parameters
    ----------
    states
        Values of all genes, for each state. A gene that moves cells towards one state alone is strong for that one.
    is_shift
        Whether values are shifts, of which the size counts, or cosines, of which the distance from one does.
    """
    strong = [_is_strong(values, is_shift=is_shift) for values in states]
    first = states[0]
    if all(np.array_equal(each.starts, first.starts) and np.array_equal(each.cells, first.cells) for each in states):
        return mean_by(np.logical_and.reduce(strong), first.starts)
    shares = [mean_by(each, values.starts) for each, values in zip(strong, states, strict=True)]
    return np.minimum.reduce(shares)


def _is_strong(values: Values, *, is_shift: bool) -> np.ndarray:
    """[n] whether each value is among the largest tenth of its cell."""
    size = np.abs(values.values) if is_shift else 1 - values.values
    order = np.lexsort((size, values.cells))
    cells = values.cells[order]
    first = np.flatnonzero(np.concatenate([[True], cells[1:] != cells[:-1]])) if len(cells) else np.zeros(0, int)
    counts = np.diff(np.append(first, len(cells)))
    place = np.arange(len(cells)) - np.repeat(first, counts)
    # Of a cell with fewer than ten genes none is among its strongest tenth.
    is_strong = np.empty(len(cells), dtype=bool)
    is_strong[order] = place >= np.repeat(counts - np.floor(counts * STRONG), counts)
    return is_strong
