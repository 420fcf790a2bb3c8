"""How a linear layer is launched on a target."""

from __future__ import annotations

from geneformer_kernels.dispatch import Candidate, Impl, compiled_float32_candidate
from geneformer_kernels.target import Target


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for a dtype on a target, best first."""
    library = {"cpu": "oneDNN or MKL", "cuda": "cuBLAS", "hip": "hipBLASLt"}.get(target.kind, "the vendor's library")
    torch = Candidate(Impl.TORCH, True, f"torch linear through {library}")
    reference = Candidate(Impl.REFERENCE, True, "plain torch, any device and dtype")
    if target.kind != "cpu":
        return torch, reference
    loops = compiled_float32_candidate(dtype, target, "tiles of six rows")
    return (loops, torch, reference) if target.prefers_float32_loops else (torch, loops, reference)
