"""What operations on int8 rows share: rounding rows, exact products of integers, and what a scale means.

Rows are ``q`` [T, K] int8 with ``scale`` [T] float32, or [T, G] with one scale for every 128 columns
(:data:`geneformer_kernels.launch.SCALE_GROUP`; the last group may be shorter). Any device, plain torch: kernels answer
to this.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from geneformer_kernels.launch import SCALE_GROUP
from geneformer_kernels.target import target_of

#: A row whose largest magnitude is below this is zero: 127 over it would be infinite in float32.
TINY = 1e-35
#: Sums of int8 products over so many columns are integers below 2**24, which float32 holds exactly.
EXACT_COLUMNS = 1024


def quantize_rows(x: torch.Tensor, smooth: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, K] -> int8 [rows, K] and float32 scale [rows]: each row times 127 over its largest magnitude, rounded.

    With ``smooth`` [K] of the row times it, column by column. Ties go to even. A row of zeros has scale 1, one with NaN
    or infinity has scale NaN.
    """
    x = x.float()
    if smooth is not None:
        x = x * smooth.float()
    inverse, scale = row_factors(x, 127.0)
    q = torch.round(x * inverse[..., None])
    return torch.nan_to_num(q).to(torch.int8), scale


def row_factors(x: torch.Tensor, most: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows [..., K] of float32 are multiplied by, so that their largest magnitude becomes ``most``, and back.

    Returns
    -------
    inverse, scale
        [...] float32: 0 and 1 of a row of zeros, 0 and NaN of one with NaN or infinity.
    """
    largest = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    is_zero, is_finite = largest < TINY, largest.isfinite()
    # Tensors by tensors: torch divides by and into numbers through a reciprocal, which rounds once more.
    wanted = torch.full_like(largest, most)
    inverse = torch.where(is_zero | ~is_finite, 0.0, wanted / torch.where(is_zero, 1.0, largest))
    scale = torch.where(is_zero, 1.0, torch.where(is_finite, largest / wanted, torch.nan))
    return inverse, scale


def quantize_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_rows` of every 128 columns by themselves: int8 [rows, K], float32 [rows, G]."""
    width = x.shape[-1]
    groups = F.pad(x, (0, -width % SCALE_GROUP)).unflatten(-1, (-1, SCALE_GROUP))
    q, scale = quantize_rows(groups)
    return q.flatten(-2)[..., :width].contiguous(), scale


def int8_product(q: torch.Tensor, weight_q: torch.Tensor) -> torch.Tensor:
    """[rows, K] x [N, K] int8 -> int32 [rows, N], exact: every sum is an integer that float64 holds."""
    return (q.double() @ weight_q.double().T).to(torch.int32)


def fast_int8_product(q: torch.Tensor, weight_q: torch.Tensor) -> torch.Tensor:
    """:func:`int8_product` by the instructions that the device has: exact on every one."""
    (n_rows, width), n_columns = q.shape, weight_q.shape[0]
    if not target_of(q.device).has_int8_product:
        out = torch.zeros((n_rows, n_columns), dtype=torch.int32, device=q.device)
        for one, other in zip(q.split(EXACT_COLUMNS, 1), weight_q.split(EXACT_COLUMNS, 1), strict=True):
            out += (one.float() @ other.float().T).to(torch.int32)
        return out
    if q.device.type == "cuda":
        # cuBLAS takes more than 16 rows, and multiples of 8 of the rest: zeros add nothing.
        even = width + -width % 8
        q, weight_q = padded(q, max(17, n_rows), even), padded(weight_q, n_columns + -n_columns % 8, even)
    elif width == 1:
        # oneDNN takes [1, N] with strides of 1 and 1 for another layout, and multiplies wrong numbers (torch 2.13).
        q, weight_q = padded(q, n_rows, 2), padded(weight_q, n_columns, 2)
    # On the CPU the product reads a weight expanded over its channels as if it were not.
    return torch._int_mm(q.contiguous(), weight_q.contiguous().T)[:n_rows, :n_columns]


def padded(x: torch.Tensor, n_rows: int, width: int) -> torch.Tensor:
    """Zeros behind the rows and the columns of a matrix, which add nothing to a product."""
    if x.shape == (n_rows, width):
        return x
    return F.pad(x, (0, width - x.shape[1], 0, n_rows - x.shape[0]))


def in_whole_steps(x: torch.Tensor, step: int) -> torch.Tensor:
    """Zeros behind the columns up to a width that kernels take, a multiple of ``step``."""
    return padded(x, x.shape[0], x.shape[1] + -x.shape[1] % step)


def rounded(x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_rows` of floats; int8 rows come with their ``scale`` and stay what they are."""
    return quantize_rows(x) if scale is None else (x, scale)


def scaled_product(
    q: torch.Tensor, scale: torch.Tensor, weight_q: torch.Tensor, *, is_fast: bool = False
) -> torch.Tensor:
    """float32 [rows, N]: the integer product times the rows' scales; of several scales, group by group in order."""
    product = fast_int8_product if is_fast else int8_product
    if scale.ndim == 1:
        return product(q, weight_q).float() * scale[:, None]
    out = torch.zeros((q.shape[0], weight_q.shape[0]), dtype=torch.float32, device=q.device)
    for i, (rows, weights) in enumerate(zip(q.split(SCALE_GROUP, 1), weight_q.split(SCALE_GROUP, 1), strict=True)):
        out = out + product(rows, weights).float() * scale[:, i, None]
    return out


def activate(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    """ReLU, GELU by the error function or by tanh, SwiGLU (gate columns first); None leaves ``x``."""
    if activation == "relu":
        return F.relu(x)
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    return x


def activate_backward(d_out: torch.Tensor, x: torch.Tensor, activation: str | None) -> torch.Tensor:
    """The gradient of what went into :func:`activate`, ``x``."""
    if activation == "relu":
        return torch.where(x > 0, d_out, 0.0)
    if activation in ("gelu", "gelu_tanh"):
        return torch.ops.aten.gelu_backward(d_out, x, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        logistic = torch.sigmoid(gate)
        d_gate = d_out * up * logistic * (1 + gate * (1 - logistic))
        return torch.cat([d_gate, d_out * gate * logistic], -1)
    return d_out


def finish(
    product: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The channel's scale, if it is not in the product yet, bias and activation on float32 products."""
    out = product if weight_scale is None else product * weight_scale.to(product.dtype)
    if bias is not None:
        out = out + bias.to(out.dtype)
    return activate(out, activation).to(out_dtype)


def widened_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """``activation(x @ weight.T + bias)`` of a weight that was widened to the dtype of ``x``."""
    product = x @ weight.T
    product = product if product.dtype == torch.float64 else product.float()
    return finish(product, None, bias, activation, out_dtype)


def widened_weight(weight_q: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a weight of int8 or float8 stands for, in ``dtype``; scaled before it is narrowed, as sums of unscaled
    products leave float16's range."""
    if weight_q.device.type == "cpu" and weight_q.dtype == torch.int8:
        # Imported late: numba is needed on this branch only.
        from geneformer_kernels.cpu.widened_rows import is_for_loops, widened_rows

        if is_for_loops(weight_q, dtype):
            return widened_rows(weight_q, weight_scale, dtype)
    weight_q = weight_q.float() if weight_q.is_floating_point() else weight_q  # float8 multiplies nothing
    return (weight_q * weight_scale[:, None]).to(dtype)
