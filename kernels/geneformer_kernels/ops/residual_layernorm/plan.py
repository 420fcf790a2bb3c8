"""How residual addition with layer normalisation is launched on a target."""

from __future__ import annotations

from geneformer_kernels.dispatch import Candidate, Impl
from geneformer_kernels.target import Target


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for a dtype on a target, best first."""
    return (
        Candidate(Impl.TORCH, True, "torch add and layer_norm in float32"),
        Candidate(Impl.REFERENCE, True, "plain torch, any device and dtype"),
    )
