"""What ranking means."""

from __future__ import annotations

import torch


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
    row = torch.repeat_interleave(torch.arange(n_rows, device=data.device), indptr.diff())
    gene = column_to_gene[indices]
    counts = data.int() if data.dtype == torch.uint16 else data  # which CUDA can neither compare nor index
    is_kept = (gene >= 0) & (counts != 0)
    key, group = torch.unique(row[is_kept] * n_genes + gene[is_kept], return_inverse=True)
    sums = torch.zeros(len(key), dtype=torch.float64, device=data.device)
    sums.index_add_(0, group, counts[is_kept].double())
    # Sums are rounded to the dtype of the counts; float16, which only stores them, counts as float32.
    wide = torch.float32 if data.dtype == torch.float16 else data.dtype
    x, row, gene = (sums.to(wide) if data.is_floating_point() else sums), key // n_genes, key % n_genes

    narrow = (torch.float32, torch.float16, torch.int8, torch.uint8, torch.int16, torch.uint16, torch.bool)
    step = torch.float32 if n_counts.dtype == torch.float32 and data.dtype in narrow else torch.float64
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
