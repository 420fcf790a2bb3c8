"""How a linear layer is launched on a target."""

from __future__ import annotations

from geneformer_kernels.dispatch import Candidate, Impl
from geneformer_kernels.target import Target


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for a dtype on a target, best first."""
    library = {"cpu": "oneDNN or MKL", "cuda": "cuBLAS", "hip": "hipBLASLt"}.get(target.kind, "the vendor's library")
    is_packed = target.kind == "cpu" and dtype == "bfloat16" and target.has_fast_bf16
    packed = ", weights packed once for inference" if is_packed else ""
    return (
        Candidate(Impl.TORCH, True, f"torch linear through {library}{packed}"),
        Candidate(Impl.REFERENCE, True, "plain torch, any device and dtype"),
    )
