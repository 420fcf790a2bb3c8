"""The operators of int8 rows and products for torch: the Triton kernels, torch's own products, and gradients."""

from __future__ import annotations

from typing import Any

import torch

from geneformer_kernels import int8_rows
from geneformer_kernels.dispatch import Impl
from geneformer_kernels.int8_rows import in_whole_steps, widened_weight
from geneformer_kernels.launch import precision_of
from geneformer_kernels.on_device import DTYPE_NAMES, launching_on, plainly_on
from geneformer_kernels.operators import operator
from geneformer_kernels.ops.int8_linear import reference
from geneformer_kernels.ops.int8_linear.plan import WIDTH_STEP, dynamic_plan, quantize_plan, weight_only_plan
from geneformer_kernels.target import target_of


@operator("quantize_rows")
def quantize_rows_op(x: torch.Tensor, smooth: torch.Tensor | None, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [rows, K], float32 scale [rows]) of [rows, K]."""
    x = x.contiguous()  # as the results are, whoever makes them
    if impl == Impl.NUMBA:
        from geneformer_kernels.cpu import int8_products

        return int8_products.quantize_rows(x, smooth)
    if impl != Impl.TRITON or not x.numel():
        return int8_rows.quantize_rows(x, smooth)
    from geneformer_kernels.ops.int8_linear.kernel import quantize_rows_kernel

    if smooth is not None:
        # A pass of its own: what is smoothed in a block comes from its LayerNorms, whose kernel does it on the way.
        x = x.float() * smooth.float()
    n_rows, width = x.shape
    q, scale = _empty_rows(x)
    planned = quantize_plan(width)
    with launching_on(x):
        quantize_rows_kernel[(-(-n_rows // planned.block_rows),)](
            x_ptr=x,
            q_ptr=q,
            scale_ptr=scale,
            n_rows=n_rows,
            width=width,
            tiny=int8_rows.TINY,
            IS_ONE_BLOCK=planned.is_one_block,
            BLOCK_ROWS=planned.block_rows,
            BLOCK_C=planned.block_c,
            **planned.launch.options,
        )
    return q, scale


@quantize_rows_op.register_fake
def _(x, smooth, impl):
    return _empty_rows(x)


def _empty_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(x.shape[:1], dtype=torch.float32, device=x.device),
    )


@operator("int8_linear_fwd")
def int8_linear_fwd(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    mode: str,
    out_dtype: torch.dtype,
    impl: str,
    quantizer: str,
) -> torch.Tensor:
    """The linear layer on rows [M, K] by one implementation, with a gradient for ``x`` and ``bias``.

    ``quantizer`` is the implementation that quantises rows before torch's product of integers.
    """
    if impl == Impl.REFERENCE:
        with plainly_on(x):
            return reference.int8_linear(x, x_scale, weight_q, weight_scale, bias, activation, mode, out_dtype)
    if impl == Impl.NUMBA:
        from geneformer_kernels.cpu import int8_products

        return int8_products.linear(x, x_scale, weight_q, weight_scale, bias, activation, out_dtype)
    if impl == Impl.TRITON and x.numel() and weight_q.numel():
        out = torch.empty((x.shape[0], weight_q.shape[0]), dtype=out_dtype, device=x.device)
        weight_q, weight_scale = weight_q.contiguous(), weight_scale.contiguous()
        if mode == "weight_only":
            _launch_weight_only(x, weight_q, weight_scale, bias, activation, out)
        else:
            q, row_scale = (x, x_scale) if x_scale is not None else quantize_rows_op(x, None, str(Impl.TRITON))
            _launch_dynamic(q, row_scale.contiguous(), weight_q, weight_scale, bias, activation, out)
        return out
    with plainly_on(x):
        if mode == "dynamic":
            q, row_scale = (x, x_scale) if x_scale is not None else quantize_rows_op(x, None, quantizer)
            product = int8_rows.scaled_product(q, row_scale, weight_q, is_fast=True)
            return int8_rows.finish(product, weight_scale, bias, activation, out_dtype)
        weight = widened_weight(weight_q, weight_scale, x.dtype)
        return int8_rows.widened_linear(x, weight, bias, activation, out_dtype)


@int8_linear_fwd.register_fake
def _(x, x_scale, weight_q, weight_scale, bias, activation, mode, out_dtype, impl, quantizer):
    return torch.empty((x.shape[0], weight_q.shape[0]), dtype=out_dtype, device=x.device)


def _launch_dynamic(
    q: torch.Tensor,
    row_scale: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    out: torch.Tensor,
) -> None:
    from geneformer_kernels.ops.int8_linear.kernel import int8_linear_dynamic_kernel

    q, weight_q = in_whole_steps(q.contiguous(), WIDTH_STEP), in_whole_steps(weight_q, WIDTH_STEP)
    (n_rows, width), n_columns = q.shape, weight_q.shape[0]
    planned = dynamic_plan(DTYPE_NAMES[out.dtype], n_rows, n_columns, activation, target_of(q.device))
    with launching_on(q):
        int8_linear_dynamic_kernel[(-(-n_rows // planned.block_rows) * -(-n_columns // planned.block_n),)](
            q_ptr=q,
            row_scale_ptr=row_scale,
            weight_ptr=weight_q,
            scale_ptr=weight_scale,
            bias_ptr=None if bias is None else bias.contiguous(),
            out_ptr=out,
            n_rows=n_rows,
            n_columns=n_columns,
            width=width,
            ACTIVATION=activation,
            BLOCK_ROWS=planned.block_rows,
            BLOCK_N=planned.block_n,
            BLOCK_K=planned.block_k,
            GROUP=planned.group,
            **planned.launch.options,
        )


def _launch_weight_only(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    out: torch.Tensor,
) -> None:
    from geneformer_kernels.ops.int8_linear.kernel import int8_linear_weight_only_kernel

    x, weight_q = in_whole_steps(x, WIDTH_STEP), in_whole_steps(weight_q, WIDTH_STEP)
    (n_rows, width), n_columns, dtype = x.shape, weight_q.shape[0], DTYPE_NAMES[x.dtype]
    planned = weight_only_plan(dtype, n_rows, n_columns, activation)
    with launching_on(x):
        int8_linear_weight_only_kernel[(-(-n_rows // planned.block_rows) * -(-n_columns // planned.block_n),)](
            x_ptr=x.contiguous(),
            weight_ptr=weight_q,
            scale_ptr=weight_scale,
            bias_ptr=None if bias is None else bias.contiguous(),
            out_ptr=out,
            n_rows=n_rows,
            n_columns=n_columns,
            width=width,
            ACTIVATION=activation,
            PRECISION=precision_of(dtype),
            BLOCK_ROWS=planned.block_rows,
            BLOCK_N=planned.block_n,
            BLOCK_K=planned.block_k,
            **planned.launch.options,
        )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, x_scale, weight_q, weight_scale, bias, ctx.activation, ctx.mode, _, ctx.impl, ctx.quantizer = inputs
    # The input is needed only to compute again what went into the activation.
    kept = (x, x_scale) if ctx.activation else (None, None)
    ctx.save_for_backward(*kept, weight_q, weight_scale, bias)
    ctx.x_dtype = x.dtype


def _backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
    """Rounding ``x`` to int8 counts as no change (the straight-through estimator, Bengio et al., arXiv:1308.3432)."""
    x, x_scale, weight_q, weight_scale, bias = ctx.saved_tensors
    wide = torch.float64 if ctx.x_dtype == torch.float64 else torch.float32
    d_pre = d_out.to(wide)
    if ctx.activation:
        pre = int8_linear_fwd(x, x_scale, weight_q, weight_scale, bias, None, ctx.mode, wide, ctx.impl, ctx.quantizer)
        d_pre = int8_rows.activate_backward(d_pre, pre, ctx.activation)
    dx = d_bias = None
    if ctx.needs_input_grad[0]:
        with plainly_on(d_pre):
            dx = d_pre.to(ctx.x_dtype) @ widened_weight(weight_q, weight_scale, ctx.x_dtype)
    if ctx.needs_input_grad[4]:
        d_bias = d_pre.sum(0).to(bias.dtype)
    return dx, None, None, None, d_bias, None, None, None, None, None


int8_linear_fwd.register_autograd(_backward, setup_context=_setup_context)
