"""linear against float64, and by oneDNN in inference: weights are always those of the moment."""

from __future__ import annotations

import pytest
import torch
from geneformer_kernels import feed_forward, linear
from geneformer_kernels.cpu.onednn import is_for_onednn, onednn_linear
from geneformer_kernels.ops.feed_forward import reference
from geneformer_kernels.target import target_of
from tolerance import Witness, assert_as_good_as

needs_onednn = pytest.mark.skipif(
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
    witness = Witness(torch.nn.functional.linear, x, weight, bias)
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


def by_numpy(weight: torch.Tensor) -> None:
    # numpy has no bfloat16: the sign of every number is turned around.
    weight.detach().view(torch.int16).numpy()[:] ^= -(2**15)


CHANGES = {
    "in place": lambda weight: weight.mul_(2),
    "through data": lambda weight: weight.data.mul_(2),
    "copied into data": lambda weight: weight.data.copy_(weight.data * 2),
    "other data": lambda weight: setattr(weight, "data", weight.data * 2),
    "numpy": by_numpy,
    "dlpack": lambda weight: torch.from_dlpack(weight.detach().__dlpack__()).mul_(2),
    "foreach": lambda weight: torch._foreach_mul_([weight.data], 2.0),
}


@pytest.mark.parametrize("is_inference", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_noticed(change: str, is_inference: bool) -> None:
    """However it is changed: torch counts no version for most of these ways."""
    x, weight, bias = inputs(64, 32, 48, torch.bfloat16)
    _, down, down_bias = inputs(1, 48, 32, torch.bfloat16)
    weight = torch.nn.Parameter(weight)

    def results() -> tuple[torch.Tensor, ...]:
        hidden = feed_forward(x, weight, bias, down, down_bias, activation="relu")
        return linear(x, weight, bias), hidden

    with torch.inference_mode(is_inference), torch.no_grad():
        before = results()
        CHANGES[change](weight)
        after = results()
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(after[0].double(), exact, atol=0.1, rtol=0.02)
    exact = torch.nn.functional.linear(exact.relu(), down.double(), down_bias.double())
    torch.testing.assert_close(after[1].double(), exact, atol=0.2, rtol=0.02)
    for one, other in zip(before, after, strict=True):
        assert not torch.allclose(one, other, atol=0.2)


@needs_onednn
def test_only_inference_is_left_to_onednn() -> None:
    x, weight, bias = inputs(64, 32, 48, torch.bfloat16)
    assert is_for_onednn(x, weight, bias)
    assert not is_for_onednn(x, weight.float(), bias)
    assert not is_for_onednn(x, weight, bias.float())
    assert not is_for_onednn(x[:0], weight, bias)
    assert not is_for_onednn(x, torch.nn.Parameter(weight), bias)
    with torch.no_grad():
        assert is_for_onednn(x, torch.nn.Parameter(weight), bias)


@needs_onednn
def test_relu_is_fused_into_the_product() -> None:
    x, up, up_bias = inputs(100, 32, 64, torch.bfloat16)
    _, down, down_bias = inputs(1, 64, 32, torch.bfloat16)
    hidden = onednn_linear(x, up, up_bias, "relu")
    assert hidden.min() == 0
    assert hidden.max() > 0
    with torch.no_grad():
        out = feed_forward(x, up, up_bias, down, down_bias, activation="relu")
    exact = feed_forward(*(t.double() for t in (x, up, up_bias, down, down_bias)), activation="relu", impl="reference")
    witness = Witness(reference.feed_forward, x, up, up_bias, down, down_bias, "relu")
    assert_as_good_as(out, witness, exact)
