"""How attention over packed cells is launched on a target."""

from __future__ import annotations

from dataclasses import dataclass

from geneformer_kernels.dispatch import Candidate, Impl
from geneformer_kernels.target import Target


@dataclass(frozen=True)
class AttentionPlan:
    """Attributes
    ----------
    route
        ``"sdpa"``: torch's scaled_dot_product_attention, one call per cell. ``"blocked"``: two batched matrix products
        around a softmax, a block of query rows at a time.
    block_rows
        Query rows per block of the blocked route.
    """

    route: str
    block_rows: int = 0


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for a dtype on a target, best first."""
    if target.kind == "cpu":
        torch_reason = f"torch per cell on the CPU, {plan(dtype, target, is_inference=True).route} for inference"
    else:
        torch_reason = "torch scaled_dot_product_attention per cell"
    return (
        Candidate(Impl.TORCH, True, torch_reason),
        Candidate(
            Impl.REFERENCE, True, "plain torch, any device and dtype, memory grows with the square of the length"
        ),
    )


def plan(dtype: str, target: Target, *, is_inference: bool) -> AttentionPlan:
    """The route through torch.

    Torch's fused CPU attention multiplies bfloat16 through MKL, which without AMX runs no faster than float32, while
    oneDNN's batched product uses avx512_bf16: 100 against 340 GFLOP/s on 2 cores of an EPYC with avx512_bf16
    (4 heads of 64, 1,024 tokens, 2026-11-21). It keeps no statistics for a backward pass, so it serves inference.
    """
    if target.kind == "cpu" and dtype == "bfloat16" and is_inference and "amx_bf16" not in target.features:
        return AttentionPlan("blocked", block_rows=256)
    return AttentionPlan("sdpa")
