"""Blocks of cells that are no such thing, on a GPU: refused or told, and nothing is written outside of the arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cells_to_rank import cells_of_lengths, launched, random_cells, small_plan
from geneformer_kernels import rank_genes
from geneformer_kernels.ops.rank_genes import device as on_device
from geneformer_kernels.ops.rank_genes import kernel, launches
from geneformer_kernels.ops.rank_genes.columns import RepeatedColumnError
from geneformer_kernels.ops.rank_genes.plan import REPEATED_COLUMN, WRONG_COLUMN, WRONG_INDPTR, WRONG_TOTAL


def test_what_is_refused(device):
    genes = dict(column_to_gene=[0, 1, 2], token_ids=[0, 1, 2], medians=[1.0, 1.0, 1.0])

    def rank(indptr=(0, 2), indices=(0, 1), n_counts=(5.0,), **changes):
        table = {name: torch.tensor(value, device=device) for name, value in (genes | changes).items()}
        block = (torch.tensor(indptr), torch.tensor(indices), torch.ones(len(indices)), torch.tensor(n_counts))
        return rank_genes(*(part.to(device) for part in block), **table, keep=5, impl="triton")

    assert rank()[0].tolist() == [0, 1]
    assert rank(indices=(2, 0))[0].tolist() == [0, 2]
    with pytest.raises(RepeatedColumnError, match="row 1 names a column twice"):
        rank((0, 1, 4), (1, 2, 0, 2), (5.0, 5.0))
    with pytest.raises(RepeatedColumnError, match="row 0 names a column twice"):
        rank((0, 3), (0, 1, 1))
    many = np.random.default_rng(0).permutation(120)
    for i, j in ((0, 119), (40, 110), (50, 51)):
        columns = np.where(np.arange(120) == j, many[i], many)
        with pytest.raises(RepeatedColumnError, match="row 0 names a column twice"):
            rank((0, 120), columns.tolist(), column_to_gene=[0] + [-1] * 119)
    for indices in ([0, 3], [-1, 1]):
        with pytest.raises(ValueError, match="row 0: a column index is out of range"):
            rank(indices=indices)
    for indptr in ([0, 9], [1, 0], [-1, 2]):
        with pytest.raises(ValueError, match="row 0: indptr does not fit"):
            rank(indptr)
    for n in (0.0, -3.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="row 0 has entries but n_counts"):
            rank(n_counts=[n])
    with pytest.raises(ValueError, match="row 1: indptr does not fit"):  # the first, whatever else is wrong
        rank((0, 1, 0, 4), (1, 2, 0, 2), (5.0, 5.0, 0.0))
    for wrong in ([1.0, 0.0, 1.0], [1.0, float("nan"), 1.0], [1.0, float("inf"), 1.0]):
        with pytest.raises(ValueError, match="medians must be positive"):
            rank(medians=wrong)
    for wrong in ([4, 4, 5], [-1, 4, 5], [1, 2, 2**31]):
        with pytest.raises(ValueError, match="unique"):
            rank(token_ids=wrong)
    with pytest.raises(ValueError, match="a gene that is not there"):
        rank(column_to_gene=[0, 1, 3])
    for n_genes in (1, 0):
        with pytest.raises(ValueError, match="a gene that is not there"):
            on_device.prepare_columns(torch.tensor([5]), torch.arange(n_genes), torch.ones(n_genes))
    with pytest.raises(ValueError, match="at most 262144 genes"):
        on_device.prepare_columns(torch.zeros(1), torch.arange(2**18 + 1), torch.ones(2**18 + 1))
    with pytest.raises(ValueError, match="keep"):
        rank_genes(*random_cells(0).block, **random_cells(0).genes, keep=0, impl="triton")


@pytest.mark.parametrize("plan", [small_plan(), small_plan((16,), select_above=16)])
def test_no_block_writes_outside_of_the_arrays(device, plan):
    """Rows that overlap could have more tokens than the buffer holds; ``launched`` has a sentinel behind it."""
    cells = random_cells(6)
    n = 30
    cells.indices, cells.data = cells.indices[:n], cells.data[:n]
    cells.indptr, cells.n_counts = torch.tensor([0, n] * 3), torch.ones(5, dtype=torch.float64)
    columns = on_device.prepare_columns(**cells.on(device).genes)
    block = launches.CountBlock.of(*cells.on(device).block)
    for first, last in ((-1, -1), (1, 2)):
        buffer = torch.full((n + 64,), -77, dtype=torch.int64, device=device)
        _, status = launches.launch(
            plan, block, columns.tables, buffer[:n], keep=n, first=first, last=last, is_checked=False
        )
        assert (buffer[n:] == -77).all()
        assert status.any()


def test_padded_rows_that_are_too_short(device, poisoned):
    """Only the public function looks at the length; rows then run into each other, but not out of the buffer."""
    on = random_cells(6).on(device)
    columns = on_device.prepare_columns(**on.genes)
    buffer = torch.full((4 * 5 + 64,), -77, dtype=torch.int64, device=device)
    launches.launch(
        small_plan(), launches.CountBlock.of(*on.block), columns.tables, buffer[:20].view(4, 5),
        keep=60, first=1, last=2, is_checked=True,
    )  # fmt: skip
    assert (buffer[20:] == -77).all()
    assert (buffer[:20] != -77).any()


@pytest.mark.parametrize("select_above", [8, 64])
@pytest.mark.parametrize(
    "wrong", [[0, 10, 25, 20, 40], [0, 10, 900, 900, 40], [0, 10, -3, -3, 40], [0, 10, 25, 41, 41]]
)
def test_a_wrong_indptr_in_the_middle(device, poisoned, wrong, select_above):
    """Just the rows that do not fit are told, also one without entries; those before them are ranked."""
    cells = cells_of_lengths((10, 10, 10, 10), 70, np.arange(70), np.linspace(1, 2, 70))
    want, _ = cells.reference(keep=70)
    cells.indptr = torch.tensor(wrong)
    values, cu_seqlens, status = launched(cells.on(device), small_plan(select_above=select_above), keep=70)
    begins, ends = cells.indptr[:-1], cells.indptr[1:]
    is_wrong = (begins < 0) | (ends < begins) | (ends > 40)
    assert is_wrong.any()
    assert torch.equal((status & WRONG_INDPTR) != 0, is_wrong)
    assert torch.equal(cu_seqlens.diff() == 0, is_wrong | (begins == ends))
    assert torch.equal(values[:10], want[:10])


@pytest.mark.parametrize("select_above", [16, 64])
def test_what_is_wrong_with_each_cell(device, poisoned, select_above):
    """Every bit of the status, from the pass over the counts and from the kernel that scores what it does not take."""
    cells = cells_of_lengths((20,) * 7, 70, np.arange(70), np.ones(70), dtype="float64")
    indices, data = cells.indices.view(7, 20), cells.data.view(7, 20)
    indices[1] = indices[1].flip(0)
    indices[2, 5] = indices[2, 9]  # and so the columns do not ascend
    indices[3, 19] = 70
    cells.n_counts[4] = 0
    data[5, 7] = 1 + 2.0**-50
    indices[6, 0] = -1
    _, _, status = launched(cells.on(device), small_plan(select_above=select_above), keep=70)
    wrong = status & (WRONG_COLUMN | WRONG_TOTAL | REPEATED_COLUMN | WRONG_INDPTR)
    assert wrong.tolist() == [0, 0, REPEATED_COLUMN, WRONG_COLUMN, WRONG_TOTAL, 0, WRONG_COLUMN]
    assert ((status & kernel.NOT_ASCENDING.value) != 0).tolist() == [False, True, True, False, False, False, True]
    assert ((status & kernel.IS_FINE.value) != 0).tolist() == [False] * 5 + [True, False]


@pytest.mark.parametrize("select_above", [16, 64])
def test_negative_counts_do_no_harm(device, poisoned, select_above):
    """They are not allowed, and nobody looks for them; the order means nothing, but each gene comes once."""
    for step in (2, 1):
        cells = random_cells(6)
        cells.data[::step] *= -1
        values, cu_seqlens, _ = launched(cells.on(device), small_plan(select_above=select_above), keep=40)
        assert cu_seqlens[-1] > 0
        for row, tokens in enumerate(values.split(cu_seqlens.diff().tolist())):
            genes = cells.column_to_gene[cells.indices[cells.indptr[row] : cells.indptr[row + 1]]]
            assert torch.isin(tokens, cells.token_ids[genes[genes >= 0]]).all()
            assert len(tokens.unique()) == len(tokens)


def test_checked_blocks_are_not_compared(device):
    """``is_checked`` only leaves out looking for repeated columns."""
    cells = random_cells(3)
    want, want_ends = cells.reference(keep=64)
    values, cu_seqlens, _ = launched(cells.on(device), small_plan(), keep=64, is_checked=True)
    assert torch.equal(values, want)
    assert torch.equal(cu_seqlens, want_ends)
