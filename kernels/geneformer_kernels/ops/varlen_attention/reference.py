"""What attention over packed cells means."""

from __future__ import annotations

import itertools

import torch


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """``softmax(q @ k.T * scale) @ v`` within each cell and head; q, k, v [T, H, D] -> [T, H, D]."""
    out = torch.zeros_like(q)
    bounds = cu_seqlens.tolist()
    for start, stop in itertools.pairwise(bounds):
        cell_q, cell_k, cell_v = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        weights = torch.softmax(cell_q @ cell_k.transpose(1, 2) * scale, dim=-1)
        out[start:stop] = (weights @ cell_v).transpose(0, 1)
    return out
