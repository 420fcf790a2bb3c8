"""The Triton kernels of the feed-forward half as torch operators: planning, launching, gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from geneformer_kernels.dropout import keep_scale
from geneformer_kernels.launch import precision_of
from geneformer_kernels.on_device import DTYPE_NAMES, constant_for_compiler, launching_on
from geneformer_kernels.operators import operator
from geneformer_kernels.ops.feed_forward.plan import (
    WIDTH_STEP,
    activation_plan,
    fused_plan,
    is_one_kernel,
    is_up_by_library,
    layernorm_plan,
    up_plan,
)
from geneformer_kernels.target import target_of


# Constant for the compiler, which cannot look at devices.
@constant_for_compiler
def can_be_fused(
    dtype: str, width: int, ff_width: int, activation: str, device_type: str, device_index: int | None
) -> bool:
    """Whether one kernel can do everything, the LayerNorm included, on a device."""
    target = target_of(torch.device(device_type, device_index))  # type: ignore[arg-type]
    return fused_plan(dtype, width, ff_width, activation, target) is not None


@constant_for_compiler
def should_be_fused(
    dtype: str, width: int, ff_width: int, activation: str, device_type: str, device_index: int | None
) -> bool:
    """Whether one kernel, the LayerNorm included, is the fastest way on a device."""
    target = target_of(torch.device(device_type, device_index))  # type: ignore[arg-type]
    return is_one_kernel(dtype, width, ff_width, activation, target, has_layernorm=True)


@operator("feed_forward_fwd")
def feed_forward_fwd(
    x: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """The feed-forward half of rows [N, C] with weights in the dtype of ``x``."""
    width, ff_width = x.shape[1], down_weight.shape[1]
    if is_one_kernel(DTYPE_NAMES[x.dtype], width, ff_width, activation, target_of(x.device), has_layernorm=False):
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _launch_fused(x, None, up_weight, up_bias, down_weight, down_bias, activation, out=out)
        return out
    hidden = _up(x, up_weight, up_bias, ff_width, activation)
    return F.linear(hidden, down_weight, None if down_bias is None else down_bias.to(x.dtype))


@feed_forward_fwd.register_fake
def _(x, up_weight, up_bias, down_weight, down_bias, activation):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _up(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ff_width: int, activation: str
) -> torch.Tensor:
    dtype, target = DTYPE_NAMES[x.dtype], target_of(x.device)
    if is_up_by_library(dtype, activation, target):
        return _up_by_library(x, weight, None if bias is None else bias.to(x.dtype), activation)

    from geneformer_kernels.ops.feed_forward.kernel import feed_forward_up_kernel

    if missing := -x.shape[1] % WIDTH_STEP:  # zeros, which add nothing to a product
        x, weight = F.pad(x, (0, missing)), F.pad(weight, (0, missing))
    n_rows, width = x.shape
    hidden = torch.empty((n_rows, ff_width), dtype=x.dtype, device=x.device)
    planned = up_plan(dtype, n_rows, ff_width, activation, target)
    n_programs = -(-n_rows // planned.block_rows) * -(-ff_width // planned.block_n)
    if n_programs:
        with launching_on(x):
            feed_forward_up_kernel[(n_programs,)](
                x_ptr=x.contiguous(),
                weight_ptr=weight.contiguous(),
                bias_ptr=None if bias is None else bias.contiguous(),
                out_ptr=hidden,
                n_rows=n_rows,
                n_columns=ff_width,
                width=width,
                ACTIVATION=activation,
                PRECISION=precision_of(dtype),
                BLOCK_ROWS=planned.block_rows,
                BLOCK_N=planned.block_n,
                BLOCK_K=planned.block_k,
                GROUP=planned.group,
                **planned.launch.options,
            )
    return hidden


def _up_by_library(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """cuBLAS, which applies a bias and ReLU or tanh-GELU as it stores the product; other activations take a pass."""
    if bias is not None and activation in ("relu", "gelu_tanh"):
        return torch._addmm_activation(bias, x, weight.T, use_gelu=activation == "gelu_tanh")
    hidden = F.linear(x, weight, bias)
    if activation == "relu":
        return hidden.relu_()
    return torch.ops.aten.gelu_(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")


def _launch_fused(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    activation: str,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    stream: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    rstd: torch.Tensor | None = None,
    eps: float = 0.0,
    is_post: bool = True,  # without a LayerNorm it means nothing, and the kernel is compiled for one of both
    dropout_p: float = 0.0,
) -> None:
    from geneformer_kernels.ops.feed_forward.kernel import feed_forward_fwd_kernel

    if not x.numel():
        return
    (n_rows, width), ff_width, dtype = x.shape, down_weight.shape[1], DTYPE_NAMES[x.dtype]
    planned = fused_plan(dtype, width, ff_width, activation, target_of(x.device))
    assert planned is not None
    read = (x, residual, up_weight, up_bias, down_weight, down_bias, weight, bias)
    names = ("x", "residual", "up_weight", "up_bias", "down_weight", "down_bias", "weight", "bias")
    pointers = {
        f"{name}_ptr": None if each is None else each.contiguous() for name, each in zip(names, read, strict=True)
    }
    with launching_on(x):
        feed_forward_fwd_kernel[(-(-n_rows // planned.block_rows),)](
            **pointers,
            seed_ptr=seed,
            stream_ptr=stream,
            out_ptr=out,
            total_ptr=total,
            mean_ptr=mean,
            rstd_ptr=rstd,
            n_rows=n_rows,
            ff_width=ff_width,
            eps=eps,
            threshold=_threshold(dropout_p),
            keep_scale=keep_scale(dropout_p),
            ACTIVATION=activation,
            IS_POST=is_post,
            PRECISION=precision_of(dtype),
            WIDTH=width,
            BLOCK_ROWS=planned.block_rows,
            BLOCK_F=planned.block_f,
            BLOCK_NORM=planned.block_norm if weight is not None else planned.block_rows,
            **planned.launch.options,
        )


def _threshold(dropout_p: float) -> int:
    return min(round(dropout_p * 65536), 65535)


@operator("feed_forward_bwd")
def feed_forward_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, up_weight, up_bias (float32), down_weight and down_bias (float32); empty where not needed."""
    from geneformer_kernels.ops.feed_forward.kernel import feed_forward_bwd_activation_kernel

    (n_rows, _), ff_width = x.shape, down_weight.shape[1]
    grads = _empty_gradients(dy, x, up_weight, down_weight, needs)
    needs_x, needs_up_weight, needs_up_bias, needs_down_weight, needs_down_bias = needs
    if needs_down_bias:
        torch.sum(dy, 0, dtype=torch.float32, out=grads[4])
    if not any(needs[:4]):
        return grads
    # Computed again rather than kept; then both become, in place, what the four products below need.
    hidden, d_hidden = torch.mm(x, up_weight.T), torch.mm(dy, down_weight)
    planned = activation_plan(n_rows, ff_width, activation, target_of(x.device))
    n_columns = hidden.shape[1]
    partial = None
    if needs_up_bias:
        partial = torch.empty((planned.n_programs, n_columns), dtype=torch.float32, device=x.device)
    with launching_on(x):
        feed_forward_bwd_activation_kernel[(planned.n_programs, -(-ff_width // planned.block_columns))](
            hidden_ptr=hidden,
            d_hidden_ptr=d_hidden,
            bias_ptr=None if up_bias is None else up_bias.contiguous(),
            partial_ptr=partial,
            n_rows=n_rows,
            ff_width=ff_width,
            ACTIVATION=activation,
            BLOCK_ROWS=planned.block_rows,
            BLOCK_F=planned.block_columns,
            **planned.launch.options,
        )
    if needs_x:
        torch.mm(hidden, up_weight, out=grads[0])
    if needs_up_weight:
        torch.mm(hidden.T, x, out=grads[1])
    if partial is not None:
        torch.sum(partial, 0, out=grads[2])
    if needs_down_weight:
        torch.mm(dy.T, d_hidden, out=grads[3])
    return grads


@feed_forward_bwd.register_fake
def _(dy, x, up_weight, up_bias, down_weight, activation, needs):
    return _empty_gradients(dy, x, up_weight, down_weight, needs)


def _empty_gradients(
    dy: torch.Tensor, x: torch.Tensor, up_weight: torch.Tensor, down_weight: torch.Tensor, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def empty(needed: bool, *shape: int, dtype: torch.dtype = x.dtype) -> torch.Tensor:
        return torch.empty(shape if needed else (0,), dtype=dtype, device=x.device)

    return (
        empty(needs[0], *x.shape),
        empty(needs[1], *up_weight.shape),
        empty(needs[2], up_weight.shape[0], dtype=torch.float32),
        empty(needs[3], *down_weight.shape),
        empty(needs[4], down_weight.shape[0], dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, up_weight, up_bias, down_weight, down_bias, ctx.activation = inputs
    ctx.save_for_backward(x, up_weight, up_bias, down_weight)
    ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (up_bias, down_bias)]


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    x, up_weight, up_bias, down_weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    # Once, for an expanded one: every product would make a copy of its own.
    grads = feed_forward_bwd(dy.contiguous(), x, up_weight, up_bias, down_weight, ctx.activation, needs)
    return *_cast_gradients(grads, needs, ctx.bias_dtypes), None


def _cast_gradients(
    grads: tuple[torch.Tensor, ...], needs: list[bool], bias_dtypes: list[torch.dtype | None]
) -> list[torch.Tensor | None]:
    dtypes = (None, None, bias_dtypes[0], None, bias_dtypes[1])
    given = zip(grads, needs, dtypes, strict=True)
    return [(grad if dtype is None else grad.to(dtype)) if needed else None for grad, needed, dtype in given]


feed_forward_fwd.register_autograd(_backward, setup_context=_setup_context)


@operator("feed_forward_layernorm_fwd")
def feed_forward_layernorm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    seed: torch.Tensor | None,
    activation: str,
    eps: float,
    is_post: bool,
    dropout_p: float,
    out_dtype: torch.dtype,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(stream, out, total, mean, rstd) of rows [N, C] by the fused kernel; ``seed`` None: no dropout.

    What would equal another tensor, or is not needed, is empty: out where it is the stream, total where it is the
    stream or without ``needs_grad``, the statistics without ``needs_grad``.
    """
    outputs = _empty_outputs(x, is_post, out_dtype, needs_grad)
    stream, out, total, mean, rstd = (each if each.numel() else None for each in outputs)
    _launch_fused(
        x, residual, up_weight, up_bias, down_weight, down_bias, activation,
        weight=weight, bias=bias, seed=seed, stream=stream, out=out, total=total, mean=mean, rstd=rstd,
        eps=eps, is_post=is_post, dropout_p=dropout_p,
    )  # fmt: skip
    return outputs


@feed_forward_layernorm_fwd.register_fake
def _(
    x, residual, up_weight, up_bias, down_weight, down_bias, weight, bias, seed, activation, eps, is_post, dropout_p,
    out_dtype, needs_grad,
):  # fmt: skip
    return _empty_outputs(x, is_post, out_dtype, needs_grad)


def _empty_outputs(
    x: torch.Tensor, is_post: bool, out_dtype: torch.dtype, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def empty(shape: torch.Size | tuple[int, ...], is_there: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape if is_there else (0,), dtype=dtype, device=x.device)

    return (
        empty(x.shape, True),
        empty(x.shape, not (is_post and out_dtype == torch.float32), out_dtype),
        empty(x.shape, is_post and needs_grad),
        empty((x.shape[0],), needs_grad),
        empty((x.shape[0],), needs_grad),
    )


@operator("feed_forward_layernorm_bwd")
def feed_forward_layernorm_bwd(
    d_stream: torch.Tensor | None,
    d_out: torch.Tensor | None,
    total: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    seed: torch.Tensor | None,
    is_post: bool,
    dropout_p: float,
    dy_dtype: torch.dtype,
    needs_residual: bool,
    needs_parameters: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dy, d_residual, [3, C] gradients of weight, bias and down_bias), dy before dropout; empty where not needed."""
    from geneformer_kernels.ops.feed_forward.kernel import feed_forward_bwd_layernorm_kernel

    dy, d_residual, d_parameters = _empty_norm_gradients(total, dy_dtype, needs_residual, needs_parameters)
    if not total.numel():
        return dy, d_residual, d_parameters.zero_()
    n_rows, width = total.shape
    planned = layernorm_plan(n_rows, width, target_of(total.device))
    partial = None
    if needs_parameters:
        partial = torch.empty((planned.n_programs, 3, width), dtype=torch.float32, device=total.device)
    with launching_on(total):
        feed_forward_bwd_layernorm_kernel[(planned.n_programs,)](
            d_stream_ptr=None if d_stream is None else d_stream.contiguous(),
            d_out_ptr=None if d_out is None else d_out.contiguous(),
            total_ptr=total,
            mean_ptr=mean,
            rstd_ptr=rstd,
            weight_ptr=weight.contiguous(),
            seed_ptr=seed,
            dy_ptr=dy,
            d_residual_ptr=d_residual if needs_residual else None,
            partial_ptr=partial,
            n_rows=n_rows,
            threshold=_threshold(dropout_p),
            keep_scale=keep_scale(dropout_p),
            IS_POST=is_post,
            WIDTH=width,
            BLOCK_ROWS=planned.block_rows,
            **planned.launch.options,
        )
    return dy, d_residual, d_parameters if partial is None else partial.sum(0)


@feed_forward_layernorm_bwd.register_fake
def _(
    d_stream, d_out, total, mean, rstd, weight, seed, is_post, dropout_p, dy_dtype, needs_residual, needs_parameters,
):  # fmt: skip
    return _empty_norm_gradients(total, dy_dtype, needs_residual, needs_parameters)


def _empty_norm_gradients(
    total: torch.Tensor, dy_dtype: torch.dtype, needs_residual: bool, needs_parameters: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.empty(total.shape, dtype=dy_dtype, device=total.device),
        torch.empty(total.shape if needs_residual else (0,), dtype=torch.float32, device=total.device),
        torch.empty((3, total.shape[1]) if needs_parameters else (0,), dtype=torch.float32, device=total.device),
    )


def _setup_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, residual, up_weight, up_bias, down_weight, down_bias, weight, bias, seed = inputs[:9]
    ctx.activation, _, ctx.is_post, ctx.dropout_p = inputs[9:13]
    stream, out, total, mean, rstd = output
    # In pre-norm what was normalised is the stream that goes on: nothing more is kept.
    normalised = total if ctx.is_post else stream
    ctx.save_for_backward(x, up_weight, up_bias, down_weight, normalised, mean, rstd, weight, seed)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([out] if out.ndim == 1 else []), total, mean, rstd)
    ctx.bias_dtypes = [None if each is None else each.dtype for each in (up_bias, down_bias)]
    ctx.residual_dtype, ctx.bias_dtype = None if residual is None else residual.dtype, bias.dtype


def _backward_norm(ctx: Any, d_stream: torch.Tensor | None, d_out: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if d_stream is None and d_out is None:
        return (None,) * 15
    x, up_weight, up_bias, down_weight, total, mean, rstd, weight, seed = ctx.saved_tensors
    needs_x, needs_residual, *needs_weights, needs_weight, needs_bias = ctx.needs_input_grad[:8]
    needs_down_bias = needs_weights[3]
    dy, d_residual, d_parameters = feed_forward_layernorm_bwd(
        d_stream, d_out, total, mean, rstd, weight, seed, ctx.is_post, ctx.dropout_p, x.dtype,
        needs_residual, needs_weight or needs_bias or needs_down_bias,
    )  # fmt: skip
    # The down bias's gradient is a sum of the same rows, made with the LayerNorm's own.
    needs = [needs_x, *needs_weights[:3], False]
    grads = feed_forward_bwd(dy, x, up_weight, up_bias, down_weight, ctx.activation, needs)
    dx, *d_weights = _cast_gradients(grads, needs, ctx.bias_dtypes)
    d_weights[3] = d_parameters[2].to(ctx.bias_dtypes[1]) if needs_down_bias else None
    return (
        dx,
        d_residual.to(ctx.residual_dtype) if needs_residual else None,
        *d_weights,
        d_parameters[0].to(weight.dtype) if needs_weight else None,
        d_parameters[1].to(ctx.bias_dtype) if needs_bias else None,
        *(None,) * 7,
    )


feed_forward_layernorm_fwd.register_autograd(_backward_norm, setup_context=_setup_norm_context)
