"""What the loss of masked gene prediction means."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def mlm_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int,
    reduction: str,
) -> torch.Tensor:
    """Cross entropy of ``hidden @ weight.T + bias`` [R, V] against targets [R], in float32 or better.

    The mean is over the rows that count, and 0 where none does.
    """
    logits = hidden @ weight.to(hidden.dtype).T
    if bias is not None:
        logits = logits + bias.to(hidden.dtype)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    loss = F.cross_entropy(logits.to(wide), targets, ignore_index=ignore_index, reduction="none")
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (targets != ignore_index).sum().clamp(min=1)
