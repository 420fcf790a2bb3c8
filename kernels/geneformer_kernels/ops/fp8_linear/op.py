"""A linear layer with float8 (e4m3) weights: the public functions, and their operator for torch."""

from __future__ import annotations

from typing import Any

import torch

from geneformer_kernels import int8_rows
from geneformer_kernels.arguments import (
    FLOATS,
    check_choice,
    check_linear,
    check_matrix,
    check_optional,
    check_out_dtype,
    check_rows,
    check_smooth,
    check_tensor,
)
from geneformer_kernels.dispatch import Impl
from geneformer_kernels.int8_rows import widened_weight
from geneformer_kernels.on_device import DTYPE_NAMES, choose_for, constant_for_compiler, plainly_on
from geneformer_kernels.operators import operator
from geneformer_kernels.ops.fp8_linear import reference
from geneformer_kernels.ops.fp8_linear.plan import ACTIVATIONS, is_dynamic
from geneformer_kernels.ranges import ranged
from geneformer_kernels.target import target_of


@operator("fp8_linear_fwd")
def fp8_linear_fwd(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    is_dynamic: bool,
    out_dtype: torch.dtype,
    impl: str,
) -> torch.Tensor:
    """The linear layer on rows [M, K] by one implementation, with a gradient for ``x`` and ``bias``."""
    with plainly_on(x):
        if impl == Impl.REFERENCE:
            return reference.fp8_linear(x, weight_q, weight_scale, bias, activation, is_dynamic, out_dtype)
        if is_dynamic and x.numel():
            return int8_rows.activate(_scaled_product(x, weight_q, weight_scale, bias, out_dtype), activation)
        weight = widened_weight(weight_q, weight_scale, x.dtype)
        return int8_rows.widened_linear(x, weight, bias, activation, out_dtype)


@fp8_linear_fwd.register_fake
def _(x, weight_q, weight_scale, bias, activation, is_dynamic, out_dtype, impl):
    return torch.empty((x.shape[0], weight_q.shape[0]), dtype=out_dtype, device=x.device)


def _scaled_product(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    q, row_scale = reference.quantize_rows_fp8(x)
    # Sums in full float32: Hopper's fast ones keep 14 bits (DeepSeek-V3, arXiv:2412.19437, section 3.3.2).
    return torch._scaled_mm(
        q.contiguous(),
        weight_q.contiguous().T,
        scale_a=row_scale[:, None],
        scale_b=weight_scale.contiguous()[None, :],
        bias=None if bias is None else bias.to(out_dtype),
        out_dtype=out_dtype,
        use_fast_accum=False,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight_q, weight_scale, bias, ctx.activation, ctx.is_dynamic, ctx.out_dtype, ctx.impl = inputs
    # The input is needed only to compute again what went into the activation.
    ctx.save_for_backward(x if ctx.activation else None, weight_q, weight_scale, bias)
    ctx.x_dtype = x.dtype


def _backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
    """Rounding ``x`` counts as no change (the straight-through estimator, Bengio et al., arXiv:1308.3432)."""
    x, weight_q, weight_scale, bias = ctx.saved_tensors
    wide = torch.float64 if ctx.x_dtype == torch.float64 else torch.float32
    d_pre = d_out.to(wide)
    if ctx.activation:
        kept = ctx.out_dtype if ctx.is_dynamic else wide  # float8 products come in bfloat16 only
        pre = fp8_linear_fwd(x, weight_q, weight_scale, bias, None, ctx.is_dynamic, kept, ctx.impl)
        d_pre = int8_rows.activate_backward(d_pre, pre.to(wide), ctx.activation)
    dx = d_bias = None
    if ctx.needs_input_grad[0]:
        with plainly_on(d_pre):
            dx = d_pre.to(ctx.x_dtype) @ widened_weight(weight_q, weight_scale, ctx.x_dtype)
    if ctx.needs_input_grad[3]:
        d_bias = d_pre.sum(0).to(bias.dtype)
    return dx, None, None, d_bias, None, None, None, None


fp8_linear_fwd.register_autograd(_backward, setup_context=_setup_context)


def quantize_rows_fp8(x: torch.Tensor, *, smooth: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``q = (x * 448 / max(abs(x))).to(float8_e4m3fn)`` for each row, and what to multiply ``q`` by for ``x``.

    Parameters
    ----------
    x
        [..., K], any floating dtype.
    smooth
        [K], any floating dtype, or None: ``x * smooth`` takes the place of ``x``, in float32.

    Returns
    -------
    q, scale
        float8_e4m3fn in the shape of ``x``, ties rounded to even; float32 [...]. A row of zeros has scale 1, a row with
        NaN or infinity has scale NaN. No gradient.

    Raises
    ------
    TypeError, ValueError
        ``x`` is no tensor of floats, or has no axis; ``smooth`` does not fit.

    References
    ----------
    Micikevicius et al., "FP8 formats for deep learning", arXiv:2209.05433.
    """
    check_rows("x", x)
    check_smooth("smooth", smooth, x)
    return reference.quantize_rows_fp8(x.detach().contiguous(), None if smooth is None else smooth.detach())


def quantize_weight_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_rows_fp8` of a weight [N, K]: e4m3 [N, K] and the float32 scale [N] of each output channel.

    Raises
    ------
    TypeError, ValueError
        The weight is no matrix of floats, or holds NaN or infinity.
    """
    check_matrix("weight", weight)
    q, scale = reference.quantize_rows_fp8(weight.detach().contiguous())
    if not scale.isfinite().all():
        raise ValueError("weight holds NaN or infinity, which no scale brings into float8")
    return q, scale


@ranged("fp8_linear")
def fp8_linear(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl | str | None = None,
) -> torch.Tensor:
    """``activation(linear(x, weight_q * weight_scale[:, None], bias))``.

    Where the card multiplies float8 (Ada, Hopper), bfloat16 comes out, and K and N are multiples of 16, each row of
    ``x`` is rounded to e4m3 too. Everywhere else ``x`` stays as it is, and the weight is widened for the product.

    Parameters
    ----------
    x
        [..., K], float16, bfloat16, float32 or float64. Autocast changes nothing: ``x`` keeps its dtype.
    weight_q, weight_scale
        [N, K] float8_e4m3fn and [N] float32, as :func:`quantize_weight_fp8` makes them.
    bias
        [N] or None.
    activation
        ``"relu"``, ``"gelu"`` (error function), ``"gelu_tanh"`` or None.
    out_dtype
        Dtype of the result; None is that of ``x``.
    impl
        ``"torch"`` or ``"reference"``; None chooses.

    Returns
    -------
    torch.Tensor
        [..., N] in ``out_dtype``. Gradients flow to ``x`` (through the widened weight, as if ``x`` were not rounded)
        and to ``bias``; the weight is fixed.

    Raises
    ------
    TypeError
        Something is no tensor, or no dtype.
    ValueError
        Shapes, dtypes or devices do not fit, or ``activation`` is unknown.
    ImplUnavailableError
        An implementation asked for by name cannot run here.

    References
    ----------
    Micikevicius et al., "FP8 formats for deep learning", arXiv:2209.05433.
    """
    check_tensor("x", x, FLOATS)
    check_tensor("weight_q", weight_q, (torch.float8_e4m3fn,), device=x.device)
    check_tensor("weight_scale", weight_scale, (torch.float32,), device=x.device)
    check_optional("bias", bias, FLOATS, device=x.device)
    check_choice("activation", activation, ACTIVATIONS, may_be_none=True)
    check_out_dtype("out_dtype", out_dtype)
    check_linear(x, weight_q, weight_scale, bias)
    out_dtype, (n_columns, width) = out_dtype or x.dtype, weight_q.shape
    chosen = choose_for("fp8_linear", x, impl, shape={"width": width, "n_columns": n_columns})
    rounds = _is_dynamic(width, n_columns, DTYPE_NAMES[out_dtype], x.device.type, x.device.index)
    rows = x.reshape(-1, width) if x.ndim != 2 else x
    out = fp8_linear_fwd(rows, weight_q, weight_scale, bias, activation, rounds, out_dtype, chosen)
    return out.view(*x.shape[:-1], n_columns)


# Constant for the compiler, which cannot look at devices.
@constant_for_compiler
def _is_dynamic(width: int, n_columns: int, out_dtype: str, device_type: str, device_index: int | None) -> bool:
    device = device_type if device_index is None else f"{device_type}:{device_index}"
    return is_dynamic(width, n_columns, out_dtype, target_of(device))
