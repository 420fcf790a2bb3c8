"""residual_layernorm against float64."""

from __future__ import annotations

import pytest
import torch
from geneformer_kernels import residual_layernorm
from geneformer_kernels.ops.residual_layernorm import reference
from tolerance import Witness, assert_as_good_as


def inputs(n: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(n, width, generator=generator) + 3).to(dtype)
    residual = torch.randn(n, width, generator=generator) - 1
    return x, residual, torch.rand(width, generator=generator) + 0.5, torch.randn(width, generator=generator)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "width"), [(7, 256), (1, 21), (0, 16)])
@pytest.mark.parametrize("has_residual", [True, False])
def test_forward(impl: str, norm: str, dtype: torch.dtype, n: int, width: int, has_residual: bool) -> None:
    x, residual, weight, bias = inputs(n, width, dtype)
    residual = residual if has_residual else None
    stream, out = residual_layernorm(x, residual, weight, bias, eps=1e-12, norm=norm, impl=impl)
    total = x.double() + (residual.double() if has_residual else 0)
    exact = torch.nn.functional.layer_norm(total, (width,), weight.double(), bias.double(), 1e-12)
    assert stream.dtype == torch.float32
    assert out.dtype == dtype

    def by_torch() -> tuple[torch.Tensor, torch.Tensor]:
        plain = x.float() if residual is None else x.float() + residual
        normed = torch.nn.functional.layer_norm(plain, (width,), weight, bias, 1e-12)
        return normed if norm == "post" else plain, normed.to(dtype)

    witness = Witness(by_torch)
    assert_as_good_as(stream, witness[0], exact if norm == "post" else total)
    assert_as_good_as(out, witness[1], exact)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("width", [1, 21, 256])
def test_one_pass_on_the_cpu(norm: str, has_residual: bool, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few threads take one pass of our own, many torch's three: both are as good as torch, and NaN stays in its row."""
    x, residual, weight, bias = inputs(9, width, torch.bfloat16)
    x[4, 0] = float("nan")
    strided = torch.stack([x, x], dim=1)[:, 0]
    residual = residual if has_residual else None
    total = x.double() + (residual.double() if has_residual else 0)
    exact = torch.nn.functional.layer_norm(total, (width,), weight.double(), bias.double(), 1e-5)
    results = []
    for n_threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        results.append(residual_layernorm(strided, residual, weight, bias, eps=1e-5, norm=norm, impl="torch"))
    good = torch.arange(9) != 4

    def by_torch() -> tuple[torch.Tensor, torch.Tensor]:
        return reference.residual_layernorm(x, residual, weight, bias, 1e-5, norm, torch.bfloat16)

    for ours, theirs, witness, true in zip(
        *results, Witness(by_torch), (exact if norm == "post" else total, exact), strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert ours.is_contiguous()
        for found in (ours, theirs):
            assert_as_good_as(found[good], witness[good], true[good])
        assert torch.equal(ours[4].isnan(), theirs[4].isnan())


def test_eps_matters() -> None:
    x = torch.full((1, 8), 2.0)
    x[0, 0] += 1e-3
    outs = [
        residual_layernorm(x, None, torch.ones(8), torch.zeros(8), eps=eps, norm="post", impl=impl)[1]
        for eps in (1e-12, 1e-5)
        for impl in ("torch", "reference")
    ]
    torch.testing.assert_close(outs[0], outs[1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(outs[2], outs[3], atol=1e-3, rtol=1e-3)
    assert (outs[0] - outs[2]).abs().max() > 0.5


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_gradients(norm: str) -> None:
    x, residual, weight, bias = (t.double().requires_grad_() for t in inputs(3, 5, torch.float64))
    torch.autograd.gradcheck(
        lambda *a: residual_layernorm(*a, eps=1e-5, norm=norm, impl="torch"), (x, residual, weight, bias)
    )


def test_bad_arguments() -> None:
    x, residual, weight, bias = inputs(3, 8, torch.float32)
    with pytest.raises(ValueError, match="norm must be"):
        residual_layernorm(x, residual, weight, bias, eps=1e-5, norm="sandwich")
    with pytest.raises(ValueError, match="one shape"):
        residual_layernorm(x, residual[:2], weight, bias, eps=1e-5, norm="post")
    with pytest.raises(ValueError, match=r"must be \[8\]"):
        residual_layernorm(x, residual, weight[:2], bias, eps=1e-5, norm="post")
