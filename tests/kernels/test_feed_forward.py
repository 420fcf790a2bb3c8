"""feed_forward against float64."""

from __future__ import annotations

import pytest
import torch
from geneformer_kernels import feed_forward
from geneformer_kernels.ops.feed_forward import reference
from tolerance import Witness, assert_as_good_as

ACTIVATIONS = ["relu", "gelu", "gelu_tanh", "swiglu"]


def inputs(
    activation: str, dtype: torch.dtype, n: int = 9, width: int = 21, ff_width: int = 34, device: str = "cpu"
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = ff_width * (2 if activation == "swiglu" else 1)
    shapes = [(n, width), (rows, width), (rows,), (width, ff_width), (width,)]
    return [(torch.randn(*shape, generator=generator) * 0.5 + 0.1).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_forward(device: str, impl: str, activation: str, dtype: torch.dtype, has_bias: bool) -> None:
    x, up, up_bias, down, down_bias = inputs(activation, dtype, device=device)
    if not has_bias:
        up_bias = down_bias = None
    out = feed_forward(x, up, up_bias, down, down_bias, activation=activation, impl=impl)
    witness = Witness(reference.feed_forward, x, up, up_bias, down, down_bias, activation)
    wide = [None if t is None else t.double() for t in (x, up, up_bias, down, down_bias)]
    exact = reference.feed_forward(*wide, activation)
    assert_as_good_as(out, witness, exact)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_means_what_torch_means(activation: str) -> None:
    x, up, up_bias, down, down_bias = inputs(activation, torch.float64)
    hidden = torch.nn.functional.linear(x, up, up_bias)
    if activation == "relu":
        hidden = torch.relu(hidden)
    elif activation == "swiglu":
        hidden = torch.nn.functional.silu(hidden[:, :34]) * hidden[:, 34:]
    else:
        hidden = torch.nn.functional.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
    expected = torch.nn.functional.linear(hidden, down, down_bias)
    out = reference.feed_forward(x, up, up_bias, down, down_bias, activation)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(device: str, activation: str) -> None:
    arguments = [t.requires_grad_() for t in inputs(activation, torch.float64, n=3, width=4, ff_width=5, device=device)]
    torch.autograd.gradcheck(lambda *a: feed_forward(*a, activation=activation), arguments)


def test_bad_arguments() -> None:
    arguments = inputs("relu", torch.float32)
    with pytest.raises(ValueError, match="activation must be"):
        feed_forward(*arguments, activation="mish")
    with pytest.raises(ValueError, match="do not fit"):
        feed_forward(*arguments, activation="swiglu")
