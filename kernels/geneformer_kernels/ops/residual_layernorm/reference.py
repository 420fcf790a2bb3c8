"""What residual addition with layer normalisation means."""

from __future__ import annotations

import torch


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
