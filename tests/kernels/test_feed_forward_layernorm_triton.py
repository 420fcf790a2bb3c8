"""The Triton kernels of feed_forward_layernorm against float64: its dropout, its LayerNorm, and what is composed."""

from __future__ import annotations

import pytest
import torch
from feed_forward_inputs import (
    ACTIVATIONS,
    COMPACT,
    NAMES,
    WIDE,
    check_block,
    expected,
    fused,
    inputs,
    leaves,
    on_hopper,
)
from geneformer_kernels import feed_forward_layernorm
from geneformer_kernels.ops.feed_forward import device as operators
from geneformer_kernels.ops.feed_forward import plan
from geneformer_kernels.target import Target
from tolerance import Witness, assert_as_good_as


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layernorm_forward_and_gradients(device: str, norm: str, activation: str, poisoned: None) -> None:
    shapes = [COMPACT] if activation != "relu" else [COMPACT, (18, 256, 128), (35, 512, 32)]
    for shape in shapes:
        tensors = inputs(shape, activation, torch.float16, device, parameters=torch.float32)
        check_block(tensors, activation, norm)


def kept_by(seed: torch.Tensor, n_rows: int, dropout_p: float, device: str, width: int = 128) -> torch.Tensor:
    """What the fused kernel multiplies by, read off with zero weights, a bias of one and no residual."""
    zero = torch.zeros(64, width, device=device, dtype=torch.float16)
    x = torch.zeros(n_rows, width, device=device, dtype=torch.float16)
    one, none = torch.ones(width, device=device), torch.zeros(width, device=device)
    total, _ = feed_forward_layernorm(
        x, None, zero, None, zero.T.contiguous(), one, one, none,
        activation="relu", eps=1.0, norm="pre", dropout_p=dropout_p, seed=seed, impl="triton",
    )  # fmt: skip
    return total


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_mask(device: str, dropout_p: float) -> None:
    seed = torch.tensor([12345], device=device)
    keep = kept_by(seed, 256, dropout_p, device)
    is_kept = keep > 0
    torch.testing.assert_close(keep[is_kept], torch.full_like(keep[is_kept], 1 / (1 - dropout_p)))
    n, expected_rate = keep.numel(), 1 - dropout_p
    deviation = (dropout_p * expected_rate / n) ** 0.5
    assert abs(is_kept.double().mean().item() - expected_rate) < 5 * deviation
    # No row, column or pair of neighbours has a rate of its own: 6 deviations of the fraction of each.
    for axis in (0, 1):
        rates = is_kept.double().mean(axis)
        assert (rates - expected_rate).abs().max() < 6 * deviation * rates.numel() ** 0.5
    centred = is_kept.double() - expected_rate
    for row, column in ((0, 1), (1, 0), (8, 0), (0, 8), (0, 16), (8, 8), (16, 0), (0, 32)):
        product = centred[row:, column:] * centred[: 256 - row, : 128 - column]
        assert abs(product.mean().item()) < 6 * dropout_p * expected_rate / product.numel() ** 0.5, (row, column)
    assert not torch.equal(is_kept, kept_by(seed + 1, 256, dropout_p, device) > 0)
    assert torch.equal(keep, kept_by(seed, 256, dropout_p, device))
    assert torch.equal(keep[:70], kept_by(seed, 70, dropout_p, device))
    assert not torch.equal(is_kept, kept_by(seed + 2**32, 256, dropout_p, device) > 0)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("width", [128, 256, 512])
def test_dropout_gradients_use_the_same_mask(device: str, norm: str, width: int) -> None:
    if plan.fused_plan("float16", width, 64, "gelu", operators.target_of(torch.device(device))) is None:
        pytest.skip("no kernel of this width on this card")
    seed = torch.tensor([77], device=device)
    tensors = inputs((37, width, 64), "gelu", torch.float16, device, parameters=torch.float32)
    keep = kept_by(seed, 37, 0.25, device, width)
    check_block(tensors, "gelu", norm, keep=keep, dropout_p=0.25, seed=seed)


@pytest.mark.parametrize(
    ("activation", "norm", "dropout_p"),
    [("relu", "post", 0.0), ("swiglu", "post", 0.25), ("gelu", "pre", 0.0), ("gelu", "pre", 0.25)],
)
def test_layernorm_a_few_rows_at_a_time(
    device: str, activation: str, norm: str, dropout_p: float, poisoned: None, monkeypatch
) -> None:
    """150 rows: a whole block, and one that ends within the rows taken at a time."""
    seed, keep = torch.tensor([5], device=device), None
    if dropout_p:
        keep = kept_by(seed, 150, dropout_p, device, 256)  # as a block in registers drops
    on_hopper(device, monkeypatch)
    if dropout_p:
        assert torch.equal(keep, kept_by(seed, 150, dropout_p, device, 256))
    tensors = inputs((150, 256, 64), activation, torch.float16, device, parameters=torch.float32)
    outs = check_block(tensors, activation, norm, keep=keep, dropout_p=dropout_p, seed=seed)
    with torch.no_grad():  # nothing is kept for a backward pass, and sums wait where the stream will stand
        again = fused(tensors, activation=activation, eps=1e-5, norm=norm, dropout_p=dropout_p, seed=seed)
    assert all(torch.equal(one, other) for one, other in zip(again, outs, strict=True))


def test_all_dropped(device: str) -> None:
    keep = kept_by(torch.tensor([3], device=device), 64, 1.0, device)
    assert (keep == 0).all()


@pytest.mark.parametrize("width", [128, 512])
def test_sums_over_more_blocks_than_programs(device: str, width: int, monkeypatch) -> None:
    """Each program adds up several blocks of 300 rows, in both kernels that make sums."""
    card = Target.cuda(80, n_sms=1)
    monkeypatch.setattr(operators, "target_of", lambda _: card)
    assert plan.activation_plan(300, 64, "swiglu", card).n_programs == 8
    assert plan.layernorm_plan(300, width, card).n_programs == 2
    tensors = inputs((300, width, 64), "swiglu", torch.float16, device, parameters=torch.float32)
    check_block(tensors, "swiglu", "post")


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_one_gradient_and_frozen_parameters(device: str, norm: str) -> None:
    """Each output alone, inputs alone: what nobody asks for is not made, and what is asked for stays right."""
    tensors = inputs(COMPACT, "relu", torch.float16, device)
    for index in (0, 1):
        for asked in (("x",), ("residual",), ("down_bias",), ("up_bias", "weight")):
            grads = []
            for run in ("mine", "true"):
                values = {k: v.double() if run == "true" else v for k, v in tensors.items()}
                values = {k: v.detach().clone().requires_grad_(k in asked) for k, v in values.items()}
                if run == "mine":
                    outs = fused(values, activation="relu", eps=1e-5, norm=norm)
                else:
                    outs = expected(values, "relu", norm, torch.float64)
                (
                    outs[index] * torch.linspace(-1, 2, outs[index].numel(), device=device).view(COMPACT[:2])
                ).sum().backward()
                grads.append([values[name].grad for name in asked])
                assert all(values[name].grad is None for name in NAMES if name not in asked)
            for got, true in zip(*grads, strict=True):
                if true is None:  # in pre-norm the stream does not depend on the LayerNorm's parameters
                    assert (norm, index, asked) == ("pre", 0, ("up_bias", "weight"))
                    assert (got == 0).all()
                    continue
                error = (got.double() - true).norm() / true.norm()
                assert error < 5e-3, (asked, index, error)


def test_eps_is_added(device: str) -> None:
    tensors = inputs(COMPACT, "relu", torch.float16, device)
    for name in ("up_weight", "down_weight", "up_bias", "down_bias"):
        tensors[name].zero_()
    tensors["residual"].mul_(1e-3)
    for eps in (1e-12, 1e-5, 1e-2):
        stream, _ = fused(tensors, activation="relu", eps=eps, norm="post")
        exact, _ = expected({k: v.double() for k, v in tensors.items()}, "relu", "post", torch.float64, eps=eps)
        torch.testing.assert_close(stream.double(), exact, rtol=1e-4, atol=1e-4)


def test_statistics_of_a_large_mean(device: str) -> None:
    tensors = inputs(COMPACT, "relu", torch.float16, device)
    tensors["residual"] += 3000.0
    stream, _ = fused(tensors, activation="relu", eps=1e-5, norm="post")
    witness = Witness(lambda: expected(tensors, "relu", "post", torch.float16)[0])
    exact, _ = expected({k: v.double() for k, v in tensors.items()}, "relu", "post", torch.float64)
    assert_as_good_as(stream, witness, exact)


def test_float32_out_is_the_stream(device: str) -> None:
    tensors = inputs(COMPACT, "relu", torch.float16, device)
    stream, out = fused(tensors, activation="relu", eps=1e-5, norm="post", out_dtype=torch.float32)
    assert out.data_ptr() == stream.data_ptr()
    stream, out = fused(tensors, activation="relu", eps=1e-5, norm="pre", out_dtype=torch.float32)
    exact = expected({k: v.double() for k, v in tensors.items()}, "relu", "pre", torch.float64)
    torch.testing.assert_close((stream.double(), out.double()), exact, rtol=2e-3, atol=2e-3)


def test_runs_are_equal(device: str) -> None:
    results = []
    for _ in range(2):
        tensors = leaves(inputs((70, 128, 64), "gelu", torch.float16, device))
        stream, out = fused(
            tensors, activation="gelu", eps=1e-5, norm="post", dropout_p=0.1, seed=torch.tensor([5], device=device)
        )
        (stream.sum() * 2 + out.sum()).backward()
        results.append([stream, out, *(leaf.grad for leaf in tensors.values())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("impl", ["torch", "reference", "triton"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_composed(device: str, impl: str, norm: str) -> None:
    """A width without a compact kernel: linear layers, then torch's dropout, addition and LayerNorm."""
    tensors = inputs(WIDE, "gelu", torch.float16 if impl == "triton" else torch.float32, device, torch.float32)
    values = [tensors[name] for name in NAMES]
    options = dict(activation="gelu", eps=1e-5, norm=norm, impl=impl)
    stream, out = feed_forward_layernorm(*values, **options)
    exact = expected({k: v.double() for k, v in tensors.items()}, "gelu", norm, torch.float64)
    assert out.dtype == tensors["x"].dtype
    torch.testing.assert_close((stream.double(), out.double()), exact, rtol=5e-3, atol=5e-3)
    values[1] = None
    torch.manual_seed(0)
    (total, _), (again, _) = (
        feed_forward_layernorm(*values, **options | {"norm": "pre"}, dropout_p=p) for p in (0.5, 0.0)
    )
    is_kept = total != 0
    assert 0.4 < is_kept.double().mean() < 0.6
    torch.testing.assert_close(total[is_kept], 2 * again[is_kept].to(total.dtype), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_torch_path_in_float64(impl: str, norm: str) -> None:
    tensors = leaves(inputs((3, 5, 4), "swiglu", torch.float64, "cpu"), torch.float64)
    options = dict(activation="swiglu", eps=1e-5, norm=norm, impl=impl)
    torch.autograd.gradcheck(lambda *a: feed_forward_layernorm(*a, **options), list(tensors.values()))
