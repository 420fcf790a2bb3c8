"""Attention on the CPU by blocks of query rows: oneDNN's bfloat16 products around a softmax."""

from __future__ import annotations

import itertools

import torch


def varlen_attention_blocked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int], scale: float, block_rows: int
) -> torch.Tensor:
    """Attention per cell for bfloat16 q, k, v [T, H, D] without gradients; scores live for one block of rows at a time.

    Keys are centred per cell and head first. That adds the same number to all scores of a row, which the softmax does
    not see, and it keeps scores small so that rounding them to bfloat16 costs less (Zhang et al., SageAttention,
    arXiv:2410.02367, smooth keys for the same reason before rounding to int8).
    """
    n_tokens, n_heads, head_dim = q.shape
    out = q.new_empty(n_tokens, n_heads, head_dim)
    longest = max((stop - start for start, stop in itertools.pairwise(bounds)), default=0)
    rows = min(block_rows, longest)
    scores_buffer = q.new_empty(n_heads * rows * longest)
    weights_buffer = torch.empty_like(scores_buffer)
    for start, stop in itertools.pairwise(bounds):
        length = stop - start
        keys = k[start:stop].float()
        keys = ((keys - keys.mean(0, keepdim=True)) * scale).to(k.dtype).permute(1, 2, 0)
        values = v[start:stop].transpose(0, 1)
        for low in range(start, stop, rows):
            high = min(low + rows, stop)
            shape = (n_heads, high - low, length)
            size = n_heads * (high - low) * length
            scores, weights = scores_buffer[:size].view(shape), weights_buffer[:size].view(shape)
            torch.bmm(q[low:high].transpose(0, 1), keys, out=scores)
            torch.softmax(scores, dim=-1, out=weights)
            out[low:high] = torch.bmm(weights, values).transpose(0, 1)
    return out
