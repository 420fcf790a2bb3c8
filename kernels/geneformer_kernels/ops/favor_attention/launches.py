"""The Triton kernels as operators of torch with gradients."""

from __future__ import annotations

import torch

from geneformer_kernels.on_device import DTYPE_NAMES, launching_on, target_for
from geneformer_kernels.operators import operator
from geneformer_kernels.ops.favor_attention.largest import add_flow_through_largest, largest_of_cells
from geneformer_kernels.ops.favor_attention.plan import FavorPlan, TilePlan, n_splits, plan

# The kernels count rows of a tile, at most 128, in int32.
_LONGEST_STRIDE = (1 << 31) // 128 - 128


def plan_for(q: torch.Tensor) -> FavorPlan:
    """The plan for [T, H, D] queries where they are."""
    return plan(DTYPE_NAMES[q.dtype], q.shape[-1], target_for(q))


def rows_of(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The tensor itself if it is what the kernels are compiled for, else a copy: [T, H, head_dim], strides of
    tokens and heads multiples of 16, elements adjacent. Zeros are added to narrower heads; they change no projection.
    """
    if missing := head_dim - x.shape[-1]:
        return torch.nn.functional.pad(x, (0, missing)).contiguous()
    is_readable = x.stride(-1) == 1 and all(stride % 16 == 0 for stride in x.stride()[:-1])
    return x if is_readable and x.stride(0) <= _LONGEST_STRIDE else x.contiguous()


def weight_parts(projection: torch.Tensor, dtype: torch.dtype, whole: FavorPlan) -> torch.Tensor:
    """[n_parts, m, head_dim] in ``dtype``, whose sum is the projection [m, D] nearly to float32's accuracy."""
    wide = torch.nn.functional.pad(projection.float(), (0, whole.head_dim - projection.shape[1]))
    first = wide.to(dtype)
    parts = [first] if whole.n_parts == 1 else [first, (wide - first.float()).to(dtype)]
    return torch.stack(parts).contiguous()


class _Problem:
    """What all launches of one call share."""

    def __init__(
        self, q: torch.Tensor, projection: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, eps: float
    ) -> None:
        self.whole, self.target = plan_for(q), target_for(q)
        self.dtype, self.device = q.dtype, q.device
        self.n_tokens, self.n_heads, true_dim = q.shape
        self.n_cells, self.longest = len(cu_seqlens) - 1, longest
        self.weight = weight_parts(projection, q.dtype, self.whole)
        self.n_features = self.weight.shape[1]
        self.cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
        self.shared = dict(
            weight_ptr=self.weight,
            n_tokens=self.n_tokens,
            n_features=self.n_features,
            scale=true_dim**-0.25,
            **self.whole.constexprs,
        )
        self.eps = eps

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def rows(self) -> torch.Tensor:
        """What the kernels write, [T, H, head_dim]."""
        return self.empty(self.n_tokens, self.n_heads, self.whole.head_dim, dtype=self.dtype)

    def numbers(self) -> torch.Tensor:
        """[H, T] float32."""
        return self.empty(self.n_heads, self.n_tokens)

    def by_cell(self, tile: TilePlan) -> tuple[tuple[int, int], dict[str, object]]:
        """Grid and arguments of kernels whose programs are tiles of the longest cell."""
        n_tiles = -(-self.longest // tile.block_t)
        arguments = dict(cu_seqlens_ptr=self.cu_seqlens, n_tiles=n_tiles, eps=self.eps, **self.shared)
        return (n_tiles * self.n_cells, self.n_heads), {**arguments, **tile.constexprs, **tile.launch.options}


def _top(k: torch.Tensor, problem: _Problem) -> torch.Tensor:
    from geneformer_kernels.ops.favor_attention import kernel

    top, tile = problem.numbers(), problem.whole.top
    kernel.favor_attention_top_kernel[(-(-problem.n_tokens // tile.block_t), problem.n_heads)](
        **_pointers(k=k),
        top_ptr=top,
        **problem.shared,
        **tile.constexprs,
        **tile.launch.options,
    )
    return top


def _sums(
    x: torch.Tensor,
    y: torch.Tensor,
    largest: torch.Tensor,
    total: torch.Tensor | None,
    delta: torch.Tensor | None,
    problem: _Problem,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, H, m, head_dim] and [B, H, m] float32; parts are added in a fixed order."""
    from geneformer_kernels.ops.favor_attention import kernel

    tile, shape = problem.whole.sums, (problem.n_cells, problem.n_heads, problem.n_features)
    n_blocks = -(-problem.n_features // tile.block_f)
    n_parts = n_splits(problem.longest, n_blocks * problem.n_cells * problem.n_heads, tile.block_t, problem.target)
    partial, partial_sum = problem.empty(n_parts, *shape, problem.whole.head_dim), problem.empty(n_parts, *shape)
    kernel.favor_attention_sums_kernel[(n_blocks * n_parts * problem.n_cells, problem.n_heads)](
        **_pointers(x=x, y=y),
        largest_ptr=largest,
        total_ptr=total,
        delta_ptr=delta,
        cu_seqlens_ptr=problem.cu_seqlens,
        partial_ptr=partial,
        partial_sum_ptr=partial_sum,
        n_blocks=n_blocks,
        n_splits=n_parts,
        eps=problem.eps,
        **problem.shared,
        **tile.constexprs,
        **tile.launch.options,
    )
    return (partial[0], partial_sum[0]) if n_parts == 1 else (partial.sum(0), partial_sum.sum(0))


def _in_range(
    context: torch.Tensor, sums: torch.Tensor, size: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both over a size of each cell and head, the first in ``dtype``, and the size [B, H]: half precision holds them,
    however many tokens a cell has."""
    size = torch.where(size > 0, size, 1.0)
    return (context / size[..., None, None]).to(dtype), sums / size[..., None], size


Results = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]


def _alone(out: torch.Tensor, problem: _Problem) -> Results:
    """The output, and nothing for a backward pass."""
    a, b, c, d, e, f, g = (problem.empty(0) for _ in range(7))
    return out, a, b, c, d, e, f, g


@operator("favor_attention_fwd")
def favor_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    projection: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    is_batch: bool,
    eps: float,
    keeps: bool,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    """out [T, H, D], and what the backward pass needs, of no elements unless ``keeps``: contexts [B, H, m, head_dim],
    sums [B, H, m], sizes [B, H] (the two are over them), largest [B], top [H, T], and of queries largest and total.
    """
    from geneformer_kernels.ops.favor_attention import kernel

    problem = _Problem(q, projection, cu_seqlens, longest, eps)
    true_dim, tile = q.shape[-1], problem.whole.fwd
    if not q.numel():
        return _alone(q.new_zeros(q.shape), problem)
    q, k, v = (rows_of(x, problem.whole.head_dim) for x in (q, k, v))
    out = problem.rows()
    largest_q, total = (problem.numbers(), problem.numbers()) if keeps else (None, None)
    with launching_on(q):
        top = _top(k, problem)
        largest = largest_of_cells(top, cu_seqlens, is_batch=is_batch)
        context, sums = _sums(k, v, largest, None, None, problem)
        # By the largest sum of features: queries then find totals of at least eps, and a context no larger than v.
        context, sums, sizes = _in_range(context, sums, sums.amax(2), q.dtype)
        grid, arguments = problem.by_cell(tile)
        kernel.favor_attention_fwd_kernel[grid](
            **_pointers(q=q),
            context_ptr=context,
            sums_ptr=sums,
            out_ptr=out,
            largest_ptr=largest_q,
            total_ptr=total,
            **arguments,
        )
    out = out if true_dim == out.shape[-1] else out[..., :true_dim].contiguous()
    if largest_q is None or total is None:
        return _alone(out, problem)
    return out, context, sums, sizes, largest, top, largest_q, total


@favor_attention_fwd.register_fake
def _(q, k, v, projection, cu_seqlens, longest, is_batch, eps, keeps):
    n_tokens, n_heads, _ = q.shape
    out, n_cells, n_features = q.new_empty(q.shape), cu_seqlens.shape[0] - 1, projection.shape[0]

    def wide(*shape: int) -> torch.Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    if not keeps:
        return out, *(wide(0) for _ in range(7))
    head_dim = plan("float32", q.shape[-1], target_for(q)).head_dim
    context = q.new_empty((n_cells, n_heads, n_features, head_dim))
    rest = (wide(n_cells, n_heads, n_features), wide(n_cells, n_heads), wide(n_cells))
    return out, context, *rest, *(wide(n_heads, n_tokens) for _ in range(3))


@operator("favor_attention_bwd")
def favor_attention_bwd(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    projection: torch.Tensor,
    cu_seqlens: torch.Tensor,
    out: torch.Tensor,
    context: torch.Tensor,
    sums: torch.Tensor,
    sizes: torch.Tensor,
    largest: torch.Tensor,
    top: torch.Tensor,
    largest_q: torch.Tensor,
    total: torch.Tensor,
    longest: int,
    is_batch: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    from geneformer_kernels.ops.favor_attention import kernel

    if not q.numel():
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    problem = _Problem(q, projection, cu_seqlens, longest, eps)
    true_dim = q.shape[-1]
    delta = (d_out.float() * out.float()).sum(-1).T.contiguous()
    rows = [rows_of(x, problem.whole.head_dim) for x in (q, k, v, d_out)]
    d_rows = rows[3]
    dq, dk, dv, flow = problem.rows(), problem.rows(), problem.rows(), problem.numbers()
    with launching_on(q):
        grid, arguments = problem.by_cell(problem.whole.bwd)
        launch = kernel.favor_attention_bwd_kernel[grid]
        launch(
            **_pointers(x=rows[0], y=d_rows),
            context_ptr=context,
            sums_ptr=sums,
            factor_ptr=None,
            largest_ptr=largest_q,
            total_ptr=total,
            delta_ptr=delta,
            dx_ptr=dq,
            dv_ptr=None,
            flow_ptr=None,
            **arguments,
        )
        d_context, d_sums = _sums(rows[0], d_rows, largest_q, total, delta, problem)
        size = torch.maximum(d_context.abs().amax((2, 3)), d_sums.abs().amax(2))
        d_context, d_sums, d_sizes = _in_range(d_context, d_sums, size, q.dtype)
        launch(
            **_pointers(x=rows[1], y=rows[2]),
            context_ptr=d_context,
            sums_ptr=d_sums,
            factor_ptr=d_sizes / sizes,
            largest_ptr=largest,
            total_ptr=None,
            delta_ptr=None,
            dx_ptr=dk,
            dv_ptr=dv,
            flow_ptr=flow,
            **arguments,
        )
    if true_dim != dq.shape[-1]:
        dq, dk, dv = (x[..., :true_dim].contiguous() for x in (dq, dk, dv))
    add_flow_through_largest(dk, k, projection, top, largest, flow, cu_seqlens, is_batch=is_batch)
    return dq, dk, dv


@favor_attention_bwd.register_fake
def _(d_out, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _pointers(**tensors: torch.Tensor) -> dict[str, torch.Tensor | int]:
    arguments: dict[str, torch.Tensor | int] = {}
    for name, x in tensors.items():
        arguments[f"{name}_ptr"] = x
        arguments[f"stride_{name}_t"], arguments[f"stride_{name}_h"] = x.stride(0), x.stride(1)
    return arguments


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.longest, ctx.is_batch, ctx.eps, ctx.keeps = inputs
    if ctx.keeps:
        ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, d_out, *_):  # type: ignore[no-untyped-def]
    gradients = favor_attention_bwd(d_out, *ctx.saved_tensors, ctx.longest, ctx.is_batch, ctx.eps)
    return *gradients, None, None, None, None, None, None


favor_attention_fwd.register_autograd(_backward, setup_context=_save)
