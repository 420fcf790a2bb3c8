"""The Triton kernels of feed_forward against float64, and both operations in the house of torch."""

from __future__ import annotations

import pytest
import torch
from feed_forward_inputs import (
    ACTIVATIONS,
    COMPACT,
    NAMES,
    WIDE,
    assert_gradients,
    fused,
    gradients_of,
    inputs,
    leaves,
    on_hopper,
    plain,
)
from geneformer_kernels import feed_forward, feed_forward_layernorm
from geneformer_kernels.ops.feed_forward import device as operators
from geneformer_kernels.ops.feed_forward import plan, reference
from geneformer_kernels.target import CARDS, Target
from tolerance import Witness, assert_as_good_as


def dtypes_on(device: str) -> list[torch.dtype]:
    return [torch.float16, torch.float32] if device == "cpu" else [torch.float16, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [WIDE, COMPACT], ids=["wide", "compact"])
def test_forward_and_gradients(device: str, shape, activation: str, poisoned: None) -> None:
    for dtype in dtypes_on(device):
        tensors = {k: v for k, v in inputs(shape, activation, dtype, device).items() if k in (NAMES[0], *NAMES[2:6])}
        mine, truth = leaves(tensors), leaves(tensors, torch.float64)
        out = feed_forward(*mine.values(), activation=activation, impl="triton")
        weights = torch.linspace(-1, 2, out.numel(), device=device).view(out.shape)

        def by_torch(tensors=tensors, weights=weights):
            values = leaves(tensors)
            plain_out = plain(values, activation)
            plain_out.backward(weights.to(plain_out.dtype))
            return plain_out.detach(), gradients_of(values)

        witness, exact = Witness(by_torch), plain(truth, activation)
        assert out.dtype == dtype
        assert_as_good_as(out, witness[0], exact)
        for each in (out, exact):
            each.backward(weights.to(each.dtype))
        assert_gradients(mine, witness[1], truth)


@pytest.mark.parametrize("shape", [WIDE, COMPACT], ids=["wide", "compact"])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_without_biases_and_with_leading_axes(device: str, shape, activation: str) -> None:
    tensors = inputs(shape, activation, torch.float16, device)
    x, up, down = tensors["x"].view(1, *tensors["x"].shape), tensors["up_weight"], tensors["down_weight"]
    up, down = (each.detach().clone().requires_grad_() for each in (up, down))
    out = feed_forward(x, up, None, down, None, activation=activation, impl="triton")
    truth = [each.detach().double().requires_grad_() for each in (up, down)]
    exact = reference.feed_forward(x.double(), truth[0], None, truth[1], None, activation)
    low = [each.detach() for each in (x, up, down)]
    witness = Witness(reference.feed_forward, low[0], low[1], None, low[2], None, activation)
    assert_as_good_as(out, witness, exact)
    out.sum().backward()
    exact.sum().backward()
    for got, true in zip((up, down), truth, strict=True):
        torch.testing.assert_close(got.grad.double(), true.grad, rtol=5e-3, atol=5e-2)


@pytest.mark.parametrize("shape", [(0, *WIDE[1:]), (0, *COMPACT[1:]), (1, *WIDE[1:]), (1, *COMPACT[1:])], ids=str)
def test_no_row_and_one_row(device: str, shape) -> None:
    tensors = leaves(inputs(shape, "gelu", torch.float16, device))
    stream, out = fused(tensors, activation="gelu", eps=1e-5, norm="post", dropout_p=0.1)
    assert stream.shape == out.shape == shape[:2]
    (stream.sum() + out.float().sum()).backward()
    for name, leaf in tensors.items():
        assert torch.isfinite(leaf.grad).all(), name
        assert leaf.grad.abs().sum() == 0 or shape[0], name


@pytest.mark.parametrize("shape", [(5, *WIDE[1:]), (5, *COMPACT[1:]), (5, 256, 64)], ids=["wide", "compact", "hopper"])
def test_nothing_is_written_past_the_end(device: str, shape, monkeypatch) -> None:
    """Every output lies in a larger buffer whose end must stay as it was."""
    if shape[1] == 256:
        on_hopper(device, monkeypatch)
    kept = []
    real = torch.empty

    def empty(*size, **options):
        size = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        count = torch.Size(size).numel()
        buffer = real(count + 40_000, **options).fill_(7)
        kept.append((buffer, count))
        return buffer[:count].view(size)

    tensors = leaves(inputs(shape, "swiglu", torch.float16, device))
    monkeypatch.setattr(torch, "empty", empty)
    names = ("x", "up_weight", "up_bias", "down_weight", "down_bias")
    feed_forward(*(tensors[name] for name in names), activation="swiglu", impl="triton").sum().backward()
    fused(tensors, activation="swiglu", eps=1e-5, norm="post", dropout_p=0.5)[0].sum().backward()
    assert len(kept) > 5
    assert all((buffer[count:] == 7).all() for buffer, count in kept)


def test_nan_stays_nan(device: str) -> None:
    for shape in (WIDE, COMPACT):
        tensors = inputs(shape, "relu", torch.float16, device)
        tensors["x"][3] = float("nan")
        names = ("x", "up_weight", "up_bias", "down_weight", "down_bias")
        out = feed_forward(*(tensors[name] for name in names), activation="relu", impl="triton")
        # cuBLAS's ReLU takes NaN for 0; the rows of a stream that hold NaN keep it through their residual.
        is_library = plan.is_up_by_library("float16", "relu", operators.target_of(tensors["x"].device))
        assert torch.isnan(out[3]).all() or is_library
        assert torch.isfinite(out[[0, 1, 2, 4]]).all()


@pytest.mark.parametrize(("card", "n_rows"), [("A100", 21), ("L4", 21), ("H100", 21), ("one", 150)])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_every_tile(device: str, card: str, n_rows: int, activation: str, monkeypatch) -> None:
    if device == "cuda" and card != "one":
        pytest.skip("plans of other cards may not fit this one")
    target = CARDS.get(card, Target.cuda(80, n_sms=1))
    monkeypatch.setattr(operators, "target_of", lambda _: target)
    for width, ff_width in ((128, 64), (72, 136), (64, 80)):
        tensors = inputs((n_rows, width, ff_width), activation, torch.float16, device)
        names = ("x", "up_weight", "up_bias", "down_weight", "down_bias")
        out = feed_forward(*(tensors[name] for name in names), activation=activation, impl="triton")
        exact = plain({name: tensor.double() for name, tensor in tensors.items()}, activation)
        assert_as_good_as(out, Witness(plain, tensors, activation), exact)


def test_autocast(device: str) -> None:
    """Under autocast x is a half and parameters float32: gradients come back float32; float32 x is cast."""
    dtype = torch.bfloat16
    tensors = leaves(inputs(COMPACT, "relu", torch.float32, device))
    with torch.autocast(device, dtype=dtype):
        for x in (tensors["x"], tensors["x"].to(dtype)):
            for impl in ("torch", "triton") if device == "cuda" else ("torch",):
                stream, out = feed_forward_layernorm(
                    x, *(tensors[name] for name in NAMES[1:]), activation="relu", eps=1e-5, norm="post", impl=impl
                )
                assert (stream.dtype, out.dtype) == (torch.float32, x.dtype)
                stream.sum().backward()
                assert tensors["up_weight"].grad.dtype == tensors["up_bias"].grad.dtype == torch.float32


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("shape", [WIDE, COMPACT], ids=["wide", "compact"])
def test_compiles_without_a_graph_break(device: str, impl: str, shape) -> None:
    tensors = leaves(inputs(shape, "relu", torch.float16, device))

    def step(*values):
        return feed_forward_layernorm(*values, activation="relu", eps=1e-5, norm="post", impl=impl)

    values = [tensors[name] for name in NAMES]
    torch._dynamo.reset()
    stream, out = torch.compile(step, backend="aot_eager", fullgraph=True)(*values)
    torch.testing.assert_close((stream, out), step(*values), rtol=2e-3, atol=2e-3)
    stream.sum().backward()
    assert tensors["x"].grad is not None


def test_operators_are_registered_properly(device: str) -> None:
    tensors = leaves(inputs((3, 128, 64), "relu", torch.float16, device))
    x, residual, up, up_bias, down, down_bias, weight, bias = (tensors[name] for name in NAMES)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        operators.feed_forward_fwd.overload, (x, up, up_bias, down, down_bias, "relu"), test_utils=tests
    )
    seed = torch.tensor([1], device=device)
    arguments = (x, residual, up, up_bias, down, down_bias, weight, bias, seed)
    for is_post in (True, False):
        torch.library.opcheck(
            operators.feed_forward_layernorm_fwd.overload,
            (*arguments, "relu", 1e-5, is_post, 0.1, torch.float16, True),
            test_utils=tests,
        )


def test_bad_arguments() -> None:
    tensors = list(inputs(WIDE, "relu", torch.float32, "cpu").values())
    options = dict(activation="relu", eps=1e-5, norm="post")
    with pytest.raises(ValueError, match="norm must be"):
        feed_forward_layernorm(*tensors, **options | {"norm": "sandwich"})
    with pytest.raises(ValueError, match="activation must be"):
        feed_forward_layernorm(*tensors, **options | {"activation": "mish"})
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\]"):
        feed_forward_layernorm(*tensors, **options, dropout_p=1.5)
    with pytest.raises(ValueError, match="one shape"):
        feed_forward_layernorm(tensors[0], tensors[1][:1], *tensors[2:], **options)
    with pytest.raises(ValueError, match=r"must be \[70\]"):
        feed_forward_layernorm(*tensors[:7], tensors[7][:1], **options)
    with pytest.raises(ValueError, match="up_bias"):
        feed_forward_layernorm(*tensors[:3], tensors[3][:1], *tensors[4:], **options)
