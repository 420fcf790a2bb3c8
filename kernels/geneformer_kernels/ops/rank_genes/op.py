"""Counts to ranked token ids: the public function."""

from __future__ import annotations

import torch

from geneformer_kernels.arguments import COUNTS, FLOATS, INTEGERS, check_counts, check_tensor, check_whole
from geneformer_kernels.dispatch import Impl, choose
from geneformer_kernels.ops.rank_genes import reference
from geneformer_kernels.ops.rank_genes.plan import MAX_RANK_BITS
from geneformer_kernels.ranges import ranged
from geneformer_kernels.target import target_of


@ranged("rank_genes")
def rank_genes(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    data: torch.Tensor,
    n_counts: torch.Tensor,
    *,
    column_to_gene: torch.Tensor,
    token_ids: torch.Tensor,
    medians: torch.Tensor,
    keep: int,
    first: int = -1,
    last: int = -1,
    is_division: bool = False,
    padded_length: int | None = None,
    pad_id: int = 0,
    impl: Impl | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per cell ``token_ids[argsort(-(x / n_counts * 10000 / medians))][:keep]`` over the genes that are not zero.

    Every implementation gives the same tokens. On a GPU the call waits for the device once, at its end, for the number
    of tokens and for what is wrong with the arguments; :mod:`geneformer_kernels.ops.rank_genes.device` has the parts
    for pipelines that must not wait, and that prepare their columns once.

    Parameters
    ----------
    indptr, indices, data
        [B + 1], [nnz] and [nnz]: the counts of B cells as CSR; finite, not negative, of any real dtype. Columns of a
        row may be in any order, but on a GPU rows whose columns ascend save looking for repeated ones, which takes the
        square of a row's length. Stored zeros are no entries.
    n_counts
        [B] total counts per cell, positive where a cell has something to rank. With float32 n_counts and float32 (or
        8- and 16-bit integer) counts the first two steps of the score round to float32, as they do in numpy; otherwise
        everything is float64.
    column_to_gene
        [G] integers: index of each column's gene in ``token_ids`` and ``medians``, -1 for columns to leave out. Columns
        of one gene are summed.
    token_ids, medians
        [n] token id and float64 corpus median of each gene. For more than 262,144 of them the reference runs on a GPU.
    keep
        Most genes to keep per cell; any number.
    first, last
        Token ids around the genes of every cell; -1 for none.
    is_division
        False multiplies by reciprocals, ``x * (1 / n) * 10000 * (1 / median)``, as scipy does for a sparse matrix; True
        divides, as numpy does for a dense one. The two differ by rounding, which can exchange neighbours.
    padded_length, pad_id
        Instead of packing, give each cell a row of this many tokens, at least ``keep`` and the specials, and fill what
        is left of it.
    impl
        ``"numba"`` (CPU), ``"triton"`` (GPU) or ``"reference"``; None chooses.

    Returns
    -------
    values
        [T] int64 token ids of all cells, packed, or [B, padded_length]; equal scores in order of token id.
    cu_seqlens
        [B + 1] int64, where each cell begins and ends when packed. A cell without entries has no tokens.

    Raises
    ------
    TypeError
        Something is no tensor, or no integer.
    ValueError
        Shapes, dtypes or devices do not fit, the block is no CSR matrix over the columns, a column is named twice in a
        row, a count is negative or not finite, n_counts or a median is not positive and finite, token ids repeat, or
        ``column_to_gene`` names a gene that is not there.
    ImplUnavailableError
        An implementation asked for by name cannot run here.

    References
    ----------
    Theodoris et al., "Transfer learning enables predictions in network biology", Nature 618 (2023), rank encoding.
    """
    _check(indptr, indices, data, n_counts, column_to_gene, token_ids, medians)
    _check_numbers(keep, first, last, padded_length, pad_id)
    # Ranks have no gradient, whatever they are made of.
    data, n_counts, medians = data.detach(), n_counts.detach(), medians.detach()
    shape = {"keep": keep, "n_expressed": len(indices) // max(len(n_counts), 1)}
    too_many = len(token_ids) > 1 << MAX_RANK_BITS
    cannot = f"ranking on a GPU knows at most {1 << MAX_RANK_BITS:,} genes, not {len(token_ids):,}" if too_many else ""
    choice = choose("rank_genes", "float64", target_of(data.device), impl, shape, cannot)
    if choice.impl == Impl.TRITON:
        from geneformer_kernels.ops.rank_genes import device

        on_device = device.prepare_columns(column_to_gene, token_ids, medians, is_division=is_division, waits=False)
        ranked = device.rank_cells(
            indptr, indices, data, n_counts, on_device, keep=keep, first=first, last=last,
            padded_length=padded_length, pad_id=pad_id,
        )  # fmt: skip
        n_tokens = device.wait(ranked, on_device, n_counts, data)
        return ranked.values[:n_tokens] if padded_length is None else ranked.values, ranked.cu_seqlens
    if choice.impl == Impl.REFERENCE:
        place = "cpu" if data.device.type == "mps" else data.device
        values, lengths = reference.rank_genes(
            indptr.to(place), indices.to(place), data.to(place), n_counts.to(place),
            column_to_gene.to(place), token_ids.to(place), medians.to(place), is_division, keep, first, last,
        )  # fmt: skip
        values, lengths = values.to(data.device), lengths.to(data.device)
    else:
        from geneformer_kernels.ops.rank_genes.host import prepare_columns, rank_block

        columns = prepare_columns(column_to_gene.numpy(), token_ids.numpy(), medians.double().numpy())
        # numpy has no bfloat16. Such counts are ranked as float32 ones, and totals that are not float32 as float64.
        data = data.float() if data.dtype == torch.bfloat16 else data
        n_counts = n_counts.double() if n_counts.dtype == torch.bfloat16 else n_counts
        packed, counted = rank_block(
            indptr.numpy(), indices.numpy(), data.numpy(), n_counts.numpy(), columns,
            is_division=is_division, keep=keep, first=first, last=last, out_dtype="int64",
        )  # fmt: skip
        values, lengths = torch.from_numpy(packed), torch.from_numpy(counted)
    if padded_length is not None:
        is_token = torch.arange(padded_length, device=values.device) < lengths[:, None]
        values = values.new_full((len(lengths), padded_length), pad_id).masked_scatter_(is_token, values)
    return values, torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _check(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    data: torch.Tensor,
    n_counts: torch.Tensor,
    column_to_gene: torch.Tensor,
    token_ids: torch.Tensor,
    medians: torch.Tensor,
) -> None:
    check_tensor("data", data, COUNTS, n_axes=1)
    for name, x, dtypes in (
        ("indptr", indptr, INTEGERS),
        ("indices", indices, INTEGERS),
        ("n_counts", n_counts, (*INTEGERS, *FLOATS)),
        ("column_to_gene", column_to_gene, INTEGERS),
        ("token_ids", token_ids, INTEGERS),
        ("medians", medians, FLOATS),
    ):
        check_tensor(name, x, dtypes, n_axes=1, device=data.device)
    if len(indices) != len(data) or len(indptr) != len(n_counts) + 1 or len(token_ids) != len(medians):
        raise ValueError(
            f"indices [{len(indices)}] and data [{len(data)}], indptr [{len(indptr)}] and n_counts [{len(n_counts)}]"
            f" + 1, token_ids [{len(token_ids)}] and medians [{len(medians)}] must fit together"
        )
    check_counts("data", data)


def _check_numbers(keep: int, first: int, last: int, padded_length: int | None, pad_id: int) -> None:
    check_whole("keep", keep, 1)
    check_whole("first", first, -1, 2**31 - 1)
    check_whole("last", last, -1, 2**31 - 1)
    check_whole("pad_id", pad_id, -(2**63), 2**63 - 1)
    if padded_length is None:
        return
    check_whole("padded_length", padded_length, 0)
    n_most = keep + int(first >= 0) + int(last >= 0)
    if padded_length < n_most:
        raise ValueError(f"padded_length {padded_length} is less than the {n_most} tokens a cell can have")
