"""What the compiled loops of the CPU are made of: rounding to bfloat16, powers of two, and NaN in all its forms."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch
from geneformer_kernels import mlm_cross_entropy, residual_layernorm
from geneformer_kernels.cpu.compiled import LOOP, power_of_two_float32, to_bfloat16
from geneformer_kernels.ops.mlm_cross_entropy import host

# Quiet and signalling, of both signs, with few and with many of their bits set.
NANS = (0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FFF8000, 0x7FFF7FFF)


def nan(bits: int) -> torch.Tensor:
    return torch.tensor(np.array([bits], np.uint32).view(np.int32)).view(torch.float32)


@numba.njit(**{**LOOP, "cache": False})
def _rounded(x, out):
    for i in range(len(x)):
        out[i] = to_bfloat16(x[i])


@numba.njit(**{**LOOP, "cache": False})
def _powers(x, out):
    for i in range(len(x)):
        out[i] = power_of_two_float32(x[i])


def test_rounding_to_bfloat16() -> None:
    """Every pattern of the upper half with those lower halves where something happens, as torch rounds."""
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    patterns = (torch.arange(2**16)[:, None] * 2**16 + lower).flatten()
    x = torch.where(patterns < 2**31, patterns, patterns - 2**32).to(torch.int32).view(torch.float32)
    out = torch.empty(len(x), dtype=torch.uint16)
    _rounded(x.numpy(), out.numpy())
    found, expected = out.view(torch.bfloat16), x.bfloat16()
    assert torch.equal(found.isnan(), x.isnan())
    assert torch.equal(found[~x.isnan()], expected[~x.isnan()])


def test_powers_of_nan_are_nan() -> None:
    x = torch.cat([nan(bits) for bits in NANS] + [torch.zeros(1)])
    out = torch.empty_like(x)
    _powers(x.numpy(), out.numpy())
    assert out.isnan().tolist() == [True] * len(NANS) + [False]
    assert out[-1] == 1


@pytest.mark.parametrize("bits", NANS, ids=hex)
def test_nan_is_the_largest(bits: int) -> None:
    row = torch.linspace(-3, 5, 40)
    assert host._largest(row.numpy()) == 5
    row[11:12] = nan(bits)
    assert np.isnan(host._largest(row.numpy()))


@pytest.mark.parametrize("bits", NANS, ids=hex)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_nan_stays_in_the_normalised_row(norm: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # of few threads' own loop
    x, residual = torch.randn(3, 40).bfloat16(), torch.randn(3, 40)
    residual[1, 4:5] = nan(bits)
    stream, out = residual_layernorm(x, residual, torch.ones(40), torch.zeros(40), eps=1e-5, norm=norm, impl="torch")
    assert out.isnan().all(-1).tolist() == out.isnan().any(-1).tolist() == [False, True, False]
    assert stream.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("bits", NANS, ids=hex)
def test_nan_reaches_the_loss_and_every_gradient(bits: int) -> None:
    hidden, weight, bias = torch.randn(6, 8).bfloat16(), torch.randn(50, 8), torch.randn(50)
    bias[7:8] = nan(bits)
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    loss = mlm_cross_entropy(*leaves, torch.arange(6), reduction="none", impl="torch")
    loss.sum().backward()
    for value in (loss, *(leaf.grad for leaf in leaves)):
        assert value.isnan().all()
