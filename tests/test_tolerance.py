"""The bounds of numerical tests: wide enough for plain torch wherever it runs, too narrow for any fault."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from roundings import drawn
from tolerance import VARIABLE, Witness, assert_as_good_as, max_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape: int, mean: float = 0.3, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) + mean


class Kind(NamedTuple):
    """An operation, tensors for it, and the same operation with faults in it."""

    right: Callable[..., torch.Tensor]
    inputs: list[torch.Tensor]
    faults: dict[str, Callable[..., torch.Tensor]]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = 0.25) -> torch.Tensor:
    return torch.softmax(q @ k.T * scale, -1) @ v


def layernorm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def slope(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Gradient of the first tensor, for another weight of every element of the output."""

    def gradient(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        x = x.detach().clone().requires_grad_()
        out = function(x, *others)
        return torch.autograd.grad(out, x, torch.linspace(-1, 2, out.numel()).view(out.shape).to(out.dtype))[0]

    return gradient


def cross_entropy(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    targets = torch.arange(len(hidden)) % len(weight)
    return F.cross_entropy(hidden @ weight.T, targets, reduction="none")


KINDS = {
    "matrix product": Kind(
        lambda a, b: a @ b,
        [normal(9, 70), normal(70, 11)],
        {
            "a term is missing": lambda a, b: a[:, 1:] @ b[1:],
            "one operand is read a row late": lambda a, b: a @ b.roll(1, 0),
        },
    ),
    "attention": Kind(
        attention,
        [normal(40, 16), normal(40, 16, seed=1), normal(40, 16, seed=2)],
        {
            "the last key is masked": lambda q, k, v: attention(q, k[:-1], v[:-1]),
            "a key of the next cell takes part": lambda q, k, v: attention(
                q, torch.cat([k, k[:1]]), torch.cat([v, v[:1] * 0])
            ),
            "the scale is that of other heads": lambda q, k, v: attention(q, k, v, 0.2),
            "weights of the first half are not rescaled": lambda q, k, v: torch.cat(
                [attention(q, k, v)[:, :8] * 1.11, attention(q, k, v)[:, 8:]], 1
            ),
        },
    ),
    "log of a sum of powers": Kind(
        lambda x: torch.logsumexp(x, -1), [normal(9, 50) * 3], {"a term is missing": lambda x: x[:, 1:].logsumexp(-1)}
    ),
    "cross entropy": Kind(
        cross_entropy,
        [normal(9, 20), normal(50, 20, seed=3)],
        {"the vocabulary ends early": lambda h, w: F.cross_entropy(h @ w[:-9].T, torch.arange(9), reduction="none")},
    ),
    "LayerNorm": Kind(
        layernorm,
        [normal(9, 12, mean=3) * 0.02, normal(12, mean=1), normal(12)],
        {
            "no eps": lambda x, w, b: layernorm(x, w, b, 1e-12),
            "the mean takes one element less": lambda x, w, b: (
                (x - x[:, 1:].mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-5) * w
                + b
            ),
            "the deviation is that of a sample": lambda x, w, b: (
                (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5) * w + b
            ),
        },
    ),
    "sum of rows": Kind(lambda x: x.sum(0), [normal(70, 11)], {"the last row is masked": lambda x: x[:-1].sum(0)}),
    "gradient of attention": Kind(
        slope(attention),
        [normal(40, 16), normal(40, 16, seed=1), normal(40, 16, seed=2)],
        {
            "the last key is masked": lambda q, k, v: slope(attention)(q, k[:-1], v[:-1]),
            "no scale": lambda q, k, v: slope(attention)(q, k, v) * 4,
        },
    ),
    "gradient of LayerNorm": Kind(
        slope(layernorm),
        [normal(9, 48, mean=3), normal(48, mean=1), normal(48)],
        {"the mean has no gradient": lambda x, w, b: slope(lambda x, w, b: layernorm(x, w, b) + x * 0.1)(x, w, b)},
    ),
    "gradient of cross entropy": Kind(
        slope(cross_entropy),
        [normal(9, 20), normal(50, 20, seed=3)],
        {"the target's own is left out": lambda h, w: slope(lambda h, w: (h @ w.T).logsumexp(-1))(h, w)},
    ),
}


def cases(dtype: torch.dtype, name: str) -> tuple[Kind, list[torch.Tensor], torch.Tensor]:
    """A kind, its tensors in a dtype, and what is true of them."""
    kind = KINDS[name]
    tensors = [x.to(dtype) for x in kind.inputs]
    return kind, tensors, kind.right(*(x.double() for x in tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_arithmetic_alone_allows_what_torch_does(name: str, dtype: torch.dtype, monkeypatch) -> None:
    """Whatever instructions this machine has; and not 100 times as much, twice the worst of all draws."""
    kind, tensors, truth = cases(dtype, name)
    found, witness = kind.right(*tensors), Witness(kind.right, *tensors)
    monkeypatch.setenv(VARIABLE, "drawn")
    assert_as_good_as(found, witness, truth)
    largest = witness.allows(float("inf"), lambda other: max_error(other, truth))
    assert largest < 100 * max_error(found, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name, kind in KINDS.items() for fault in kind.faults])
def test_faults_are_told_apart(name: str, fault: str, dtype: torch.dtype) -> None:
    """Even when they are computed in float64 otherwise."""
    kind, tensors, truth = cases(dtype, name)
    found = kind.faults[fault](*(x.double() for x in tensors)).to(dtype)
    with pytest.raises(AssertionError, match="against float64, allowed"):
        assert_as_good_as(found, Witness(kind.right, *tensors), truth)


@pytest.mark.parametrize("name", ["matrix product", "attention"])
def test_narrower_operands_are_told_apart(name: str) -> None:
    """TF32, which keeps 10 bits of float32's 23, is not float32; nor are sums added up in halves those of float16."""
    kind, tensors, truth = cases(torch.float32, name)
    cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in tensors]
    with pytest.raises(AssertionError, match="allowed"):
        assert_as_good_as(kind.right(*cut), Witness(kind.right, *tensors), truth)
    a, b = normal(5, 700, mean=1).half(), normal(700, 7, mean=1).half()
    total = torch.zeros(5, 7, dtype=torch.float16)
    for k in range(700):
        total += a[:, k, None] * b[None, k]
    with pytest.raises(AssertionError, match="allowed"):
        assert_as_good_as(total, Witness(torch.matmul, a, b), a.double() @ b.double())


def test_what_is_exact_has_no_rounding() -> None:
    """Copies, slices, masks, small integers and their products' signs stay as they are; float64 too."""
    x = torch.arange(-12.0, 12).half().view(4, 6)

    def moved(x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([x[1:].T.contiguous(), x.relu().T], 1).clone()
        y[0] = -y[1]
        return torch.where(y > 3, y + 1, y.masked_fill(y < 0, 2) * 4).amax(0)

    assert torch.equal(drawn(lambda: moved(x), 0), moved(x))
    wide = normal(5, 7).double()
    assert torch.equal(drawn(lambda: attention(wide, wide, wide), 0), attention(wide, wide, wide))


def test_draws_are_the_same_every_time_and_differ_from_each_other() -> None:
    x, y = normal(9, 30).half(), normal(30, 9).half()
    witness = Witness(lambda: [torch.softmax(x @ y, -1), x @ y])
    first = list(witness[0].draws())
    assert all(torch.equal(a, b) for a, b in zip(first, Witness(lambda: torch.softmax(x @ y, -1)).draws(), strict=True))
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(first))
    assert len(witness._drawn) == len(first)  # and were not drawn again for another part
    assert len(list(witness[1].draws())) == len(witness._drawn)


def test_roundings_grow_with_terms_sizes_and_dtypes() -> None:
    def spread(n: int, size: float, dtype: torch.dtype) -> float:
        x = (normal(200, n, mean=1) * size).to(dtype)
        exact = x.double().sum(-1)
        return max(max_error(drawn(lambda: x.float().sum(-1), seed), exact) for seed in range(4))

    base = spread(64, 1.0, torch.float32)
    assert 20 < spread(64, 32.0, torch.float32) / base < 45
    assert 4 < spread(256, 1.0, torch.float32) / base < 16  # four times the size, twice the roundings
    low = normal(64, 64).to(torch.bfloat16)
    errors = [max_error(drawn(lambda x=x: x @ x, 0), x.double() @ x.double()) for x in (low, low.half())]
    assert 4 < errors[0] / errors[1] < 16


def test_an_in_place_sum_is_a_sum() -> None:
    rows, target = normal(300, 5, mean=1), torch.zeros(2, 5)

    def added() -> torch.Tensor:
        out = target.clone()
        out.index_add_(0, torch.arange(300) % 2, rows)
        return out

    exact = torch.stack([rows[::2].double().sum(0), rows[1::2].double().sum(0)])
    assert 0 < max_error(drawn(added, 0), exact) < 1e-3
    assert not target.any()


def test_nan_and_infinity_are_never_right() -> None:
    x = normal(3, 4)
    witness, truth = Witness(torch.neg, x), -x.double()
    for wrong in (float("nan"), float("inf")):
        found = -x
        found[1, 2] = wrong
        with pytest.raises(AssertionError, match="allowed"):
            assert_as_good_as(found, witness, truth)
    with pytest.raises(AssertionError, match="is not"):
        assert_as_good_as(-x[:2], witness, truth)
