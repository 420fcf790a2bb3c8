"""Attention of bfloat16 on the CPU with gradients: ``host_training`` as custom operators, opaque to a compiler."""

from __future__ import annotations

from typing import Any

import torch

from geneformer_kernels.operators import operator


@operator("varlen_attention_blocked")
def attend_blocked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    block_rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [T, H, D], log2 of the softmax's sums [H, T]); ``seed`` None: no dropout."""
    return _attention(q, cu_seqlens, scale, dropout_p, seed, block_rows).forward(q, k, v)


@operator("varlen_attention_blocked_bwd")
def attend_blocked_bwd(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    block_rows: int,
) -> torch.Tensor:
    """[T, 3, H, D], the gradients of q, k and v."""
    return _attention(q, cu_seqlens, scale, dropout_p, seed, block_rows).backward(d_out, q, k, v, out, lse)


def _attention(
    q: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    block_rows: int,
) -> Any:
    # Numba is needed on this branch only.
    from geneformer_kernels.ops.varlen_attention.host_training import Attention

    if seed is None:
        return Attention(q.shape, cu_seqlens.tolist(), scale, block_rows, 0.0, 0)
    return Attention(q.shape, cu_seqlens.tolist(), scale, block_rows, dropout_p, int(seed))


@attend_blocked.register_fake
def _(q, k, v, cu_seqlens, scale, dropout_p, seed, block_rows):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@attend_blocked_bwd.register_fake
def _(d_out, q, k, v, out, lse, cu_seqlens, scale, dropout_p, seed, block_rows):
    return q.new_empty(q.shape[0], 3, *q.shape[1:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.scale, ctx.dropout_p, seed, ctx.block_rows = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, seed)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_out: torch.Tensor, _: Any) -> tuple[Any, ...]:
    *tensors, seed = ctx.saved_tensors
    d_qkv = attend_blocked_bwd(d_out, *tensors, ctx.scale, ctx.dropout_p, seed, ctx.block_rows)
    return *d_qkv.unbind(1), None, None, None, None, None


attend_blocked.register_autograd(_backward, setup_context=_save)
