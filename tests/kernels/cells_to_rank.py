"""Blocks of cells for the Triton kernels that rank genes, plans with small blocks, and both ways to ask for rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from geneformer_kernels import rank_genes
from geneformer_kernels.launch import Launch
from geneformer_kernels.ops.rank_genes import device as on_device
from geneformer_kernels.ops.rank_genes import launches
from geneformer_kernels.ops.rank_genes.plan import DevicePlan, SortPlan

_LAUNCH = Launch(num_warps=1, num_stages=1, enable_fp_fusion=False)


def small_plan(widths=(16, 32, 64), select_above=64, **changes) -> DevicePlan:
    """Blocks so small that cells of some dozens of genes meet every loop and every bucket."""
    sorts = tuple(SortPlan(width, 2, _LAUNCH, _LAUNCH, _LAUNCH) for width in widths)
    plan = DevicePlan(
        sorts, select_above, n_select_programs=2, n_score_programs=2, settle_small=len(sorts) // 2, list_block=2,
        list_rows=2, score_block=32, sum_block=16, select_block=128, place_block=16, repeats_tile=(16, 32),
    )  # fmt: skip
    return dataclasses.replace(plan, **changes)


@dataclasses.dataclass
class Cells:
    """A block of cells and its genes, on the CPU."""

    indptr: torch.Tensor
    indices: torch.Tensor
    data: torch.Tensor
    n_counts: torch.Tensor
    column_to_gene: torch.Tensor
    token_ids: torch.Tensor
    medians: torch.Tensor

    @property
    def block(self) -> tuple[torch.Tensor, ...]:
        return self.indptr, self.indices, self.data, self.n_counts

    @property
    def genes(self) -> dict[str, torch.Tensor]:
        return dict(column_to_gene=self.column_to_gene, token_ids=self.token_ids, medians=self.medians)

    def on(self, device: str) -> Cells:
        return Cells(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))

    def reference(self, **options) -> tuple[torch.Tensor, torch.Tensor]:
        return rank_genes(*self.block, **self.genes, **options, impl="reference")


def csr_cells(dense, column_to_gene, token_ids, medians, n_counts=None, *, rng=None) -> Cells:
    """CSR of a dense matrix; with ``rng`` rows are shuffled and some zeros stored."""
    indptr, indices, data = [0], [], []
    for row in dense:
        columns = np.flatnonzero(row)
        if rng is not None:
            columns = rng.permutation(np.concatenate([columns, rng.permutation(np.flatnonzero(row == 0))[:2]]))
        indices.append(columns)
        data.append(row[columns])
        indptr.append(indptr[-1] + len(columns))
    if n_counts is None:
        n_counts = dense.sum(1).astype("float64") + 1
    arrays = (
        np.array(indptr), np.concatenate(indices).astype("int32"), np.concatenate(data).astype(dense.dtype), n_counts,
        np.asarray(column_to_gene), np.asarray(token_ids), np.asarray(medians, dtype="float64"),
    )  # fmt: skip
    return Cells(*(torch.from_numpy(array) for array in arrays))


def random_cells(seed=0, n_cells=4, n_columns=70, n_genes=60, dtype="float32", density=0.5, n_dtype="float64") -> Cells:
    """Shared genes, dropped columns, shared medians, ratios of small integers, an empty cell, a cell of one gene."""
    rng = np.random.default_rng(seed)
    shape = (n_cells, n_columns)
    dense = rng.poisson(3.0, shape) * (rng.random(shape) < density * rng.uniform(0.1, 2, (n_cells, 1)))
    if np.dtype(dtype).kind == "f":
        dense = dense * rng.choice([1.0, 0.375, 12.75], shape)  # sums in any order are exact
    dense[n_cells // 2] = 0
    dense[-1] = 0
    dense[-1, 3] = 2
    column_to_gene = np.where(rng.random(n_columns) < 0.1, -1, rng.integers(0, n_genes, n_columns))
    column_to_gene[: 3 * n_genes // 4] = np.arange(3 * n_genes // 4)
    medians = np.where(rng.random(n_genes) < 0.5, rng.integers(1, 13, n_genes) / 7, rng.lognormal(0, 2, n_genes))
    token_ids = rng.permutation(3 * n_genes)[:n_genes]
    n_counts = (dense.sum(1) * 1.37 + 1).astype(n_dtype)
    return csr_cells(dense.astype(dtype), column_to_gene, token_ids, medians, n_counts, rng=rng)


def near_ties(seed: int, dtype: str, n_dtype: str, n_cells: int = 2, n_genes: int = 50) -> Cells:
    """Counts that are small multiples of the medians: scores differ by nothing but how each step is rounded."""
    rng = np.random.default_rng(seed)
    units = rng.integers(1, 40, n_genes)
    dense = units * rng.integers(1, 4, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < 0.6)
    n_counts = (dense.sum(1) * 1.37 + 1).astype(n_dtype)
    return csr_cells(dense.astype(dtype), np.arange(n_genes), rng.permutation(n_genes), units / 7, n_counts, rng=rng)


def launched(cells: Cells, plan: DevicePlan, *, keep, first=-1, last=-1, is_division=False, is_checked=False):
    """values, cu_seqlens and status of one run of a plan, with a sentinel behind the values."""
    columns = on_device.prepare_columns(**cells.genes, is_division=is_division)
    n_specials = int(first >= 0) + int(last >= 0)
    capacity = on_device.capacity_of(len(cells.indices), len(cells.n_counts), keep, n_specials)
    buffer = torch.full((capacity + 64,), -77, dtype=torch.int64, device=cells.data.device)
    cu_seqlens, status = launches.launch(
        plan, launches.CountBlock.of(*cells.block), columns.tables, buffer[:capacity],
        keep=keep, first=first, last=last, is_checked=is_checked,
    )  # fmt: skip
    n_tokens = int(cu_seqlens[-1])
    assert (buffer[n_tokens:] == -77).all(), "nothing is written behind the last token"
    return buffer[:n_tokens].cpu(), cu_seqlens.cpu(), status.cpu()


def assert_same(cells: Cells, device: str, plan: DevicePlan, **options) -> torch.Tensor:
    want, want_ends = cells.reference(**options)
    values, cu_seqlens, status = launched(cells.on(device), plan, **options)
    assert torch.equal(cu_seqlens, want_ends)
    assert torch.equal(values, want)
    return status


def assert_same_padded(cells: Cells, device: str, plan: DevicePlan, *, keep, first=-1, last=-1) -> None:
    """Rows of just the length that a cell can have, with a sentinel in and behind them."""
    want, want_ends = cells.reference(keep=keep, first=first, last=last)
    on = cells.on(device)
    n_cells, length = len(cells.n_counts), keep + int(first >= 0) + int(last >= 0)
    buffer = torch.full((n_cells * length + 64,), -77, dtype=torch.int64, device=device)
    columns = on_device.prepare_columns(**on.genes)
    cu_seqlens, _ = launches.launch(
        plan, launches.CountBlock.of(*on.block), columns.tables, buffer[: n_cells * length].view(n_cells, length),
        keep=keep, first=first, last=last, is_checked=False,
    )  # fmt: skip
    assert torch.equal(cu_seqlens.cpu(), want_ends)
    assert (buffer[n_cells * length :] == -77).all()
    rows, parts = buffer.cpu()[: n_cells * length].view(n_cells, length), want.split(want_ends.diff().tolist())
    for row, tokens in zip(rows, parts, strict=True):
        assert torch.equal(row[: len(tokens)], tokens)
        assert (row[len(tokens) :] == -77).all()


def cells_of_lengths(lengths, n_columns, column_to_gene, medians, *, seed=0, dtype="float32") -> Cells:
    """Rows of so many entries each, in ascending columns; counts whose sums are exact in any order."""
    rng = np.random.default_rng(seed)
    dense = np.zeros((len(lengths), n_columns), dtype)
    for row, length in zip(dense, lengths, strict=True):
        row[rng.choice(n_columns, length, replace=False)] = rng.integers(1, 9, length)
    return csr_cells(dense, column_to_gene, rng.permutation(2 * len(medians))[: len(medians)], medians)


BORDERS = (64, 0, 17, 16, 65, 1, 33, 31, 0, 32, 15, 66, 63, 2, 16, 64)
