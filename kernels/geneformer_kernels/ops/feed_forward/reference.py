"""What the feed-forward half of a block means, alone and with the residual addition and LayerNorm after it."""

from __future__ import annotations

import math

import torch


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """ReLU, GELU by the error function, or GELU by Hendrycks and Gimpel's tanh formula (arXiv:1606.08415)."""
    if activation == "relu":
        return x.clamp_min(0)
    if activation == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise ValueError(f"no activation named {activation!r}")


def feed_forward(
    x: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """``down(activation(up(x)))``; for SwiGLU (arXiv:2002.05202) the gate rows come first in the up weight."""
    hidden = x @ up_weight.T
    if up_bias is not None:
        hidden = hidden + up_bias
    if activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        hidden = gate * torch.sigmoid(gate) * up
    else:
        hidden = activate(hidden, activation)
    out = hidden @ down_weight.T
    return out if down_bias is None else out + down_bias


def feed_forward_layernorm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    activation: str,
    eps: float,
    norm: str,
    out_dtype: torch.dtype,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(stream, out); ``keep`` is what dropout multiplies by: 0, or 1 over the probability to stay."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = feed_forward(x, up_weight, up_bias, down_weight, down_bias, activation).to(wide)
    if keep is not None:
        total = total * keep.to(wide)
    if residual is not None:
        total = total + residual.to(wide)
    mean = total.mean(-1, keepdim=True)
    variance = (total - mean).square().mean(-1, keepdim=True)
    normed = (total - mean) * torch.rsqrt(variance + eps) * weight.to(wide) + bias.to(wide)
    return normed if norm == "post" else total, normed.to(out_dtype)
