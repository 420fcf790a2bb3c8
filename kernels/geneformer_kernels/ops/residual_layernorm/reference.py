"""What residual addition with layer normalisation means."""

from __future__ import annotations

import torch

from geneformer_kernels.int8_rows import quantize_rows


def residual_layernorm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    norm: str,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum, normalise over the last axis; returns (stream, out) where the stream is in the residual's precision."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    mean = total.mean(-1, keepdim=True)
    variance = (total - mean).square().mean(-1, keepdim=True)
    normed = (total - mean) * torch.rsqrt(variance + eps) * weight.to(wide) + bias.to(wide)
    stream = normed if norm == "post" else total
    return stream, normed.to(out_dtype)


def residual_layernorm_int8(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    norm: str,
    smooth: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(stream, q, scale): :func:`residual_layernorm`, of which the value to compute on is rounded to int8 rows."""
    stream, normed = residual_layernorm(x, residual, weight, bias, eps, norm, torch.float32)
    return stream, *quantize_rows(normed, smooth)
