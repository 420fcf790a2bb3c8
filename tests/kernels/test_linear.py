"""linear against float64, and weights packed for the CPU: what is packed is never out of date."""

from __future__ import annotations

import gc

import pytest
import torch
from geneformer_kernels import feed_forward, linear, packed
from geneformer_kernels.packed import is_packable, packed_linear
from geneformer_kernels.target import target_of
from tolerance import assert_as_good_as

needs_packing = pytest.mark.skipif(
    not (target_of("cpu").has_fast_bf16 and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this CPU, or this build of torch, has no fast bfloat16 products",
)


def inputs(rows: int, width: int, out: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator) + 1
    weight = torch.randn(out, width, generator=generator) * width**-0.5 + 0.1
    return x.to(dtype), weight.to(dtype), torch.randn(out, generator=generator).to(dtype)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "out"), [(7, 32, 96), (1, 5, 3), (0, 8, 8), (130, 64, 33)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_forward(impl: str, dtype: torch.dtype, rows: int, width: int, out: int, has_bias: bool) -> None:
    x, weight, bias = inputs(rows, width, out, dtype)
    bias = bias if has_bias else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    witness = torch.nn.functional.linear(x, weight, bias)
    with torch.no_grad():
        assert_as_good_as(linear(x, weight, bias, impl=impl), witness, exact)


def test_gradients() -> None:
    arguments = [t.requires_grad_() for t in inputs(4, 5, 3, torch.float64)]
    torch.autograd.gradcheck(linear, arguments)
    x, weight, bias = inputs(4, 8, 6, torch.bfloat16)
    assert linear(x, weight.requires_grad_(), bias).requires_grad


def test_bad_arguments() -> None:
    x, weight, bias = inputs(4, 8, 6, torch.float32)
    with pytest.raises(ValueError, match=r"\[4, 7\] and weight \[6, 8\] do not fit"):
        linear(x[:, :7], weight, bias)


@needs_packing
@pytest.mark.parametrize("change", ["in place", "data", "another tensor"])
def test_a_changed_weight_is_noticed(change: str) -> None:
    x, weight, bias = inputs(64, 32, 48, torch.bfloat16)
    weight = torch.nn.Parameter(weight)
    with torch.inference_mode():
        before = linear(x, weight, bias)
    with torch.no_grad():
        if change == "in place":
            weight.mul_(2)
        elif change == "data":
            weight.data = weight.data * 2
        else:
            weight = torch.nn.Parameter(weight * 2)
    with torch.inference_mode():
        after = linear(x, weight, bias)
        torch.testing.assert_close(after, torch.nn.functional.linear(x, weight, bias), atol=0.1, rtol=0.02)
    assert not torch.allclose(before, after)


@needs_packing
def test_packed_copies_go_with_their_weights() -> None:
    x, weight, bias = inputs(64, 32, 48, torch.bfloat16)
    with torch.no_grad():
        linear(x, weight, bias)
    before = len(packed._packed)
    del weight
    gc.collect()
    assert len(packed._packed) == before - 1


@needs_packing
def test_only_inference_is_packed() -> None:
    x, weight, bias = inputs(64, 32, 48, torch.bfloat16)
    assert is_packable(x, weight, bias)
    assert not is_packable(x, weight.float(), bias)
    assert not is_packable(x[:0], weight, bias)
    assert not is_packable(x, torch.nn.Parameter(weight), bias)
    with torch.no_grad():
        assert is_packable(x, torch.nn.Parameter(weight), bias)
    with torch.inference_mode():
        assert not is_packable(x, weight.clone(), bias)


@needs_packing
def test_relu_is_fused_into_the_product() -> None:
    x, up, up_bias = inputs(100, 32, 64, torch.bfloat16)
    _, down, down_bias = inputs(1, 64, 32, torch.bfloat16)
    hidden = packed_linear(x, up, up_bias, "relu")
    assert hidden.min() == 0
    assert hidden.max() > 0
    with torch.no_grad():
        out = feed_forward(x, up, up_bias, down, down_bias, activation="relu")
    exact = feed_forward(*(t.double() for t in (x, up, up_bias, down, down_bias)), activation="relu", impl="reference")
    witness = feed_forward(x, up, up_bias, down, down_bias, activation="relu", impl="reference")
    assert_as_good_as(out, witness, exact)
