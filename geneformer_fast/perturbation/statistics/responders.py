"""Genes that move whatever cell they are in: universal responders, whose effect says little of the state."""

from __future__ import annotations

import numpy as np

from geneformer_fast.perturbation.statistics.columns import Values, mean_by

#: A gene is strong in a cell where it is among this share of the genes that move the cell most ...
STRONG = 0.1
#: ... and a universal responder where it is so in this share of its cells.
UNIVERSAL = 0.8


def share_of_cells_moved_most(values: Values, *, is_shift: bool) -> np.ndarray:
    """[E] share of each gene's cells that it moves more than nine tenths of their genes do.

    Parameters
    ----------
    values
        Of all genes.
    is_shift
        Whether values are shifts, of which the size counts, or cosines, of which the distance from one does.
    """
    size = np.abs(values.values) if is_shift else 1 - values.values
    order = np.lexsort((size, values.cells))
    cells = values.cells[order]
    first = np.flatnonzero(np.concatenate([[True], cells[1:] != cells[:-1]])) if len(cells) else np.zeros(0, int)
    counts = np.diff(np.append(first, len(cells)))
    place = np.arange(len(cells)) - np.repeat(first, counts)
    # Of a cell with fewer than ten genes none is among its strongest tenth.
    is_strong = np.empty(len(cells), dtype=np.float32)
    is_strong[order] = place >= np.repeat(counts - np.floor(counts * STRONG), counts)
    return mean_by(is_strong, values.starts)
