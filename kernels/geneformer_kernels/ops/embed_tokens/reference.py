"""What embedding packed tokens means."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def embed_tokens(
    token_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    token_table: torch.Tensor,
    position_table: torch.Tensor,
    type_row: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    keep: torch.Tensor | None = None,
    keep_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token + type + position, normalised if there is a weight, then dropout by a mask ``keep`` [T, C]."""
    lengths = cu_seqlens.diff().tolist()
    positions = torch.cat([torch.arange(length) for length in lengths] or [torch.arange(0)])
    # Unlike an index, this takes no -1 for the last row.
    total = F.embedding(token_ids.long(), token_table)
    if type_row is not None:
        total = total + type_row
    total = total + position_table[positions.to(total.device)].view(total.shape)
    if weight is not None and bias is not None:
        mean = total.mean(-1, keepdim=True)
        variance = (total - mean).square().mean(-1, keepdim=True)
        total = (total - mean) * torch.rsqrt(variance + eps) * weight + bias
    if keep is not None:
        total = torch.where(keep, total * keep_scale, 0.0)
    return total, total.to(out_dtype)
