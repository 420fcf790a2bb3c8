"""A linear layer with int8 weights: the public functions, and their operators for torch."""

from __future__ import annotations

from typing import Any

import torch

from geneformer_kernels.arguments import FLOATS, check_choice, check_optional, check_out_dtype, check_tensor
from geneformer_kernels.dispatch import Impl
from geneformer_kernels.launch import precision_of
from geneformer_kernels.on_device import DTYPE_NAMES, choose_for, constant_for_compiler, launching_on, plainly_on
from geneformer_kernels.operators import operator
from geneformer_kernels.ops.int8_linear import reference
from geneformer_kernels.ops.int8_linear.plan import (
    ACTIVATIONS,
    MODES,
    WIDTH_STEP,
    dynamic_plan,
    has_int8_product,
    mode_for,
    quantize_plan,
    weight_only_plan,
)
from geneformer_kernels.target import target_of

# Sums of int8 products over so many columns are integers below 2**24, which float32 holds exactly.
EXACT_COLUMNS = 1024
# ... and over so many below 2**31, which int32 holds.
MAX_DYNAMIC_WIDTH = (2**31 - 1) // 127**2


@operator("quantize_rows")
def quantize_rows_op(x: torch.Tensor, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [rows, K], float32 scale [rows]) of [rows, K]."""
    x = x.contiguous()  # as the results are, whoever makes them
    if impl != Impl.TRITON or not x.numel():
        return reference.quantize_rows(x)
    from geneformer_kernels.ops.int8_linear.kernel import quantize_rows_kernel

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
            tiny=reference.TINY,
            IS_ONE_BLOCK=planned.is_one_block,
            BLOCK_ROWS=planned.block_rows,
            BLOCK_C=planned.block_c,
            **planned.launch.options,
        )
    return q, scale


@quantize_rows_op.register_fake
def _(x, impl):
    return _empty_rows(x)


def _empty_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(x.shape[:1], dtype=torch.float32, device=x.device),
    )


@operator("int8_linear_fwd")
def int8_linear_fwd(
    x: torch.Tensor,
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
            return reference.int8_linear(x, weight_q, weight_scale, bias, activation, mode, out_dtype)
    if impl == Impl.TRITON and x.numel() and weight_q.numel():
        out = torch.empty((x.shape[0], weight_q.shape[0]), dtype=out_dtype, device=x.device)
        launch = _launch_dynamic if mode == "dynamic" else _launch_weight_only
        launch(x, weight_q.contiguous(), weight_scale.contiguous(), bias, activation, out)
        return out
    with plainly_on(x):
        if mode == "dynamic":
            q, row_scale = quantize_rows_op(x, quantizer)
            product = _int8_product(q, weight_q).float() * row_scale[:, None]
        else:
            product = x @ _dequantised(weight_q, weight_scale, x.dtype).T
            product = product if product.dtype == torch.float64 else product.float()
            weight_scale = torch.ones_like(weight_scale)
        return reference.finish(product, weight_scale, bias, activation, out_dtype)


def _dequantised(weight_q: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # Scaled before it is narrowed: sums of unscaled products leave float16's range.
    return (weight_q * weight_scale[:, None]).to(dtype)


@int8_linear_fwd.register_fake
def _(x, weight_q, weight_scale, bias, activation, mode, out_dtype, impl, quantizer):
    return torch.empty((x.shape[0], weight_q.shape[0]), dtype=out_dtype, device=x.device)


def _launch_dynamic(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    out: torch.Tensor,
) -> None:
    from geneformer_kernels.ops.int8_linear.kernel import int8_linear_dynamic_kernel

    q, row_scale = quantize_rows_op(x, str(Impl.TRITON))
    q, weight_q = _in_whole_steps(q), _in_whole_steps(weight_q)
    (n_rows, width), n_columns = q.shape, weight_q.shape[0]
    planned = dynamic_plan(DTYPE_NAMES[out.dtype], n_rows, n_columns, activation, target_of(x.device))
    with launching_on(x):
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

    x, weight_q = _in_whole_steps(x), _in_whole_steps(weight_q)
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


def _in_whole_steps(x: torch.Tensor) -> torch.Tensor:
    """Zeros, which add nothing to a product, up to a width that the kernels take."""
    return _padded(x, x.shape[0], x.shape[1] + -x.shape[1] % WIDTH_STEP)


def _int8_product(q: torch.Tensor, weight_q: torch.Tensor) -> torch.Tensor:
    """[M, K] x [N, K] int8 -> int32 [M, N], exact on every device."""
    (n_rows, width), n_columns = q.shape, weight_q.shape[0]
    if not has_int8_product(target_of(q.device)):
        out = torch.zeros((n_rows, n_columns), dtype=torch.int32, device=q.device)
        for one, other in zip(q.split(EXACT_COLUMNS, 1), weight_q.split(EXACT_COLUMNS, 1), strict=True):
            out += (one.float() @ other.float().T).to(torch.int32)
        return out
    if q.device.type == "cuda":
        # cuBLAS takes more than 16 rows, and multiples of 8 of the rest: zeros add nothing.
        even = width + -width % 8
        q, weight_q = _padded(q, max(17, n_rows), even), _padded(weight_q, n_columns + -n_columns % 8, even)
    # On the CPU the product reads a weight expanded over its channels as if it were not.
    return torch._int_mm(q, weight_q.contiguous().T)[:n_rows, :n_columns]


def _padded(x: torch.Tensor, n_rows: int, width: int) -> torch.Tensor:
    if x.shape == (n_rows, width):
        return x
    return torch.nn.functional.pad(x, (0, width - x.shape[1], 0, n_rows - x.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight_q, weight_scale, bias, ctx.activation, ctx.mode, _, ctx.impl, ctx.quantizer = inputs
    # The input is needed only to compute again what went into the activation.
    ctx.save_for_backward(x if ctx.activation else None, weight_q, weight_scale, bias)
    ctx.x_dtype = x.dtype


def _backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
    """Rounding ``x`` to int8 counts as no change (the straight-through estimator, Bengio et al., arXiv:1308.3432)."""
    x, weight_q, weight_scale, bias = ctx.saved_tensors
    wide = torch.float64 if ctx.x_dtype == torch.float64 else torch.float32
    d_pre = d_out.to(wide)
    if ctx.activation:
        pre = int8_linear_fwd(x, weight_q, weight_scale, bias, None, ctx.mode, wide, ctx.impl, ctx.quantizer)
        if ctx.activation == "relu":
            d_pre = torch.where(pre > 0, d_pre, 0.0)
        else:
            approximate = "tanh" if ctx.activation == "gelu_tanh" else "none"
            d_pre = torch.ops.aten.gelu_backward(d_pre, pre, approximate=approximate)
    dx = d_bias = None
    if ctx.needs_input_grad[0]:
        with plainly_on(d_pre):
            dx = d_pre.to(ctx.x_dtype) @ _dequantised(weight_q, weight_scale, ctx.x_dtype)
    if ctx.needs_input_grad[3]:
        d_bias = d_pre.sum(0).to(bias.dtype)
    return dx, None, None, d_bias, None, None, None, None, None


int8_linear_fwd.register_autograd(_backward, setup_context=_setup_context)


def quantize_rows(x: torch.Tensor, *, impl: Impl | str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``q = round(x * 127 / max(abs(x)))`` for each row, and what to multiply ``q`` by to have ``x`` again.

    Parameters
    ----------
    x
        [..., K], any floating dtype.
    impl
        ``"triton"``, ``"torch"`` or ``"reference"``; None chooses. All give the same numbers, but for ``q`` where
        ``scale`` is NaN.

    Returns
    -------
    q, scale
        int8 in the shape of ``x``, between -127 and 127, ties rounded to even; float32 [...]. A row of zeros has scale
        1, a row with NaN or infinity has scale NaN. No gradient.

    Raises
    ------
    TypeError, ValueError
        ``x`` is no tensor of floats, or has no axis.
    ImplUnavailableError
        An implementation asked for by name cannot run here.

    References
    ----------
    Dettmers et al., "LLM.int8()", arXiv:2208.07339 (row by row, largest magnitude).
    """
    check_tensor("x", x, FLOATS)
    if x.ndim == 0:
        raise ValueError("x must be rows, not a single number")
    chosen = choose_for("quantize_rows", x, impl)
    q, scale = quantize_rows_op(x.detach().reshape(-1, x.shape[-1]) if x.ndim != 2 else x.detach(), chosen)
    return q.view(x.shape), scale.view(x.shape[:-1])


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_rows` of a weight [N, K]: int8 [N, K] and the float32 scale [N] of each output channel.

    Raises
    ------
    TypeError, ValueError
        The weight is no matrix of floats, or holds NaN or infinity.
    """
    check_tensor("weight", weight, FLOATS)
    if weight.ndim != 2:
        raise ValueError(f"weight must be [N, K], not {[*weight.shape]}")
    q, scale = reference.quantize_rows(weight.detach())
    if not scale.isfinite().all():
        raise ValueError("weight holds NaN or infinity, which no int8 stands for")
    return q, scale


def int8_linear(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    mode: str | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl | str | None = None,
) -> torch.Tensor:
    """``activation(linear(x, weight_q * weight_scale[:, None], bias))``.

    Parameters
    ----------
    x
        [..., K], float16, bfloat16 or float32; float64 without Triton. Autocast changes nothing: ``x`` keeps its dtype.
    weight_q, weight_scale
        [N, K] int8 and [N] float32, as :func:`quantize_weight` makes them.
    bias
        [N] or None.
    activation
        ``"relu"``, ``"gelu"`` (error function), ``"gelu_tanh"`` or None.
    mode
        ``"dynamic"``: each row of ``x`` is rounded to int8, and the product is one of integers. ``"weight_only"``:
        ``x`` stays as it is, and weights are widened where they are multiplied. None: weight_only up to 32 rows and
        where there is no product of int8 (Volta, K above 133,144), dynamic otherwise.
    out_dtype
        Dtype of the result; None is that of ``x``.
    impl
        ``"triton"``, ``"torch"`` or ``"reference"``; None chooses.

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
        Shapes, dtypes or devices do not fit, ``activation`` or ``mode`` is unknown, or ``"dynamic"``
        for K above 133,144, where sums of integer products leave int32.
    ImplUnavailableError
        An implementation asked for by name cannot run here.

    References
    ----------
    Dettmers et al., "LLM.int8()", arXiv:2208.07339; Jacob et al., arXiv:1712.05877 (integer products).
    """
    check_tensor("x", x, FLOATS)
    check_tensor("weight_q", weight_q, (torch.int8,), device=x.device)
    check_tensor("weight_scale", weight_scale, (torch.float32,), device=x.device)
    check_optional("bias", bias, FLOATS, device=x.device)
    check_choice("activation", activation, ACTIVATIONS, may_be_none=True)
    check_choice("mode", mode, MODES, may_be_none=True)
    check_out_dtype("out_dtype", out_dtype)
    if weight_q.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight_q.shape[1]:
        raise ValueError(f"x {[*x.shape]} and weight_q {[*weight_q.shape]} do not fit: [..., K] and [N, K] are needed")
    for name, each in (("weight_scale", weight_scale), ("bias", bias)):
        if each is not None and each.shape != weight_q.shape[:1]:
            raise ValueError(f"{name} {[*each.shape]} must be [{weight_q.shape[0]}]")
    rows = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    is_too_wide = weight_q.shape[1] > MAX_DYNAMIC_WIDTH
    if mode == "dynamic" and is_too_wide:
        raise ValueError(
            f"{weight_q.shape[1]:,} products of int8 may add up to more than int32 holds: "
            f'mode="dynamic" is for K up to {MAX_DYNAMIC_WIDTH:,}'
        )
    has_product = not is_too_wide and _has_int8_product(x.device.type, x.device.index)
    mode = mode or mode_for(rows.shape[0], has_product)
    shape = {"width": weight_q.shape[1], "n_columns": weight_q.shape[0], "is_dynamic": mode == "dynamic"}
    chosen = choose_for("int8_linear", x, impl, shape=shape)
    # The Triton product is preceded by the Triton kernel, torch's by whichever is best here.
    quantizer = choose_for("quantize_rows", x, impl) if mode == "dynamic" and chosen == Impl.TORCH else chosen
    out_dtype = out_dtype or x.dtype
    out = int8_linear_fwd(rows, weight_q, weight_scale, bias, activation, mode, out_dtype, chosen, quantizer)
    return out.view(*x.shape[:-1], weight_q.shape[0])


# Constant for the compiler, which cannot look at devices.
@constant_for_compiler
def _has_int8_product(device_type: str, device_index: int | None) -> bool:
    return has_int8_product(target_of(torch.device(device_type, device_index)))  # type: ignore[arg-type]
