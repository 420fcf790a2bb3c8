"""Matched genes, intervals and power, each against what is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as students_t
from statistics_rows import collected, screen

from geneformer_fast.perturbation.statistics import bootstrap, null, power
from geneformer_fast.perturbation.statistics.multiple import false_discovery_rates


def test_genes_are_matched_by_rank_and_detection() -> None:
    rng = np.random.default_rng(0)
    n_cells, rank = rng.integers(10, 1000, 400), rng.random(400)
    is_taken = np.ones(400, dtype=bool)
    is_taken[::7] = False
    like = null.matched_genes(n_cells, rank, 1000, is_taken, size=20).like
    assert (like[~is_taken] == -1).all()
    assert is_taken[like[is_taken]].all()
    for gene in np.flatnonzero(is_taken):
        assert gene not in like[gene]
        assert len(set(like[gene].tolist())) == 20
    taken = np.flatnonzero(is_taken)
    everybody = np.abs(rank[taken, None] - rank[None, taken]).mean()
    assert np.abs(rank[like[is_taken]] - rank[is_taken][:, None]).mean() < everybody / 4
    # Without an order of genes, detection alone.
    alone = null.matched_genes(n_cells, np.full(400, np.nan), 1000, is_taken, size=20).like
    distance = np.abs(n_cells[alone[is_taken]] - n_cells[is_taken][:, None])
    assert np.median(distance) < 30


def test_few_genes_have_no_null() -> None:
    few = null.matched_genes(np.full(10, 50), np.arange(10) / 9, 60, np.ones(10, dtype=bool))
    assert not few.has_null.any()
    assert np.isnan(null.against_like(np.arange(10.0), few).p_values).all()
    eleven = null.matched_genes(np.full(11, 50), np.arange(11) / 10, 60, np.ones(11, dtype=bool))
    assert eleven.has_null.all()


def test_a_gene_among_its_like() -> None:
    """By the formula of one more value; chance alone gives p-values that are uniform."""
    rng = np.random.default_rng(1)
    n = 1500
    matched = null.matched_genes(rng.integers(10, 100, n), rng.random(n), 100, np.ones(n, dtype=bool), size=30)
    values = rng.normal(3, 2, n)
    test = null.against_like(values, matched)
    others = values[matched.like[5]]
    wanted = 2 * students_t.sf(abs(values[5] - others.mean()) / (others.std(ddof=1) * np.sqrt(31 / 30)), 29)
    assert test.p_values[5] == pytest.approx(wanted)
    for share in (0.01, 0.05, 0.5):
        for p_values in (test.p_values, test.by_order):
            assert (p_values <= share).mean() == pytest.approx(share, abs=0.03)
    values[7] = 30
    assert null.against_like(values, matched).p_values[7] < 1e-10
    assert null.against_like(values, matched).by_order[7] == pytest.approx(1 / 31)
    assert (null.against_like(np.ones(n), matched).p_values == 1).all()


@pytest.mark.parametrize("weights", [16_000_000, 300])
def test_draws_are_means_over_drawn_cells(weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_MOST_WEIGHTS", weights)
    rng = np.random.default_rng(3)
    values = 1 - 1e-3 * rng.random((40, 5))
    values[rng.random((40, 5)) < 0.3] = np.nan
    run = collected(screen(values))
    drawn = bootstrap.drawn_deviations(run.only, 40, draws=50, seed=9)
    again = np.random.default_rng(9)
    for draw in range(50):
        mean = np.nanmean(values.astype(np.float32).astype(float)[again.integers(0, 40, 40)], axis=0)
        assert drawn[:, draw] == pytest.approx(mean - run.only.means(), abs=3e-9)
    part = bootstrap.drawn_deviations(run.only, 40, draws=50, seed=9, first=2, last=4)
    assert (part == drawn[2:4]).all()


def test_donors_count_alike() -> None:
    values = np.concatenate([np.full((30, 1), 1.0), np.full((2, 1), 4.0), np.full((3, 1), 7.0)])
    run = collected(screen(values))
    group = np.repeat([0, 1, 2], [30, 2, 3])
    of_groups = bootstrap.group_means(run.only, group, 4)
    assert of_groups[0, :3].tolist() == [1, 4, 7]
    assert np.isnan(of_groups[0, 3])
    assert bootstrap.mean_of_groups(of_groups).tolist() == [4]
    drawn = bootstrap.drawn_deviations_of_groups(of_groups[:, :3], draws=2000, seed=0)
    assert drawn.mean() == pytest.approx(0, abs=0.15)
    assert {round(float(each), 6) for each in np.unique(drawn)} == {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0}
    without = bootstrap.group_means(run.only, np.where(group == 2, -1, group), 2)
    assert without[0].tolist() == [1, 4]


@pytest.mark.parametrize("n", [2, 4, 8, 40])
def test_intervals_hold_the_mean_as_often_as_they_say(n: int) -> None:
    """A thousand genes, each the same cells' normal values: plain percentiles of 4 hold it in 77 of 100 only."""
    rng = np.random.default_rng(4)
    run = collected(screen(rng.normal(5, 2, (n, 1000))))
    drawn = bootstrap.drawn_deviations(run.only, n, draws=1000, seed=1)
    low, high = bootstrap.interval(drawn, run.only.counts, 0.95)
    means = run.only.means()
    assert ((means + low < 5) & (means + high > 5)).mean() == pytest.approx(0.95, abs=0.045)


def test_there_is_no_interval_of_one() -> None:
    values = np.full((3, 2), np.nan)
    values[0, 0], values[:, 1] = 1, [1, 2, 3]
    run = collected(screen(values))
    low, high = bootstrap.interval(bootstrap.drawn_deviations(run.only, 3, draws=200, seed=0), run.only.counts, 0.9)
    assert np.isnan([low[0], high[0]]).all()
    assert low[1] < 0 < high[1]


@pytest.mark.parametrize(("effect", "n"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_power_is_that_of_the_tables(effect: float, n: int) -> None:
    """Of the one-sample t-test: two-sided 0.05, power 0.8."""
    assert power.power(n, effect) >= 0.8 > power.power(n - 1, effect)
    assert power.needed(np.array([effect, -effect])).tolist() == [n, n]
    found = power.detectable(np.array([n, n - 1]))
    assert found[0] <= effect < found[1]


def test_power_at_the_edges() -> None:
    assert np.isnan(power.power(1, 1.0))
    assert np.isnan(power.detectable(np.array([0, 1]))).all()
    assert power.needed(np.array([0.0, np.nan, 1e3])).tolist()[0] == np.inf
    assert np.isnan(power.needed(np.array([np.nan]))[0])
    assert power.needed(np.array([1e3]))[0] == 2
    for n in (150, 250, 5000):
        for level in (0.05, 1e-5):
            effect = power.detectable(np.array([n]), level)[0]
            assert power.power(n, effect, level) == pytest.approx(0.8, abs=2e-3)


def test_rates_are_of_tests_that_were_made() -> None:
    rates = false_discovery_rates(np.array([0.01, np.nan, 0.02, 0.5]))
    assert rates[[0, 2, 3]].tolist() == pytest.approx([0.03, 0.03, 0.5])
    assert np.isnan(rates[1])
    by = false_discovery_rates(np.array([0.01, np.nan, 0.02, 0.5]), "by")
    assert by[0] == pytest.approx(0.03 * (1 + 1 / 2 + 1 / 3))
    assert np.isnan(false_discovery_rates(np.array([np.nan]))).all()
