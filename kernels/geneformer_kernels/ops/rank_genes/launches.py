"""The launches of ranking on a GPU. None of them waits for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from geneformer_kernels.on_device import launching_on
from geneformer_kernels.ops.rank_genes.plan import (
    COUNT_DTYPES,
    IS_OPEN,
    NARROW_COUNTS,
    WIDENED_COUNTS,
    DevicePlan,
)


class ColumnTables(NamedTuple):
    """What the kernels look up for the columns of a matrix.

    Attributes
    ----------
    codes
        [G] int32: rank of the column's gene in order of token id; -1 drops the column; ``-2 - rank`` where several
        columns share the gene.
    tokens, weights
        [n] int32 token ids, ascending, and float64 medians (or their reciprocals) in that order.
    classes
        [n] int32 in that order, equal for genes whose weights are equal.
    is_division
        Whether scores are quotients; see :func:`geneformer_kernels.rank_genes`.
    has_shared
        False where it is known that no gene has several columns, which saves memory and a kernel.
    """

    codes: torch.Tensor
    tokens: torch.Tensor
    weights: torch.Tensor
    classes: torch.Tensor
    is_division: bool
    has_shared: bool


class CountBlock(NamedTuple):
    """A CSR block in the dtypes the kernels load."""

    indptr: torch.Tensor
    indices: torch.Tensor
    data: torch.Tensor
    n_counts: torch.Tensor
    is_single: bool

    @staticmethod
    def of(indptr: torch.Tensor, indices: torch.Tensor, data: torch.Tensor, n_counts: torch.Tensor) -> CountBlock:
        name = str(data.dtype).removeprefix("torch.")
        is_single = n_counts.dtype == torch.float32 and name in NARROW_COUNTS
        if name not in COUNT_DTYPES:
            data = data.to(getattr(torch, WIDENED_COUNTS[name]))
        if indices.dtype not in (torch.int32, torch.int64):
            indices = indices.to(torch.int64)
        if n_counts.dtype != torch.float32:
            n_counts = n_counts.double()
        indptr = indptr.to(torch.int64).contiguous()
        return CountBlock(indptr, indices.contiguous(), data.contiguous(), n_counts.contiguous(), is_single)


def launch(
    plan: DevicePlan,
    block: CountBlock,
    columns: ColumnTables,
    values: torch.Tensor,
    *,
    keep: int,
    first: int,
    last: int,
    is_checked: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernels of a plan, which write to ``values`` ([capacity], or [B, padded_length]); cu_seqlens, status."""
    keep = min(keep, 2**31 - 1)  # an int32 in the kernels
    n_cells = len(block.n_counts)
    if n_cells == 0:
        return block.indptr.new_zeros(1), block.indptr.new_zeros(0, dtype=torch.int32)
    n_specials = int(first >= 0) + int(last >= 0)
    with launching_on(block.data):
        bits, ranks, sizes, status = _score(plan, block, columns, is_checked)
        lengths = torch.where(sizes > 0, sizes.clamp(max=keep) + n_specials, 0)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        offsets = cu_seqlens
        if values.dim() == 2:
            offsets = torch.arange(n_cells, device=values.device) * values.shape[1]
        cells = dict(
            bits_ptr=bits, ranks_ptr=ranks, indptr_ptr=block.indptr, sizes_ptr=sizes, offsets_ptr=offsets,
            values_ptr=values, keep=keep, first=first, capacity=values.numel(),
            rank_bits=max(1, (len(columns.tokens) - 1).bit_length()),
        )  # fmt: skip
        _sort(plan, cells, columns, _buckets(plan, sizes), status, last)
    return cu_seqlens, status


def _score(plan: DevicePlan, block: CountBlock, columns: ColumnTables, is_checked: bool) -> tuple[torch.Tensor, ...]:
    """bits and ranks of the scored entries [nnz], how many of them each cell has, and its status [B]."""
    from geneformer_kernels.ops.rank_genes import kernel

    n_cells, n_entries = len(block.n_counts), len(block.indices)
    bits = torch.empty(n_entries, dtype=torch.int64, device=block.data.device)
    ranks = torch.empty_like(bits, dtype=torch.int32)
    # Without shared genes nothing is ever written here, and any pointers will do.
    shared_x = torch.empty_like(bits, dtype=torch.float64) if columns.has_shared else columns.weights
    shared_ranks = torch.empty_like(ranks) if columns.has_shared else ranks
    sizes, n_shared, status = (torch.empty(n_cells, dtype=torch.int32, device=bits.device) for _ in range(3))
    shared = dict(shared_x_ptr=shared_x, shared_ranks_ptr=shared_ranks, n_shared_ptr=n_shared)
    scored = dict(bits_ptr=bits, ranks_ptr=ranks, sizes_ptr=sizes, status_ptr=status)
    of_cells = dict(indptr_ptr=block.indptr, n_counts_ptr=block.n_counts, weights_ptr=columns.weights)
    arithmetic = dict(IS_SINGLE=block.is_single, IS_DIVISION=columns.is_division)
    kernel.rank_genes_score_kernel[(n_cells,)](
        **of_cells, indices_ptr=block.indices, data_ptr=block.data, codes_ptr=columns.codes, **scored, **shared,
        n_entries=n_entries, n_columns=len(columns.codes), **arithmetic, BLOCK=plan.score_block, **plan.score.options,
    )  # fmt: skip
    if columns.has_shared:
        is_rounded = block.data.dtype in (torch.float16, torch.float32)
        kernel.rank_genes_sum_kernel[(n_cells,)](
            **of_cells, **scored, **shared, **arithmetic, IS_ROUNDED=is_rounded, BLOCK=plan.sum_block,
            **plan.sum.options,
        )  # fmt: skip
    if not is_checked:
        tile = dict(zip(("BLOCK_I", "BLOCK_J"), plan.repeats_tile, strict=True))
        kernel.rank_genes_repeats_kernel[(n_cells,)](
            indptr_ptr=block.indptr, indices_ptr=block.indices, status_ptr=status, **tile, **plan.repeats.options
        )
    return bits, ranks, sizes, status


def _buckets(plan: DevicePlan, sizes: torch.Tensor) -> torch.Tensor:
    """[B] int32: 0 for an empty cell, from 1 on the sort a cell fits in, and after the last those to select first."""
    doublings = torch.frexp(((sizes - 1) // plan.sorts[0].width).float()).exponent
    buckets = torch.where(sizes > 0, doublings + 1, 0)
    return torch.where(sizes > plan.select_above, len(plan.sorts) + 1, buckets)


def _in_buckets(buckets: torch.Tensor, n_sorts: int) -> dict[str, torch.Tensor]:
    """The cells in order of bucket, and where in that order each bucket begins and the last one ends."""
    in_order, items = torch.sort(buckets, stable=True)
    numbers = torch.arange(n_sorts + 3, dtype=torch.int32, device=buckets.device)
    return {"items_ptr": items, "bounds_ptr": torch.searchsorted(in_order, numbers)}


def _sort(
    plan: DevicePlan, cells: dict, columns: ColumnTables, buckets: torch.Tensor, status: torch.Tensor, last: int
) -> None:
    """Tokens of all cells: wide ones are selected, every bucket is sorted, and what is open is settled."""
    from geneformer_kernels.ops.rank_genes import kernel

    n_cells, n_sorts = len(buckets), len(plan.sorts)
    wide = plan.sort_of_selected(cells["keep"])

    def select(items: dict[str, torch.Tensor]) -> None:
        kernel.rank_genes_select_kernel[(min(plan.n_select_programs, n_cells),)](
            **cells, **items, i_bucket=n_sorts + 1, WIDTH=wide.width, BLOCK=plan.select_block, **plan.select.options
        )

    items = _in_buckets(buckets, n_sorts)
    select(items)
    for i_bucket, sort in enumerate((*plan.sorts, wide), start=1):
        kernel.rank_genes_sort_kernel[(min(sort.n_programs, n_cells),)](
            **cells, **items, status_ptr=status, tokens_ptr=columns.tokens, classes_ptr=columns.classes, last=last,
            i_bucket=i_bucket, is_selected=int(i_bucket > n_sorts), **sort.constexprs, **sort.launch.options,
        )  # fmt: skip

    open_items = _in_buckets(torch.where((status & IS_OPEN) != 0, buckets, 0), n_sorts)
    select(open_items)
    small = plan.settle_small
    again = ((plan.sorts[small], 1, small + 1), (plan.sorts[-1], small + 2, n_sorts), (wide, n_sorts + 1, n_sorts + 1))
    for sort, first_bucket, last_bucket in again:
        kernel.rank_genes_settle_kernel[(min(sort.n_programs, n_cells),)](
            **cells, **open_items, tokens_ptr=columns.tokens, first_bucket=first_bucket, last_bucket=last_bucket,
            is_selected=int(first_bucket > n_sorts), **sort.constexprs, **sort.settle_launch.options,
        )  # fmt: skip
