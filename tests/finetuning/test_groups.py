"""Whole groups in parts: as near to the share, and as even, as every way that there is; found where there is one."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from geneformer_fast.errors import InputError
from geneformer_fast.finetuning import groups as grouped
from geneformer_fast.finetuning.groups import deal, nearest_set
from geneformer_fast.finetuning.splits import folds, hold_out, numbers_of, told

NAMES = ["T", "B", "NK", "mono", "rare"]


@st.composite
def tables(draw, most: int = 8):
    """[G, K] members of classes in groups, every class in two groups at least, no group empty."""
    n_groups, n_classes = draw(st.integers(2, most)), draw(st.integers(1, 4))
    size = st.one_of(st.just(0), st.integers(1, 9), st.integers(20, 400))
    rows = st.lists(size, min_size=n_classes, max_size=n_classes)
    counts = np.array(draw(st.lists(rows, min_size=n_groups, max_size=n_groups)))
    assume(((counts > 0).sum(0) >= 2).all() and counts.any(1).all())
    return counts


def keeps(counts: np.ndarray, taken: np.ndarray) -> bool:
    return bool(counts[~taken].any(0).all())


def possible_sets(counts: np.ndarray) -> list[np.ndarray]:
    """Every set of groups that leaves every class to the others."""
    choices = itertools.product([False, True], repeat=len(counts))
    return [taken for taken in map(np.array, choices) if taken.any() and keeps(counts, taken)]


def assert_as_near_as_possible(counts: np.ndarray, taken: np.ndarray, target: float) -> None:
    assert taken.any()
    assert keeps(counts, taken)
    sizes = counts.sum(1)

    def miss(chosen: np.ndarray) -> float:
        return abs(sizes[chosen].sum() - target)

    def covers(chosen: np.ndarray) -> int:
        return int(counts[chosen].any(0).sum())

    every = possible_sets(counts)
    nearest = min(map(miss, every))
    assert miss(taken) <= nearest + 0.6 * target + 1e-9
    # More than a tenth of the share is given away for classes only, of which there are as many as there can be then.
    near = [chosen for chosen in every if miss(chosen) <= nearest + 0.5 * target]
    assert covers(taken) >= max(map(covers, near))
    as_good = [miss(chosen) for chosen in near if covers(chosen) == covers(taken)]
    assert miss(taken) <= min(as_good) + 0.1 * target + 1e-9


@settings(deadline=None, max_examples=60)
@given(tables(), st.sampled_from([0.05, 0.1, 0.2, 0.5]), st.integers(0, 20))
def test_the_set_is_as_near_as_any(counts, share, seed):
    target = share * counts.sum()
    taken = nearest_set(counts, target, np.random.default_rng(seed))
    assert_as_near_as_possible(counts, taken, target)


@settings(deadline=None, max_examples=60)
@given(tables(), st.sampled_from([0.05, 0.1, 0.3]), st.integers(0, 20))
def test_a_group_is_left_for_the_evaluation_where_there_can_be_one(counts, share, seed):
    def has_another(taken: np.ndarray) -> bool:
        others = (taken | np.eye(len(counts), dtype=bool)[group] for group in np.flatnonzero(~taken))
        return any(keeps(counts, more) for more in others)

    taken = nearest_set(counts, share * counts.sum(), np.random.default_rng(seed), leaves_one=True)
    assert has_another(taken) == any(map(has_another, possible_sets(counts)))


def uneven(counts: np.ndarray, places: np.ndarray, n_folds: int) -> float:
    """What is to be small, written out."""
    total = 0.0
    for fold in range(n_folds):
        part = counts[places == fold].sum(0)
        total += (part.sum() / counts.sum() * n_folds - 1) ** 2
        total += np.mean((part / counts.sum(0) * n_folds - 1) ** 2)
    return total


def is_whole(counts: np.ndarray, places: np.ndarray, n_folds: int) -> bool:
    parts = [places == fold for fold in range(n_folds)]
    return all(part.any() and keeps(counts, part) for part in parts)


def n_stuck(counts: np.ndarray, places: np.ndarray, n_folds: int) -> int:
    """Folds whose training can spare no group for evaluation."""

    def is_stuck(test: np.ndarray) -> bool:
        others = (test | np.eye(len(counts), dtype=bool)[group] for group in np.flatnonzero(~test))
        return not any(keeps(counts, more) for more in others)

    return sum(is_stuck(places == fold) for fold in range(n_folds))


@settings(deadline=None, max_examples=25)
@given(tables(5), st.integers(2, 4), st.integers(0, 20))
def test_folds_are_found_where_there_are_any_and_are_as_even_as_any(counts, n_folds, seed):
    places = deal(counts, n_folds, np.random.default_rng(seed))
    every = map(np.array, itertools.product(range(n_folds), repeat=len(counts)))
    whole = [ways for ways in every if is_whole(counts, ways, n_folds)]
    assert (places is not None) == bool(whole)
    if places is not None:
        assert is_whole(counts, places, n_folds)
        least = min(n_stuck(counts, ways, n_folds) for ways in whole)
        assert n_stuck(counts, places, n_folds) == least
        best = min(uneven(counts, ways, n_folds) for ways in whole if n_stuck(counts, ways, n_folds) == least)
        assert uneven(counts, places, n_folds) <= best + 0.01 * n_folds + 1e-9


@settings(deadline=None, max_examples=25)
@given(tables(6), st.integers(2, 4), st.integers(0, 20))
def test_the_search_finds_folds_where_there_are_any(counts, n_folds, seed):
    before = grouped.MOST_DEALS
    grouped.MOST_DEALS = 0
    try:
        places = deal(counts, n_folds, np.random.default_rng(seed))
    finally:
        grouped.MOST_DEALS = before
    every = map(np.array, itertools.product(range(n_folds), repeat=len(counts)))
    whole = [uneven(counts, ways, n_folds) for ways in every if is_whole(counts, ways, n_folds)]
    assert (places is not None) == bool(whole)
    if places is not None:
        assert is_whole(counts, places, n_folds)


@settings(deadline=None, max_examples=20)
@given(st.integers(17, 60), st.integers(1, 5), st.sampled_from([0.05, 0.1, 0.2]), st.integers(0, 99))
def test_many_groups_meet_a_share_nearly_exactly(n_groups, n_classes, share, seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 60, (n_groups, n_classes)) + (rng.integers(n_groups, size=(n_groups, 1)) == 0) * 500
    assume(((counts > 0).sum(0) >= 2).all() and counts.any(1).all())
    target = share * counts.sum()
    taken = nearest_set(counts, target, rng)
    assert keeps(counts, taken)
    # The smallest group is the finest that a sum can be set by; ten percent are the seed's.
    assert abs(counts[taken].sum() - target) <= max(0.11 * target, counts.sum(1).min() + 1)


def test_the_search_is_as_good_as_looking_at_every_set(monkeypatch):
    rng = np.random.default_rng(1)
    for _ in range(20):
        counts = rng.integers(0, 50, (10, 3)) * rng.choice([1, 1, 1, 8], (10, 1)) + 1
        target = 0.1 * counts.sum()
        monkeypatch.setattr(grouped, "MOST_SETS", 0)
        taken = nearest_set(counts, target, rng)
        sizes = counts.sum(1)
        best = min(abs(sizes[chosen].sum() - target) for chosen in possible_sets(counts))
        assert abs(sizes[taken].sum() - target) <= best + 0.1 * target + 1e-9


def test_folds_of_many_groups_are_even():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 200, (40, 6))
    counts[:, 5] = 0
    counts[[3, 17], 5] = 5  # a class of two groups, which must not meet
    for seed in range(3):
        places = deal(counts, 5, np.random.default_rng(seed))
        assert places[3] != places[17]
        sizes = np.bincount(places, weights=counts.sum(1))
        assert abs(sizes / sizes.mean() - 1).max() < 0.03


def test_a_hard_deal_is_found_and_an_impossible_one_is_seen():
    # Three classes, each of two groups of three: two folds would have to hold both groups of one of them.
    triangle = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1]])
    assert deal(triangle, 2, np.random.default_rng(0)) is None
    assert deal(triangle, 3, np.random.default_rng(0)) is not None
    # A chain of 30 groups, each sharing a class with the next, has two ways into two folds only: in turns.
    chain = np.zeros((30, 29), dtype=np.int64)
    for link in range(29):
        chain[[link, link + 1], link] = 1
    places = deal(chain, 2, np.random.default_rng(0))
    assert (places[::2] == places[0]).all()
    assert (places[1::2] == 1 - places[0]).all()


def cells_of(counts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(codes, donors) of a table of donors and classes."""
    table = np.array(counts)
    codes = np.concatenate([np.repeat(np.arange(table.shape[1]), row) for row in table])
    return codes, np.repeat([f"d{number}" for number in range(len(table))], table.sum(1))


@pytest.mark.parametrize(
    ("sizes", "share", "least", "most"),
    [
        ([231, 241, 251, 261, 271, 281, 2233], 0.1, 0.06, 0.14),
        ([412, 38, 40, 32, 40], 0.1, 0.067, 0.133),
        ([100] * 10, 0.2, 0.2, 0.2),
        ([10_000, 3, 3, 3], 0.1, 0.0002, 0.001),
    ],
)
def test_a_large_donor_is_not_the_test_set(sizes, share, least, most):
    codes, donors = cells_of([[size // 2, size - size // 2] for size in sizes])
    taken = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(12):
            split = hold_out(codes, NAMES, groups=donors, test_share=share, seed=seed)
            assert least <= len(split.test) / len(codes) <= most
            assert len(split.eval) > 0
            assert set(codes[split.train]) == {0, 1}
            taken.add(tuple(np.unique(donors[split.test])))
    assert len(taken) > 1, "the seed chooses nothing"


def test_a_share_that_whole_donors_miss_by_far_is_said():
    codes, donors = cells_of([[300, 300], [300, 300], [300, 300]])
    with pytest.warns(UserWarning, match=r"33\.3% of the cells are for testing, not 10\.0%"):
        hold_out(codes, NAMES, groups=donors, test_share=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hold_out(codes, NAMES, groups=donors, test_share=0.3, eval_share=0.3)


def test_folds_that_exist_are_found_and_none_is_without_evaluation():
    codes, donors = cells_of([[2, 5, 6, 11], [13, 3, 3, 5], [1, 9, 0, 0], [1, 1, 4, 0]])
    for seed in range(8):
        for split in folds(codes, NAMES, 3, groups=donors, seed=seed):
            assert min(len(split.train), len(split.eval), len(split.test)) > 0
            assert set(codes[split.train]) == {0, 1, 2, 3}
            assert len(split.test) in (16, 24)


@pytest.mark.parametrize("n_spared", [0, 1])
def test_every_group_is_a_fold_of_its_own(n_spared):
    for n_groups in (30, 1200) if not n_spared else (30, 120):
        counts = np.random.default_rng(n_groups).integers(1, 9, (n_groups, 2))
        places = deal(counts, n_groups - n_spared, np.random.default_rng(0))
        sizes = np.bincount(places)
        assert len(sizes) == n_groups - n_spared
        assert sizes.min() == 1
        assert sizes.max() == 1 + n_spared


def test_the_ways_that_are_looked_at_fit_into_memory():
    # 99 folds of 100 groups: 4,950 ways, each of 99 x 100 numbers.
    assert grouped._n_numbers(np.ones((100, 2)), 99) > grouped._MOST_NUMBERS
    assert grouped._n_numbers(np.ones((12, 3)), 3) > grouped._MOST_NUMBERS  # 86,526 ways
    assert grouped._n_numbers(np.ones((6, 3)), 3) == 90 * 3 * 6
    assert grouped._n_numbers(np.ones((4, 9)), 2) == 7 * 2 * 9


def test_where_no_donor_can_be_spared_the_last_epoch_is_kept_and_said():
    codes, donors = cells_of([[9, 9], [9, 9]])
    with pytest.warns(UserWarning, match="in 2 of 2 folds no group can be spared for evaluation"):
        found = folds(codes, NAMES, 2, groups=donors)
    assert [len(split.eval) for split in found] == [0, 0]


def test_refusals_say_where_the_classes_are():
    codes, donors = cells_of([[5, 5, 0], [5, 5, 0], [0, 5, 5]])
    with pytest.raises(InputError, match=r"all cells of NK come from one group.*NK \(d2\)"):
        hold_out(codes, NAMES, groups=donors)
    codes, donors = cells_of([[3, 3, 0], [0, 3, 3], [3, 0, 3]])
    with pytest.raises(InputError, match=r"no way was found to deal 3 groups into 2 folds.*T is in d0, d2 only"):
        folds(codes, NAMES, 2, groups=donors)
    codes, donors = cells_of([[30, 30]])
    with pytest.raises(InputError, match=r"there is one \(d0\).*take no group column$"):
        hold_out(codes, NAMES, groups=donors)
    codes, donors = cells_of([[30, 30], [30, 30]])
    with pytest.raises(InputError, match=r"there are 2.*leave the evaluation out"):
        hold_out(codes, NAMES, groups=donors)
    assert len(hold_out(codes, NAMES, groups=donors, eval_share=0, test_share=0.4).test) == 60


def test_numbers_are_told():
    codes, donors = cells_of([[30, 10], [30, 10], [30, 10], [30, 0]])
    split = hold_out(codes, NAMES, groups=donors, eval_share=0.2, test_share=0.25)
    numbers = numbers_of(split, codes, NAMES, donors)
    assert sum(part["cells"] for part in numbers.values()) == 150
    assert sum(part["share"] for part in numbers.values()) == pytest.approx(1)
    assert sum(part["groups"] for part in numbers.values()) == 4
    assert {name: sum(part["classes"].get(name, 0) for part in numbers.values()) for name in ("T", "B")} == {
        "T": 120,
        "B": 30,
    }
    text = told("split", numbers)
    assert text.startswith(f"split: training {len(split.train):,} cells (")
    assert f"test {len(split.test)} cells ({len(split.test) / 150:.1%}) of 1 group" in text
    assert "T " in text
