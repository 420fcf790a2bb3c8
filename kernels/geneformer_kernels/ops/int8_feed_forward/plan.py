"""How the feed-forward half of a block with int8 weights is launched on a target."""

from __future__ import annotations

from geneformer_kernels.dispatch import Candidate, Impl
from geneformer_kernels.target import Target

OP = "int8_feed_forward"
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "swiglu")
#: Hidden units that torch's passes hold at once, as integers and as floats.
HIDDEN_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 26}


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for a dtype of activations on a target, best first."""
    how = "integer products by torch._int_mm" if target.has_int8_product else "exact products of integers as float32"
    return (
        Candidate(Impl.TORCH, True, f"{how}, rows rounded by torch's passes"),
        Candidate(Impl.REFERENCE, True, "plain torch, any device and dtype, products in float64"),
    )
