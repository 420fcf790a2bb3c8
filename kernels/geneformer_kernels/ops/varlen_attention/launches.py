"""The Triton kernels as torch operators with gradients, so that a compiled model runs through them without a break."""

from __future__ import annotations

import math

import torch

from geneformer_kernels.on_device import DTYPE_NAMES, launching_on, target_for
from geneformer_kernels.operators import operator
from geneformer_kernels.ops.varlen_attention.plan import (
    BLOCK_CELLS,
    HEAD_DIM_STEP,
    MAX_HEAD_DIM,
    TILES_LAUNCH,
    AttentionPlan,
    TilePlan,
    constants,
    plan,
)

_LOG2_E = math.log2(math.e)


@operator("varlen_attention_tiles")
def varlen_attention_tiles(cu_seqlens: torch.Tensor, n_tokens: int, block_rows: int) -> torch.Tensor:
    """[n_slots + 1, 4] int32: the number of tiles of ``block_rows`` rows that cells have, then the tiles themselves.

    Made on the device: nobody waits to learn how many there are. There are slots for as many as there can be.
    """
    from geneformer_kernels.ops.varlen_attention import kernel

    n_cells, n_slots = len(cu_seqlens) - 1, _n_slots(cu_seqlens, n_tokens, block_rows)
    if n_cells == 0 or n_tokens == 0:
        return torch.zeros(n_slots + 1, 4, dtype=torch.int32, device=cu_seqlens.device)
    tiles = torch.empty(n_slots + 1, 4, dtype=torch.int32, device=cu_seqlens.device)
    with launching_on(cu_seqlens):
        kernel.varlen_attention_tiles_kernel[(n_cells,)](
            cu_seqlens_ptr=cu_seqlens.contiguous(),
            tiles_ptr=tiles,
            n_cells=n_cells,
            n_tokens=n_tokens,
            n_slots=n_slots,
            BLOCK_ROWS=block_rows,
            BLOCK_CELLS=BLOCK_CELLS,
            **TILES_LAUNCH.options,
        )
    return tiles


@varlen_attention_tiles.register_fake
def _(cu_seqlens, n_tokens, block_rows):
    return cu_seqlens.new_empty((_n_slots(cu_seqlens, n_tokens, block_rows) + 1, 4), dtype=torch.int32)


def _n_slots(cu_seqlens: torch.Tensor, n_tokens: int, block_rows: int) -> int:
    return n_tokens // block_rows + cu_seqlens.shape[0] - 1


def _fitting(tiles: torch.Tensor | None, cu_seqlens: torch.Tensor, n_tokens: int, block_rows: int) -> torch.Tensor:
    """The list that was handed down if it has tiles of ``block_rows`` rows, else one that does.

    As many slots mean as large tiles, or that no cell has more rows than a tile: then the lists are equal.
    """
    if tiles is not None and len(tiles) == _n_slots(cu_seqlens, n_tokens, block_rows) + 1:
        return tiles
    return varlen_attention_tiles.function(cu_seqlens, n_tokens, block_rows)


def plan_for(q: torch.Tensor, dropout_p: float) -> AttentionPlan:
    """The plan for [T, H, D] queries where they are."""
    return plan(DTYPE_NAMES[q.dtype], q.shape[-1], target_for(q), has_dropout=dropout_p > 0)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tiles: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    whole: AttentionPlan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [T, H, D], and lse [H, T] float32, the base-2 logarithm of each row's sum."""
    from geneformer_kernels.ops.varlen_attention import kernel

    n_tokens, n_heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(n_heads, n_tokens, dtype=torch.float32, device=q.device)
    if n_tokens == 0:
        return out, lse
    with launching_on(q):
        tiles = _fitting(tiles, cu_seqlens, n_tokens, whole.fwd.block_m)
        kernel.varlen_attention_fwd_kernel[(len(tiles) - 1, n_heads)](
            **_pointers(q=q, k=k, v=v, out=out),
            lse_ptr=lse,
            tiles_ptr=tiles,
            seed_ptr=seed,
            n_tokens=n_tokens,
            scale_log2=scale * _LOG2_E,
            **_constants(whole, whole.fwd, head_dim, dropout_p),
        )
    return out, lse


def backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tiles_dq: torch.Tensor | None,
    tiles_dkdv: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    whole: AttentionPlan,
) -> None:
    """Writes the gradients of q, k and v, which may be views of one tensor."""
    from geneformer_kernels.ops.varlen_attention import kernel

    n_tokens, n_heads, head_dim = q.shape
    if n_tokens == 0:
        return
    d_out = rows_of(d_out)
    dq, dk, dv = gradients
    delta = torch.empty_like(lse)
    shared = dict(
        lse_ptr=lse, delta_ptr=delta, seed_ptr=seed, n_tokens=n_tokens, scale=scale, scale_log2=scale * _LOG2_E
    )
    with launching_on(q):
        tiles = _fitting(tiles_dq, cu_seqlens, n_tokens, whole.dq.block_m)
        kernel.varlen_attention_bwd_dq_kernel[(len(tiles) - 1, n_heads)](
            **_pointers(q=q, k=k, v=v, out=out, d_out=d_out, dq=dq),
            tiles_ptr=tiles,
            **shared,
            **_constants(whole, whole.dq, head_dim, dropout_p),
        )
        if whole.dkdv.block_n != whole.dq.block_m:
            tiles = _fitting(tiles_dkdv, cu_seqlens, n_tokens, whole.dkdv.block_n)
        # After the other one, which writes delta.
        kernel.varlen_attention_bwd_dkdv_kernel[(len(tiles) - 1, n_heads)](
            **_pointers(q=q, k=k, v=v, d_out=d_out, dk=dk, dv=dv),
            tiles_ptr=tiles,
            **shared,
            **_constants(whole, whole.dkdv, head_dim, dropout_p),
        )


# Tiles have at most 128 rows, whose distances from the first of them the kernels count in int32.
_LONGEST_STRIDE = (1 << 31) // 128 - MAX_HEAD_DIM


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself if it is what the kernels are compiled for, else a copy: [..., D] with D and strides multiples
    of 16, innermost elements adjacent, tokens not so far apart that the rows of a tile lie beyond what the kernels can
    count. Zeros are added to heads that are narrower; they change no score.
    """
    if missing := -x.shape[-1] % HEAD_DIM_STEP:
        return torch.nn.functional.pad(x, (0, missing)).contiguous()
    is_readable = x.stride(-1) == 1 and all(stride % HEAD_DIM_STEP == 0 for stride in x.stride()[:-1])
    return x if is_readable and x.stride(0) <= _LONGEST_STRIDE else x.contiguous()


def _pointers(**tensors: torch.Tensor) -> dict[str, torch.Tensor | int]:
    arguments: dict[str, torch.Tensor | int] = {}
    for name, x in tensors.items():
        arguments[f"{name}_ptr"] = x
        arguments[f"stride_{name}_t"], arguments[f"stride_{name}_h"] = x.stride(0), x.stride(1)
    return arguments


def _constants(whole: AttentionPlan, tile: TilePlan, head_dim: int, dropout_p: float) -> dict[str, object]:
    # The largest float32 below 1: the kernels compute with a float32.
    return {
        "dropout_p": min(dropout_p, 1 - 2.0**-24),
        **constants(whole, tile, head_dim, dropout_p > 0),
        **tile.launch.options,
    }


@operator("varlen_attention_fwd")
def varlen_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tiles: torch.Tensor | None,
    tiles_dq: torch.Tensor | None,
    tiles_dkdv: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of separate q, k, v; lists of tiles that were not handed down are made."""
    return forward(q, k, v, cu_seqlens, tiles, scale, dropout_p, seed, plan_for(q, dropout_p))


@operator("varlen_attention_bwd")
def varlen_attention_bwd(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tiles_dq: torch.Tensor | None,
    tiles_dkdv: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of separate q, k, v."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    lists, numbers = (cu_seqlens, tiles_dq, tiles_dkdv), (scale, dropout_p, seed)
    backward(d_out, q, k, v, out, lse, *lists, *numbers, (dq, dk, dv), plan_for(q, dropout_p))
    return dq, dk, dv


@operator("varlen_attention_qkv_fwd")
def varlen_attention_qkv_fwd(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tiles: torch.Tensor | None,
    tiles_dq: torch.Tensor | None,
    tiles_dkdv: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a fused projection [T, 3, H, D]."""
    q, k, v = qkv.unbind(1)
    return forward(q, k, v, cu_seqlens, tiles, scale, dropout_p, seed, plan_for(q, dropout_p))


@operator("varlen_attention_qkv_bwd")
def varlen_attention_qkv_bwd(
    d_out: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tiles_dq: torch.Tensor | None,
    tiles_dkdv: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of a fused projection, in one tensor."""
    q, k, v = qkv.unbind(1)
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dq, dk, dv = d_qkv.unbind(1)
    lists, numbers = (cu_seqlens, tiles_dq, tiles_dkdv), (scale, dropout_p, seed)
    backward(d_out, q, k, v, out, lse, *lists, *numbers, (dq, dk, dv), plan_for(q, dropout_p))
    return d_qkv


@varlen_attention_fwd.register_fake
def _(q, k, v, cu_seqlens, tiles, tiles_dq, tiles_dkdv, scale, dropout_p, seed):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@varlen_attention_bwd.register_fake
def _(d_out, q, k, v, out, lse, cu_seqlens, tiles_dq, tiles_dkdv, scale, dropout_p, seed):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@varlen_attention_qkv_fwd.register_fake
def _(qkv, cu_seqlens, tiles, tiles_dq, tiles_dkdv, scale, dropout_p, seed):
    n_tokens, _, n_heads, head_dim = qkv.shape
    return qkv.new_empty((n_tokens, n_heads, head_dim)), qkv.new_empty((n_heads, n_tokens), dtype=torch.float32)


@varlen_attention_qkv_bwd.register_fake
def _(d_out, qkv, out, lse, cu_seqlens, tiles_dq, tiles_dkdv, scale, dropout_p, seed):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    *tensors, cu_seqlens, _, tiles_dq, tiles_dkdv, scale, dropout_p, seed = inputs
    ctx.save_for_backward(*tensors, *output, cu_seqlens, tiles_dq, tiles_dkdv, seed)
    ctx.scale, ctx.dropout_p = scale, dropout_p
    ctx.set_materialize_grads(False)  # there is no gradient of lse: no zeros for it


def _backward(ctx, d_out, _d_lse):
    if d_out is None:
        return (None,) * 10
    *saved, seed = ctx.saved_tensors
    dq, dk, dv = varlen_attention_bwd(d_out, *saved, ctx.scale, ctx.dropout_p, seed)
    return dq, dk, dv, *(None,) * 7


def _qkv_backward(ctx, d_out, _d_lse):
    if d_out is None:
        return (None,) * 8
    *saved, seed = ctx.saved_tensors
    return varlen_attention_qkv_bwd(d_out, *saved, ctx.scale, ctx.dropout_p, seed), *(None,) * 7


varlen_attention_fwd.register_autograd(_backward, setup_context=_save)
varlen_attention_qkv_fwd.register_autograd(_qkv_backward, setup_context=_save)
