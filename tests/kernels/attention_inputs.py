"""Cells, projections and tiles for the Triton kernels of varlen_attention, and what results are held against."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from geneformer_kernels import varlen_attention_qkv
from geneformer_kernels.launch import Launch
from geneformer_kernels.ops.varlen_attention import reference
from geneformer_kernels.ops.varlen_attention.plan import AttentionPlan, TilePlan
from tolerance import Witness, assert_as_good_as

LENGTHS = [5, 0, 1, 70, 33]
DTYPES = [torch.float16, torch.float32, torch.bfloat16]


def cumulative(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def inputs(dtype: torch.dtype, head_dim: int, lengths: list[int], device: str, n_heads: int = 2, seed: int = 0):
    """A fused projection and a gradient, with means away from zero (which hide no missing mask)."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, n_heads, head_dim, generator=generator) + 0.5
    d_out = torch.randn(sum(lengths), n_heads, head_dim, generator=generator) + 0.25
    return qkv.to(device, dtype), d_out.to(device, dtype), cumulative(lengths, device)


def tiles(block_d: int, fwd: tuple[int, int], dq: tuple[int, int], dkdv: tuple[int, int]) -> AttentionPlan:
    return AttentionPlan(block_d, *(TilePlan(*block, Launch()) for block in (fwd, dq, dkdv)))


def check_dtype(device: str, dtype: torch.dtype) -> None:
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 wrongly")


def by_reference(qkv, d_out, cu_seqlens, scale, keep=None, dropout_p=0.0):
    """(out, gradient of qkv) by autograd through the reference, in the dtype of qkv."""
    qkv = qkv.detach().clone().requires_grad_()
    q, k, v = qkv.unbind(1)
    out = torch.zeros_like(q) + reference.varlen_attention(q, k, v, cu_seqlens, scale, keep=keep, dropout_p=dropout_p)
    return out.detach(), torch.autograd.grad(out, qkv, d_out)[0]


def by_formula(qkv, d_out, cu_seqlens, scale, keep=None, dropout_p=0.0):
    """Gradient of qkv as FlashAttention writes it (Dao et al., arXiv:2205.14135, appendix B), in the dtype of qkv.

    A row's sum of weights times their gradients is there ``sum(d_out * out)``. Short rows lose digits to the difference
    of the two, which autograd of the reference does not: in a cell of one token its gradients are exactly 0.
    """
    d_qkv = torch.zeros_like(qkv)
    for i_cell, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        q, k, v = qkv[start:stop].permute(1, 2, 0, 3)
        d_cell = d_out[start:stop].transpose(0, 1)
        kept = 1.0 if keep is None else (keep[i_cell] / (1 - dropout_p)).to(qkv.dtype)
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, -1)
        out = (weights * kept) @ v
        d_scores = weights * (d_cell @ v.transpose(1, 2) * kept - (d_cell * out).sum(-1, keepdim=True)) * scale
        gradients = d_scores @ k, d_scores.transpose(1, 2) @ q, (weights * kept).transpose(1, 2) @ d_cell
        d_qkv[start:stop] = torch.stack(gradients).permute(2, 0, 1, 3)
    return d_qkv


def assert_right(out, d_qkv, qkv, d_out, cu_seqlens, scale, **dropout) -> None:
    """Outputs and gradients are as good as plain torch in their own dtype: gradients as the worse of two ways."""
    exact = by_reference(qkv.double(), d_out.double(), cu_seqlens, scale, **dropout)
    witness = Witness(by_reference, qkv, d_out, cu_seqlens, scale, **dropout)
    other = Witness(by_formula, qkv, d_out, cu_seqlens, scale, **dropout)
    # On a card products of float32 take three passes of TF32, which are nearly as good as scalar ones.
    factor = 6.0 if qkv.is_cuda and qkv.dtype == torch.float32 else 2.0
    assert_as_good_as(out, witness[0], exact[0], factor=factor)
    for i in range(3):
        assert_as_good_as(d_qkv[:, i], [witness[1][:, i], other[:, i]], exact[1][:, i], factor=factor)


def run(qkv, d_out, cu_seqlens, **arguments):
    """(out, gradient of qkv) by the Triton kernels."""
    qkv = qkv.detach().requires_grad_()
    out = varlen_attention_qkv(qkv, cu_seqlens=cu_seqlens, impl="triton", **arguments)
    return out.detach(), torch.autograd.grad(out, qkv, d_out)[0]


def expected_keep(seed: int, i_head: int, start: int, length: int, dropout_p: float) -> np.ndarray:
    """[length, length] booleans, from the definition: Philox4x32 with 7 rounds, 16 weights per call."""
    query, key = np.meshgrid(np.arange(length), np.arange(length), indexing="ij")
    mask32 = np.uint64(0xFFFFFFFF)
    place = [(x >> 4) * 16 + (x >> 1 & 3) for x in (query, key)]
    words = [x.astype(np.uint64) for x in (start + place[0], place[1], np.full_like(key, i_head), 0 * key)]
    round_keys = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(7):
        product0, product2 = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        high0, high2 = product0 >> np.uint64(32), product2 >> np.uint64(32)
        words = [
            high2 ^ words[1] ^ np.uint64(round_keys[0]),
            product2 & mask32,
            high0 ^ words[3] ^ np.uint64(round_keys[1]),
            product0 & mask32,
        ]
        round_keys = [(round_keys[0] + 0x9E3779B9) % 2**32, (round_keys[1] + 0xBB67AE85) % 2**32]
    word = np.choose((query & 1) * 2 + (key & 1), words)
    left = (((query & 8) * 2 + (key & 8)) & 31).astype(np.uint64)
    rotated = ((word << left) & mask32) | (word >> (np.uint64(32) - left))
    return rotated >= np.uint64(int(np.float32(dropout_p) * 2.0**32))
