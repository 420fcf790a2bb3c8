"""How far a result may be from the truth, judged by a witness rather than by a number somebody liked."""

from __future__ import annotations

import torch

# One rounding band per dtype: the half distance between neighbours, relative.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def max_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference from a float64 truth; NaN and infinity count as infinite."""
    if value.numel() == 0:
        return 0.0
    error = (value.double() - truth.double()).abs().max().item()
    return error if error == error else float("inf")


def assert_as_good_as(
    value: torch.Tensor, witness: torch.Tensor, truth: torch.Tensor, *, factor: float = 2.0, slack: float = 0.0
) -> None:
    """The error against float64 is at most ``factor`` times a witness's in the same dtype, plus one rounding band.

    ``slack`` comes on top: what a card's arithmetic may add beyond the witness's.
    """
    assert value.shape == truth.shape, f"{[*value.shape]} is not {[*truth.shape]}"
    band = ROUNDING[value.dtype] * max(truth.abs().max().item(), 1e-6) if truth.numel() else 0.0
    error, allowed = max_error(value, truth), factor * max_error(witness, truth) + band + slack
    assert error <= allowed, f"error {error:.3e} against float64, allowed {allowed:.3e}"


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Smallest cosine similarity over rows, in float64."""
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).min().item()
