"""What a linear layer with int8 weights means."""

from __future__ import annotations

import torch

from geneformer_kernels.int8_rows import finish, quantize_rows, scaled_product


def int8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    mode: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``activation(x @ (weight_q * weight_scale).T + bias)``; dynamic: with ``x`` rounded to int8 row by row.

    Where ``x`` comes as int8 rows, ``x_scale`` is theirs.
    """
    if x_scale is not None:
        product = scaled_product(x, x_scale, weight_q)
    elif mode == "dynamic":
        product = scaled_product(*quantize_rows(x), weight_q)
    else:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        product = x.to(wide) @ weight_q.to(wide).T
    return finish(product, weight_scale, bias, activation, out_dtype)
