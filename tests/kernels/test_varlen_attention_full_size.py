"""The Triton kernels of varlen_attention on a card: cells of 1 to 4,096 tokens in one batch, every dtype and head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_inputs import assert_right, expected_keep, inputs, run
from geneformer_kernels import varlen_attention_qkv

pytestmark = pytest.mark.gpu
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# As Geneformer's batches are: short cells, full ones, an empty one, and lengths around tiles.
LENGTHS = [50, 4096, 0, 1, 1000, 129, 128, 127, 2047]


def skip_without_tensor_cores() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("Triton has no tensor cores for this card: attention never runs there")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128, 48, 20])
def test_forward_and_gradients(dtype: torch.dtype, head_dim: int) -> None:
    skip_without_tensor_cores()
    qkv, d_out, cu_seqlens = inputs(dtype, head_dim, LENGTHS, "cuda")
    out, d_qkv = run(qkv, d_out, cu_seqlens)
    assert_right(out, d_qkv, qkv, d_out, cu_seqlens, head_dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_dropout(dtype: torch.dtype, head_dim: int) -> None:
    """The mask is its definition in all three kernels under the card's own tiles."""
    skip_without_tensor_cores()
    lengths, seed = [300, 0, 1, 129], (9 << 32) + 7
    qkv, d_out, cu_seqlens = inputs(dtype, head_dim, lengths, "cuda")
    out, d_qkv = run(qkv, d_out, cu_seqlens, dropout_p=0.1, seed=torch.tensor([seed], device="cuda"))
    keep = [
        torch.from_numpy(np.stack([expected_keep(seed, head, start, length, 0.1) for head in range(2)])).cuda()
        for start, length in zip((0, 300, 300, 301), lengths, strict=True)
    ]
    assert_right(out, d_qkv, qkv, d_out, cu_seqlens, head_dim**-0.5, keep=keep, dropout_p=0.1)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_same_bits_every_time(head_dim: int, dropout_p: float) -> None:
    skip_without_tensor_cores()
    qkv, d_out, cu_seqlens = inputs(torch.float16, head_dim, LENGTHS, "cuda", n_heads=8)
    seed = torch.tensor([11], device="cuda") if dropout_p else None
    first = run(qkv, d_out, cu_seqlens, dropout_p=dropout_p, seed=seed)
    for _ in range(3):
        for value, other in zip(first, run(qkv, d_out, cu_seqlens, dropout_p=dropout_p, seed=seed), strict=True):
            assert torch.isfinite(value).all()
            assert torch.equal(value, other)


def test_nobody_waits_for_the_device() -> None:
    """Not even to learn how many tiles there are; forward and backward replay as one graph with other lengths."""
    skip_without_tensor_cores()
    qkv, d_out, cu_seqlens = inputs(torch.float16, 64, LENGTHS, "cuda")
    others = torch.tensor([0, 4000, 4000, 5000, 5001, 5002, 6000, 7000, 7001, sum(LENGTHS)], device="cuda").int()
    leaf = qkv.clone().requires_grad_()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        out = varlen_attention_qkv(leaf, cu_seqlens=cu_seqlens, impl="triton")
        return out, torch.autograd.grad(out, leaf, d_out)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    cu_seqlens.copy_(others)
    graph.replay()
    for value, other in zip(captured, step(), strict=True):
        assert torch.equal(value, other)
