"""Attention with gradients on the CPU in bfloat16: against float64, with dropout, on any number of threads."""

from __future__ import annotations

import itertools

import pytest
import torch
from geneformer_kernels import varlen_attention, varlen_attention_qkv
from geneformer_kernels.ops.varlen_attention import reference
from geneformer_kernels.ops.varlen_attention.blocked import attend_blocked
from tolerance import Witness, assert_as_good_as

LENGTHS = [5, 0, 1, 130, 33, 300]


def inputs(
    n_heads: int, head_dim: int, lengths: list[int] = LENGTHS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """qkv with means away from zero, the output's gradient, and cumulative lengths."""
    generator = torch.Generator().manual_seed(0)
    n_tokens = sum(lengths)
    qkv = torch.randn(n_tokens, 3, n_heads, head_dim, generator=generator) + 0.5
    d_out = torch.randn(n_tokens, n_heads, head_dim, generator=generator) + 0.1
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return qkv.bfloat16(), d_out.bfloat16(), cu_seqlens


def differentiated(function, qkv: torch.Tensor, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the gradient of qkv."""
    qkv = qkv.detach().clone().requires_grad_()
    out = function(*qkv.unbind(1))
    out.backward(d_out.to(out.dtype))
    assert qkv.grad is not None
    return out.detach(), qkv.grad


@pytest.mark.parametrize(("n_heads", "head_dim"), [(4, 64), (2, 32), (3, 7)])
@pytest.mark.parametrize("block_rows", [1, 64, 100, 256])
def test_gradients(n_heads: int, head_dim: int, block_rows: int) -> None:
    qkv, d_out, cu_seqlens = inputs(n_heads, head_dim)
    scale = head_dim**-0.5
    expected = lambda q, k, v: reference.varlen_attention(q, k, v, cu_seqlens, scale)  # noqa: E731
    found = differentiated(
        lambda q, k, v: attend_blocked(q, k, v, cu_seqlens, scale, 0.0, None, block_rows)[0], qkv, d_out
    )
    for ours, witness, exact in zip(
        found,
        Witness(differentiated, expected, qkv, d_out),
        differentiated(expected, qkv.double(), d_out),
        strict=True,
    ):
        assert_as_good_as(ours, witness, exact)


def kept(cu_seqlens: torch.Tensor, n_heads: int, dropout_p: float, seed: torch.Tensor) -> list[torch.Tensor]:
    """[H, L, L] booleans for every cell, which weights dropout keeps: with equal scores and unit vectors as values."""
    n_tokens, longest = int(cu_seqlens[-1]), int(cu_seqlens.diff().max())
    q = torch.zeros(n_tokens, n_heads, longest, dtype=torch.bfloat16)
    bounds = cu_seqlens.tolist()
    places = torch.cat([torch.arange(stop - start) for start, stop in itertools.pairwise(bounds)])
    v = torch.nn.functional.one_hot(places, longest)[:, None].expand_as(q).bfloat16()
    out, _ = attend_blocked(q, q, v, cu_seqlens, 1.0, dropout_p, seed, 64)
    cells = [out[start:stop, :, : stop - start] for start, stop in itertools.pairwise(bounds)]
    return [cell.transpose(0, 1) > 0 for cell in cells]


@pytest.mark.parametrize("dropout_p", [0.02, 0.5])
def test_dropout_drops_the_same_weights_in_both_passes(dropout_p: float) -> None:
    qkv, d_out, cu_seqlens = inputs(2, 32, [40, 0, 1, 90])
    seed, scale = torch.tensor([2**40 + 17]), 0.2
    masks = kept(cu_seqlens, 2, dropout_p, seed)

    def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return reference.varlen_attention(q, k, v, cu_seqlens, scale, keep=masks, dropout_p=dropout_p)

    found = differentiated(
        lambda q, k, v: attend_blocked(q, k, v, cu_seqlens, scale, dropout_p, seed, 64)[0], qkv, d_out
    )
    for ours, witness, exact in zip(
        found,
        Witness(differentiated, expected, qkv, d_out),
        differentiated(expected, qkv.double(), d_out),
        strict=True,
    ):
        assert_as_good_as(ours, witness, exact)


def test_dropout_is_chance() -> None:
    n_heads, dropout_p = 3, 0.25
    cu_seqlens = torch.tensor([0, 200, 400])
    first, second = kept(cu_seqlens, n_heads, dropout_p, torch.tensor([1]))
    other, _ = kept(cu_seqlens, n_heads, dropout_p, torch.tensor([2]))
    # Six standard deviations of a mean over independent draws.
    band = lambda n, p: 6 * (p * (1 - p) / n) ** 0.5  # noqa: E731
    assert abs(first.float().mean() - 0.75) < band(first.numel(), 0.75)
    for axis in (1, 2):
        means = first.float().mean(axis)
        assert (means - 0.75).abs().max() < band(200, 0.75)
    # Neighbouring heads, rows, columns, cells, seeds and the transposed place agree as often as chance does.
    pairs = {
        "heads": (first[:-1], first[1:]), "rows": (first[:, :-1], first[:, 1:]),
        "columns": (first[..., :-1], first[..., 1:]), "cells": (first, second), "seeds": (first, other),
        "diagonal": (first[:, 1:, 1:], first[:, :-1, :-1]),
        "transposed": (first.triu(1), first.transpose(1, 2).triu(1)),
    }  # fmt: skip
    for name, (a, b) in pairs.items():
        are_both = torch.ones(200, 200).triu(1).bool().expand(3, -1, -1) if name == "transposed" else torch.ones_like(a)
        agree = (a == b)[are_both.bool()].float()
        expected = 0.75**2 + 0.25**2
        assert abs(agree.mean() - expected) < band(len(agree), expected), name


def test_dropout_scales_what_it_keeps() -> None:
    qkv, _, cu_seqlens = inputs(2, 32, [300])
    q, k, v = qkv.unbind(1)
    out = varlen_attention(q, k, torch.ones_like(v), cu_seqlens=cu_seqlens, dropout_p=0.5, seed=torch.tensor([3]))
    assert out.float().std() > 0.01
    assert abs(out.float().mean() - 1) < 0.02


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_threads_change_nothing(dropout_p: float) -> None:
    qkv, d_out, cu_seqlens = inputs(2, 32)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3, 1):
            torch.set_num_threads(n_threads)
            torch.manual_seed(5)
            found.append(
                differentiated(
                    lambda q, k, v: varlen_attention(q, k, v, cu_seqlens=cu_seqlens, dropout_p=dropout_p), qkv, d_out
                )
            )
            assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    for out, gradient in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_nan_stays_within_its_cell() -> None:
    qkv, d_out, cu_seqlens = inputs(2, 32)
    qkv[:6] = float("nan")  # all but the cells of 130, 33 and 300 tokens
    out, gradient = differentiated(lambda q, k, v: varlen_attention(q, k, v, cu_seqlens=cu_seqlens), qkv, d_out)
    assert out[:6].isnan().all()
    assert gradient[:6].isnan().all()
    assert not out[6:].isnan().any()
    assert not gradient[6:].isnan().any()


def test_compiles_with_dropout() -> None:
    torch._dynamo.reset()
    qkv, d_out, cu_seqlens = inputs(2, 32, [40, 3])

    def attend(qkv: torch.Tensor) -> torch.Tensor:
        return varlen_attention_qkv(qkv, cu_seqlens=cu_seqlens, dropout_p=0.3, seed=torch.tensor([7]))

    found = []
    for function in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        leaf = qkv.clone().requires_grad_()
        out = function(leaf)
        out.backward(d_out)
        found.append((out.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_registered_as_torch_wants_it() -> None:
    qkv, _, cu_seqlens = inputs(2, 16, [9, 0, 30])
    arguments = [x.clone().requires_grad_() for x in qkv.unbind(1)]
    torch.library.opcheck(attend_blocked.overload, (*arguments, cu_seqlens, 0.25, 0.1, torch.tensor([7]), 64))
