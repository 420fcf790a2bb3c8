"""Attention over packed cells by torch's own kernels."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from geneformer_kernels.on_device import DTYPE_NAMES, constant_for_compiler, draw_seed
from geneformer_kernels.operators import operator
from geneformer_kernels.ops.varlen_attention import library
from geneformer_kernels.ops.varlen_attention.blocked import attend_blocked
from geneformer_kernels.ops.varlen_attention.cells import AttentionCells
from geneformer_kernels.ops.varlen_attention.plan import TorchPlan, torch_plan
from geneformer_kernels.target import target_of
from geneformer_kernels.workspace import Workspace

# Routes of loops that numba compiles.
_COMPILED = ("blocked", "registers", "tiles")


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cells: AttentionCells,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of [T, H, D] by the route that :func:`plan.torch_plan` gives; a seed counts on the CPU only."""
    cu_seqlens = cells.cu_seqlens
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    is_inference = not needs_grad and dropout_p == 0
    route = _route(DTYPE_NAMES[q.dtype], q.device.type, q.device.index, is_inference, dropout_p > 0)
    if route.route == "blocked" and not is_inference:
        if dropout_p == 0:
            seed = None
        elif seed is None:
            seed = draw_seed(q.device)
        return attend_blocked(q, k, v, cu_seqlens, scale, dropout_p, seed, route.block_rows)[0]
    if q.device.type == "cpu" and (torch.compiler.is_compiling() or (seed is not None and dropout_p > 0)):
        if dropout_p > 0 and seed is None:
            seed = draw_seed(q.device)
        return attend_cells(q, k, v, cu_seqlens, scale, dropout_p, seed, is_inference)
    if q.shape[0] == 0:
        return q.clone()
    if route.route in ("varlen", "efficient"):
        return _attend_packed(route.route, q, k, v, cells, scale, dropout_p, needs_grad)
    bounds = cu_seqlens.tolist()
    if route.route in _COMPILED:
        return _compiled(route, q, k, v, bounds, scale)
    return _sdpa_per_cell(q, k, v, bounds, scale, dropout_p)


def attend_float32(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cells: AttentionCells, scale: float
) -> torch.Tensor:
    """Attention of float32 [T, H, D] on a CPU with AVX2, without gradients, by the loops that numba compiles."""
    from geneformer_kernels.ops.varlen_attention.host_float32 import varlen_attention_float32

    def by_torch(cell_q: torch.Tensor, cell_k: torch.Tensor, cell_v: torch.Tensor) -> torch.Tensor:
        return _sdpa_per_cell(cell_q, cell_k, cell_v, [0, len(cell_q)], scale, 0.0)

    return varlen_attention_float32(q, k, v, cells.cu_seqlens.tolist(), scale, by_torch)


def workspace(dtype: torch.dtype, longest: int, n_heads: int, head_dim: int) -> Workspace:
    """Of attention on the CPU without gradients, by the route that :func:`attend` takes, for cells of such lengths."""
    route = _route(DTYPE_NAMES[dtype], "cpu", None, is_inference=True, has_dropout=False)
    if route.route == "registers":
        from geneformer_kernels.ops.varlen_attention import host_avx512

        if host_avx512.serves(head_dim):
            return host_avx512.workspace(longest, n_heads, head_dim, route.block_rows)
    if route.route == "tiles":
        from geneformer_kernels.ops.varlen_attention import host_amx

        if host_amx.serves(head_dim):
            return host_amx.workspace(longest, head_dim)
    if route.route in ("blocked", "registers"):
        from geneformer_kernels.ops.varlen_attention import host

        return host.workspace(longest, n_heads, head_dim, route.block_rows)
    # torch's flash attention on the CPU (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, torch 2.13): scores of a
    # block of queries and keys and what is made of them, and its results; sums of all rows. The cells' results are
    # joined in the end. Halves: scores are narrowed, and for AMX keys and values are laid out anew.
    size, wide = dtype.itemsize, 8 if dtype == torch.float64 else 4
    queries, keys = 256 if longest >= 768 else 64 if longest >= 192 else 32, min(512, longest)
    row, sums = size * n_heads * head_dim, wide * n_heads * longest
    block = wide * queries * (keys + 2 + head_dim) + (size * queries * keys if size < wide else 0)
    is_for_amx = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}.get(dtype) in target_of("cpu").features
    return Workspace(row, sums + (2 * row * longest if is_for_amx else 0), block + size * keys * head_dim * is_for_amx)


def _compiled(
    route: TorchPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int], scale: float
) -> torch.Tensor:
    """Bfloat16 on the CPU without gradients, by the loops that numba compiles; it is needed on this branch only."""
    if route.route == "registers":
        from geneformer_kernels.ops.varlen_attention.host_avx512 import serves, varlen_attention_avx512

        if serves(q.shape[-1]):
            return varlen_attention_avx512(q, k, v, bounds, scale, route.block_rows)
    if route.route == "tiles":
        from geneformer_kernels.ops.varlen_attention import host_amx

        if not host_amx.serves(q.shape[-1]):
            return _sdpa_per_cell(q, k, v, bounds, scale, 0.0).contiguous()
        return host_amx.varlen_attention_amx(q, k, v, bounds, scale, route.block_rows)
    from geneformer_kernels.ops.varlen_attention.host import varlen_attention_blocked

    return varlen_attention_blocked(q, k, v, bounds, scale, route.block_rows)


# Constant for the compiler: versions and instruction sets are no part of a graph.
@constant_for_compiler
def _route(dtype: str, device_type: str, device_index: int | None, is_inference: bool, has_dropout: bool) -> TorchPlan:
    target = target_of(device_type if device_index is None else f"{device_type}:{device_index}")
    return torch_plan(dtype, target, is_inference=is_inference, has_dropout=has_dropout)


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


def _attend_packed(
    route: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cells: AttentionCells,
    scale: float,
    dropout_p: float,
    needs_grad: bool,
) -> torch.Tensor:
    """One call for all cells on a CUDA device. Both kernels want heads of a multiple of 8 elements."""
    head_dim = q.shape[-1]
    if head_dim % 8:
        q, k, v = (F.pad(x, (0, -head_dim % 8)) for x in (q, k, v))  # torch differentiates it
    bounds = cells.cu_seqlens.to(torch.int32)
    out = library.attend(route, q, k, v, bounds, cells.bound(), scale, dropout_p, needs_grad)
    return out[..., :head_dim]


def attend_equal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int, scale: float) -> torch.Tensor:
    """Attention of [T, H, D] cells of one length by cuDNN's kernel, without gradients and without copies."""
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    out = library.cudnn(q, k, v, scale)
    return out.transpose(1, 2).flatten(0, 1)


@operator("varlen_attention_cells")
def attend_cells(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    is_inference: bool,
) -> torch.Tensor:
    """The CPU's attention per cell, opaque to a compiler, which could not loop over cells of unknown lengths.

    Dropout draws from a generator with a seed of its own, so that the backward pass sees the same mask.
    """
    bounds = cu_seqlens.tolist()
    if q.shape[0] == 0:
        return q.new_empty(q.shape)
    if dropout_p == 0:
        route = _route(DTYPE_NAMES[q.dtype], "cpu", None, is_inference, False)
        if route.route in _COMPILED:
            return _compiled(route, q, k, v, bounds, scale)
        return _sdpa_per_cell(q, k, v, bounds, scale, 0.0).contiguous()
    out = q.new_empty(q.shape)
    for start, stop, _, kept in _weights_of(q, k, bounds, scale, dropout_p, seed):
        out[start:stop] = (kept @ v[start:stop].transpose(0, 1).to(kept.dtype)).transpose(0, 1)
    return out


@operator("varlen_attention_cells_bwd")
def attend_cells_bwd(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; weights are computed again, in float32 or wider."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    for start, stop, weights, kept in _weights_of(q, k, cu_seqlens.tolist(), scale, dropout_p, seed):
        cell_q, cell_k, cell_v, d_cell = (x[start:stop].transpose(0, 1).to(weights.dtype) for x in (q, k, v, d_out))
        dv[start:stop] = (kept.transpose(1, 2) @ d_cell).transpose(0, 1)
        d_kept = (d_cell @ cell_v.transpose(1, 2)) * kept
        d_scores = (d_kept - weights * d_kept.sum(-1, keepdim=True)) * scale
        dq[start:stop] = (d_scores @ cell_k).transpose(0, 1)
        dk[start:stop] = (d_scores.transpose(1, 2) @ cell_q).transpose(0, 1)
    return dq, dk, dv


def _weights_of(q, k, bounds, scale, dropout_p, seed):
    """Of every cell that is not empty: start, stop, weights [H, L, L], and the weights after dropout."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    generator = torch.Generator().manual_seed(int(seed)) if dropout_p > 0 else None
    for start, stop in itertools.pairwise(bounds):
        if start == stop:
            continue
        cell_q, cell_k = (x[start:stop].transpose(0, 1).to(dtype) for x in (q, k))
        weights = torch.softmax(cell_q @ cell_k.transpose(1, 2) * scale, dim=-1)
        kept = weights
        if generator is not None:
            # Of float32, whatever the default dtype is: bfloat16 would have 256 chances.
            chance = torch.rand(weights.shape, generator=generator, dtype=torch.float32)
            kept = weights * (chance >= dropout_p) / (1 - dropout_p)
        yield start, stop, weights, kept


@attend_cells.register_fake
def _(q, k, v, cu_seqlens, scale, dropout_p, seed, is_inference):
    return q.new_empty(q.shape)


@attend_cells_bwd.register_fake
def _(d_out, q, k, v, cu_seqlens, scale, dropout_p, seed):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens, ctx.scale, ctx.dropout_p, seed, _ = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, seed)


def _backward(ctx, d_out):
    q, k, v, cu_seqlens, seed = ctx.saved_tensors
    dq, dk, dv = attend_cells_bwd(d_out, q, k, v, cu_seqlens, ctx.scale, ctx.dropout_p, seed)
    return dq, dk, dv, None, None, None, None, None


attend_cells.register_autograd(_backward, setup_context=_save)
