"""A budget of memory: how many tokens may be in work at once, how many batches, how many cells read ahead."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.extract.memory import Memory, memory_of
from geneformer_fast.extract.sizes import in_mb, size_in_bytes

# Fewer cells than these at a time are of no use: batches would be small, and as many are read in no time.
_LEAST_WINDOW = 64
# Of what is left for batches and windows, the share of the latter.
_WINDOW_SHARE = 10
# One part in so many of a budget is set aside, beside a fixed margin.
_SPARE_SHARE = 64


@dataclass(frozen=True)
class Need:
    """What a run takes, in bytes where nothing else is said.

    Attributes
    ----------
    fixed
        In use before the first batch: libraries, weights, what is known of the cells.
    peak
        The most that was in use until then.
    token
        For every token in work.
    batch
        For every batch in work, whatever its size.
    cell
        For every cell of a window: its tokens, read ahead, and its row of the result.
    result
        What is there in the end, in memory.
    longest
        Tokens of the longest cell, or of the batches that were asked for.
    n_cells
        How many cells there are.
    """

    fixed: int
    peak: int
    token: int
    batch: int
    cell: int
    result: int
    longest: int
    n_cells: int

    @property
    def least(self) -> int:
        """One batch of the longest cell at a time, and the smallest window."""
        window = min(_LEAST_WINDOW, self.n_cells)
        return self.fixed + self.result + window * self.cell + self.batch + self.longest * self.token


@dataclass(frozen=True)
class Plan:
    """How a run goes on: most tokens in a batch of several cells, batches at a time, cells of a window."""

    token_budget: int
    workers: int
    window_cells: int


def smallest_budget(need: Need, margin: int) -> int:
    """The smallest budget that :func:`plan` serves."""
    return max(-(-(need.least + margin) * _SPARE_SHARE // (_SPARE_SHARE - 1)) + 1, need.peak)


def advised_budget(need: Need, margin: int) -> int:
    """A budget to name: what starting takes at its peak differs by a few megabytes from run to run."""
    return max(smallest_budget(need, margin), need.peak + need.peak // _SPARE_SHARE)


def plan(limit: int, need: Need, margin: int, *, tokens: int, workers: int, window_cells: int) -> Plan | None:
    """Divide a budget: as many workers as it has room for, then as many tokens for each.

    Parameters
    ----------
    limit
        The budget, in bytes.
    need
        What the run takes.
    margin
        Bytes to set aside, beside a small share of the budget.
    tokens, workers, window_cells
        As many as a run without a budget would take: never more.

    Returns
    -------
    Plan or None
        None where the budget is too small.
    """
    if limit < smallest_budget(need, margin):
        return None
    left = limit - limit // _SPARE_SHARE - margin - need.fixed - need.result
    least_window = min(_LEAST_WINDOW, need.n_cells)
    each = need.batch + need.longest * need.token
    # What the smallest window and one batch leave, in part, makes windows larger.
    more = (left - least_window * need.cell - each) // _WINDOW_SHARE // max(need.cell, 1)
    window = min(least_window + more, window_cells)
    left -= window * need.cell
    workers = max(1, min(workers, left // each))
    return Plan(max(1, min(tokens, (left // workers - need.batch) // need.token)), workers, window)


class MemoryBudget:
    """The memory that a run may take, and what it has in work of it.

    Parameters
    ----------
    limit
        Bytes.
    memory
        Which memory.
    """

    def __init__(self, limit: int, memory: Memory) -> None:
        self.limit, self.memory = limit, memory
        self._need: Need | None = None
        self._fixed = self._in_work = self._most_in_work = 0
        self._changed = threading.Condition()

    def plan(self, need: Need, *, tokens: int, workers: int, window_cells: int) -> Plan:
        """:func:`plan` for what a run needs.

        Raises
        ------
        UnsupportedError
            The budget is too small; says which one is not.
        """
        margin = self.memory.margin
        found = plan(self.limit, need, margin, tokens=tokens, workers=workers, window_cells=window_cells)
        if found is None:
            raise UnsupportedError(
                f"memory_budget {in_mb(self.limit)} (--memory-budget) is too small: {self.memory.owner} takes "
                f"{in_mb(need.fixed)} before the first batch ({in_mb(need.peak)} at its peak), and a batch of "
                f"{need.longest:,} tokens, which the longest cell has or token_budget asks for, takes "
                f"{in_mb(need.least - need.fixed)} with its results; the smallest that works is "
                f"{in_mb(advised_budget(need, margin))}. A quantized model, or shorter cells, take less"
            )
        self._need, self._fixed = need, need.fixed + need.result + found.window_cells * need.cell
        return found

    def room(self) -> int:
        """Tokens that one batch may have, from what is known of the run by now."""
        assert self._need is not None
        return (self.limit - self._fixed - self._need.batch) // self._need.token

    @contextlib.contextmanager
    def batch(self, n_tokens: int) -> Iterator[None]:
        """While a batch is computed; waits for others to be done where there is no room beside them.

        Raises
        ------
        UnsupportedError
            There is no room for it by itself, or memory ran out.
        """
        need = self._need
        assert need is not None
        cost = need.batch + n_tokens * need.token
        with self._changed:
            self._changed.wait_for(lambda: not self._in_work or self._fixed + self._in_work + cost <= self.limit)
            if not self._in_work:
                self._check(self.memory.used() + cost)
            self._in_work += cost
            self._most_in_work = max(self._most_in_work, self._in_work)
        try:
            yield
        except torch.OutOfMemoryError:
            raise self._passed(self.limit + need.token * n_tokens // 2) from None
        finally:
            with self._changed:
                self._in_work -= cost
                self._learn()
                self._changed.notify_all()
        self._check(self.memory.peak())

    def _learn(self) -> None:
        """What is in use whatever is in work, where the peak shows that it is more than was thought."""
        assert self._need is not None
        peak = self.memory.peak()
        if peak > self._need.peak:
            self._fixed = max(self._fixed, peak - self._most_in_work)

    def _check(self, n_bytes: int) -> None:
        if n_bytes > self.limit:
            raise self._passed(n_bytes)

    def _passed(self, n_bytes: int) -> UnsupportedError:
        return UnsupportedError(
            f"memory_budget {in_mb(self.limit)} (--memory-budget) does not last: {self.memory.owner} needs "
            f"{in_mb(n_bytes)} for this batch. Nothing is written; begin again with {in_mb(n_bytes + n_bytes // 10)}"
        )


@contextlib.contextmanager
def memory_budget_of(size: str | int | None, device: str | torch.device) -> Iterator[MemoryBudget | None]:
    """The budget that a user asks for, while it is to be kept; None where nobody asks.

    Raises
    ------
    UnsupportedError
        It is no size, or nobody says here how much memory is in use.
    """
    if size is None:
        yield None
        return
    limit, memory = size_in_bytes(size), memory_of(torch.device(device))
    with memory.within(limit):
        yield MemoryBudget(limit, memory)
