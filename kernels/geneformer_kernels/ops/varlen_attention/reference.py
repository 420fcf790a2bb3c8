"""What attention over packed cells means."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    *,
    keep: Sequence[torch.Tensor] | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """``dropout(softmax(q @ k.T * scale)) @ v`` within each cell and head; q, k, v [T, H, D] -> [T, H, D].

    Which weights dropout keeps is handed in, a boolean [H, L, L] for every cell; None keeps all.
    """
    out = torch.zeros_like(q)
    for i_cell, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        weights = _weights(q[start:stop], k[start:stop], scale)
        if keep is not None:
            weights = weights * keep[i_cell] / (1 - dropout_p)
        out[start:stop] = (weights @ v[start:stop].transpose(0, 1)).transpose(0, 1)
    return out


def attention_scores(q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor, scale: float) -> list[torch.Tensor]:
    """``softmax(q @ k.T * scale)`` [H, L, L] of every cell."""
    bounds = cu_seqlens.tolist()
    return [_weights(q[start:stop], k[start:stop], scale) for start, stop in itertools.pairwise(bounds)]


def _weights(cell_q: torch.Tensor, cell_k: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.softmax(cell_q.transpose(0, 1) @ cell_k.permute(1, 2, 0) * scale, dim=-1)
