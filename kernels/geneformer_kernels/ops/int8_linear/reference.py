"""What a linear layer with int8 weights means."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# A row whose largest magnitude is below this is zero: 127 over it would be infinite in float32.
TINY = 1e-35


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, K] -> int8 [rows, K] and float32 scale [rows]: each row times 127 over its largest magnitude, rounded.

    Ties go to even. A row of zeros has scale 1, one with NaN or infinity has scale NaN.
    """
    x = x.float()
    largest = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    is_zero, is_finite = largest < TINY, largest.isfinite()
    # Tensors by tensors: torch divides by and into numbers through a reciprocal, which rounds once more.
    most = torch.full_like(largest, 127.0)
    inverse = torch.where(is_zero | ~is_finite, 0.0, most / torch.where(is_zero, 1.0, largest))
    scale = torch.where(is_zero, 1.0, torch.where(is_finite, largest / most, torch.nan))
    q = torch.round(x * inverse[..., None])
    return torch.nan_to_num(q).to(torch.int8), scale


def int8_product(q: torch.Tensor, weight_q: torch.Tensor) -> torch.Tensor:
    """[rows, K] x [N, K] int8 -> int32 [rows, N], exact: every sum is an integer that float64 holds."""
    return (q.double() @ weight_q.double().T).to(torch.int32)


def activate(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    """ReLU, GELU by the error function or by tanh; None leaves ``x``."""
    if activation == "relu":
        return F.relu(x)
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return x


def finish(
    product: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The channel's scale, bias and activation on float32 products."""
    out = product * weight_scale.to(product.dtype)
    if bias is not None:
        out = out + bias.to(out.dtype)
    return activate(out, activation).to(out_dtype)


def int8_linear(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    mode: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``activation(x @ (weight_q * weight_scale).T + bias)``; dynamic: with ``x`` rounded to int8 row by row."""
    if mode == "dynamic":
        q, row_scale = quantize_rows(x)
        product = int8_product(q, weight_q).float() * row_scale[:, None]
    else:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        product = x.to(wide) @ weight_q.to(wide).T
    return finish(product, weight_scale, bias, activation, out_dtype)
