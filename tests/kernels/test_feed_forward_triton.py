"""The Triton kernels of feed_forward and feed_forward_layernorm against float64, and how they are planned."""

from __future__ import annotations

import importlib

import pytest
import torch
from geneformer_kernels import feed_forward, feed_forward_layernorm
from geneformer_kernels.dispatch import Impl, candidates, choose
from geneformer_kernels.ops.feed_forward import device as operators
from geneformer_kernels.ops.feed_forward import plan, reference
from geneformer_kernels.target import CARDS, Target
from tolerance import Witness, assert_as_good_as

ACTIVATIONS = ["relu", "gelu", "gelu_tanh", "swiglu"]
NAMES = ("x", "residual", "up_weight", "up_bias", "down_weight", "down_bias", "weight", "bias")
# A width without a compact kernel, nothing a multiple of anything.
WIDE = (37, 70, 51)
COMPACT = (37, 128, 64)


def dtypes_on(device: str) -> list[torch.dtype]:
    return [torch.float16, torch.float32] if device == "cpu" else [torch.float16, torch.float32, torch.bfloat16]


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


# feed_forward


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


# Tiles that a small CPU target never chooses


def on_hopper(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plans of Hopper, whose LayerNorm at width 256 takes a few rows of a block at a time."""
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("Hopper's plans do not fit this card")
    if device == "cpu":
        monkeypatch.setattr(operators, "target_of", lambda _: CARDS["H100"])
    planned = plan.fused_plan("float16", 256, 64, "relu", operators.target_of(torch.device(device)))
    assert planned.block_norm < planned.block_rows


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


# feed_forward_layernorm


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


# The house of torch: autocast, the compiler, checks of operators


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


# Plans

KERNELS = importlib.import_module("geneformer_kernels.ops.feed_forward.kernel")


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_cases_name_the_kernels_arguments(card: Target) -> None:
    cases = plan.kernel_cases(card)
    assert len({(case.kernel, case.problem, case.dtype) for case in cases}) == len(cases)
    for case in cases:
        assert sorted([*case.signature, *case.constexprs]) == sorted(getattr(KERNELS, case.kernel).arg_names)
        assert case.divisible <= set(case.signature)
        is_by_library = card.sm >= 90 and case.dtype != "float32" and case.constexprs.get("ACTIVATION") != "swiglu"
        is_never = case.kernel == "feed_forward_up_kernel" or (
            case.problem.startswith("C=256 ") and "no norm" in case.problem
        )
        assert case.is_default == (card.sm >= 80 and not (is_by_library and is_never))


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_plans(card: Target, activation: str) -> None:
    for width, ff_width in ((128, 64), (256, 512), (256, 1024), (512, 1024), (768, 3072), (640, 2560)):
        planned = plan.fused_plan("bfloat16", width, ff_width, activation, card)
        assert (planned is not None) == (width in (128, 256) or (width == 512 and card.sm < 90))
        if planned is not None:
            # The input and one block of each weight; what the compiler adds is what tools/aot_matrix.py measures.
            n_weights = 3 if activation == "swiglu" else 2
            assert card.sm < 80 or 2 * width * (planned.block_rows + n_weights * planned.block_f) <= card.smem_bytes
            assert planned.block_rows % planned.block_norm == 0
            assert planned.block_norm % 16 == 0  # a mask is regenerated for 16 rows at least
            assert ff_width % planned.block_f == 0
    assert plan.fused_plan("bfloat16", 256, 500, activation, card) is None
    options = dict(activation=activation, target=card)
    is_one = [plan.is_one_kernel("bfloat16", 256, 512, **options, has_layernorm=norm) for norm in (True, False)]
    assert is_one == [card.sm < 90, card.sm < 90 or activation == "swiglu"]
    assert plan.is_one_kernel("bfloat16", 128, 512, **options, has_layernorm=True)
    assert not plan.is_up_by_library("float32", activation, card)
    assert plan.fused_plan("float32", 256, 512, activation, card) is None
    small, large = (plan.up_plan("bfloat16", n, 1024, activation, card) for n in (1, 1 << 20))
    assert small.block_rows * small.block_n < large.block_rows * large.block_n
    assert plan.activation_plan(1, 512, activation, card).n_programs == 1
    assert plan.activation_plan(1, 500, activation, card).block_rows == 16
    assert plan.layernorm_plan(1 << 20, 256, card).n_programs == 2 * card.n_sms


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_choice(card: Target) -> None:
    first = next(option for option in candidates("feed_forward", "float16", card) if option.can_run)
    assert first.impl == (Impl.TRITON if card.sm >= 80 else Impl.TORCH)
    # On Hopper what is asked for as Triton is cuBLAS's for the most part, and the reason says so.
    for dtype in ("float16", "bfloat16", "float32") if card.sm >= 80 else ():
        assert ("cuBLAS" in choose("feed_forward", dtype, card).reason) == (card.sm >= 90 and dtype != "float32")
    doubles = candidates("feed_forward", "float64", card)
    assert not next(option for option in doubles if option.impl == Impl.TRITON).can_run


# On a card, at full size


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape", [(16389, 256, 512), (16389, 128, 512), (16389, 512, 1024), (4099, 768, 3072)], ids=str
)
def test_full_size(shape, activation: str, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tensors = inputs(shape, activation, dtype, "cuda", parameters=torch.float32)
    # Float32 is multiplied in three passes on tensor cores, which cut TF32 off instead of rounding it: measured on an
    # H200, errors are 1.3 to 6 times those of scalar products. One pass would have 1,000 times as much.
    factor = 10.0 if dtype == torch.float32 else 2.0
    check_block(tensors, activation, "post", eps=1e-12, low=dtype, factor=factor)
