"""What a linear layer means."""

from __future__ import annotations

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias``; x [T, C], weight [N, C] -> [T, N]."""
    out = x @ weight.T
    return out if bias is None else out + bias
