"""What ranking means."""

from __future__ import annotations

import torch

from geneformer_kernels.ops.rank_genes.columns import RepeatedColumnError

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Counts whose score rounds to float32 at first where n_counts is float32: numpy's rules of promotion.
_NARROW = (*_FLOATS, torch.int8, torch.uint8, torch.int16, torch.uint16, torch.bool)


def rank_genes(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    data: torch.Tensor,
    n_counts: torch.Tensor,
    column_to_gene: torch.Tensor,
    token_ids: torch.Tensor,
    medians: torch.Tensor,
    is_division: bool,
    keep: int,
    first: int,
    last: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row the ``keep`` genes of greatest ``x / n * 10000 / median``, ties by token id; -> values, lengths [B]."""
    n_rows, n_genes = len(indptr) - 1, len(token_ids)
    _check_genes(column_to_gene, token_ids, medians)
    indices, data = _check_rows(indptr, indices, data, len(column_to_gene))
    row = torch.repeat_interleave(torch.arange(n_rows, device=data.device), indptr.diff())
    gene = column_to_gene[indices].long()
    counts = data.int() if data.dtype == torch.uint16 else data  # which CUDA can neither compare nor index
    is_kept = (gene >= 0) & (counts != 0)
    key, sums = _sums(row[is_kept] * n_genes + gene[is_kept], counts[is_kept].double())
    # Sums of float32 are rounded to it; float16 and bfloat16, which only store counts, count as float32.
    x, row, gene = (sums.float() if data.dtype in _FLOATS else sums), key // n_genes, key % n_genes
    if (is_bad := ~((n_counts > 0) & (n_counts < torch.inf))[row]).any():
        wrong = int(row[is_bad][0])
        raise ValueError(f"row {wrong} has entries but n_counts {n_counts[wrong].item()}")

    step = torch.float32 if n_counts.dtype == torch.float32 and data.dtype in _NARROW else torch.float64
    # 1 / n is taken in n's own precision, before the product's.
    n = n_counts if n_counts.dtype == torch.float32 else n_counts.double()
    share = x.to(step) / n.to(step)[row] if is_division else x.to(step) * (1.0 / n).to(step)[row]
    score = (share * 10000).double()
    score = score / medians.double()[gene] if is_division else score * (1.0 / medians.double())[gene]

    # Stable sorts from the least to the most significant criterion.
    order = torch.argsort(token_ids[gene], stable=True)
    order = order[torch.argsort(score[order], descending=True, stable=True)]
    order = order[torch.argsort(row[order], stable=True)]
    cells = torch.bincount(row, minlength=n_rows).tolist()
    ends = [torch.tensor([end] if end >= 0 else [], dtype=torch.int64, device=data.device) for end in (first, last)]
    ranked = [
        torch.cat([ends[0], tokens[:keep].long(), ends[1]]) if len(tokens) else tokens.long()
        for tokens in token_ids[gene[order]].split(cells)
    ]
    lengths = torch.tensor([len(cell) for cell in ranked], dtype=torch.int64, device=data.device)
    return torch.cat(ranked) if ranked else torch.zeros(0, dtype=torch.int64, device=data.device), lengths


def _check_genes(column_to_gene: torch.Tensor, token_ids: torch.Tensor, medians: torch.Tensor) -> None:
    if not ((medians > 0) & (medians < torch.inf)).all():
        raise ValueError("medians must be positive finite numbers")
    if ((token_ids < 0) | (token_ids.long() >= 2**31)).any() or len(token_ids.unique()) != len(token_ids):
        raise ValueError("token ids must be unique, not negative and less than 2**31")
    if ((column_to_gene < -1) | (column_to_gene >= len(token_ids))).any():
        raise ValueError("column_to_gene names a gene that is not there")


def _check_rows(
    indptr: torch.Tensor, indices: torch.Tensor, data: torch.Tensor, n_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The entries that rows have, all of whose columns are there and no two the same."""
    sizes = indptr.diff()
    is_wrong = (sizes < 0) | (indptr[:-1] < 0) | (indptr[1:] > len(indices))
    if is_wrong.any():
        raise ValueError(f"row {is_wrong.nonzero()[0].item()}: indptr does not fit")
    if len(sizes):
        indices, data = (x[indptr[0] : indptr[-1]] for x in (indices.long(), data))
    row = torch.repeat_interleave(torch.arange(len(sizes), device=indices.device), sizes)
    is_out = (indices < 0) | (indices >= n_columns)
    if is_out.any():
        raise ValueError(f"row {row[is_out][0].item()}: a column index is out of range")
    place = (row * n_columns + indices).sort().values
    is_again = place[1:] == place[:-1]
    if is_again.any():
        raise RepeatedColumnError(f"row {place[1:][is_again][0].item() // n_columns} names a column twice")
    return indices, data


def _sums(key: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys there are, ascending, and the sum of each one's counts, in their order and twice float64's precision.

    Knuth's two-sum, the first addend of all sums at once, then the second of those that have one, and so on: the same
    on every device at every run.
    """
    key, order = key.sort(stable=True)
    counts = counts[order]
    key, n_addends = torch.unique_consecutive(key, return_counts=True)
    start = n_addends.cumsum(0) - n_addends
    total, error = torch.zeros(2, len(key), dtype=torch.float64, device=key.device)
    for i_addend in range(int(n_addends.max()) if len(key) else 0):
        chosen = n_addends > i_addend
        before, addend = total[chosen], counts[start[chosen] + i_addend]
        after = before + addend
        part = after - before
        error[chosen] += (before - (after - part)) + (addend - part)
        total[chosen] = after
    return key, total + error
