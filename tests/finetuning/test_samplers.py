"""Samplers: what holds for any classes, any seed, any cap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.finetuning.samplers import ClassSampler, over_sample, under_sample

class_lists = st.lists(st.integers(0, 4), min_size=1, max_size=80).map(np.array)
caps = st.none() | st.integers(1, 30)
seeds = st.integers(0, 1000)


def times(positions: np.ndarray, n: int) -> np.ndarray:
    """How often each of n positions was drawn."""
    return np.bincount(positions, minlength=n)


@settings(deadline=None)
@given(class_lists, caps, seeds)
def test_over_sampling_makes_classes_equal_and_repeats_evenly(codes, cap, seed):
    drawn = over_sample(codes, np.random.default_rng(seed), cap=cap)
    target = np.bincount(codes).max() if cap is None else cap
    count = times(drawn, len(codes))
    for code in np.unique(codes):
        assert (codes[drawn] == code).sum() == target
        assert np.ptp(count[codes == code]) <= 1
    if cap is None:
        assert count.min() >= 1  # every cell is seen


@settings(deadline=None)
@given(class_lists, caps, seeds)
def test_under_sampling_repeats_nothing_and_keeps_small_classes_whole(codes, cap, seed):
    drawn = under_sample(codes, np.random.default_rng(seed), cap=cap)
    sizes = np.bincount(codes)
    target = sizes[sizes > 0].min() if cap is None else cap
    assert len(np.unique(drawn)) == len(drawn)
    for code in np.unique(codes):
        assert (codes[drawn] == code).sum() == min(sizes[code], target)


def draw(codes: np.ndarray, kind: str, cap: int | None = None, seed: int = 0) -> np.ndarray:
    return ClassSampler(codes, kind, cap).order(np.arange(len(codes)), np.random.default_rng(seed))


@settings(deadline=None)
@given(class_lists, st.sampled_from(["none", "over", "under"]), caps, seeds)
def test_an_epoch_depends_on_its_generator_alone_and_names_training_cells_only(codes, kind, cap, seed):
    cells = np.sort(np.random.default_rng(1).permutation(1000)[: len(codes)])
    in_folder = np.full(1000, 3)
    in_folder[cells] = codes
    sampler = ClassSampler(in_folder, kind, cap)
    first = sampler.order(cells, np.random.default_rng(seed))
    assert np.array_equal(first, sampler.order(cells, np.random.default_rng(seed)))
    assert np.isin(first, cells).all()
    if kind == "none" and cap is None:
        assert np.array_equal(np.sort(first), cells)


@settings(deadline=None)
@given(class_lists, st.sampled_from(["none", "over", "under"]), seeds)
def test_cells_without_a_label_come_once(codes, kind, seed):
    codes = np.where(codes == 4, -100, codes)
    assert (times(draw(codes, kind, seed=seed), len(codes))[codes < 0] == 1).all()


def test_epochs_draw_anew():
    codes = np.array([0] * 50 + [1] * 3)
    epochs = [set(draw(codes, "under", seed=number).tolist()) for number in range(20)]
    assert all({50, 51, 52} < epoch and len(epoch) == 6 for epoch in epochs)
    assert len(set.union(*epochs)) > 30


def test_every_cell_of_a_large_class_is_equally_likely():
    codes = np.array([0] * 8 + [1] * 2)
    drawn = [under_sample(codes, np.random.default_rng(seed)) for seed in range(4000)]
    count = times(np.concatenate(drawn), 10)
    assert (count[8:] == 4000).all()
    # 4,000 draws of 2 of 8: 1,000 each, standard deviation 27.
    assert np.abs(count[:8] - 1000).max() < 5 * 27


def test_no_memory_is_spent_on_cells():
    """An epoch is one integer per shown cell, whatever a cell weighs."""
    codes = np.array([0] * 1000 + [1] * 10)
    drawn = draw(codes, "over")
    assert drawn.dtype == np.int64
    assert drawn.nbytes == 2000 * 8


def test_refusals():
    with pytest.raises(UnsupportedError, match="one of none, over, under, not 'smote'"):
        ClassSampler(np.arange(2), "smote")
    with pytest.raises(UnsupportedError, match="cap of 0"):
        ClassSampler(np.arange(2), "none", 0)
