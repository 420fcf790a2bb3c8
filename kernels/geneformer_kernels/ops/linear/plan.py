"""How a linear layer is launched on a target."""

from __future__ import annotations

from geneformer_kernels.dispatch import Candidate, Impl
from geneformer_kernels.target import Target


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for a dtype on a target, best first."""
    library = {"cpu": "oneDNN or MKL", "cuda": "cuBLAS", "hip": "hipBLASLt"}.get(target.kind, "the vendor's library")
    return (
        Candidate(Impl.TORCH, True, f"torch linear through {library}"),
        Candidate(Impl.REFERENCE, True, "plain torch, any device and dtype"),
    )
