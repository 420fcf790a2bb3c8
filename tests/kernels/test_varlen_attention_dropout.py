"""Dropout in the Triton kernels of varlen_attention: one mask, by its definition, in every kernel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attention_inputs import DTYPES, assert_right, check_dtype, cumulative, expected_keep, inputs, run, tiles
from geneformer_kernels.ops.varlen_attention import launches
from geneformer_kernels.ops.varlen_attention.plan import AttentionPlan


def kept_by_forward(seed: int, lengths: list[int], dropout_p: float, device: str, whole: AttentionPlan | None = None):
    """The mask of every cell [H, L, L]: equal scores, and values that are rows of the identity."""
    n_heads, cu_seqlens = 2, cumulative(lengths, device)
    q = torch.zeros(sum(lengths), n_heads, 128, device=device)
    v = torch.cat([torch.eye(128, device=device)[:length] for length in lengths])[:, None].expand(-1, n_heads, -1)
    seeds = torch.tensor([seed], device=device)
    whole = whole or launches.plan_for(q, dropout_p)
    out, _ = launches.forward(q, q, v, cu_seqlens, None, 1.0, dropout_p, seeds, whole)
    cells = out.split(lengths)
    return [cell.permute(1, 0, 2)[:, :, :length].cpu() > 0 for cell, length in zip(cells, lengths, strict=True)]


@pytest.mark.parametrize("blocks", [(64, 64), (16, 32), (32, 128)])
def test_dropout_mask_is_its_definition(device: str, blocks: tuple[int, int]) -> None:
    """Whatever the tiles; both halves of the seed count."""
    lengths, seed = [40, 0, 1, 70], (77 << 32) + 5
    if device == "cuda" and blocks == (32, 128):
        blocks = (32, 64)
    masks = kept_by_forward(seed, lengths, 0.3, device, tiles(128, blocks, blocks, blocks))
    for start, length, mask in zip((0, 40, 40, 41), lengths, masks, strict=True):
        for i_head in range(2):
            np.testing.assert_array_equal(mask[i_head].numpy(), expected_keep(seed, i_head, start, length, 0.3))


def test_dropout_statistics() -> None:
    """The right share survives, within five standard deviations, and neighbours of every kind are independent."""
    masks = np.stack(
        [[expected_keep(seed, i_head, start, 256, 0.1) for i_head in range(4)] for seed in (3, 4) for start in (0, 256)]
    )
    n = masks.size
    assert abs(masks.mean() - 0.9) < 5 * math.sqrt(0.09 / n)
    signs = (masks - 0.9) / 0.3
    pairs = [(signs[0], signs[1]), (signs[0], signs[2]), (signs[:, 0], signs[:, 1])]
    for bit in (1, 2, 4, 8, 16, 32):
        pairs += [(signs[..., bit:, :], signs[..., :-bit, :]), (signs[..., bit:], signs[..., :-bit])]
    for a, b in pairs:
        assert abs((a * b).mean()) < 5 / math.sqrt(a.size)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 24])
def test_dropout_forward_and_gradients(device: str, dtype: torch.dtype, head_dim: int, monkeypatch) -> None:
    """The mask is the same in all three kernels, though each cuts the scores differently."""
    check_dtype(device, dtype)
    lengths, seed = [70, 0, 1, 20], 123456789012
    qkv, d_out, cu_seqlens = inputs(dtype, head_dim, lengths, device)
    block_d = 1 << (head_dim - 1).bit_length()
    if device == "cpu":
        monkeypatch.setattr(launches, "plan_for", lambda q, p: tiles(block_d, (32, 32), (64, 64), (16, 32)))
    out, d_qkv = run(qkv, d_out, cu_seqlens, dropout_p=0.25, seed=torch.tensor([seed], device=device))
    keep = [
        torch.from_numpy(np.stack([expected_keep(seed, i, start, length, 0.25) for i in range(2)])).to(device)
        for start, length in zip((0, 70, 70, 71), lengths, strict=True)
    ]
    assert_right(out, d_qkv, qkv, d_out, cu_seqlens, head_dim**-0.5, keep=keep, dropout_p=0.25)
