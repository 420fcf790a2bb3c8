"""All genes at once give what SciPy gives of each."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, ranksums
from statistics_rows import collected, screen

from geneformer_fast.perturbation.statistics import ranksum
from geneformer_fast.perturbation.statistics.columns import Run


@pytest.fixture(params=[None, 5])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Genes in 1 to 30 cells; many values are equal. With a parameter values are looked up in small pieces."""
    if request.param:
        monkeypatch.setattr(ranksum, "_PIECE", request.param)
    rng = np.random.default_rng(1)
    values = rng.integers(0, 12, (30, 9)) / 8
    for gene in range(9):
        values[1 + 3 * gene + 2 :, gene] = np.nan
    return collected(screen(values))


def test_against_the_pool(run: Run) -> None:
    pool = run.only.values
    found = ranksum.against(pool, run.only)
    for edit in range(9):
        x = run.only.of(edit)
        assert found.p_values[edit] == pytest.approx(ranksums(pool, x).pvalue, rel=1e-12)
        wins = mannwhitneyu(x, pool).statistic
        assert found.above[edit] == pytest.approx(wins / (len(x) * len(pool)))


def test_ties_with_the_pool(run: Run) -> None:
    found = ranksum.against(run.only.values, run.only, has_ties=True)
    for edit in range(9):
        wanted = mannwhitneyu(
            run.only.of(edit).astype(float), run.only.values.astype(float), use_continuity=False, method="asymptotic"
        ).pvalue
        assert found.p_values[edit] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("has_ties", [False, True])
def test_against_the_others(run: Run, has_ties: bool) -> None:
    found = ranksum.against_the_others(run.only, has_ties=has_ties)
    for edit in range(9):
        x, others = run.only.of(edit).astype(float), run.only.values.astype(float)[run.only.edits != edit]
        if has_ties:
            wanted = mannwhitneyu(x, others, use_continuity=False, method="asymptotic").pvalue
        else:
            wanted = ranksums(x, others).pvalue
        assert found.p_values[edit] == pytest.approx(wanted, rel=1e-12)
        assert found.above[edit] == pytest.approx(mannwhitneyu(x, others).statistic / (len(x) * len(others)))


@pytest.mark.parametrize("has_ties", [False, True])
def test_two_samples(run: Run, has_ties: bool) -> None:
    rng = np.random.default_rng(2)
    other = collected(screen(rng.integers(0, 12, (7, 9)) / 8)).only
    found = ranksum.two_samples(run.only, other, has_ties=has_ties)
    for edit in range(9):
        x, y = run.only.of(edit).astype(float), other.of(edit).astype(float)
        if has_ties:
            wanted = mannwhitneyu(x, y, use_continuity=False, method="asymptotic").pvalue
        else:
            wanted = ranksums(x, y).pvalue
        assert found.p_values[edit] == pytest.approx(wanted, rel=1e-12)


def test_one_gene_alone_and_values_that_are_all_alike() -> None:
    lonely = collected(screen(np.ones((4, 1)))).only
    assert np.isnan(ranksum.against_the_others(lonely).p_values).all()
    alike = collected(screen(np.ones((4, 3)))).only
    for has_ties in (False, True):
        assert (ranksum.against_the_others(alike, has_ties=has_ties).p_values == 1).all()


def test_a_large_pool_is_drawn_from_as_there() -> None:
    pool = np.arange(100_001, dtype=np.float32)
    random.seed(42)
    wanted = random.sample(pool.tolist(), 100_000)
    assert ranksum.drawn(pool).tolist() == wanted
    assert ranksum.drawn(pool[:-1]) is not None
    assert len(ranksum.drawn(pool[:-1])) == 100_000
    assert ranksum.drawn(pool[:-1]).tolist() == pool[:-1].tolist()
