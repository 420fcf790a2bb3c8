"""What the operations that end in a residual addition and a LayerNorm ask of their arguments."""

from __future__ import annotations

import torch

NORMS = ("post", "pre")


def check_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm: str,
    dropout_p: float,
) -> None:
    """Look at everything but what the sublayer itself computes with.

    Raises
    ------
    ValueError
        Shapes do not fit, ``norm`` is unknown, or ``dropout_p`` is no probability.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, not {norm!r}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"x {[*x.shape]} and residual {[*residual.shape]} must have one shape")
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(f"weight {[*weight.shape]} and bias {[*bias.shape]} must be [{x.shape[-1]}]")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie between 0 and 1, not {dropout_p}")
