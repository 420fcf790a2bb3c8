"""varlen_attention against float64, route by route."""

from __future__ import annotations

import pytest
import torch
from geneformer_kernels import attention_scores, varlen_attention, varlen_attention_qkv
from geneformer_kernels.dispatch import ImplUnavailableError
from geneformer_kernels.ops.varlen_attention import reference
from geneformer_kernels.ops.varlen_attention.host import softmax_, varlen_attention_blocked
from geneformer_kernels.ops.varlen_attention.plan import torch_plan
from geneformer_kernels.target import Target
from tolerance import Witness, assert_as_good_as

LENGTHS = [5, 0, 1, 130, 33, 300]


def inputs(dtype: torch.dtype, n_heads: int = 2, head_dim: int = 32, lengths: list[int] = LENGTHS, seed: int = 0):
    """A fused projection with means away from zero (which hide no missing mask), and cumulative lengths."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, n_heads, head_dim, generator=generator) + 0.5
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return *qkv.to(dtype).unbind(1), cu_seqlens


def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return reference.varlen_attention(q.double(), k.double(), v.double(), cu_seqlens, q.shape[-1] ** -0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n_heads", "head_dim"), [(4, 64), (2, 32), (3, 7)])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_forward(dtype: torch.dtype, n_heads: int, head_dim: int, needs_grad: bool) -> None:
    q, k, v, cu_seqlens = inputs(dtype, n_heads, head_dim)
    q.requires_grad_(needs_grad)
    out = varlen_attention(q, k, v, cu_seqlens=cu_seqlens)
    q = q.detach()
    witness = Witness(reference.varlen_attention, q, k, v, cu_seqlens, head_dim**-0.5)
    assert_as_good_as(out.detach(), witness, truth(q, k, v, cu_seqlens))


@pytest.mark.parametrize("block_rows", [1, 7, 64, 1000])
def test_blocked_route(block_rows: int) -> None:
    q, k, v, cu_seqlens = inputs(torch.bfloat16, 4, 64)
    out = varlen_attention_blocked(q, k, v, cu_seqlens.tolist(), 0.125, block_rows)
    witness = Witness(reference.varlen_attention, q, k, v, cu_seqlens, 0.125)
    assert_as_good_as(out, witness, truth(q, k, v, cu_seqlens))


def test_blocked_route_centres_keys() -> None:
    """An offset that all keys of a cell share must cost no precision: the softmax does not see it."""
    q, k, v, cu_seqlens = inputs(torch.bfloat16, 4, 64)
    q, shifted = q + 2, (k + 16).bfloat16()
    plain = reference.varlen_attention(q, shifted, v, cu_seqlens, 0.125)
    exact = truth(q, shifted, v, cu_seqlens)
    out = varlen_attention_blocked(q, shifted, v, cu_seqlens.tolist(), 0.125, 64)
    error, stock = (out.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    assert error < stock / 2


def test_cells_do_not_see_each_other() -> None:
    q, k, v, cu_seqlens = inputs(torch.float32)
    for impl in ("torch", "reference"):
        out = varlen_attention(q, k, v, cu_seqlens=cu_seqlens, impl=impl)
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[:6] = float("nan")  # all but the cells of 130, 33 and 300 tokens
        again = varlen_attention(*others, cu_seqlens=cu_seqlens, impl=impl)
        assert torch.equal(out[6:], again[6:])
        assert again[:6].isnan().all()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradients(impl: str) -> None:
    q, k, v, cu_seqlens = inputs(torch.float64, 2, 4, [3, 0, 1, 5])
    arguments = [x.contiguous().requires_grad_() for x in (q, k, v)]
    torch.autograd.gradcheck(lambda q, k, v: varlen_attention(q, k, v, cu_seqlens=cu_seqlens, impl=impl), arguments)


def test_scale_and_dropout() -> None:
    q, k, v, cu_seqlens = inputs(torch.float32)
    scaled = varlen_attention(q, k, v, cu_seqlens=cu_seqlens, scale=0.01)
    expected = reference.varlen_attention(q, k, v, cu_seqlens, 0.01)
    torch.testing.assert_close(scaled, expected, atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    # Ones as values: the mean over many rows of dropped and rescaled weights is 1 again.
    dropped = varlen_attention(q, k, torch.ones_like(v), cu_seqlens=cu_seqlens, dropout_p=0.5)
    assert dropped.std() > 0.01
    assert abs(dropped.mean().item() - 1) < 0.05
    with pytest.raises(ValueError, match="no dropout"):
        varlen_attention(q, k, v, cu_seqlens=cu_seqlens, dropout_p=0.5, impl="reference")


def test_no_tokens() -> None:
    q = torch.zeros(0, 2, 8)
    assert varlen_attention(q, q, q, cu_seqlens=torch.tensor([0, 0])).shape == (0, 2, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_inference", [False, True])
def test_no_tokens_in_a_compiled_function(dtype: torch.dtype, is_inference: bool) -> None:
    q, k, v, cu_seqlens = inputs(dtype, lengths=[0, 0])
    compiled = torch.compile(varlen_attention, backend="aot_eager", fullgraph=True)
    with torch.inference_mode(is_inference):
        assert compiled(q, k, v, cu_seqlens=cu_seqlens).shape == (0, 2, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_takes_any_seed_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    """Chance in bfloat16 would have 256 values, of which none is below 0.003."""
    q, k, v, cu_seqlens = inputs(dtype, 1, 32, [300])
    v = torch.ones_like(v, requires_grad=True)
    for seed in (-1, -(2**63), 2**63 - 1):
        options = dict(cu_seqlens=cu_seqlens, dropout_p=0.003, seed=torch.tensor([seed]))
        expected = varlen_attention(q, k, v, **options)
        try:
            torch.set_default_dtype(torch.bfloat16)
            found = varlen_attention(q, k, v, **options)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found, expected)
        assert (found != 1).any()


def test_bad_arguments() -> None:
    q, k, v, cu_seqlens = inputs(torch.float32)
    with pytest.raises(ValueError, match="one shape"):
        varlen_attention(q, k[:-1], v, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="one dtype"):
        varlen_attention(q, k.double(), v, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="run from 0 to 469"):
        varlen_attention(q, k, v, cu_seqlens=cu_seqlens[:-1])
    with pytest.raises(ValueError, match="decrease"):
        varlen_attention(q, k, v, cu_seqlens=torch.tensor([0, 9, 3, 469]))
    with pytest.raises(ImplUnavailableError, match=r"numba.*torch"):
        varlen_attention(*(x.double() for x in (q, k, v)), cu_seqlens=cu_seqlens, impl="numba")
    for dtype in (torch.int32, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"q must be float16, bfloat16, float32 or float64, not {dtype}"):
            varlen_attention(*(q.to(dtype),) * 3, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="heads must have elements"):
        varlen_attention(*(q[..., :0],) * 3, cu_seqlens=cu_seqlens)
    for function, heads in ((varlen_attention, (q, k, v)), (varlen_attention_qkv, (torch.stack((q, k, v), 1),))):
        with pytest.raises(ValueError, match="cu_seqlens must be integers"):
            function(*heads, cu_seqlens=cu_seqlens.float())
        with pytest.raises(ValueError, match=r"must be \[B \+ 1\]"):
            function(*heads, cu_seqlens=cu_seqlens[0])


def test_routes() -> None:
    zen, xeon, old = (
        Target.cpu({"avx512", "avx512_bf16"}),
        Target.cpu({"avx512_bf16", "amx_bf16"}),
        Target.cpu({"avx2"}),
    )
    arm = Target.cpu({"arm_bf16"})
    assert torch_plan("bfloat16", zen, is_inference=True).route == "registers"
    assert torch_plan("bfloat16", arm, is_inference=True).route == "blocked"
    assert torch_plan("bfloat16", zen, is_inference=False).route == "blocked"
    assert torch_plan("bfloat16", zen, is_inference=False, has_dropout=True).route == "blocked"
    assert torch_plan("bfloat16", xeon, is_inference=False).route == "cells"
    assert torch_plan("bfloat16", xeon, is_inference=False, has_dropout=True).route == "blocked"
    assert torch_plan("float32", zen, is_inference=False, has_dropout=True).route == "cells"
    assert torch_plan("float32", zen, is_inference=True).route == "cells"
    assert torch_plan("bfloat16", xeon, is_inference=True).route == "tiles"
    assert "AMX tiles" in torch_plan("bfloat16", xeon, is_inference=True).reason
    assert torch_plan("float16", xeon, is_inference=True).route == "cells"
    assert torch_plan("float32", old, is_inference=True).route == "cells"


@pytest.mark.parametrize("n_threads", [1, 4])
@pytest.mark.parametrize("length", [1, 2, 15, 64, 700])
@pytest.mark.parametrize("spread", [0.01, 3, 100])
def test_softmax_of_blocks(n_threads: int, length: int, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    generator = torch.Generator().manual_seed(length)
    scores = ((torch.randn(2, 9, length, generator=generator) - 1) * spread).bfloat16()
    exact = torch.softmax(scores.double(), -1)
    weights = scores.clone()
    softmax_(weights)
    assert_as_good_as(weights, Witness(torch.softmax, scores, -1), exact)


def test_softmax_of_blocks_far_from_zero() -> None:
    """Rows whose powers leave float32, upwards, downwards or both, beside one that needs no second try."""
    spread = torch.linspace(-3, 3, 70)
    rows = [spread, spread + 200, spread - 200, spread * 60, torch.cat([spread[:69], torch.tensor([89.0])])]
    scores = torch.stack(rows).bfloat16()
    exact, witness = torch.softmax(scores.double(), -1), Witness(torch.softmax, scores, -1)
    found = scores.clone()
    softmax_(found)
    for weights, near, true in zip(found, witness, exact, strict=True):
        assert_as_good_as(weights, near, true)


def test_softmax_of_blocks_keeps_nan_in_its_row() -> None:
    for nan in (0x7FC0, 0xFFC0):  # both signs: what x86 computes from inf - inf is a negative NaN
        scores = torch.randn(4, 33).bfloat16()
        scores.view(torch.uint16)[1, 7] = nan
        weights = scores.clone()
        softmax_(weights)
        assert weights[1].isnan().all()
        assert not weights[[0, 2, 3]].isnan().any()
    scores = torch.full((1, 8), float("-inf")).bfloat16()
    scores[0, 3] = 1.0
    softmax_(scores)
    assert scores[0].tolist() == pytest.approx([0, 0, 0, 1, 0, 0, 0, 0], abs=1e-37)


def test_scores_are_the_weights_that_attention_mixes_with() -> None:
    q, k, v, cu_seqlens = inputs(torch.float64, 2, 8, [5, 0, 1, 9])
    scores = attention_scores(q, k, cu_seqlens=cu_seqlens, scale=0.7)
    assert [tuple(cell.shape) for cell in scores] == [(2, 5, 5), (2, 0, 0), (2, 1, 1), (2, 9, 9)]
    mixed = [
        (cell @ part.transpose(0, 1)).transpose(0, 1) for cell, part in zip(scores, v.split([5, 0, 1, 9]), strict=True)
    ]
    out = varlen_attention(q, k, v, cu_seqlens=cu_seqlens, scale=0.7)
    torch.testing.assert_close(torch.cat(mixed), out)
    for cell in scores:
        torch.testing.assert_close(cell.sum(-1), torch.ones(cell.shape[:2], dtype=torch.float64))
    with pytest.raises(ValueError, match="one shape"):
        attention_scores(q, k[:-1], cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="scale"):
        attention_scores(q, k, cu_seqlens=cu_seqlens, scale=-1.0)
