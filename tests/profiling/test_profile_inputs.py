"""Lengths of cells are those of the mask, wherever they are read; what is no mask and no length is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from geneformer_fast import Ragged
from geneformer_fast.data.masking import MaskedBatch
from geneformer_fast.errors import ProfileError
from geneformer_fast.profiling.loop.inputs import CallReader, Seen, passes_of_step, told_lengths, told_mask
from geneformer_fast.profiling.loop.tally import Tally

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])


def lengths_in(seen: Seen | None) -> list[int]:
    assert seen is not None
    assert seen.lengths is not None
    return [int(each) for each in seen.lengths]


@pytest.mark.parametrize(
    "mask", [MASK, MASK.bool(), MASK.float(), MASK.to(torch.int8), MASK.numpy(), MASK.tolist()],
    ids=["int64", "bool", "float", "int8", "numpy", "list"],
)  # fmt: skip
def test_lengths_are_the_sums_of_a_mask(mask: Any) -> None:
    lengths, width = told_mask(mask)
    assert ([int(each) for each in lengths], width) == ([3, 1, 4], 4)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (MASK[0], "a int64 tensor [4]"),
        (MASK[:, None, None], "a int64 tensor [3, 1, 1, 4]"),
        ((1 - MASK) * -1e4, "holds something else"),
        (MASK * 2, "holds something else"),
        (torch.full((2, 3), float("nan")), "holds something else"),
        ("mask", "a str"),
        (None, "a NoneType"),
    ],
)
def test_what_is_no_mask_is_refused(mask: Any, said: str) -> None:
    with pytest.raises(ProfileError, match="attention_mask must be") as caught:
        told_mask(mask)
    assert said in str(caught.value)


@pytest.mark.parametrize("lengths", [[3, 0, 7], (3, 0, 7), np.array([3, 0, 7], dtype="u1"), torch.tensor([3, 0, 7])])
def test_lengths_of_every_kind_of_integer(lengths: Any) -> None:
    assert told_lengths(lengths).tolist() == [3, 0, 7]


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([1.0, float("nan")], "NaN is among them"),
        (np.array([1.0, np.nan]), "NaN is among them"),
        ([1, 2.5], ": 2.5 is among them"),
        ((1, 2.5), ": 2.5 is among them"),
        (torch.tensor([1, 2.5]), ": 2.5 is among them"),
        ([1.0, 2.0], ": 1.0 is among them"),
        ([4, "five"], ": a str is among them"),
        ([3, -1], "must not be negative: there is -1"),
        ([1.5, 2.0], "whole numbers"),
        ([[1, 2]], "whole numbers"),
        (5, "not a int"),
        ("12", "not a str"),
        ([True, False], "whole numbers"),
        ([None], "whole numbers"),
        (torch.tensor([1.0]), "not a float32 tensor [1]"),
        ({1: 2}, "not a dict"),
    ],
)
def test_what_are_no_lengths_is_refused(lengths: Any, said: str) -> None:
    with pytest.raises(ProfileError, match="lengths must") as caught:
        told_lengths(lengths)
    assert said in str(caught.value)


class Bert(nn.Module):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> None: ...


class Wrapped(nn.Module):
    """As DDP wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **kwargs: Any) -> None: ...


IDS = torch.zeros(3, 4, dtype=torch.int64)


@pytest.mark.parametrize("model", [Bert(), Wrapped(Bert()), Wrapped(Wrapped(Bert()))], ids=["bare", "once", "twice"])
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((IDS, MASK), {}), ((IDS,), {"attention_mask": MASK}), ((), {"input_ids": IDS, "attention_mask": MASK})],
)
def test_masks_are_read_from_calls(model: nn.Module, args: Any, kwargs: Any) -> None:
    seen = CallReader(model, is_packed=False).read(args, kwargs)
    assert lengths_in(seen) == [3, 1, 4]
    assert seen is not None
    assert (seen.padded_to, seen.is_rectangle_known, seen.head_rows) == (4, True, None)
    packed = CallReader(model, is_packed=True).read(args, kwargs)
    assert packed is not None
    assert (lengths_in(packed), packed.padded_to) == ([3, 1, 4], None)


def test_without_a_mask_every_position_is_a_token_as_transformers_has_it() -> None:
    assert lengths_in(CallReader(Bert(), is_packed=False).read((IDS,), {})) == [4, 4, 4]


def test_a_mask_of_another_kind_leaves_lengths_unknown() -> None:
    seen = CallReader(Bert(), is_packed=False).read((IDS, MASK[:, None]), {})
    assert seen == Seen(3, None, 4)
    assert CallReader(Bert(), is_packed=False).read((), {"x": 1}) is None


def test_labels_say_which_rows_of_the_head_are_asked_for() -> None:
    reader = CallReader(Bert(), is_packed=False)
    labels = torch.full((3, 4), -100)
    labels[0, 1] = labels[2, 3] = 7
    seen = reader.read((IDS, MASK), {"labels": labels})
    assert seen is not None
    assert seen.head_rows == 2
    of_cells = reader.read((IDS, MASK), {"labels": torch.zeros(3, dtype=torch.int64)})
    assert of_cells is not None
    assert of_cells.head_rows is None


@pytest.mark.parametrize("is_in_batch", [False, True])
def test_packed_cells_are_read_from_calls(is_in_batch: bool) -> None:
    tokens = Ragged.from_cells([[1, 2, 3], [4], [5, 6]])
    rows = torch.zeros(0, dtype=torch.int64)
    given = MaskedBatch(tokens, rows, rows) if is_in_batch else tokens
    seen = CallReader(Wrapped(Bert()), is_packed=True).read((given,), {})
    assert lengths_in(seen) == [3, 1, 2]


def step(found: list[Seen], *, is_packed: bool = False, **told: Any) -> list[Seen]:
    named = {"lengths": None, "mask": None, "n_cells": None, "head_rows": None, **told}
    return passes_of_step(found, *named.values(), is_packed=is_packed)


def test_lengths_that_are_told_keep_the_rectangles_that_were_seen() -> None:
    found = [Seen(2, np.array([4, 4]), 4), Seen(1, np.array([6]), 6)]
    passes = step(found, lengths=[2, 3, 5], head_rows=9)
    assert [(lengths_in(each), each.padded_to, each.head_rows) for each in passes] == [([2, 3], 4, 9), ([5], 6, 0)]


def test_lengths_alone_do_not_say_what_was_computed() -> None:
    (seen,) = step([], lengths=[2, 3])
    assert not seen.is_rectangle_known
    (packed,) = step([], lengths=[2, 3], is_packed=True)
    assert packed.is_rectangle_known
    tally = Tally()
    tally.add([seen])
    tally.settle()
    assert "what they were padded to" in str(tally.tokens().useful_share)
    assert tally.cells(2.0).tokens_per_s == 2.5


def test_what_was_seen_is_what_counts_where_nothing_is_told() -> None:
    found = [Seen(2, np.array([4, 4]), 4)]
    assert step(found) == found
    assert step([], n_cells=5) == [Seen(5)]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({}, "nobody says what cells this step had"),
        ({"lengths": [1], "mask": MASK}, "lengths or attention_mask, not both"),
        ({"n_cells": -1}, "n_cells must be"),
        ({"n_cells": 2.0}, "n_cells must be"),
        ({"n_cells": True}, "n_cells must be"),
        ({"lengths": [1, 2], "n_cells": 3}, "n_cells is 3, and there are lengths of 2 cells"),
        ({"lengths": [1, 2], "head_rows": -3}, "head_rows must be"),
    ],
)
def test_steps_that_contradict_themselves_are_refused(told: Any, said: str) -> None:
    with pytest.raises(ProfileError, match=said):
        step([], **told)


def test_a_cell_longer_than_its_rectangle_is_refused() -> None:
    tally = Tally()
    tally.add(step([Seen(2, np.array([4, 4]), 4)], lengths=[4, 5]))
    tally.settle()
    assert "a cell of 5 tokens" in str(tally.fault)


def test_tallies_are_sums_however_they_are_cut() -> None:
    """Of more steps than are looked at at once, and of percentiles as numpy has them of all lengths."""
    rng = np.random.default_rng(0)
    tally, every, positions, squares = Tally(), [], 0, 0
    for _ in range(2500):
        lengths = rng.integers(0, 50, rng.integers(1, 5))
        tally.add([Seen(len(lengths), torch.from_numpy(lengths), 50)])
        every.append(lengths)
        positions, squares = positions + 50 * len(lengths), squares + 2500 * len(lengths)
    tally.settle()
    whole = np.concatenate(every)
    tokens, cells = tally.tokens(), tally.cells(10.0)
    assert (cells.n, tokens.n_real, tokens.n_positions) == (len(whole), whole.sum(), positions)
    assert (tokens.n_real_squares, tokens.n_position_squares) == ((whole**2).sum(), squares)
    assert tokens.useful_share == whole.sum() / positions
    assert cells.per_s == len(whole) / 10
    assert cells.tokens_per_s == whole.sum() / 10
    assert cells.lengths is not None
    assert [cells.lengths.p10, cells.lengths.p50, cells.lengths.p90] == np.percentile(whole, [10, 50, 90]).tolist()
    assert 1000 < len(tokens.batches) <= 2000
    assert tokens.batches[0] == [len(every[0]), every[0].sum(), 50 * len(every[0])]


def test_steps_of_unknown_lengths_make_rates_of_tokens_unknown_too() -> None:
    tally = Tally()
    tally.add([Seen(2, np.array([3, 4]), None)])
    tally.add([Seen(5)])
    tally.settle()
    assert tally.cells(1.0).per_s == 7
    assert "nobody said how long" in str(tally.cells(1.0).tokens_per_s)
    assert "nobody said how long" in str(tally.tokens().useful_share)
