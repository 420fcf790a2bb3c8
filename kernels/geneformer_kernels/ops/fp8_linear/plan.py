"""How a linear layer with float8 weights runs on a target."""

from __future__ import annotations

from geneformer_kernels.dispatch import Candidate, Impl
from geneformer_kernels.target import Target

OP = "fp8_linear"
ACTIVATIONS = ("relu", "gelu", "gelu_tanh")
#: What sizes of a product of float8 must be multiples of.
SIZE_STEP = 16


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for a dtype of activations on a target, best first."""
    how = "widened weights: this device has no product of float8"
    if target.has_fp8_product:
        how = "float8 products by torch._scaled_mm where bfloat16 comes out, otherwise widened weights"
    return (
        Candidate(Impl.TORCH, True, how),
        Candidate(Impl.REFERENCE, True, "plain torch, any device and dtype"),
    )


def is_dynamic(width: int, n_columns: int, out_dtype: str, target: Target) -> bool:
    """Whether rows are rounded to float8 and multiplied as such: torch._scaled_mm with scales per row.

    It gives bfloat16, and sizes are multiples of 16 (torch 2.5 to 2.13).
    """
    fits = width > 0 and n_columns > 0 and width % SIZE_STEP == 0 and n_columns % SIZE_STEP == 0
    return target.has_fp8_product and out_dtype == "bfloat16" and fits
