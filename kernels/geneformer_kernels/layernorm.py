"""What the operations that end in a residual addition and a LayerNorm ask of their arguments."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from geneformer_kernels.arguments import (
    FLOATS,
    check_choice,
    check_optional,
    check_out_dtype,
    check_positive,
    check_probability,
    check_seed,
    check_tensor,
)

NORMS = ("post", "pre")


def check_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
    norm: str,
    dropout_p: float,
    out_dtype: torch.dtype | None,
    seed: torch.Tensor | None,
) -> None:
    """Look at everything but what the sublayer itself computes with.

    Raises
    ------
    TypeError
        Something is no tensor, or no number.
    ValueError
        Shapes, dtypes or devices do not fit, ``norm`` is unknown, ``eps`` is not positive, or ``dropout_p`` is no
        probability.
    """
    check_tensor("x", x, FLOATS)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be rows of at least one column, not {[*x.shape]}")
    check_optional("residual", residual, FLOATS, device=x.device)
    check_tensor("weight", weight, FLOATS, device=x.device)
    check_tensor("bias", bias, FLOATS, device=x.device)
    check_choice("norm", norm, NORMS)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"x {[*x.shape]} and residual {[*residual.shape]} must have one shape")
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(f"weight {[*weight.shape]} and bias {[*bias.shape]} must be [{x.shape[-1]}]")
    check_positive("eps", eps)
    check_probability("dropout_p", dropout_p)
    check_out_dtype("out_dtype", out_dtype)
    check_seed("seed", seed, x.device)


def added_and_normalised(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, and the LayerNorm of it, by torch's passes: both float32, or float64 of float64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # The sum of a half and a float32 is float32: no copy of the half is made.
    total = x.to(wide) if residual is None else residual.to(wide) + x
    return total, F.layer_norm(total, x.shape[-1:], weight.to(wide), bias.to(wide), eps)
