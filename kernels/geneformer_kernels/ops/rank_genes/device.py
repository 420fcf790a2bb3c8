"""Ranking on a GPU for pipelines: columns are prepared once, and nothing waits for the device until one asks it to.

Buffers are sized by what is known on the host: the tokens of all cells together are at most
``min(nnz, B * keep) + B * specials``. How many there are stands in ``cu_seqlens[-1]``, on the device, like the problems
that were found; :func:`wait` reads both back at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from geneformer_kernels.arguments import WRONG_COUNTS, has_wrong_counts
from geneformer_kernels.on_device import target_for
from geneformer_kernels.operators import operator
from geneformer_kernels.ops.rank_genes.columns import RepeatedColumnError
from geneformer_kernels.ops.rank_genes.launches import ColumnTables, CountBlock, launch
from geneformer_kernels.ops.rank_genes.plan import (
    MAX_RANK_BITS,
    REPEATED_COLUMN,
    WRONG_COLUMN,
    WRONG_INDPTR,
    WRONG_TOTAL,
    device_plan,
)

_COLUMN_PROBLEMS = (
    "",
    "medians must be positive finite numbers",
    "token ids must be unique, not negative and less than 2**31",
    "column_to_gene names a gene that is not there",
)


class DeviceColumns(NamedTuple):
    """The columns of a matrix as ranking needs them; made by :func:`prepare_columns`, once per matrix.

    Attributes
    ----------
    tables
        What the kernels look up.
    problem
        [] int64 on the device: 0, or which of the arguments cannot be used.
    """

    tables: ColumnTables
    problem: torch.Tensor


class RankedCells(NamedTuple):
    """What the launches leave on the device.

    Attributes
    ----------
    values
        int64: the tokens of all cells, packed, then room that was not needed and holds anything; or with
        ``padded_length`` the rows [B, padded_length].
    cu_seqlens
        [B + 1] int64: where each cell begins when packed.
    status
        [B] int32: what was found wrong with each cell, for :func:`wait`.
    """

    values: torch.Tensor
    cu_seqlens: torch.Tensor
    status: torch.Tensor


def prepare_columns(
    column_to_gene: torch.Tensor,
    token_ids: torch.Tensor,
    medians: torch.Tensor,
    *,
    is_division: bool = False,
    waits: bool = True,
) -> DeviceColumns:
    """Tabulate per column what ranking looks up, on the device of ``column_to_gene``.

    Parameters
    ----------
    column_to_gene, token_ids, medians
        [G], [n] and [n], as for :func:`geneformer_kernels.rank_genes`.
    is_division
        Whether scores will be quotients.
    waits
        True reads back whether the arguments make sense, and whether any gene has several columns. False leaves both
        open: :func:`wait` raises later, and room is made for genes that several columns share.

    Raises
    ------
    ValueError
        More than 262,144 genes; and with ``waits`` what :func:`wait` raises for columns.
    """
    n_genes = len(token_ids)
    if n_genes > 1 << MAX_RANK_BITS:
        raise ValueError(f"ranking on a GPU knows at most {1 << MAX_RANK_BITS} genes, not {n_genes}: impl='reference'")
    if n_genes == 0:  # tables of one entry that no column points at
        token_ids, medians = token_ids.new_zeros(1), medians.new_ones(1)
    medians = medians.double()
    tokens, order = torch.sort(token_ids.to(torch.int64))
    rank_of_gene = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    gene = column_to_gene.to(torch.int64)
    is_kept = gene >= 0
    is_there = (gene >= -1) & (gene < n_genes)
    gene = torch.where(is_kept & is_there, gene, 0)
    n_columns = torch.zeros_like(order).index_add_(0, gene, (is_kept & is_there).to(torch.int64))
    rank = rank_of_gene[gene]
    codes = torch.where(is_kept, torch.where(n_columns[gene] > 1, -2 - rank, rank), -1)
    wrong = (
        ~((medians > 0) & (medians < torch.inf)).all(),
        (tokens[0] < 0) | (tokens[1:] == tokens[:-1]).any() | (tokens[-1] >= 2**31),
        ~is_there.all(),
    )
    problem = torch.zeros((), dtype=torch.int64, device=order.device)
    for number in (3, 2, 1):
        problem = torch.where(wrong[number - 1], number, problem)
    weights = medians[order] if is_division else 1.0 / medians[order]
    ascending, by_weight = torch.sort(weights)
    steps = torch.nn.functional.pad((ascending[1:] != ascending[:-1]).to(torch.int32), (1, 0))
    classes = torch.empty_like(steps).scatter_(0, by_weight, steps.cumsum(0, dtype=torch.int32))
    tables = ColumnTables(codes.to(torch.int32), tokens.to(torch.int32), weights, classes, is_division, has_shared=True)
    if not waits:
        return DeviceColumns(tables, problem)
    number, n_most = torch.stack([problem, n_columns.amax()]).tolist()
    if number:
        raise ValueError(_COLUMN_PROBLEMS[number])
    return DeviceColumns(tables._replace(has_shared=n_most > 1), problem)


def rank_cells(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    data: torch.Tensor,
    n_counts: torch.Tensor,
    columns: DeviceColumns,
    *,
    keep: int,
    first: int = -1,
    last: int = -1,
    padded_length: int | None = None,
    pad_id: int = 0,
    is_checked: bool = False,
) -> RankedCells:
    """:func:`geneformer_kernels.rank_genes` for pipelines: never waits for the device, and can be captured in a graph.

    Takes the same block of cells and what :func:`prepare_columns` made of the columns. ``is_checked``: the caller has
    made sure that no row names a column twice, which is then not looked for; in rows whose columns ascend that costs
    nothing anyway. Counts must be finite and not negative, which only :func:`wait` can look at. Call :func:`wait` to
    learn how many tokens there are, and to have errors raised; without it, cells that the status calls wrong hold
    tokens that mean nothing.
    """
    block = (indptr, indices, data, n_counts)
    return RankedCells(*rank_genes_fwd(*block, *columns.tables, keep, first, last, padded_length, pad_id, is_checked))


def wait(ranked: RankedCells, columns: DeviceColumns, n_counts: torch.Tensor, data: torch.Tensor | None = None) -> int:
    """How many tokens all cells have together; waits for the device once, also to look at ``data`` if it is given.

    Raises
    ------
    RepeatedColumnError
        A row names a column twice.
    ValueError
        The block was no CSR matrix over the prepared columns, a cell with something to rank had no positive finite
        n_counts, the columns, prepared without waiting, were wrong, or a count was negative, NaN or infinite.
    """
    bad = ranked.status & (WRONG_INDPTR | WRONG_COLUMN | REPEATED_COLUMN)
    # The kernels look at the totals of all rows with entries, but if these are all dropped there is nothing to divide.
    bad |= torch.where(ranked.cu_seqlens.diff() > 0, ranked.status & WRONG_TOTAL, 0)
    is_wrong = torch.zeros_like(columns.problem) if data is None else has_wrong_counts(data)
    found = [columns.problem, is_wrong, ranked.cu_seqlens[-1]]
    if len(bad):
        row = torch.where(bad != 0, torch.arange(len(bad), device=bad.device), len(bad) - 1).amin()
        found += [bad.gather(0, row[None]).squeeze(0), row]  # bad[row] would wait
    number, has_wrong, n_tokens, *first_bad = torch.stack([value.to(torch.int64) for value in found]).tolist()
    if number:
        raise ValueError(_COLUMN_PROBLEMS[number])
    if has_wrong:
        raise ValueError(WRONG_COUNTS.format("data"))
    if not first_bad or not first_bad[0]:
        return n_tokens
    kind, row = first_bad
    if kind & WRONG_INDPTR:
        raise ValueError(f"row {row}: indptr does not fit")
    if kind & WRONG_COLUMN:
        raise ValueError(f"row {row}: a column index is out of range")
    if kind & REPEATED_COLUMN:
        raise RepeatedColumnError(f"row {row} names a column twice")
    raise ValueError(f"row {row} has entries but n_counts {n_counts[row].item()}")


def capacity_of(n_entries: int, n_cells: int, keep: int, n_specials: int) -> int:
    """Most tokens that a block of cells can have."""
    return torch.sym_min(n_entries, n_cells * keep) + n_cells * n_specials


@operator("rank_genes_fwd")
def rank_genes_fwd(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    data: torch.Tensor,
    n_counts: torch.Tensor,
    codes: torch.Tensor,
    tokens: torch.Tensor,
    weights: torch.Tensor,
    classes: torch.Tensor,
    is_division: bool,
    has_shared: bool,
    keep: int,
    first: int,
    last: int,
    padded_length: int | None,
    pad_id: int,
    is_checked: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """values, cu_seqlens and status of :class:`RankedCells`."""
    tables = ColumnTables(codes, tokens, weights, classes, is_division, has_shared)
    n_specials = int(first >= 0) + int(last >= 0)
    n_cells = len(n_counts)
    if padded_length is None:
        capacity = capacity_of(len(indices), n_cells, keep, n_specials)
        values = torch.empty(capacity, dtype=torch.int64, device=data.device)
    else:
        values = data.new_full((n_cells, padded_length), pad_id, dtype=torch.int64)
    block = CountBlock.of(indptr, indices, data, n_counts)
    cu_seqlens, status = launch(
        device_plan(target_for(data)), block, tables, values, keep=keep, first=first, last=last, is_checked=is_checked
    )
    return values, cu_seqlens, status


@rank_genes_fwd.register_fake
def _(
    indptr, indices, data, n_counts, codes, tokens, weights, classes, is_division, has_shared, keep, first, last,
    padded_length, pad_id, is_checked,
):  # fmt: skip
    n_cells = n_counts.shape[0]
    n_specials = int(first >= 0) + int(last >= 0)
    size: object = (n_cells, padded_length)
    if padded_length is None:
        size = (capacity_of(indices.shape[0], n_cells, keep, n_specials),)
    values = data.new_empty(size, dtype=torch.int64)
    cu_seqlens = data.new_empty((n_cells + 1,), dtype=torch.int64)
    return values, cu_seqlens, data.new_empty((n_cells,), dtype=torch.int32)
