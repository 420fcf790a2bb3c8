"""Blocks of an encoder for the Triton kernels of feed_forward, and what results are held against."""

from __future__ import annotations

import pytest
import torch
from geneformer_kernels import feed_forward_layernorm
from geneformer_kernels.ops.feed_forward import device as operators
from geneformer_kernels.ops.feed_forward import plan, reference
from geneformer_kernels.target import CARDS
from tolerance import Witness, assert_as_good_as

ACTIVATIONS = ["relu", "gelu", "gelu_tanh", "swiglu"]
NAMES = ("x", "residual", "up_weight", "up_bias", "down_weight", "down_bias", "weight", "bias")

# A width without a compact kernel, nothing a multiple of anything.
WIDE = (37, 70, 51)
COMPACT = (37, 128, 64)


def inputs(
    shape: tuple[int, int, int], activation: str, dtype: torch.dtype, device: str, parameters: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Means away from zero, so that what is masked or left out shows."""
    n_rows, width, ff_width = shape
    generator = torch.Generator().manual_seed(n_rows)

    def normal(*size: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * scale + shift

    up_rows = ff_width * (2 if activation == "swiglu" else 1)
    tensors = {
        "x": normal(n_rows, width, shift=0.5).to(dtype),
        "residual": normal(n_rows, width, shift=2.0),
        "up_weight": normal(up_rows, width, scale=width**-0.5).to(parameters or dtype),
        "up_bias": normal(up_rows, shift=0.3).to(parameters or dtype),
        "down_weight": normal(width, ff_width, scale=ff_width**-0.5, shift=0.02).to(parameters or dtype),
        "down_bias": normal(width, shift=-0.4).to(parameters or dtype),
        "weight": normal(width, scale=0.3, shift=1.0),
        "bias": normal(width, shift=0.7),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def leaves(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    return {
        name: (t if dtype is None else t.to(dtype)).detach().clone().requires_grad_() for name, t in tensors.items()
    }


def plain(tensors: dict[str, torch.Tensor], activation: str) -> torch.Tensor:
    names = ("x", "up_weight", "up_bias", "down_weight", "down_bias")
    return reference.feed_forward(*(tensors[name] for name in names), activation)


def gradients_of(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: leaf.grad for name, leaf in values.items() if leaf.grad is not None}


def fused(tensors: dict[str, torch.Tensor], **options) -> tuple[torch.Tensor, torch.Tensor]:
    return feed_forward_layernorm(*(tensors[name] for name in NAMES), impl="triton", **options)


def expected(tensors, activation, norm, out_dtype, keep=None, eps=1e-5):
    return reference.feed_forward_layernorm(*(tensors[name] for name in NAMES), activation, eps, norm, out_dtype, keep)


def assert_gradients(mine: dict, witness: Witness, truth: dict, *, factor: float = 2.0) -> None:
    """The gradients of leaves, of a witness who knows them by name, and of leaves in float64."""
    for name, leaf in truth.items():
        if leaf.grad is None:
            continue
        assert mine[name].grad is not None, name
        assert mine[name].grad.dtype == mine[name].dtype
        # Sums over thousands of rows, which torch's LayerNorm adds up in float32 one after the other.
        slack = 2e-5 * leaf.grad.abs().max().item() if factor > 2 else 0.0
        assert_as_good_as(mine[name].grad, witness[name], leaf.grad, factor=factor, slack=slack)


def check_block(
    tensors: dict[str, torch.Tensor],
    activation: str,
    norm: str,
    *,
    keep: torch.Tensor | None = None,
    eps: float = 1e-5,
    low: torch.dtype = torch.float16,
    factor: float = 2.0,
    **options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and gradients of feed_forward_layernorm against float64; returns the outputs."""
    slopes = torch.linspace(-1, 2, tensors["x"].numel(), device=tensors["x"].device).view(tensors["x"].shape)

    def with_gradients(outs, values):
        """Both outputs count, in different ways."""
        ((outs[0] * slopes).sum() + (outs[1] * slopes.flip(0)).sum()).backward()
        return [out.detach() for out in outs], gradients_of(values)

    def by_torch():
        values = leaves(tensors)
        narrow = {k: v.to(low) if "up" in k or "down" in k else v for k, v in values.items()}
        return with_gradients(expected(narrow, activation, norm, low, keep, eps), values)

    mine, truth, witness = leaves(tensors), leaves(tensors, torch.float64), Witness(by_torch)
    outs = fused(mine, activation=activation, eps=eps, norm=norm, **options)
    assert (outs[0].dtype, outs[1].dtype) == (torch.float32, low)
    found, exact = (
        with_gradients(each, values)
        for each, values in ((outs, mine), (expected(truth, activation, norm, torch.float64, keep, eps), truth))
    )
    for one, witnessed, true in zip(found[0], witness[0], exact[0], strict=True):
        assert_as_good_as(one, witnessed, true, factor=factor)
    assert_gradients(mine, witness[1], truth, factor=factor)
    return outs


def on_hopper(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plans of Hopper, whose LayerNorm at width 256 takes a few rows of a block at a time."""
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("Hopper's plans do not fit this card")
    if device == "cpu":
        monkeypatch.setattr(operators, "target_of", lambda _: CARDS["H100"])
    planned = plan.fused_plan("float16", 256, 64, "relu", operators.target_of(torch.device(device)))
    assert planned.block_norm < planned.block_rows
