"""Attention over packed cells: the public function."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from geneformer_kernels.dispatch import Impl, choose
from geneformer_kernels.ops.varlen_attention import reference
from geneformer_kernels.ops.varlen_attention.plan import plan
from geneformer_kernels.target import target_of


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    scale: float | None = None,
    dropout_p: float = 0.0,
    impl: Impl | str | None = None,
) -> torch.Tensor:
    """``softmax(q @ k.T * scale) @ v`` within each cell and head, with no padding.

    Parameters
    ----------
    q, k, v
        [T, H, D] each, float16, bfloat16, float32 or float64, of one dtype and device; may be strided views of a fused
        projection.
    cu_seqlens
        [B + 1] integers, cumulative cell lengths, starting at 0 and ending at T. Empty cells are allowed.
    scale
        Factor on the scores; None is ``1 / sqrt(D)``.
    dropout_p
        Probability of dropping an attention weight (training only).
    impl
        ``"torch"`` or ``"reference"``; None chooses. The reference ignores no argument but has no dropout.

    Returns
    -------
    torch.Tensor
        [T, H, D] in the dtype of ``q``; a token attends to every token of its own cell and to none of another.

    Raises
    ------
    ValueError
        Shapes, dtypes or ``cu_seqlens`` do not fit together.
    ImplUnavailableError
        An implementation asked for by name cannot run here.

    References
    ----------
    Vaswani et al., "Attention is all you need", arXiv:1706.03762; Dao et al., "FlashAttention", arXiv:2205.14135
    (packing by cumulative lengths).
    """
    if q.ndim != 3 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(f"q, k and v must be [T, H, D] of one shape, not {[*q.shape]}, {[*k.shape]}, {[*v.shape]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != q.shape[0]:
        raise ValueError(
            f"cu_seqlens must run from 0 to {q.shape[0]} (the tokens in q), not {bounds[:1]}..{bounds[-1:]}"
        )
    if any(start > stop for start, stop in itertools.pairwise(bounds)):
        raise ValueError("cu_seqlens must not decrease")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype, target = str(q.dtype).removeprefix("torch."), target_of(q.device)
    choice = choose("varlen_attention", dtype, target, impl)
    if choice.impl == Impl.REFERENCE:
        if dropout_p:
            raise ValueError("the reference of varlen_attention has no dropout")
        return reference.varlen_attention(q, k, v, cu_seqlens, scale)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    route = plan(dtype, target, is_inference=not needs_grad and dropout_p == 0)
    if route.route == "blocked":
        # Compiled by numba, which a machine that computes on a card may lack.
        from geneformer_kernels.ops.varlen_attention.host import varlen_attention_blocked

        return varlen_attention_blocked(q, k, v, bounds, scale, route.block_rows)
    return _sdpa_per_cell(q, k, v, bounds, scale, dropout_p)


def _sdpa_per_cell(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int], scale: float, dropout_p: float
) -> torch.Tensor:
    def attend(cell_q: torch.Tensor, cell_k: torch.Tensor, cell_v: torch.Tensor) -> torch.Tensor:
        if not len(cell_q):
            return cell_q
        cell_q, cell_k, cell_v = (x.transpose(0, 1).unsqueeze(0) for x in (cell_q, cell_k, cell_v))
        out = F.scaled_dot_product_attention(cell_q, cell_k, cell_v, dropout_p=dropout_p, scale=scale)
        return out.squeeze(0).transpose(0, 1)

    # Split, not sliced: the backward of a slice fills a gradient of all tokens, once per cell.
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    cells = [attend(*cell) for cell in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)]
    return torch.cat(cells) if cells else torch.zeros_like(q)
