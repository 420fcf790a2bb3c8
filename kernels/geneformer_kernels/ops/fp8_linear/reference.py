"""What a linear layer with float8 (e4m3) weights means."""

from __future__ import annotations

import torch

from geneformer_kernels.int8_rows import finish, row_factors

#: The largest number of float8_e4m3fn.
LARGEST = 448.0


def quantize_rows_fp8(x: torch.Tensor, smooth: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, K] -> e4m3 [rows, K] and float32 scale [rows]: each row times 448 over its largest magnitude, rounded.

    With ``smooth`` [K] of the row times it, column by column. Ties go to even. A row of zeros has scale 1, one with NaN
    or infinity has scale NaN.
    """
    x = x.float()
    if smooth is not None:
        x = x * smooth.float()
    inverse, scale = row_factors(x, LARGEST)
    return torch.nan_to_num(x * inverse[..., None]).to(torch.float8_e4m3fn), scale


def fp8_linear(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    is_dynamic: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``activation(x @ (weight_q * weight_scale).T + bias)``; dynamic: with ``x`` rounded to e4m3 row by row."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if is_dynamic:
        q, row_scale = quantize_rows_fp8(x)
        product = (q.to(wide) @ weight_q.to(wide).T) * row_scale[:, None].to(wide)
    else:
        product = x.to(wide) @ weight_q.to(wide).T
    return finish(product, weight_scale, bias, activation, out_dtype)
