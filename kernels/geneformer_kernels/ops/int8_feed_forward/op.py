"""The feed-forward half of a block with int8 weights: the public function, and its operator for torch."""

from __future__ import annotations

from typing import Any

import torch

from geneformer_kernels import int8_rows
from geneformer_kernels.arguments import (
    FLOATS,
    check_channels,
    check_choice,
    check_optional,
    check_out_dtype,
    check_row_scales,
    check_tensor,
)
from geneformer_kernels.dispatch import Impl
from geneformer_kernels.int8_rows import in_whole_steps, widened_weight
from geneformer_kernels.launch import MAX_DYNAMIC_WIDTH, SCALE_GROUP
from geneformer_kernels.on_device import choose_for, launching_on, plainly_on
from geneformer_kernels.operators import operator
from geneformer_kernels.ops.int8_feed_forward import reference
from geneformer_kernels.ops.int8_feed_forward.plan import ACTIVATIONS, HIDDEN_AT_ONCE, WIDTH_STEP, down_plan, up_plan
from geneformer_kernels.ranges import ranged
from geneformer_kernels.target import target_of


@operator("int8_feed_forward_fwd")
def int8_feed_forward_fwd(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    up_q: torch.Tensor,
    up_scale: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_q: torch.Tensor,
    down_scale: torch.Tensor,
    down_bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    impl: str,
) -> torch.Tensor:
    """Rows [T, C] through both layers by one implementation, with gradients for ``x`` and the biases."""
    if impl == Impl.NUMBA:
        from geneformer_kernels.cpu import int8_products

        up, down = (up_q, up_scale, up_bias), (down_q, down_scale, down_bias)
        return int8_products.feed_forward(x, x_scale, up, down, activation, out_dtype)
    values = (x, x_scale, up_q, up_scale, up_bias, down_q, down_scale, down_bias)
    with plainly_on(x):
        if impl == Impl.TRITON and x.numel() and down_q.numel():
            return _by_kernels(*values, activation, out_dtype)
        if impl == Impl.REFERENCE:
            return reference.int8_feed_forward(*values, activation, out_dtype)
        return _by_torch(*values, activation, out_dtype)


@int8_feed_forward_fwd.register_fake
def _(x, x_scale, up_q, up_scale, up_bias, down_q, down_scale, down_bias, activation, out_dtype, impl):
    return torch.empty((x.shape[0], down_q.shape[0]), dtype=out_dtype, device=x.device)


def _by_torch(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    up_q: torch.Tensor,
    up_scale: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_q: torch.Tensor,
    down_scale: torch.Tensor,
    down_bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Rows after rows, so that hidden units wider than int8 are few at any time."""
    out = torch.empty((x.shape[0], down_q.shape[0]), dtype=out_dtype, device=x.device)
    at_once = max(1, HIDDEN_AT_ONCE.get(x.device.type, 1 << 22) // max(1, up_q.shape[0]))
    for first in range(0, x.shape[0], at_once):
        here = slice(first, first + at_once)
        q, scale = int8_rows.rounded(x[here], None if x_scale is None else x_scale[here])
        hidden = int8_rows.scaled_product(q, scale, up_q, is_fast=True)
        hidden = int8_rows.finish(hidden, up_scale, up_bias, activation, torch.float32)
        product = int8_rows.scaled_product(*int8_rows.quantize_rows(hidden), down_q, is_fast=True)
        out[here] = int8_rows.finish(product, down_scale, down_bias, None, out_dtype)
    return out


def _by_kernels(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    up_q: torch.Tensor,
    up_scale: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_q: torch.Tensor,
    down_scale: torch.Tensor,
    down_bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    from geneformer_kernels.ops.int8_feed_forward.kernel import (
        int8_feed_forward_down_kernel,
        int8_feed_forward_up_kernel,
    )

    # The fast way in are rows that the LayerNorm before has rounded; floats take torch's passes.
    q, scale = int8_rows.rounded(x, x_scale)
    q, up_q, down_q = (in_whole_steps(each.contiguous(), WIDTH_STEP) for each in (q, up_q, down_q))
    (n_rows, width), ff_width = q.shape, up_scale.shape[0] // (2 if activation == "swiglu" else 1)
    n_columns, n_groups = down_q.shape[0], down_q.shape[1] // SCALE_GROUP
    hidden = torch.empty((n_rows, down_q.shape[1]), dtype=torch.int8, device=x.device)
    hidden_scale = torch.empty((n_rows, n_groups), dtype=torch.float32, device=x.device)
    out = torch.empty((n_rows, n_columns), dtype=out_dtype, device=x.device)
    target = target_of(x.device)
    up, down = up_plan(n_rows, ff_width, activation, target), down_plan(n_rows, n_columns, target)
    with launching_on(x):
        int8_feed_forward_up_kernel[(-(-n_rows // up.block_rows) * -(-ff_width // up.block_n),)](
            q_ptr=q,
            row_scale_ptr=scale.contiguous(),
            weight_ptr=up_q,
            scale_ptr=up_scale.contiguous(),
            bias_ptr=None if up_bias is None else up_bias.contiguous(),
            hidden_ptr=hidden,
            hidden_scale_ptr=hidden_scale,
            n_rows=n_rows,
            ff_width=ff_width,
            width=width,
            tiny=int8_rows.TINY,
            ACTIVATION=activation,
            BLOCK_ROWS=up.block_rows,
            BLOCK_N=up.block_n,
            BLOCK_K=up.block_k,
            GROUP=up.group,
            **up.launch.options,
        )
        int8_feed_forward_down_kernel[(-(-n_rows // down.block_rows) * -(-n_columns // down.block_n),)](
            hidden_ptr=hidden,
            hidden_scale_ptr=hidden_scale,
            weight_ptr=down_q,
            scale_ptr=down_scale.contiguous(),
            bias_ptr=None if down_bias is None else down_bias.contiguous(),
            out_ptr=out,
            n_rows=n_rows,
            n_columns=n_columns,
            n_groups=n_groups,
            BLOCK_ROWS=down.block_rows,
            BLOCK_N=down.block_n,
            BLOCK_K=down.block_k,
            GROUP=down.group,
            **down.launch.options,
        )
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, x_scale, up_q, up_scale, up_bias, down_q, down_scale, down_bias, ctx.activation, _, _ = inputs
    ctx.save_for_backward(x, x_scale, up_q, up_scale, up_bias, down_q, down_scale)
    ctx.down_dtype = None if down_bias is None else down_bias.dtype


def _backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
    """Rounding to int8 counts as no change (the straight-through estimator, Bengio et al., arXiv:1308.3432)."""
    x, x_scale, up_q, up_scale, up_bias, down_q, down_scale = ctx.saved_tensors
    dx = d_up_bias = d_down_bias = None
    d_out = d_out.float()
    if ctx.needs_input_grad[7]:
        d_down_bias = d_out.sum(0).to(ctx.down_dtype)
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[4]:
        with plainly_on(d_out):
            q, scale = int8_rows.rounded(x, x_scale)
            product = int8_rows.scaled_product(q, scale, up_q, is_fast=True)
            pre = int8_rows.finish(product, up_scale, up_bias, None, torch.float32)
            d_hidden = d_out @ widened_weight(down_q, down_scale, torch.float32)
            d_pre = int8_rows.activate_backward(d_hidden, pre, ctx.activation)
            if ctx.needs_input_grad[0]:
                dx = (d_pre @ widened_weight(up_q, up_scale, torch.float32)).to(x.dtype)
        if ctx.needs_input_grad[4]:
            d_up_bias = d_pre.sum(0).to(up_bias.dtype)
    return dx, None, None, None, d_up_bias, None, None, d_down_bias, None, None, None


int8_feed_forward_fwd.register_autograd(_backward, setup_context=_setup_context)


@ranged("int8_feed_forward")
def int8_feed_forward(
    x: torch.Tensor,
    up_q: torch.Tensor,
    up_scale: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_q: torch.Tensor,
    down_scale: torch.Tensor,
    down_bias: torch.Tensor | None,
    *,
    x_scale: torch.Tensor | None = None,
    activation: str,
    out_dtype: torch.dtype | None = None,
    impl: Impl | str | None = None,
) -> torch.Tensor:
    """``linear(activation(linear(x, up)), down)`` with int8 weights, ``x`` and the hidden units rounded to int8 rows.

    Parameters
    ----------
    x
        [T, C] floats, rounded here row by row, or int8 rows as :func:`geneformer_kernels.residual_layernorm_int8`
        writes them; more leading axes are allowed. Autocast changes nothing.
    up_q, up_scale, up_bias
        [F, C] int8, [F] float32 and [F]; for ``"swiglu"`` 2 F of each, gate rows first. The bias may be None.
    down_q, down_scale, down_bias
        [N, F] int8, [N] float32 and [N].
    x_scale
        float32 scales of int8 rows, [T]. None with floats.
    activation
        ``"relu"``, ``"gelu"`` (error function), ``"gelu_tanh"`` or ``"swiglu"`` (``silu(gate) * up``).
    out_dtype
        Dtype of the result; None is that of ``x``, and to be said where ``x`` is int8.
    impl
        ``"triton"``, ``"numba"`` (compiled loops of a CPU), ``"torch"`` or ``"reference"``; None chooses.

    Returns
    -------
    torch.Tensor
        [T, N] in ``out_dtype``. Gradients flow to a floating ``x`` and to the biases, as if nothing were rounded; the
        weights are fixed.

    Raises
    ------
    TypeError
        Something is no tensor, or no dtype.
    ValueError
        Shapes, dtypes or devices do not fit, ``x_scale`` or ``out_dtype`` is missing beside int8 rows, the activation
        is unknown, or C or F is above 133,144, where sums of integer products leave int32.
    ImplUnavailableError
        An implementation asked for by name cannot run here.

    Notes
    -----
    Hidden units are rounded with one scale per row; by kernels that spread a row over programs, with one per row and
    128 hidden units, which rounds less coarsely.

    References
    ----------
    Dettmers et al., "LLM.int8()", arXiv:2208.07339; Shazeer, arXiv:2002.05202 (SwiGLU).
    """
    _check(x, up_q, up_scale, up_bias, down_q, down_scale, down_bias, x_scale, activation, out_dtype)
    out_dtype = out_dtype or x.dtype
    shape = {"width": up_q.shape[1], "ff_width": down_q.shape[1]}
    chosen = choose_for("int8_feed_forward", x, impl, dtype=None if x_scale is None else out_dtype, shape=shape)
    rows = x.reshape(-1, x.shape[-1])
    scale = None if x_scale is None else x_scale.reshape(-1)
    out = int8_feed_forward_fwd(
        rows, scale, up_q, up_scale, up_bias, down_q, down_scale, down_bias, activation, out_dtype, chosen
    )
    return out.view(*x.shape[:-1], down_q.shape[0])


def _check(
    x: torch.Tensor,
    up_q: torch.Tensor,
    up_scale: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_q: torch.Tensor,
    down_scale: torch.Tensor,
    down_bias: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None,
) -> None:
    check_tensor("x", x, (*FLOATS, torch.int8))
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be rows of at least one column, not {[*x.shape]}")
    check_tensor("up_q", up_q, (torch.int8,), n_axes=2, device=x.device)
    check_tensor("down_q", down_q, (torch.int8,), n_axes=2, device=x.device)
    check_choice("activation", activation, ACTIVATIONS)
    check_out_dtype("out_dtype", out_dtype)
    hidden_width = down_q.shape[1] * (2 if activation == "swiglu" else 1)
    if up_q.shape != (hidden_width, x.shape[-1]):
        raise ValueError(
            f"x {[*x.shape]}, up_q {[*up_q.shape]} and down_q {[*down_q.shape]} do not fit for {activation}"
        )
    for name, scale, size in (("up_scale", up_scale, hidden_width), ("down_scale", down_scale, down_q.shape[0])):
        check_tensor(name, scale, (torch.float32,), device=x.device)
        check_channels(name, scale, size)
    for name, bias, size in (("up_bias", up_bias, hidden_width), ("down_bias", down_bias, down_q.shape[0])):
        check_optional(name, bias, FLOATS, device=x.device)
        check_channels(name, bias, size)
    check_row_scales("x_scale", x_scale, x, out_dtype, has_groups=False)
    widest = max(x.shape[-1], down_q.shape[1])
    if widest > MAX_DYNAMIC_WIDTH:
        raise ValueError(
            f"x, up_q and down_q: {widest:,} products of int8 may add up to more than int32 holds, which does for "
            f"{MAX_DYNAMIC_WIDTH:,}"
        )
