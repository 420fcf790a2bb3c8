"""Counts to ranked token ids: the public function."""

from __future__ import annotations

import torch

from geneformer_kernels.dispatch import Impl, choose
from geneformer_kernels.ops.rank_genes import reference
from geneformer_kernels.target import target_of


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
    impl: Impl | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per cell ``token_ids[argsort(-(x / n_counts * 10000 / medians))][:keep]`` over the genes that are not zero.

    Parameters
    ----------
    indptr, indices, data
        [B + 1], [nnz] and [nnz]: the counts of B cells as CSR; finite, not negative, of any real dtype.
    n_counts
        [B] total counts per cell, positive where the cell has entries. With float32 n_counts and float32 (or 8- and
        16-bit integer) counts the first two steps of the score round to float32, as they do in numpy; otherwise
        everything is float64.
    column_to_gene
        [G] integers: index of each column's gene in ``token_ids`` and ``medians``, -1 for columns to leave out. Columns
        of one gene are summed.
    token_ids, medians
        [n] token id and float64 corpus median of each gene.
    keep
        Most genes to keep per cell.
    first, last
        Token ids around the genes of every cell; -1 for none.
    is_division
        False multiplies by reciprocals, ``x * (1 / n) * 10000 * (1 / median)``, as scipy does for a sparse matrix; True
        divides, as numpy does for a dense one. The two differ by rounding, which can exchange neighbours.
    impl
        ``"numba"`` (CPU) or ``"reference"``; None chooses.

    Returns
    -------
    values
        [T] int64 token ids of all cells, packed; equal scores in order of token id.
    cu_seqlens
        [B + 1] int64, where each cell begins and ends in ``values``. A cell without entries has no tokens.

    Raises
    ------
    ValueError
        Shapes do not fit, a column is named twice in a row, a median is not positive, or token ids repeat.
    ImplUnavailableError
        An implementation asked for by name cannot run here.

    References
    ----------
    Theodoris et al., "Transfer learning enables predictions in network biology", Nature 618 (2023), rank encoding.
    """
    if len(indices) != len(data) or len(indptr) != len(n_counts) + 1 or len(token_ids) != len(medians):
        raise ValueError(
            f"indices [{len(indices)}] and data [{len(data)}], indptr [{len(indptr)}] and n_counts [{len(n_counts)}]"
            f" + 1, token_ids [{len(token_ids)}] and medians [{len(medians)}] must fit together"
        )
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    choice = choose("rank_genes", "float64", target_of(data.device), impl)
    if choice.impl == Impl.REFERENCE:
        values, lengths = reference.rank_genes(
            indptr, indices, data, n_counts, column_to_gene, token_ids, medians, is_division, keep, first, last
        )
    else:
        from geneformer_kernels.ops.rank_genes.host import prepare_columns, rank_block

        columns = prepare_columns(column_to_gene.numpy(), token_ids.numpy(), medians.numpy())
        packed, counted = rank_block(
            indptr.numpy(), indices.numpy(), data.numpy(), n_counts.numpy(), columns,
            is_division=is_division, keep=keep, first=first, last=last, out_dtype="int64",
        )  # fmt: skip
        values, lengths = torch.from_numpy(packed), torch.from_numpy(counted)
    return values, torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
