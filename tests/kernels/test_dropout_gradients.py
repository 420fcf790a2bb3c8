"""Gradients with dropout on, against differences of the function itself: whoever draws another mask backwards fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from geneformer_kernels import (
    embed_tokens,
    feed_forward_layernorm,
    residual_layernorm,
    varlen_attention_qkv,
)

Function = Callable[..., torch.Tensor]
BOUNDS = [0, 7, 7, 8, 20]
EPS = 1e-5


def drawn(*shapes: tuple[int, ...], device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(*shape, generator=generator) + 0.3).to(device, dtype) for shape in shapes]


def attention(impl: str, device: str, dtype: torch.dtype, seed: torch.Tensor) -> tuple[Function, list[torch.Tensor]]:
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device=device)

    def function(qkv: torch.Tensor) -> torch.Tensor:
        return varlen_attention_qkv(qkv, cu_seqlens=bounds, dropout_p=0.3, seed=seed, impl=impl)

    return function, drawn((20, 3, 2, 16), device=device, dtype=dtype)


def norm(impl: str, device: str, dtype: torch.dtype, seed: torch.Tensor) -> tuple[Function, list[torch.Tensor]]:
    def function(*leaves: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)  # the torch path draws from torch's generator
        stream, out = residual_layernorm(*leaves, eps=EPS, norm="post", dropout_p=0.3, seed=seed, impl=impl)
        return stream + 2 * out

    return function, drawn((20, 24), (20, 24), (24,), (24,), device=device, dtype=dtype)


def embedding(impl: str, device: str, dtype: torch.dtype, seed: torch.Tensor) -> tuple[Function, list[torch.Tensor]]:
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device=device)
    ids = (torch.arange(20, device=device) * 7) % 9

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        stream, _ = embed_tokens(ids, bounds, *leaves, eps=EPS, dropout_p=0.3, seed=seed, impl=impl)
        return stream

    return function, drawn((9, 24), (12, 24), (24,), (24,), (24,), device=device, dtype=dtype)


def feed_forward(impl: str, device: str, dtype: torch.dtype, seed: torch.Tensor) -> tuple[Function, list[torch.Tensor]]:
    def function(*leaves: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        stream, out = feed_forward_layernorm(
            *leaves, activation="gelu", eps=EPS, norm="pre", dropout_p=0.3, seed=seed, impl=impl
        )
        return stream + 2 * out

    shapes = ((5, 8), (5, 8), (12, 8), (12,), (8, 12), (8,), (8,), (8,))
    return function, drawn(*shapes, device=device, dtype=dtype)


@pytest.mark.parametrize("problem", [attention, norm, embedding, feed_forward])
def test_torch_path(problem: Callable) -> None:
    function, leaves = problem("torch", "cpu", torch.float64, torch.tensor([5]))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("problem", [attention, norm, embedding])
def test_triton_kernels(device: str, problem: Callable) -> None:
    """Float32 allows differences along a direction only: three of them, all leaves at once."""

    def slopes(seed: int) -> list[tuple[float, float]]:
        """(by differences, by the gradients) for each direction."""
        function, leaves = problem("triton", device, torch.float32, torch.tensor([seed], device=device))
        weights = torch.linspace(-1, 2, function(*leaves).numel(), device=device).double()

        def total(*values: torch.Tensor) -> torch.Tensor:
            return (function(*values).double().flatten() * weights).sum()

        leaves = [leaf.requires_grad_() for leaf in leaves]
        gradients = torch.autograd.grad(total(*leaves), leaves)
        found = []
        for direction in range(3):
            generator = torch.Generator().manual_seed(direction)
            steps = [torch.randn(leaf.shape, generator=generator).to(device) for leaf in leaves]
            with torch.no_grad():
                up, down = (
                    total(*(x + sign * 1e-2 * step for x, step in zip(leaves, steps, strict=True))) for sign in (1, -1)
                )
            along = sum((g.double() * step).sum().item() for g, step in zip(gradients, steps, strict=True))
            found.append(((up - down).item() / 2e-2, along))
        return found

    right, other = slopes(5), slopes(6)
    scale = max(abs(difference) for difference, _ in right)
    assert max(abs(difference - along) for difference, along in right) < 0.01 * scale
    # The gradients of another mask are told apart: the check can fail.
    wrong = [abs(difference - along) for (difference, _), (_, along) in zip(right, other, strict=True)]
    assert max(wrong) > 0.05 * scale
