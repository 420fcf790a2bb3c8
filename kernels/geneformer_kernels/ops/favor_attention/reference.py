"""What linear attention by random features means."""

from __future__ import annotations

import itertools

import torch


def favor_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    projection: torch.Tensor,
    cu_seqlens: torch.Tensor,
    stabiliser: str = "cell",
    eps: float = 1e-4,
) -> torch.Tensor:
    """``phi(q) (phi(k).T v) / (phi(q) sum(phi(k)))`` within each cell and head; q, k, v [T, H, D] -> [T, H, D].

    ``phi(x) = (exp(w x - |x|^2 / 2 - largest) + eps) / sqrt(m)`` with m features w, the rows of ``projection`` [m, D],
    and x scaled by ``D^(-1/4)``. ``largest`` is of w x: for a query of its own features, for keys of all features,
    tokens and heads of the cell (``"cell"``) or of all cells (``"batch"``).
    """
    out = torch.zeros_like(q)
    scale, weight = q.shape[-1] ** -0.25, projection.to(q.dtype)
    shared = (k * scale @ weight.T).amax() if stabiliser == "batch" and len(k) else None
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        if start == stop:
            continue
        queries, keys, values = (x[start:stop].transpose(0, 1) for x in (q * scale, k * scale, v))
        of_queries, of_keys = queries @ weight.T, keys @ weight.T  # [H, L, m]
        phi_q = _features(of_queries, queries, of_queries.amax(-1, keepdim=True), eps)
        phi_k = _features(of_keys, keys, of_keys.amax() if shared is None else shared, eps)
        total = phi_q @ phi_k.sum(1)[..., None]  # [H, L, 1]
        out[start:stop] = (phi_q @ (phi_k.transpose(1, 2) @ values) / total).transpose(0, 1)
    return out


def _features(projected: torch.Tensor, rows: torch.Tensor, largest: torch.Tensor, eps: float) -> torch.Tensor:
    half_norm = rows.square().sum(-1, keepdim=True) / 2
    return (torch.exp(projected - half_norm - largest) + eps) * projected.shape[-1] ** -0.5
