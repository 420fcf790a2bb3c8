"""Linear layers, feed-forward halves and LayerNorm of float32 by compiled loops, on a CPU with AVX2."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from geneformer_kernels import feed_forward, linear, on_device, residual_layernorm
from geneformer_kernels.cpu import float32_products
from geneformer_kernels.cpu.float32_products import _CHUNK, BLOCK_ROWS
from geneformer_kernels.dispatch import ImplUnavailableError, choose, use_impl
from geneformer_kernels.ops.feed_forward import reference
from geneformer_kernels.target import Target, target_of
from tolerance import Witness, assert_as_good_as

pytestmark = pytest.mark.skipif(not target_of("cpu").has_float32_loops, reason="needs a CPU with AVX2")

#: Around whole tiles and whole blocks.
N_ROWS = (0, 1, 5, 6, 7, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS + 9)
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "swiglu")


def drawn(*shape: int, mean: float = 0.3, scale: float = 1.0) -> torch.Tensor:
    """Numbers whose mean is away from zero."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) + mean) * scale


def layer(n: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return drawn(n, width, scale=width**-0.5), drawn(n)


def halves(activation: str, width: int = 32, ff_width: int = 48) -> tuple[torch.Tensor, ...]:
    up = layer(ff_width * (2 if activation == "swiglu" else 1), width)
    return *up, *layer(width, ff_width)


@pytest.mark.parametrize("n_rows", N_ROWS)
@pytest.mark.parametrize(("width", "n_columns"), [(32, 48), (1, 16), (_CHUNK - 3, 32), (_CHUNK + 5, 16)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(n_rows: int, width: int, n_columns: int, has_bias: bool) -> None:
    x, (weight, bias) = drawn(n_rows, width), layer(n_columns, width)
    arguments = (x, weight, bias if has_bias else None)
    exact = torch.nn.functional.linear(*(each if each is None else each.double() for each in arguments))
    out = linear(*arguments, impl="numba")
    assert_as_good_as(out, Witness(torch.nn.functional.linear, *arguments), exact)


@pytest.mark.parametrize("n_rows", N_ROWS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward(n_rows: int, activation: str) -> None:
    x, parameters = drawn(n_rows, 32), halves(activation)
    exact = reference.feed_forward(x.double(), *(each.double() for each in parameters), activation)
    out = feed_forward(x, *parameters, activation=activation, impl="numba")
    assert_as_good_as(out, Witness(reference.feed_forward, x, *parameters, activation), exact)
    up, _, down, _ = parameters
    out = feed_forward(x[None], up, None, down, None, activation=activation, impl="numba")
    exact = reference.feed_forward(x.double(), up.double(), None, down.double(), None, activation)
    assert_as_good_as(out[0], Witness(reference.feed_forward, x, up, None, down, None, activation), exact)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize(("n_rows", "width"), [(0, 16), (1, 16), (40, 48), (9, 256)])
def test_residual_layernorm(norm: str, has_residual: bool, n_rows: int, width: int) -> None:
    x, weight, bias = drawn(n_rows, width, mean=3), drawn(width, mean=1), drawn(width)
    residual = drawn(width, n_rows, mean=-1).T if has_residual else None
    total = x.double() if residual is None else x.double() + residual.double()
    exact = torch.nn.functional.layer_norm(total, (width,), weight.double(), bias.double(), 1e-12)
    stream, out = residual_layernorm(x, residual, weight, bias, eps=1e-12, norm=norm, impl="numba")

    def by_torch() -> tuple[torch.Tensor, torch.Tensor]:
        plain = x if residual is None else x + residual
        return plain, torch.nn.functional.layer_norm(plain, (width,), weight, bias, 1e-12)

    witness = Witness(by_torch)
    assert_as_good_as(out, witness[1], exact)
    assert_as_good_as(stream, *((witness[1], exact) if norm == "post" else (witness[0], total)))


def test_eps_and_the_sign_of_zero() -> None:
    x = torch.full((1, 16), 2.0)
    x[0, 0] += 1e-3
    outs = [
        residual_layernorm(x, None, torch.ones(16), torch.zeros(16), eps=eps, norm="post", impl=impl)[1]
        for eps in (1e-12, 1e-5)
        for impl in ("numba", "reference")
    ]
    torch.testing.assert_close(outs[0], outs[1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(outs[2], outs[3], atol=1e-3, rtol=1e-3)
    assert (outs[0] - outs[2]).abs().max() > 0.5
    zeros = torch.full((2, 16), -0.0)
    stream, _ = residual_layernorm(zeros, None, torch.ones(16), torch.zeros(16), eps=1e-5, norm="pre", impl="numba")
    assert stream.signbit().all()


X, STREAM = drawn(3 * BLOCK_ROWS + 17, 48), drawn(3 * BLOCK_ROWS + 17, 48, mean=-1)
WIDE = halves("gelu", 48, 80)
RUNS: dict[str, Callable[[slice], Sequence[torch.Tensor]]] = {
    "linear": lambda rows: [linear(X[rows], *layer(64, 48), impl="numba")],
    "feed_forward": lambda rows: [feed_forward(X[rows], *WIDE, activation="gelu", impl="numba")],
    "residual_layernorm": lambda rows: residual_layernorm(
        X[rows], STREAM[rows], WIDE[3], WIDE[3], eps=1e-5, norm="pre", impl="numba"
    ),
}


@pytest.mark.parametrize("op", RUNS)
def test_threads_and_neighbours_change_nothing(op: str) -> None:
    before, whole = torch.get_num_threads(), RUNS[op](slice(None))
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            for rows in (slice(None), slice(0, 1), slice(5, 107), slice(100, None)):
                for found, expected in zip(RUNS[op](rows), whole, strict=True):
                    assert torch.equal(found, expected[rows])
    finally:
        torch.set_num_threads(before)


def test_threads_share_nothing_but_the_weights() -> None:
    packed = float32_products.pack(*layer(32, 300))
    one, other = float32_products.for_thread(packed), float32_products.for_thread(packed)
    assert np.shares_memory(one.panels, other.panels)
    for room in ("tail", "tail_out", "part"):
        assert not np.shares_memory(getattr(one, room), getattr(other, room))


@pytest.mark.parametrize("op", RUNS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_in_its_row(op: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = RUNS[op](slice(None))
    spoiled = X.clone()
    spoiled[98, 3] = value
    monkeypatch.setitem(globals(), "X", spoiled)
    for found, expected in zip(RUNS[op](slice(None)), clean, strict=True):
        assert not found[98].isfinite().all()
        assert torch.equal(found[:98], expected[:98])
        assert torch.equal(found[99:], expected[99:])


def test_a_changed_weight_is_noticed() -> None:
    """Nothing of a weight is kept from call to call."""
    weight, bias = layer(32, 48)
    before = linear(X, weight, bias, impl="numba")
    weight.numpy()[:] *= 2
    torch.testing.assert_close(linear(X, weight, bias, impl="numba") - bias, (before - bias) * 2)


def test_choice() -> None:
    on_avx2, on_avx512, old = (Target.cpu(each) for each in ({"avx2", "fma"}, {"avx2", "fma", "avx512"}, {"avx2"}))
    for op in ("linear", "feed_forward", "residual_layernorm", "varlen_attention"):
        chosen = choose(op, "float32", on_avx2)
        assert (chosen.impl, "avx2" in chosen.reason) == ("numba", True)
        assert choose(op, "bfloat16", on_avx2).impl == "torch"
        assert choose(op, "float32", on_avx512).impl == "torch"
        assert choose(op, "float32", on_avx512, "numba").impl == "numba"
        with pytest.raises(ImplUnavailableError, match="with AVX2"):
            choose(op, "float32", old, "numba")
        with pytest.raises(ImplUnavailableError):
            choose(op, "float32", Target.cuda(90), "numba")


def test_wide_rows_are_torchs_where_nobody_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "target_of", lambda place: Target.cpu({"avx2", "fma"}))
    taken: list[tuple[str, int]] = []
    for name in ("linear", "feed_forward"):
        plain = getattr(float32_products, name)
        monkeypatch.setattr(
            float32_products, name, lambda x, *rest, n=name, p=plain: taken.append((n, x.shape[1])) or p(x, *rest)
        )
    widest = on_device.WIDEST_OF_LOOPS
    for width in (widest, widest + 16):
        linear(drawn(2, width), *layer(16, width))
        feed_forward(drawn(2, 32), *halves("relu", 32, width), activation="relu")
    assert taken == [("linear", widest), ("feed_forward", 32)]
    linear(drawn(2, widest + 16), *layer(16, widest + 16), impl="numba")
    with use_impl("numba"):
        feed_forward(drawn(2, widest + 16), *halves("relu", widest + 16, 32), activation="relu")
    assert taken[2:] == [("linear", widest + 16), ("feed_forward", widest + 16)]


def test_what_the_loops_do_not_serve() -> None:
    x, (weight, bias) = drawn(4, 48), layer(32, 48)
    with pytest.raises(ImplUnavailableError, match="multiples of 16"):
        linear(x, weight[:30], bias[:30], impl="numba")
    with pytest.raises(ImplUnavailableError, match="no gradient"):
        linear(x, torch.nn.Parameter(weight), bias, impl="numba")
    with torch.no_grad():
        assert torch.equal(
            linear(x, torch.nn.Parameter(weight), bias, impl="numba"), linear(x, weight, bias, impl="numba")
        )
    with pytest.raises(ImplUnavailableError, match="autocast"), torch.autocast("cpu", torch.bfloat16):
        linear(x, weight, bias, impl="numba")
    with pytest.raises(ImplUnavailableError, match="plain tensors"):
        linear(x, torch.ones(32, 48).as_subclass(type("Other", (torch.Tensor,), {})), bias, impl="numba")
    up, up_bias, down, down_bias = halves("relu")
    with pytest.raises(ImplUnavailableError, match="multiples of 16"):
        feed_forward(x[:, :32], up[:40], up_bias[:40], down[:, :40], down_bias, activation="relu", impl="numba")
    norm = dict(eps=1e-5, norm="post", impl="numba")
    with pytest.raises(ImplUnavailableError, match="multiples of 16"):
        residual_layernorm(x[:, :40], None, bias.new_ones(40), bias.new_ones(40), **norm)
    with pytest.raises(ImplUnavailableError, match="no dropout"):
        residual_layernorm(x, None, drawn(48), drawn(48), dropout_p=0.1, **norm)
    with pytest.raises(ImplUnavailableError, match="in float32"):
        residual_layernorm(x, None, drawn(48), drawn(48), out_dtype=torch.float64, **norm)


def test_what_watches_operators_sees_them() -> None:
    """Loops would pass by what transforms functions, or looks at every operator."""
    weight, bias = layer(32, 48)
    tangents = torch.func.jvp(lambda x: linear(x, weight, bias), (drawn(3, 48),), (drawn(3, 48, mean=1),))[1]
    torch.testing.assert_close(tangents, drawn(3, 48, mean=1) @ weight.T, atol=1e-4, rtol=1e-4)
    with pytest.raises(ImplUnavailableError, match="watches"):
        torch.func.vmap(lambda x: linear(x, weight, bias, impl="numba"))(drawn(2, 3, 48))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ImplUnavailableError, match="no gradient"):
        linear(drawn(3, 48), weight, bias, impl="numba")
