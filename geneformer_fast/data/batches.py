"""Which cells make which optimizer step, on which rank, in how many pieces: all from the length column.

A step's cells are settled by the seed and the epoch alone. They are then shared among the ranks and cut into pieces
that fit the memory: the number of GPUs and the token budget change where a gradient is computed, not what it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from geneformer_fast.data.random import CellRandom
from geneformer_fast.errors import InputError, UnsupportedError

#: The "epoch" of evaluation: one fixed mask, however often it is looked at.
EVALUATION = 2**32 - 1
# Independent of the streams of CellRandom, which end their seeds with a small number.
_ORDER = 2**31


class Sampler(Protocol):
    """Decides which cells an epoch shows, and in which order."""

    def order(self, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The cells of one epoch, as indices into the token folder; repeated and left-out cells are welcome.

        Parameters
        ----------
        cells
            [N] int64, the training cells, ascending.
        rng
            Seeded by the run's seed and the epoch; draw from nothing else, and every rank gets the same order.
        """
        ...


class Shuffled:
    """Every cell exactly once, in random order."""

    def order(self, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A permutation."""
        return rng.permutation(cells)


@dataclass(frozen=True)
class Weighted:
    """As many cells as there are, drawn with replacement in proportion to their weights.

    Attributes
    ----------
    weights
        [n_cells of the token folder] non-negative.
    """

    weights: np.ndarray

    def order(self, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draws with replacement."""
        weights = np.asarray(self.weights, dtype=np.float64)
        if weights.ndim != 1 or (len(cells) and cells.max() >= len(weights)):
            raise UnsupportedError(f"weights {[*weights.shape]} must be one for each cell of the token folder")
        weights = weights[cells]
        if not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() == 0:
            raise UnsupportedError("weights of cells must be finite, not negative, and not all 0")
        return rng.choice(cells, len(cells), p=weights / weights.sum())


@dataclass(frozen=True)
class Piece:
    """What goes through the model at once: part of one step's cells, on one rank.

    Attributes
    ----------
    epoch, step
        Where it belongs; steps count from 0 within an epoch.
    index, n_pieces
        Which of how many pieces of this step on this rank; all ranks have equally many.
    cells, slots
        [B] indices into the token folder, and places in the epoch's order.
    is_filler
        True where this rank has nothing left to do: cells of others, which must count for nothing.
    n_step_cells, n_step_tokens
        Of the whole step, over all ranks.
    """

    epoch: int
    step: int
    index: int
    n_pieces: int
    cells: np.ndarray
    slots: np.ndarray
    is_filler: bool
    n_step_cells: int
    n_step_tokens: int

    def random(self, seed: int) -> CellRandom:
        """The random numbers of its cells."""
        return CellRandom(seed, self.epoch, self.slots)


@dataclass(frozen=True)
class Epoch:
    """One epoch: its cells in order, their lengths, and where each step begins and ends."""

    number: int
    order: np.ndarray
    lengths: np.ndarray
    bounds: np.ndarray

    @property
    def n_steps(self) -> int:
        """Optimizer steps."""
        return len(self.bounds) - 1


class BatchPlan:
    """The steps of every epoch.

    Parameters
    ----------
    lengths
        [n_cells of the token folder] tokens per cell (``TokenFolder.lengths()``).
    cells
        The cells to train on.
    batch_cells, batch_tokens
        Size of a step over all ranks: so many cells (the last of an epoch may have fewer), or about so many tokens
        (a step ends with the cell that reaches its share). Exactly one of the two.
    token_budget
        Most tokens that go through the model at once; a longer cell goes alone.
    seed
        Of the orders.
    rank, world_size
        Which of how many processes this is.
    sampler
        None: every cell once per epoch, shuffled.

    Raises
    ------
    InputError
        There are no cells, or fewer than ranks; a cell is not in the token folder.
    UnsupportedError
        A size is no positive integer, or there are two of them.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        cells: np.ndarray,
        *,
        batch_cells: int | None = None,
        batch_tokens: int | None = None,
        token_budget: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        sampler: Sampler | None = None,
    ) -> None:
        if (batch_cells is None) == (batch_tokens is None):
            raise UnsupportedError("give the size of a batch either in cells or in tokens")
        for name, size in (
            ("batch_cells", batch_cells),
            ("batch_tokens", batch_tokens),
            ("token_budget", token_budget),
        ):
            if size is not None:
                _check_number(name, size, 1)
        _check_number("seed", seed, 0)
        _check_number("world_size", world_size, 1)
        _check_number("rank", rank, 0, world_size - 1)
        self.lengths = _whole("lengths", lengths)
        self.cells = np.sort(_cells(cells, len(self.lengths)))
        if not len(self.cells):
            raise InputError("there are no cells to train on")
        if len(self.cells) < world_size:
            raise InputError(f"{len(self.cells)} cells cannot be shared among {world_size} processes; start fewer")
        self.batch_cells, self.batch_tokens, self.token_budget = batch_cells, batch_tokens, token_budget
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.sampler: Sampler = Shuffled() if sampler is None else sampler
        self._is_complete = sampler is None
        self._steps_of: dict[int, int] = {}

    def epoch(self, number: int) -> Epoch:
        """One epoch's cells, in their order, and its steps."""
        rng = np.random.default_rng((self.seed, number, _ORDER))
        order = _cells(self.sampler.order(self.cells, rng), len(self.lengths))
        if not len(order):
            raise InputError("the sampler left no cells to train on")
        lengths = self.lengths[order]
        epoch = Epoch(number, order, lengths, self._bounds(lengths))
        self._steps_of[number] = epoch.n_steps
        return epoch

    def n_steps(self, number: int = 0) -> int:
        """Steps of one epoch; without a sampler all epochs have equally many."""
        number = 0 if self._is_complete else number
        if number not in self._steps_of:
            if self._is_complete:
                self._steps_of[number] = len(self._bounds(self.lengths[self.cells])) - 1
            else:
                self.epoch(number)
        return self._steps_of[number]

    def total_steps(self, epochs: float) -> int:
        """Steps of so many epochs, of which the last may be broken off."""
        whole = int(epochs)
        total = whole * self.n_steps() if self._is_complete else sum(map(self.n_steps, range(whole)))
        rest = epochs - whole
        return max(1, total + (math.ceil(rest * self.n_steps(whole)) if rest > 1e-9 else 0))

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a step counted from the beginning of the run."""
        if self._is_complete:
            return divmod(step, self.n_steps())
        for number in itertools.count():
            if step < self.n_steps(number):
                return number, step
            step -= self.n_steps(number)
        raise AssertionError

    def pieces(self, first_step: int, n_steps: int) -> Iterator[Piece]:
        """This rank's pieces of the steps from ``first_step`` up to but excluding ``n_steps``, epoch after epoch."""
        number, within = self.locate(first_step)
        left = n_steps - first_step
        while left > 0:
            epoch = self.epoch(number)
            for step in range(within, min(epoch.n_steps, within + left)):
                yield from self.pieces_of(epoch, step)
            left -= epoch.n_steps - within
            number, within = number + 1, 0

    def pieces_of(self, epoch: Epoch, step: int) -> list[Piece]:
        """This rank's pieces of one step."""
        start, stop = int(epoch.bounds[step]), int(epoch.bounds[step + 1])
        lengths = epoch.lengths[start:stop]
        shares = _shares(lengths, self.world_size)
        cuts = [
            [shares[rank] + cut for cut in budget_cuts(lengths[shares[rank] : shares[rank + 1]], self.token_budget)]
            for rank in range(self.world_size)
        ]
        n_pieces = max(len(bounds) - 1 for bounds in cuts)
        own = list(itertools.pairwise(cuts[self.rank]))
        pieces = []
        for index in range(n_pieces):
            # The filler is a cell of this step, so that it is as long as a cell can be, and there.
            first, last = own[index] if index < len(own) else (0, 1)
            slots = np.arange(start + first, start + last)
            n_cells, n_tokens = stop - start, int(lengths.sum())
            cells, is_filler = epoch.order[slots], index >= len(own)
            pieces.append(Piece(epoch.number, step, index, n_pieces, cells, slots, is_filler, n_cells, n_tokens))
        return pieces

    def _bounds(self, lengths: np.ndarray) -> np.ndarray:
        """[n_steps + 1], where each step begins and ends in the order."""
        n_cells = len(lengths)
        if self.batch_cells is not None:
            return np.append(np.arange(0, n_cells, self.batch_cells), n_cells)
        assert self.batch_tokens is not None
        stops = np.cumsum(lengths)
        total = int(stops[-1])
        # The same number of steps whatever the order, so that a schedule knows its end. A step longer than the longest
        # cell cannot be empty.
        n_steps = max(1, min(round(total / self.batch_tokens), total // max(1, int(lengths.max()))))
        each, rest = divmod(total, n_steps)
        steps = np.arange(1, n_steps)
        inner = np.searchsorted(stops, steps * each - (-steps * rest // n_steps), side="left") + 1
        return np.concatenate([[0], inner, [n_cells]])


def _check_number(name: str, value: Any, least: int, most: int | None = None) -> None:
    """UnsupportedError for what is no integer, or too small or large."""
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UnsupportedError(f"{name} must be an integer {limits}, not {value!r}")


def _whole(name: str, values: Any) -> np.ndarray:
    """[n] int64; InputError for what would have to be changed, or is negative."""
    found = np.asarray(values)
    if found.ndim != 1 or (len(found) and found.dtype.kind not in "iu"):
        raise InputError(f"{name} must be a vector of integers, not {found.dtype} of the shape {[*found.shape]}")
    found = found.astype(np.int64, copy=False)
    if len(found) and found.min() < 0:
        raise InputError(f"{name} must not be negative: number {int(found.argmin())} is {int(found.min())}")
    return found


def _cells(cells: Any, n_cells: int) -> np.ndarray:
    """Indices into the token folder."""
    found = _whole("cells", cells)
    if len(found) and found.max() >= n_cells:
        raise InputError(f"cells must be below {n_cells}, the cells of the token folder, not {int(found.max())}")
    return found


def _shares(lengths: np.ndarray, n_shares: int) -> list[int]:
    """[n_shares + 1] bounds that split cells into runs of about equally many tokens."""
    stops = np.cumsum(lengths)
    middles = stops - lengths / 2
    wanted = np.arange(1, n_shares) * (stops[-1] / n_shares)
    return [0, *np.searchsorted(middles, wanted).tolist(), len(lengths)]


def budget_cuts(lengths: np.ndarray, token_budget: int) -> list[int]:
    """Bounds that cut cells into runs of at most ``token_budget`` tokens; a longer cell is a run of its own."""
    stops = np.cumsum(lengths)
    cuts, start, done = [0], 0, 0
    while start < len(lengths):
        stop = max(start + 1, int(np.searchsorted(stops, done + token_budget, side="right")))
        cuts.append(stop)
        start, done = stop, int(stops[stop - 1])
    return cuts


def evaluation_pieces(
    lengths: np.ndarray, cells: np.ndarray, token_budget: int, *, rank: int = 0, world_size: int = 1
) -> list[Piece]:
    """This rank's pieces of all cells, each once, in the order given.

    A piece has at most ``token_budget`` tokens, and where there are several ranks about as many; all ranks have equally
    many pieces.

    Raises
    ------
    InputError
        There are fewer cells than ranks.
    """
    _check_number("token_budget", token_budget, 1)
    _check_number("world_size", world_size, 1)
    _check_number("rank", rank, 0, world_size - 1)
    lengths = _whole("lengths", lengths)
    cells = _cells(cells, len(lengths))
    lengths = lengths[cells]
    bounds = budget_cuts(lengths, token_budget)
    if world_size > 1:
        if len(cells) < world_size:
            raise InputError(f"{len(cells)} cells to evaluate on cannot be shared among {world_size} processes")
        n_pieces = min(-(-(len(bounds) - 1) // world_size), len(cells) // world_size) * world_size
        # Equal numbers of tokens; of cells, where cells are so few and unequal that a piece would be left empty.
        bounds = _shares(lengths, n_pieces)
        if min(np.diff(bounds)) == 0:
            bounds = [len(cells) * i // n_pieces for i in range(n_pieces + 1)]
    cuts = list(itertools.pairwise(bounds))[rank::world_size]
    n_tokens = int(lengths.sum())
    return [
        Piece(EVALUATION, 0, index, len(cuts), cells[start:stop], np.arange(start, stop), False, len(cells), n_tokens)
        for index, (start, stop) in enumerate(cuts)
    ]
