"""Cells, tokens and positions of the measured steps, added up as they come by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from geneformer_fast.errors import ProfileError
from geneformer_fast.profiling.figures import Cells, Figure, Missing, Spread, Tokens, divided
from geneformer_fast.profiling.loop.inputs import Seen, on_host
from geneformer_fast.profiling.loop.steps import Selection

# So many batches are kept until they are counted: their lengths may lie on a card, which is waited for once for all.
AT_ONCE = 1000
# A length beyond this is no cell of anybody's.
_LONGEST = 1 << 24


class Tally:
    """What the measured steps consisted of.

    Parameters
    ----------
    count
        Given the passes of some hundred steps, with lengths on the host; counts operations.

    Attributes
    ----------
    n_told
        Cells so far.
    n_cells, n_real, n_positions, n_real_squares, n_position_squares
        Cells, tokens, positions that were computed, and the sums of the squares of what was each cell's, of the steps
        that have been looked at (:meth:`settle`).
    batches
        [cells, tokens, positions] of the steps; of very many, a regular selection.
    untold, unknown
        Why the tokens, or what was computed of them, are not known; "" where they are.
    fault
        What was wrong with lengths that could only be looked at later.
    """

    def __init__(self, count: Callable[[Sequence[Seen]], None] | None = None) -> None:
        self._count = count
        self.n_told = self.n_cells = self.n_real = self.n_positions = 0
        self.n_real_squares = self.n_position_squares = 0
        self.batches: Selection[list[int]] = Selection()
        self.untold = self.unknown = ""
        self.fault: ProfileError | None = None
        self._steps: list[list[Seen]] = []
        self._n_of_length = np.zeros(0, dtype=np.int64)

    def add(self, passes: list[Seen]) -> None:
        """The forward passes of one step."""
        self.n_told += sum(each.n_cells for each in passes)
        self._steps.append(passes)
        if len(self._steps) >= AT_ONCE:
            self.settle()

    def settle(self) -> None:
        """Look at what is waiting."""
        steps, self._steps = self._steps, []
        try:
            known = [[on_host(each) for each in passes] for passes in steps]
        except ProfileError as error:
            self.fault = self.fault or error
            return
        for passes in known:
            before = (self.n_cells, self.n_real, self.n_positions)
            for each in passes:
                self._one(each)
            after = (self.n_cells, self.n_real, self.n_positions)
            self.batches.add([now - then for now, then in zip(after, before, strict=True)])
        if self._count is not None:
            self._count([each for passes in known for each in passes])

    def cells(self, wall_s: float) -> Cells:
        """Cells and tokens per second."""
        tokens: Figure = Missing(self.untold) if self.untold else float(self.n_real)
        n_cells: Figure = self.n_cells
        if not n_cells:
            n_cells = tokens = Missing("no cells came by")
        return Cells(
            self.n_cells,
            divided(n_cells, wall_s, "the window"),
            divided(tokens, wall_s, "the window"),
            self._spread(),
        )

    def tokens(self) -> Tokens:
        """Real tokens and positions."""
        if why := self.untold or self.unknown:
            return Tokens(self.n_real, self.n_positions, Missing(why), [])
        share = divided(self.n_real, self.n_positions, "what was computed")
        squares = (self.n_real_squares, self.n_position_squares)
        return Tokens(self.n_real, self.n_positions, share, self.batches.values, *squares)

    def _one(self, seen: Seen) -> None:
        """Add one pass."""
        self.n_cells += seen.n_cells
        lengths = seen.lengths
        if lengths is None:
            self.untold = self.untold or "nobody said how long the cells are: run.step(lengths=...) tells it"
            return
        assert isinstance(lengths, np.ndarray)
        n_real, squares, n_positions = int(lengths.sum()), int((lengths**2).sum()), int(lengths.sum())
        position_squares = squares
        if lengths.size:
            found = np.bincount(np.minimum(lengths, _LONGEST))
            self._n_of_length = np.pad(self._n_of_length, (0, max(0, len(found) - len(self._n_of_length))))
            self._n_of_length[: len(found)] += found
        if not seen.is_rectangle_known:
            self.unknown = self.unknown or (
                "lengths were told, and not what they were padded to: run.step(attention_mask=...) tells it"
            )
        elif seen.padded_to is not None:
            n_positions, position_squares = seen.n_cells * seen.padded_to, seen.n_cells * seen.padded_to**2
            if lengths.size and lengths.max() > seen.padded_to:
                self.fault = self.fault or ProfileError(
                    f"a cell of {lengths.max():,} tokens was told, and the model was given {seen.padded_to:,} of them "
                    "for each cell: give the lengths of this very batch"
                )
        self.n_real, self.n_positions = self.n_real + n_real, self.n_positions + n_positions
        self.n_real_squares += squares
        self.n_position_squares += position_squares

    def _spread(self) -> Spread | None:
        """Percentiles of the lengths, as numpy would have them of the sorted lengths."""
        total = int(self._n_of_length.sum())
        if not total:
            return None
        until = self._n_of_length.cumsum()
        places = np.array([0.1, 0.5, 0.9]) * (total - 1)
        low, high = (np.searchsorted(until, np.asarray(each) + 1) for each in (np.floor(places), np.ceil(places)))
        return Spread(*(float(value) for value in low + (high - low) * (places - np.floor(places))))
