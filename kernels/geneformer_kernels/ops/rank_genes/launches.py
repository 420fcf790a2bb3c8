"""The launches of ranking on a GPU. None of them waits for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from geneformer_kernels.on_device import launching_on
from geneformer_kernels.ops.rank_genes.plan import (
    COUNT_DTYPES,
    IS_OPEN,
    N_BUCKETS,
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
        False where it is known that no gene has several columns, which saves memory, code and a kernel.
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
    from geneformer_kernels.ops.rank_genes import kernel, kernel_hard

    keep = min(keep, 2**31 - 1)  # an int32 in the kernels
    n_cells, n_entries = len(block.n_counts), len(block.indices)
    if n_cells == 0:
        return block.indptr.new_zeros(1), block.indptr.new_zeros(0, dtype=torch.int32)
    n_specials = int(first >= 0) + int(last >= 0)
    with launching_on(block.data):
        # Per entry scores and ranks of hard cells, which are scored last; until then, in the same place, the words of
        # shared genes and the staged tokens.
        bits = torch.empty(n_entries, dtype=torch.int64, device=values.device)
        ranks = torch.empty(n_entries, dtype=torch.int32, device=values.device)
        # Without shared genes nothing is ever written here, and any pointers will do.
        shared_x = torch.empty_like(bits, dtype=torch.float64) if columns.has_shared else columns.weights
        shared_ranks = torch.empty_like(ranks) if columns.has_shared else ranks
        sizes, status = (torch.empty(n_cells, dtype=torch.int32, device=values.device) for _ in range(2))
        counts = dict(
            indptr_ptr=block.indptr, n_counts_ptr=block.n_counts, weights_ptr=columns.weights, bits_ptr=bits,
            shared_x_ptr=shared_x, shared_ranks_ptr=shared_ranks, sizes_ptr=sizes, status_ptr=status,
        )  # fmt: skip
        output = dict(keep=keep, first=first, last=last, capacity=values.numel())
        is_padded = values.dim() == 2
        staged = {} if is_padded else dict(first=-1, last=-1, capacity=n_entries)
        _rank_rows(
            plan, block, columns, _in_buckets(plan, counts, n_entries, is_hard=False), counts,
            dict(out_ptr=values if is_padded else ranks, padded_length=values.shape[1] if is_padded else 0)
            | output | staged,
        )  # fmt: skip
        hard = _in_buckets(plan, counts, n_entries, is_hard=True)
        _score(plan, block, columns, hard, counts | dict(ranks_ptr=ranks))
        if not is_checked:
            tile = dict(zip(("BLOCK_I", "BLOCK_J"), plan.repeats_tile, strict=True))
            kernel_hard.rank_genes_repeats_kernel[(n_cells,)](
                indptr_ptr=block.indptr, indices_ptr=block.indices, status_ptr=status, **tile, **plan.repeats.options
            )
        lengths = torch.where(sizes > 0, sizes.clamp(max=keep) + n_specials, 0)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        offsets = cu_seqlens
        if is_padded:
            offsets = torch.arange(n_cells, device=values.device) * values.shape[1]
        else:
            kernel.rank_genes_place_kernel[(n_cells,)](
                staged_ptr=ranks, indptr_ptr=block.indptr, sizes_ptr=sizes, offsets_ptr=cu_seqlens, values_ptr=values,
                **output, BLOCK=plan.place_block, **plan.place.options,
            )  # fmt: skip
        cells = dict(
            bits_ptr=bits, ranks_ptr=ranks, indptr_ptr=block.indptr, sizes_ptr=sizes, status_ptr=status,
            offsets_ptr=offsets, values_ptr=values, rank_bits=_rank_bits(columns), **hard, **output,
        )  # fmt: skip
        _settle(plan, cells, columns, n_cells, n_entries)
    return cu_seqlens, status


def _rank_bits(columns: ColumnTables) -> int:
    return max(1, (len(columns.tokens) - 1).bit_length())


def _arithmetic(block: CountBlock, columns: ColumnTables) -> dict[str, bool]:
    return dict(IS_SINGLE=block.is_single, IS_DIVISION=columns.is_division)


def _is_rounded(block: CountBlock) -> bool:
    """Whether sums of counts are rounded to float32, as sums in a matrix of them are."""
    return block.data.dtype in (torch.float16, torch.float32)


def _in_buckets(plan: DevicePlan, counts: dict, n_entries: int, *, is_hard: bool) -> dict[str, torch.Tensor]:
    """The cells by bucket, all or the hard ones, and where each bucket begins; sizes and status of all others."""
    from geneformer_kernels.ops.rank_genes import kernel

    sizes = counts["sizes_ptr"]
    n_cells, n_blocks = len(sizes), -(-len(sizes) // plan.list_block)
    n_in_blocks = torch.empty((n_blocks, N_BUCKETS), dtype=torch.int32, device=sizes.device)
    cells = dict(
        indptr_ptr=counts["indptr_ptr"], status_ptr=counts["status_ptr"], counts_ptr=n_in_blocks, n_cells=n_cells,
        n_entries=n_entries, select_above=plan.select_above, IS_HARD=is_hard, LOG_FIRST=plan.log_first,
        N_SORTS=len(plan.sorts), BLOCK=plan.list_block, **plan.listing.options,
    )  # fmt: skip
    kernel.rank_genes_count_kernel[(n_blocks,)](sizes_ptr=sizes, **cells)
    items = torch.empty_like(sizes)
    bounds = torch.empty(N_BUCKETS, dtype=torch.int32, device=sizes.device)
    kernel.rank_genes_list_kernel[(n_blocks,)](
        items_ptr=items, bounds_ptr=bounds, n_blocks=n_blocks, ROWS=plan.list_rows, **cells
    )
    return {"items_ptr": items, "bounds_ptr": bounds}


def _rank_rows(
    plan: DevicePlan, block: CountBlock, columns: ColumnTables, items: dict, counts: dict, output: dict
) -> None:
    """Tokens, sizes and status of all cells whose rows one sort takes."""
    from geneformer_kernels.ops.rank_genes import kernel

    # No row has more entries than all together: what nothing can come to is neither compiled nor launched.
    too_wide = [False, *(sort.width >= len(block.indices) for sort in plan.sorts)]
    for i_bucket, sort in enumerate(plan.sorts, start=1):
        if too_wide[i_bucket - 1]:
            break
        kernel.rank_genes_cells_kernel[(min(sort.n_programs, len(block.n_counts)),)](
            **counts, **items, **output, indices_ptr=block.indices, data_ptr=block.data, codes_ptr=columns.codes,
            tokens_ptr=columns.tokens, classes_ptr=columns.classes, n_columns=len(columns.codes),
            rank_bits=_rank_bits(columns), i_bucket=i_bucket, **_arithmetic(block, columns),
            IS_ROUNDED=_is_rounded(block), HAS_SHARED=columns.has_shared, **sort.constexprs(sort.rows),
            **sort.rows.options,
        )  # fmt: skip


def _score(plan: DevicePlan, block: CountBlock, columns: ColumnTables, hard: dict, counts: dict) -> None:
    """Scores, ranks, sizes and status of hard cells."""
    from geneformer_kernels.ops.rank_genes import kernel_hard

    n_programs = min(plan.n_score_programs, len(block.n_counts))
    n_shared = torch.empty_like(counts["sizes_ptr"])
    common = dict(**counts, **hard, n_shared_ptr=n_shared, last_bucket=len(plan.sorts) + 1)
    kernel_hard.rank_genes_score_kernel[(n_programs,)](
        **common, indices_ptr=block.indices, data_ptr=block.data, codes_ptr=columns.codes,
        n_columns=len(columns.codes), **_arithmetic(block, columns), BLOCK=plan.score_block, **plan.score.options,
    )  # fmt: skip
    if columns.has_shared:
        kernel_hard.rank_genes_sum_kernel[(n_programs,)](
            **common, **_arithmetic(block, columns), IS_ROUNDED=_is_rounded(block), BLOCK=plan.sum_block,
            **plan.sum.options,
        )  # fmt: skip


def _settle(plan: DevicePlan, cells: dict, columns: ColumnTables, n_cells: int, n_entries: int) -> None:
    """Tokens of hard cells: wide ones are selected and sorted, and what is open is settled."""
    from geneformer_kernels.ops.rank_genes import kernel_hard

    n_sorts = len(plan.sorts)
    wide = plan.sort_of_selected(cells["keep"])
    unsorted = {name: value for name, value in cells.items() if name != "last"}

    def select(needed: int) -> None:
        kernel_hard.rank_genes_select_kernel[(min(plan.n_select_programs, n_cells),)](
            **unsorted, i_bucket=n_sorts + 1, needed=needed, WIDTH=wide.width, BLOCK=plan.select_block,
            **plan.select.options,
        )  # fmt: skip

    if n_entries > plan.select_above:
        select(0)
        kernel_hard.rank_genes_sort_kernel[(min(wide.n_programs, n_cells),)](
            **cells, tokens_ptr=columns.tokens, classes_ptr=columns.classes, i_bucket=n_sorts + 1,
            **wide.constexprs(wide.scored), **wide.scored.options,
        )  # fmt: skip
        select(IS_OPEN)
    small = plan.settle_small
    again = [(plan.sorts[small], 1, small + 1)]
    if n_entries > plan.sorts[small].width:
        again.append((plan.sorts[-1], small + 2, n_sorts))
    if n_entries > plan.select_above:
        again.append((wide, n_sorts + 1, n_sorts + 1))
    for sort, first_bucket, last_bucket in again:
        kernel_hard.rank_genes_settle_kernel[(min(sort.n_programs, n_cells),)](
            **unsorted, tokens_ptr=columns.tokens, first_bucket=first_bucket, last_bucket=last_bucket,
            is_selected=int(first_bucket > n_sorts), **sort.constexprs(sort.settled), **sort.settled.options,
        )  # fmt: skip
