"""Equal and nearly equal scores, and cells cut to their greatest scores first, ranked on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cells_to_rank import assert_same, csr_cells, random_cells, small_plan
from geneformer_kernels import rank_genes
from geneformer_kernels.ops.rank_genes.plan import IS_OPEN


@pytest.mark.parametrize(
    ("case", "is_selected"),
    [
        *((case, False) for case in ("alike", "two", "one rounding apart", "ratios", "tiny", "fine")),
        *((case, True) for case in ("alike", "one rounding apart", "fine")),
    ],
)
def test_ties(device, case, is_selected):
    """Equal and nearly equal scores, cut anywhere; which of them one sort settles, and which need two more."""
    rng = np.random.default_rng(1)
    n = 40
    token_ids, dense = rng.permutation(1000)[:n], rng.integers(1, 4, (2, n)).astype("float32")
    medians = {
        "alike": np.full(n, 1.7),
        "two": np.where(rng.random(n) < 0.5, 1.0, 1e-30),
        "one rounding apart": 1 + rng.integers(0, 3, n) * 2.0**-52,
        "ratios": rng.integers(1, 9, n) / 6,
        "tiny": np.full(n, 1.5e308),  # scores are subnormal, and differ in few bits
        "fine": np.full(n, 1.0),
    }[case]
    n_counts = np.array([1000.0, 5.0])
    if case == "tiny":
        n_counts *= 1e17
        dense[:] = rng.integers(1, 1000, dense.shape)
    if case == "fine":  # counts that differ less than leading bits can tell
        dense = 3.0 + rng.integers(0, 9, dense.shape) * 2.0**-51
    cells = csr_cells(dense, np.arange(n), token_ids, medians, n_counts)
    plan = small_plan(select_above=16) if is_selected else small_plan()
    cuts = ((5, True), (33, False), (40, True))
    for keep, is_division in cuts[:2] if is_selected else cuts:  # all of a selected cell: test_selection
        status = assert_same(cells, device, plan, keep=keep, is_division=is_division, first=1)
        is_open = ((status & IS_OPEN) != 0).any()
        if case in ("alike", "two"):
            assert not is_open, "settled by one sort"
        else:
            assert is_open or keep == 5


@pytest.mark.parametrize("select_above", [16, 64])
def test_a_score_that_underflows_to_zero(device, poisoned, select_above):
    """It is the least there is, and yet stands before what lies behind the cell; no open pair has it sorted again."""
    rng = np.random.default_rng(5)
    dense, medians = rng.integers(1, 9, (1, 20)).astype("float64"), np.ones(20)
    dense[0, 7], medians[7] = 2.0**-100, 2.0**1000
    cells = csr_cells(dense, np.arange(20), np.arange(20), medians)
    status = assert_same(cells, device, small_plan(select_above=select_above), keep=20)
    assert not (status & IS_OPEN).any()
    assert cells.reference(keep=20)[0][-1] == 7


def test_neighbours(device):
    """One open pair, anywhere in words of which a thread holds eight, as on a card."""
    rng = np.random.default_rng(3)
    n = 230
    for better, worse in ((0, 1), (7, 8), (102, 103), (228, 229)):
        medians = 1.0 + np.arange(n) / 8
        medians[worse] = medians[better] * (1 + 2.0**-50)
        token_ids = np.arange(n)[::-1].copy()  # would rank them the other way round
        order = rng.permutation(n)
        cells = csr_cells(np.ones((1, n), "float32"), order, token_ids, medians)
        status = assert_same(cells, device, small_plan((256,), select_above=256, settle_small=0), keep=n)
        assert (status & IS_OPEN).all()


@pytest.mark.parametrize("keep", [1, 20, 1000])
def test_selection(device, poisoned, keep):
    """Cells that are cut to slabs first, one or many, beside cells that are not; cuts through ties and near ties."""
    cells = random_cells(keep, n_columns=100, n_genes=95, density=0.7)
    assert_same(cells, device, small_plan((16, 32), select_above=20), keep=keep, first=998)
    cells.medians = torch.ones_like(cells.medians)
    assert_same(cells, device, small_plan((16, 32), select_above=32, select_block=32), keep=min(keep, 40), last=999)


def test_selection_of_the_greatest_rank(device, poisoned):
    """As many genes as their ranks' bits can number, and all scores equal: the last entry has the greatest rank."""
    rng = np.random.default_rng(2)
    cells = csr_cells(np.ones((1, 32), "float32"), rng.permutation(32), rng.permutation(32), np.ones(32))
    assert_same(cells, device, small_plan((16,), select_above=16), keep=32)


def test_more_genes_than_a_sort_takes(device):
    rng = np.random.default_rng(0)
    n = 9000
    dense = rng.poisson(2.0, (2, n)).astype("int32") + 1
    dense[1, 100:] = 0
    cells = csr_cells(dense, np.arange(n), rng.permutation(n), rng.lognormal(0, 1, n)).on(device)
    want, want_ends = cells.reference(keep=20)
    values, cu_seqlens = rank_genes(*cells.block, **cells.genes, keep=20, impl="triton")
    assert torch.equal(values, want)
    assert torch.equal(cu_seqlens, want_ends)
