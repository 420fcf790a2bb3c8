"""Batches from the length column: every cell once, the same for every rank and budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_fast.data.batches import BatchPlan, Weighted, budget_cuts, evaluation_pieces
from geneformer_fast.errors import InputError, UnsupportedError

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=60)


@st.composite
def plans(draw: st.DrawFn) -> dict[str, object]:
    """Lengths, a choice of cells, and a way to batch them."""
    lengths = np.array(draw(SIZES))
    cells = np.flatnonzero(draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    cells = cells if len(cells) else np.arange(len(lengths))
    size = draw(st.integers(1, 50))
    batch = draw(st.sampled_from(["batch_cells", "batch_tokens"]))
    return {
        "lengths": lengths, "cells": cells, batch: size, "token_budget": draw(st.integers(1, 100)),
        "seed": draw(st.integers(0, 5)), "world_size": draw(st.integers(1, min(4, len(cells)))),
    }  # fmt: skip


def pieces_by_rank(options: dict[str, object], first: int, stop: int) -> list[list]:
    return [
        list(BatchPlan(rank=rank, **options).pieces(first, stop))
        for rank in range(options["world_size"])  # type: ignore[call-overload]
    ]


@given(plans(), st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_every_cell_once_per_epoch_over_all_ranks(options: dict, epoch: int) -> None:
    plan = BatchPlan(**options)
    n_steps = plan.n_steps()
    by_rank = pieces_by_rank(options, epoch * n_steps, (epoch + 1) * n_steps)
    real = [piece for pieces in by_rank for piece in pieces if not piece.is_filler]
    assert sorted(np.concatenate([piece.cells for piece in real])) == sorted(options["cells"])
    assert sorted(np.concatenate([piece.slots for piece in real])) == list(range(len(options["cells"])))
    assert {piece.epoch for piece in real} == {epoch}
    for steps in zip(*by_rank, strict=True):  # all ranks have equally many pieces in every step
        assert len({(piece.step, piece.index, piece.n_pieces) for piece in steps}) == 1
    assert {piece.step for piece in real} == set(range(n_steps))  # no step is empty
    for piece in real:
        total = options["lengths"][piece.cells].sum()
        assert total <= options["token_budget"] or np.count_nonzero(options["lengths"][piece.cells]) == 1
    for step, pieces in itertools.groupby(sorted(real, key=lambda piece: piece.step), key=lambda piece: piece.step):
        pieces = list(pieces)
        assert sum(options["lengths"][piece.cells].sum() for piece in pieces) == pieces[0].n_step_tokens, step
        assert sum(len(piece.cells) for piece in pieces) == pieces[0].n_step_cells
        if "batch_cells" in options:
            assert pieces[0].n_step_cells <= options["batch_cells"]


@given(plans())
@settings(max_examples=60, deadline=None)
def test_a_step_has_the_same_cells_for_any_number_of_ranks_and_any_budget(options: dict) -> None:
    def cells_of_steps(**changes: object) -> dict[int, list[tuple[int, int]]]:
        asked = {**options, **changes}
        found: dict[int, list[tuple[int, int]]] = {}
        for pieces in pieces_by_rank(asked, 0, BatchPlan(**asked).n_steps()):
            for piece in pieces:
                if not piece.is_filler:
                    found.setdefault(piece.step, []).extend(
                        zip(piece.slots.tolist(), piece.cells.tolist(), strict=True)
                    )
        return {step: sorted(pairs) for step, pairs in found.items()}

    assert cells_of_steps() == cells_of_steps(world_size=1, token_budget=7)


@given(plans(), st.data())
@settings(max_examples=60, deadline=None)
def test_it_goes_on_from_any_step(options: dict, data: st.DataObject) -> None:
    plan = BatchPlan(**options)
    total = plan.total_steps(2.5)
    first = data.draw(st.integers(0, total))
    everything = [(p.epoch, p.step, p.index, p.slots.tolist(), p.cells.tolist()) for p in plan.pieces(0, total)]
    rest = [(p.epoch, p.step, p.index, p.slots.tolist(), p.cells.tolist()) for p in plan.pieces(first, total)]
    done = [entry for entry in everything if plan.locate(first) <= entry[:2]]
    assert rest == done


@given(SIZES, st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_batches_of_tokens_are_about_that_large(sizes: list[int], batch_tokens: int) -> None:
    lengths = np.array(sizes)
    plan = BatchPlan(lengths, np.arange(len(lengths)), batch_tokens=batch_tokens, token_budget=10)
    epoch = plan.epoch(0)
    per_step = lengths.sum() / epoch.n_steps
    totals = [epoch.lengths[a:b].sum() for a, b in itertools.pairwise(epoch.bounds)]
    assert all(abs(total - per_step) < lengths.max() + 1 for total in totals)
    if lengths.max() <= batch_tokens:
        assert (
            abs(epoch.n_steps - lengths.sum() / batch_tokens) <= 0.5
            or epoch.n_steps == 1
            or (epoch.n_steps == lengths.sum() // lengths.max())
        )


def test_orders_depend_on_seed_and_epoch_alone() -> None:
    lengths = np.arange(1, 101)
    plan = BatchPlan(lengths, np.arange(100), batch_cells=7, token_budget=50, seed=1)
    again = BatchPlan(lengths, np.arange(100)[::-1], batch_cells=9, token_budget=5, seed=1, world_size=3, rank=2)
    other = BatchPlan(lengths, np.arange(100), batch_cells=7, token_budget=50, seed=2)
    assert (plan.epoch(3).order == again.epoch(3).order).all()
    assert (plan.epoch(3).order != plan.epoch(4).order).any()
    assert (plan.epoch(3).order != other.epoch(3).order).any()
    assert (plan.epoch(0).order != np.arange(100)).any()


class Twice:
    """Every cell as often as the epoch's parity says, in order."""

    def order(self, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.repeat(cells, 2)[: 15 + int(rng.integers(5))]


def test_a_sampler_decides_cells_and_order() -> None:
    lengths = np.arange(1, 11)
    plan = BatchPlan(lengths, np.arange(10), batch_cells=4, token_budget=100, sampler=Twice())
    for epoch in range(3):
        order = plan.epoch(epoch).order
        assert (order == np.repeat(np.arange(10), 2)[: len(order)]).all()
    total = plan.total_steps(3)
    assert total == sum(plan.n_steps(epoch) for epoch in range(3))
    pieces = list(plan.pieces(0, total))
    assert [piece.epoch for piece in pieces] == sorted(piece.epoch for piece in pieces)
    assert plan.locate(plan.n_steps(0) + 1) == (1, 1)


def test_weights_draw_in_proportion() -> None:
    weights = np.array([0.0, 1.0, 3.0, 100.0])
    plan = BatchPlan(np.ones(4, int), np.array([0, 1, 2]), batch_cells=3, token_budget=9, sampler=Weighted(weights))
    drawn = np.concatenate([plan.epoch(epoch).order for epoch in range(1500)])
    counts = np.bincount(drawn, minlength=4)
    assert counts[0] == counts[3] == 0
    # 4,500 draws, a share of 3/4: five standard deviations are 0.032.
    assert abs(counts[2] / counts.sum() - 0.75) < 0.032
    for bad in (np.zeros(4), np.array([1, -1, 1, 1.0]), np.array([np.nan, 1, 1, 1])):
        with pytest.raises(UnsupportedError, match="weights of cells"):
            BatchPlan(np.ones(4, int), np.arange(4), batch_cells=3, token_budget=9, sampler=Weighted(bad)).epoch(0)


@given(SIZES, st.integers(1, 100), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_evaluation_sees_every_cell_once_and_ranks_keep_step(sizes: list[int], budget: int, world_size: int) -> None:
    lengths, cells = np.array(sizes), np.arange(len(sizes))[::-1]
    if len(cells) < world_size:
        with pytest.raises(InputError, match="cannot be shared"):
            evaluation_pieces(lengths, cells, budget, world_size=world_size)
        return
    by_rank = [
        evaluation_pieces(lengths, cells, budget, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert len({len(pieces) for pieces in by_rank}) == 1
    pieces = [piece for pieces in by_rank for piece in pieces]
    assert sorted(np.concatenate([piece.cells for piece in pieces])) == sorted(cells)
    for piece in pieces:
        assert len(piece.cells)
        assert (cells[piece.slots] == piece.cells).all()


def test_cuts_are_greedy() -> None:
    assert budget_cuts(np.array([3, 3, 3, 9, 1, 0]), 6) == [0, 2, 3, 4, 6]
    assert budget_cuts(np.array([], dtype=int), 6) == [0]


def test_refusals() -> None:
    lengths = np.ones(3, int)
    with pytest.raises(InputError, match="no cells to train on"):
        BatchPlan(lengths, np.arange(0), batch_cells=1, token_budget=1)
    with pytest.raises(InputError, match="3 cells cannot be shared among 4 processes"):
        BatchPlan(lengths, np.arange(3), batch_cells=1, token_budget=1, world_size=4)
    with pytest.raises(UnsupportedError, match="either in cells or in tokens"):
        BatchPlan(lengths, np.arange(3), token_budget=1)
    with pytest.raises(UnsupportedError, match="at least 1"):
        BatchPlan(lengths, np.arange(3), batch_cells=0, token_budget=1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_cells": 2.5}, UnsupportedError, "batch_cells must be an integer of at least 1, not 2.5"),
        ({"batch_cells": True}, UnsupportedError, "batch_cells must be an integer"),
        ({"batch_cells": 0}, UnsupportedError, "batch_cells must be an integer of at least 1, not 0"),
        ({"token_budget": -1}, UnsupportedError, "token_budget must be"),
        ({"token_budget": float("inf")}, UnsupportedError, "token_budget must be"),
        ({"seed": -1}, UnsupportedError, "seed must be"),
        ({"rank": 2, "world_size": 2}, UnsupportedError, "rank must be an integer from 0 to 1, not 2"),
        ({"world_size": 0}, UnsupportedError, "world_size must be"),
        ({"lengths": np.array([3.0, 4.5])}, InputError, "lengths must be a vector of integers"),
        ({"lengths": np.array([[3, 4]])}, InputError, "lengths must be a vector of integers"),
        ({"lengths": np.array([3, -4])}, InputError, "lengths must not be negative: number 1 is -4"),
        ({"cells": np.array([0.0, 1.9])}, InputError, "cells must be a vector of integers"),
        ({"cells": np.array([True, False])}, InputError, "cells must be a vector of integers"),
        ({"cells": np.array([0, -1])}, InputError, "cells must not be negative"),
        ({"cells": np.array([0, 2])}, InputError, "cells must be below 2, the cells of the token folder, not 2"),
    ],
)
def test_nonsense_is_refused(change: dict, error: type[Exception], message: str) -> None:
    given = dict(lengths=np.array([3, 4]), cells=np.array([0, 1]), batch_cells=1, token_budget=9) | change
    with pytest.raises(error, match=message):
        BatchPlan(**given)
    given.pop("batch_cells")
    given.pop("seed", None)
    if not set(change) & {"batch_cells", "seed"}:
        with pytest.raises(error, match=message):
            evaluation_pieces(**given)


def test_weights_are_of_all_cells() -> None:
    plan = BatchPlan(np.ones(4, int), np.arange(4), batch_cells=3, token_budget=9, sampler=Weighted(np.ones(3)))
    with pytest.raises(UnsupportedError, match=r"weights \[3\] must be one for each cell"):
        plan.epoch(0)
