"""A linear layer with int8 weights: the public functions."""

from __future__ import annotations

import torch

from geneformer_kernels import int8_rows
from geneformer_kernels.arguments import (
    FLOATS,
    check_choice,
    check_device,
    check_linear,
    check_matrix,
    check_optional,
    check_out_dtype,
    check_row_scales,
    check_rows,
    check_smooth,
    check_tensor,
    check_whole,
)
from geneformer_kernels.dispatch import Impl, is_forced
from geneformer_kernels.launch import MAX_DYNAMIC_WIDTH
from geneformer_kernels.on_device import DTYPE_NAMES, choose_for, constant_for_compiler
from geneformer_kernels.ops.int8_linear.launches import int8_linear_fwd, quantize_rows_op
from geneformer_kernels.ops.int8_linear.modes import mode_here
from geneformer_kernels.ops.int8_linear.plan import ACTIVATIONS, MODES, WEIGHT_ONLY_ROWS, mode_for
from geneformer_kernels.ranges import ranged
from geneformer_kernels.target import target_of


@ranged("quantize_rows")
def quantize_rows(
    x: torch.Tensor, *, smooth: torch.Tensor | None = None, impl: Impl | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``q = round(x * 127 / max(abs(x)))`` for each row, and what to multiply ``q`` by to have ``x`` again.

    Parameters
    ----------
    x
        [..., K], any floating dtype.
    smooth
        [K], any floating dtype, or None: ``x * smooth`` takes the place of ``x``, in float32. The columns of the weight
        such rows are multiplied by were divided by it, so that a large column of ``x`` costs the others no digits.
    impl
        ``"triton"``, ``"numba"``, ``"torch"`` or ``"reference"``; None chooses. All give the same numbers, but for
        ``q`` where ``scale`` is NaN.

    Returns
    -------
    q, scale
        int8 in the shape of ``x``, between -127 and 127, ties rounded to even; float32 [...]. A row of zeros has scale
        1, a row with NaN or infinity has scale NaN. No gradient.

    Raises
    ------
    TypeError, ValueError
        ``x`` is no tensor of floats, or has no axis; ``smooth`` does not fit.
    ImplUnavailableError
        An implementation asked for by name cannot run here.

    References
    ----------
    Dettmers et al., "LLM.int8()", arXiv:2208.07339 (row by row, largest magnitude); Xiao et al., "SmoothQuant",
    arXiv:2211.10438 (``smooth``).
    """
    check_rows("x", x)
    check_smooth("smooth", smooth, x)
    chosen = choose_for("quantize_rows", x, impl)
    rows = x.detach().reshape(-1, x.shape[-1]) if x.ndim != 2 else x.detach()
    q, scale = quantize_rows_op(rows, None if smooth is None else smooth.detach(), chosen)
    return q.view(x.shape), scale.view(x.shape[:-1])


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_rows` of a weight [N, K]: int8 [N, K] and the float32 scale [N] of each output channel.

    Raises
    ------
    TypeError, ValueError
        The weight is no matrix of floats, or holds NaN or infinity.
    """
    check_matrix("weight", weight)
    q, scale = int8_rows.quantize_rows(weight.detach())
    if not scale.isfinite().all():
        raise ValueError("weight holds NaN or infinity, which no int8 stands for")
    return q, scale


def int8_mode(width: int, n_columns: int, dtype: torch.dtype, device: torch.device | str) -> str:
    """What scheme int8 does with a layer on a device: ``"dynamic"`` or ``"weight_only"``, as in :func:`int8_linear`.

    ``"dynamic"`` are integer products, ``"weight_only"`` weights widened to the compute dtype where that is faster, by
    measured rows per instruction set and card. It does not depend on the number of rows, so a cell has the same numbers
    alone and among others. :func:`geneformer_kernels.ops.int8_linear.modes.mode_here` says why.

    Parameters
    ----------
    width, n_columns
        K and N of the weight [N, K].
    dtype
        Compute dtype: what activations are in.
    device
        Where the layer runs.

    Raises
    ------
    TypeError, ValueError
        Sizes are no positive integers, or the dtype is none of activations.
    """
    check_whole("width", width, 1)
    check_whole("n_columns", n_columns, 1)
    if dtype is None:
        raise TypeError("dtype must be a dtype of torch, not NoneType")
    check_out_dtype("dtype", dtype)
    place = check_device("device", device)
    return _mode_here(int(width), int(n_columns), DTYPE_NAMES[dtype], place.type, place.index)


@ranged("int8_linear")
def int8_linear(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
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
        Or int8: rows that :func:`quantize_rows`, or the operation before, has rounded.
    weight_q, weight_scale
        [N, K] int8 and [N] float32, as :func:`quantize_weight` makes them.
    bias
        [N] or None.
    x_scale
        float32 scales of int8 rows: [...], or [..., ceil(K / 128)] with one for every 128 columns. None with floats.
    activation
        ``"relu"``, ``"gelu"`` (error function), ``"gelu_tanh"`` or None.
    mode
        ``"dynamic"``: each row of ``x`` is rounded to int8, and the product is one of integers. ``"weight_only"``:
        ``x`` stays as it is, and weights are widened where they are multiplied. None: on a card weight_only up to 32
        rows and where there is no product of int8 (Volta, K above 133,144), dynamic otherwise; elsewhere as
        :func:`int8_mode` says, however many rows there are. int8 rows are always dynamic.
    out_dtype
        Dtype of the result; None is that of ``x``, and to be said where ``x`` is int8.
    impl
        ``"triton"``, ``"numba"`` (compiled loops of a CPU, for integer products), ``"torch"`` or ``"reference"``; None
        chooses.

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
        Shapes, dtypes or devices do not fit, ``x_scale`` or ``out_dtype`` is missing beside int8 rows, ``activation``
        or ``mode`` is unknown, or ``"dynamic"`` for K above 133,144, where sums of integer products leave int32.
    ImplUnavailableError
        An implementation asked for by name cannot run here.

    References
    ----------
    Dettmers et al., "LLM.int8()", arXiv:2208.07339; Jacob et al., arXiv:1712.05877 (integer products).
    """
    _check_linear(x, x_scale, weight_q, weight_scale, bias, activation, mode, out_dtype)
    (n_columns, width), out_dtype = weight_q.shape, out_dtype or x.dtype
    rows = x.reshape(-1, width) if x.ndim != 2 else x
    scale = None if x_scale is None else x_scale.reshape(rows.shape[0], *x_scale.shape[x.ndim - 1 :])
    mode = mode or _mode_of(x, rows.shape[0], weight_q)
    has_groups = scale is not None and scale.ndim == 2
    chosen = choose_for(
        "int8_linear",
        x,
        _library_for_many_rows(x, rows.shape[0], mode, impl),
        dtype=out_dtype if scale is not None else None,
        shape={"width": width, "n_columns": n_columns, "is_dynamic": mode == "dynamic"},
        triton_cannot="the Triton kernel takes one scale per row" if has_groups else "",
        numba_cannot=_why_not_loops(mode, has_groups),
    )
    # The Triton product is preceded by the Triton kernel, torch's by whichever is best here.
    needs_rows = mode == "dynamic" and scale is None and chosen == Impl.TORCH
    quantizer = choose_for("quantize_rows", x, impl) if needs_rows else chosen
    out = int8_linear_fwd(rows, scale, weight_q, weight_scale, bias, activation, mode, out_dtype, chosen, quantizer)
    return out.view(*x.shape[:-1], n_columns)


def _why_not_loops(mode: str, has_groups: bool) -> str:
    if mode == "weight_only":
        return "the compiled loops multiply integers: weights are widened for torch's products"
    return "the compiled loops take one scale per row" if has_groups else ""


def _check_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    mode: str | None,
    out_dtype: torch.dtype | None,
) -> None:
    check_tensor("x", x, (*FLOATS, torch.int8))
    check_tensor("weight_q", weight_q, (torch.int8,), device=x.device)
    check_tensor("weight_scale", weight_scale, (torch.float32,), device=x.device)
    check_optional("bias", bias, FLOATS, device=x.device)
    check_choice("activation", activation, ACTIVATIONS, may_be_none=True)
    check_choice("mode", mode, MODES, may_be_none=True)
    check_out_dtype("out_dtype", out_dtype)
    check_linear(x, weight_q, weight_scale, bias)
    check_row_scales("x_scale", x_scale, x, out_dtype)
    if x.dtype == torch.int8 and mode == "weight_only":
        raise ValueError('mode must be "dynamic" or None where x is int8, not "weight_only"')
    if weight_q.shape[1] > MAX_DYNAMIC_WIDTH and (mode == "dynamic" or x.dtype == torch.int8):
        raise ValueError(
            f"{weight_q.shape[1]:,} products of int8 may add up to more than int32 holds: "
            f'mode="dynamic" is for K up to {MAX_DYNAMIC_WIDTH:,}'
        )


def _mode_of(x: torch.Tensor, n_rows: int, weight_q: torch.Tensor) -> str:
    """What ``mode=None`` stands for."""
    if x.dtype == torch.int8:
        return "dynamic"
    n_columns, width = weight_q.shape
    if x.device.type != "cuda":
        return _mode_here(width, n_columns, DTYPE_NAMES[x.dtype], x.device.type, x.device.index)
    return mode_for(n_rows, width <= MAX_DYNAMIC_WIDTH and _has_int8_product(x.device.type, x.device.index))


def _library_for_many_rows(x: torch.Tensor, n_rows: int, mode: str, impl: Impl | str | None) -> Impl | str | None:
    """On a card, torch where nobody asks for something else: cuBLAS's product outweighs a pass that widens the weight.

    By arithmetic, not measured: at 16,384 rows the pass moves 1 % of the bytes of the product's rows.
    """
    is_many = mode == "weight_only" and x.device.type == "cuda" and n_rows > WEIGHT_ONLY_ROWS
    return Impl.TORCH if is_many and impl is None and not _is_forced() else impl


# Constant for the compiler, which cannot look at devices, blocks and the environment.
@constant_for_compiler
def _has_int8_product(device_type: str, device_index: int | None) -> bool:
    return target_of(torch.device(device_type, device_index)).has_int8_product  # type: ignore[arg-type]


@constant_for_compiler
def _is_forced() -> bool:
    return is_forced("int8_linear")


@constant_for_compiler
def _mode_here(width: int, n_columns: int, dtype: str, device_type: str, device_index: int | None) -> str:
    device = device_type if device_index is None else f"{device_type}:{device_index}"
    return mode_here(width, n_columns, dtype, target_of(device)).mode
