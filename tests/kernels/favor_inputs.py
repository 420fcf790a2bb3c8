"""Cells, projections and gradients for favor_attention, and what results are held against."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from geneformer_kernels import favor_attention
from geneformer_kernels.ops.favor_attention import reference
from tolerance import Witness, assert_as_good_as

LENGTHS = [5, 0, 1, 70, 33]


def cumulative(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def inputs(
    dtype: torch.dtype, head_dim: int, lengths: list[int], device: str = "cpu", *, n_heads: int = 2,
    n_features: int = 37, spread: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """A fused projection [T, 3, H, D], random features, the output's gradient and bounds; no mean is zero.

    Cells differ in size, so that a stabiliser of another cell is far off.
    """
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, n_heads, head_dim, generator=generator) * spread + 0.2
    size = torch.repeat_interleave(1 + 0.3 * torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    qkv = qkv * size[:, None, None, None]
    projection = torch.randn(n_features, head_dim, generator=generator)
    d_out = torch.randn(sum(lengths), n_heads, head_dim, generator=generator) + 0.25
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return qkv.to(device, dtype), projection.to(device, wide), d_out.to(device, dtype), cumulative(lengths, device)


def results(
    function: Callable[..., torch.Tensor], qkv: torch.Tensor, projection: torch.Tensor, d_out: torch.Tensor, *arguments,
    **options,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, gradient of qkv)."""
    qkv = qkv.detach().clone().requires_grad_()
    out = function(*qkv.unbind(1), projection, *arguments, **options)
    if not out.requires_grad:  # the reference's, where there are no tokens
        return out, torch.zeros_like(qkv)
    return out.detach(), torch.autograd.grad(out, qkv, d_out)[0]


def check(
    tensors: tuple[torch.Tensor, ...], impl: str, stabiliser: str = "cell", *, eps: float = 1e-4, factor: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and gradient are as near to float64 as the reference in the same dtype; they are returned."""
    qkv, projection, d_out, cu_seqlens = tensors
    options = dict(cu_seqlens=cu_seqlens, stabiliser=stabiliser, eps=eps)
    found = results(favor_attention, qkv, projection, d_out, **options, impl=impl)
    witness = Witness(results, reference.favor_attention, qkv, projection, d_out, **options)
    doubles = (x.double() for x in (qkv, projection, d_out))
    truth = results(reference.favor_attention, *doubles, **options)
    for value, plain, true in zip(found, witness, truth, strict=True):
        assert value.dtype == qkv.dtype
        assert_as_good_as(value, plain, true, factor=factor)
    return found
