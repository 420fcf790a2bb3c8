"""Genes that several columns share, ranked on a GPU: their sums are those that the compiled loop makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cells_to_rank import Cells, assert_same, assert_same_padded, csr_cells, launched, random_cells, small_plan
from geneformer_kernels.ops.rank_genes import device as on_device
from geneformer_kernels.ops.rank_genes.plan import IS_OPEN


@pytest.mark.parametrize("select_above", [16, 64])
@pytest.mark.parametrize("n_medians", [1, 60])
def test_shared_genes_of_a_cell(device, poisoned, n_medians, select_above):
    """Pairs, triples and a gene of five columns in one cell, far apart and in rows of any order, among other genes."""
    rng = np.random.default_rng(n_medians)
    column_to_gene = np.arange(64)
    column_to_gene[[3, 60]] = 3
    column_to_gene[[5, 6, 40]] = 5
    column_to_gene[[0, 63]] = 0
    column_to_gene[[10, 20, 30, 50, 55]] = 10
    column_to_gene[[21, 22]] = -1
    dense = rng.integers(0, 9, (4, 64)).astype("float32")
    dense[1, [3, 60, 5, 6, 40]] = 7  # all of them there
    dense[2, [60, 6, 40]] = 0  # one column of a gene of several
    dense[3] = 0
    dense[3, [5, 6, 40]] = 2  # nothing else in the cell
    medians = np.ones(64) if n_medians == 1 else rng.lognormal(0, 1, 64)
    plan = small_plan(select_above=select_above)
    for shuffled, keep in ((None, 7), (rng, 64)):
        cells = csr_cells(dense, column_to_gene, rng.permutation(64), medians, rng=shuffled)
        status = assert_same(cells, device, plan, keep=keep, first=99)
    if select_above == 64:
        assert_same_padded(cells, device, plan, keep=20, last=98)
    assert n_medians > 1 or not (status & IS_OPEN).any(), "these were settled where they were scored"


@pytest.mark.parametrize("select_above", [16, 64])
@pytest.mark.parametrize("keep", [9, 64])
def test_open_pairs_of_shared_genes(device, poisoned, keep, select_above):
    """Sums that tie with other genes of other medians, and are added up once more where the cell is settled."""
    rng = np.random.default_rng(keep)
    column_to_gene = np.where(np.arange(64) < 40, np.arange(64), rng.permutation(64) % 20)
    dense = rng.integers(0, 4, (3, 64)).astype("float32")
    dense[1] = 0
    cells = csr_cells(dense, column_to_gene, rng.permutation(40), rng.choice([1.0, 1.5, 2.0, 3.0], 40), rng=rng)
    status = assert_same(cells, device, small_plan(select_above=select_above), keep=keep, first=99)
    assert keep == 9 or ((status & IS_OPEN) != 0)[[0, 2]].all()
    if keep == 9:
        assert_same_padded(cells, device, small_plan(select_above=select_above), keep=keep, last=98)


def _two_sum_tokens(cells: Cells) -> list[list[int]]:
    """Tokens where the sums of shared genes are made as ``host.py`` says: in order of the row, in twice float64."""
    out = []
    for row in range(len(cells.n_counts)):
        sums: dict[int, tuple[float, float]] = {}
        for p in range(int(cells.indptr[row]), int(cells.indptr[row + 1])):
            gene, x = int(cells.column_to_gene[cells.indices[p]]), float(cells.data[p])
            if gene >= 0 and x:
                old, error = sums.get(gene, (0.0, 0.0))
                new = old + x
                part = new - old
                sums[gene] = new, error + ((old - (new - part)) + (x - part))
        genes = np.array(list(sums))
        dtype = "float32" if cells.data.dtype in (torch.float16, torch.float32) else "float64"
        x = np.array([np.float64(total + error).astype(dtype) for total, error in sums.values()])
        n, medians = cells.n_counts[row].numpy(), cells.medians.numpy()[genes]
        score = ((x * (1 / n)) * 10000).astype("float64") * (1 / medians)
        tokens = cells.token_ids.numpy()[genes]
        out.append(tokens[np.lexsort((tokens, -score))].tolist())
    return out


@pytest.mark.parametrize(
    ("dtype", "n_dtype"),
    [("float32", "float32"), ("float32", "float64"), ("float64", "float64"), ("float16", "float32")],
)
@pytest.mark.parametrize("select_above", [16, 64])
def test_sums_of_shared_genes(device, poisoned, dtype, n_dtype, select_above):
    """Genes of eight columns, whose sums differ by a rounding or not at all; more than one block of them."""
    rng = np.random.default_rng(4)
    dense = np.repeat(rng.lognormal(0, 1, (2, 1, 8)), 6, axis=1)  # six genes of the same eight counts
    dense[:, 1, 0] *= 1 + 2.0 ** {"float16": -9, "float32": -22, "float64": -51}[dtype]
    dense[:, 2, 0] *= 1 + 2.0 ** {"float16": -9, "float32": -22, "float64": -51}[dtype]
    dense = np.append(dense.reshape(2, 48), [[1.0, 2.0], [3.0, 0.0]], axis=1)
    column_to_gene = np.append(np.repeat(np.arange(6), 8), [7, 8])
    cells = csr_cells(
        dense.astype(dtype), column_to_gene, rng.permutation(60)[:10], np.ones(10), np.full(2, 7.0, n_dtype), rng=rng
    )
    values, cu_seqlens, _ = launched(cells.on(device), small_plan(select_above=select_above), keep=1000)
    assert [part.tolist() for part in values.split(cu_seqlens.diff().tolist())] == _two_sum_tokens(cells)


def test_sums_outgrow_the_dtype_of_the_counts(device):
    dense = np.full((2, 30), 250, dtype="uint8")
    dense[:, 20:] = 1
    assert_same(csr_cells(dense, np.arange(30) % 7, np.arange(7), np.arange(1.0, 8)), device, small_plan(), keep=9)


def test_more_shared_entries_than_threads(device, poisoned):
    """The first columns of genes stand in every block of shared entries."""
    dense = np.random.default_rng(0).integers(1, 9, (2, 60)).astype("float32")
    assert_same(csr_cells(dense, np.arange(60) // 2, np.arange(30), np.arange(1.0, 31)), device, small_plan(), keep=30)


def test_known_to_share_no_gene(device):
    """Without shared genes preparation says so, and the kernel that sums them is not launched."""
    cells = random_cells(2)
    cells.column_to_gene = torch.where(torch.arange(70) < 60, torch.arange(70), -1)
    columns = on_device.prepare_columns(**cells.genes)
    assert not columns.tables.has_shared
    assert on_device.prepare_columns(**random_cells(2).genes).tables.has_shared
    assert on_device.prepare_columns(**cells.genes, waits=False).tables.has_shared
    assert_same(cells, device, small_plan(), keep=30)
