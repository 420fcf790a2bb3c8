"""Splits: nothing is ever in two parts, every class is learnt from, and what cannot be split is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from geneformer_fast.errors import InputError, UnsupportedError
from geneformer_fast.finetuning.splits import Split, folds, hold_out

NAMES = ["T", "B", "NK", "mono", "rare"]


@st.composite
def labelled(draw, least: int = 5):
    """Classes with at least ``least`` cells each, in any order."""
    sizes = draw(st.lists(st.integers(least, 40), min_size=2, max_size=5))
    codes = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(draw(st.integers(0, 99))).permutation(codes)


def assert_apart(split: Split, n: int, groups: np.ndarray | None = None) -> None:
    parts = [split.train, split.eval, split.test]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n)), "a cell is missing or in two parts"
    if groups is not None:
        names = [set(groups[part].tolist()) for part in parts]
        both = names[0] & names[1] | names[0] & names[2] | names[1] & names[2]
        assert not both, f"donors {both} are in two parts"


@settings(deadline=None, max_examples=50)
@given(labelled(), st.integers(2, 5), st.sampled_from([0.0, 0.1, 0.3]), st.integers(0, 50))
def test_folds_are_stratified_and_test_every_cell_once(codes, n_folds, eval_share, seed):
    found = folds(codes, NAMES, n_folds, eval_share=eval_share, seed=seed)
    assert np.array_equal(np.sort(np.concatenate([split.test for split in found])), np.arange(len(codes)))
    for split in found:
        assert_apart(split, len(codes))
        assert set(codes[split.train]) == set(codes)
        for code in np.unique(codes):
            in_test, expected = (codes[split.test] == code).sum(), (codes == code).sum() / n_folds
            assert abs(in_test - expected) < 1 + 1e-9
        assert (len(split.eval) == 0) == (eval_share == 0)


# Five cells to learn from, of which the evaluation cells are to be a fifth: more folds than any class has cells.
@example(np.array([0, 1, 0, 1, 0, 1, 1, 0, 1, 0]), 2, 7, 0.2, 0)
@settings(deadline=None, max_examples=50)
@given(labelled(), st.integers(2, 4), st.integers(4, 12), st.sampled_from([0.0, 0.2]), st.integers(0, 50))
def test_no_donor_is_in_two_parts(codes, n_folds, n_donors, eval_share, seed):
    groups = np.random.default_rng(seed).integers(n_donors, size=len(codes)).astype(str)
    try:
        found = folds(codes, NAMES, n_folds, groups=groups, eval_share=eval_share, seed=seed)
    except InputError:
        # Refused with good reason: a class that is too few donors', or too few donors at all.
        few = [code for code in np.unique(codes) if len(np.unique(groups[codes == code])) < n_folds]
        assume(False) if not few else None
        return
    assert np.array_equal(np.sort(np.concatenate([split.test for split in found])), np.arange(len(codes)))
    for split in found:
        assert_apart(split, len(codes), groups)
        assert set(codes[split.train]) == set(codes)


@settings(deadline=None, max_examples=50)
@given(labelled(least=3), st.sampled_from([0.05, 0.2]), st.sampled_from([0.1, 0.3]), st.integers(0, 50))
def test_hold_out_has_every_class_everywhere(codes, eval_share, test_share, seed):
    split = hold_out(codes, NAMES, eval_share=eval_share, test_share=test_share, seed=seed)
    assert_apart(split, len(codes))
    for part in (split.train, split.eval, split.test):
        assert set(codes[part]) == set(codes)


@settings(deadline=None, max_examples=50)
@given(labelled(least=20), st.integers(0, 50))
def test_hold_out_by_donor(codes, seed):
    groups = np.random.default_rng(seed).integers(8, size=len(codes))
    split = hold_out(codes, NAMES, groups=groups, eval_share=0.2, test_share=0.2, seed=seed)
    assert_apart(split, len(codes), groups)
    assert set(codes[split.train]) == set(codes)
    assert len(split.test) > 0


def test_shares_are_met():
    codes = np.repeat([0, 1], [800, 200])
    split = hold_out(codes, NAMES, eval_share=0.1, test_share=0.2)
    assert [len(part) for part in (split.train, split.eval, split.test)] == [700, 100, 200]
    grouped = hold_out(codes, NAMES, groups=np.arange(1000) % 10, eval_share=0.1, test_share=0.2)
    assert [len(part) for part in (grouped.train, grouped.eval, grouped.test)] == [700, 100, 200]


def test_seeds_differ_and_repeat():
    codes = np.repeat([0, 1], 50)
    first, again, other = (folds(codes, NAMES, 5, seed=seed)[0].test for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_refusals_name_the_class():
    codes = np.repeat([0, 1, 4], [20, 20, 1])
    with pytest.raises(InputError, match=r"5 folds need 5 cells of every class, but there are fewer of rare \(1\)"):
        folds(codes, NAMES, 5)
    with pytest.raises(InputError, match=r"need 3 cells of every class.*rare"):
        hold_out(codes, NAMES)
    with pytest.raises(InputError, match=r"20 cells of one class only \('B'\)"):
        folds(np.ones(20, dtype=int), NAMES, 5)
    with pytest.raises(InputError, match="0 cells of one class only"):
        hold_out(np.zeros(0, dtype=int), NAMES)
    with pytest.raises(UnsupportedError, match="1 folds are no cross-validation"):
        folds(codes, NAMES, 1)
    with pytest.raises(UnsupportedError, match="leave nothing to learn from"):
        hold_out(codes, NAMES, eval_share=0.5, test_share=0.5)


def test_refusals_of_many_classes_can_be_read():
    names = [f"type{i}" for i in range(500)]
    with pytest.raises(InputError, match=r"fewer of type0 \(1\).* and 480 more; leave") as refusal:
        hold_out(np.arange(500), names)
    assert len(str(refusal.value)) < 600


def test_refusals_by_donor():
    codes = np.tile([0, 1], 20)
    with pytest.raises(InputError, match="need 5 groups, but there are 2"):
        folds(codes, NAMES, 5, groups=np.repeat(["x", "y"], 20))
    donors = np.where(codes == 1, 0, np.arange(40))
    with pytest.raises(InputError, match="all cells of B come from one group"):
        folds(codes, NAMES, 5, groups=donors)


def test_genes_are_called_genes():
    with pytest.raises(InputError, match=r"genes of every class, but there are fewer of B \(1\).*the classes file"):
        folds(np.array([0, 0, 0, 1]), NAMES, 2, of="genes")
