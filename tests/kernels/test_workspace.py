"""What implementations say of the memory they take, beside what they have in use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from geneformer_kernels.cpu import float32_block, float32_norm, float32_products
from geneformer_kernels.cpu.int8_products import instruction_set
from geneformer_kernels.ops.varlen_attention import host, host_amx, host_avx512, host_float32, sdpa
from geneformer_kernels.ops.varlen_attention.cells import AttentionCells
from geneformer_kernels.target import target_of
from geneformer_kernels.workspace import Workspace, one_by_one, together
from memory_use import most_bytes

# Objects of Python, and loops' small buffers of their own.
SMALL = 40_000
needs_avx2 = pytest.mark.skipif(not target_of("cpu").has_float32_loops, reason="this CPU has no AVX2")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(call: Callable[[], object], said: Workspace, n_rows: int, result_bytes: int, *, factor: float = 1.15) -> None:
    """A call has in use what it says, and its result."""
    call()  # compiles
    with torch.inference_mode():
        tensors, arrays = most_bytes(call)
    found = tensors + arrays - result_bytes
    claimed = n_rows * said.row + said.call + said.thread
    assert found <= claimed + SMALL
    assert claimed <= factor * found + SMALL


def test_what_is_in_use_at_once_adds_up_and_the_most_of_what_comes_in_turn_counts() -> None:
    parts = Workspace(1, 20, 300), Workspace(4, 10, 0)
    assert together(*parts) == Workspace(5, 30, 300)
    assert one_by_one(*parts) == Workspace(4, 20, 300)


LENGTHS = {"many": [40, 300, 7, 300], "long": [900], "longer": [1500, 20]}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("way", ["float32", "blocked", "registers", "tiles", "bfloat16", "float16", "float64"])
def test_attention(way: str, lengths: list[int]) -> None:
    n_heads, head_dim, longest = 2, 64, max(lengths)
    dtype = torch.bfloat16 if way in ("blocked", "registers", "tiles") else getattr(torch, way)
    bounds = list(itertools.accumulate(lengths, initial=0))
    q, k, v = torch.randn(bounds[-1], 3, n_heads, head_dim).to(dtype).unbind(1)
    result = bounds[-1] * n_heads * head_dim * dtype.itemsize
    scale = head_dim**-0.5
    if way == "float32":
        if not target_of("cpu").has_float32_loops:
            pytest.skip("this CPU has no AVX2")
        said = host_float32.workspace(longest, head_dim)
        check(lambda: host_float32.varlen_attention_float32(q, k, v, bounds, scale, None), said, bounds[-1], result)
    elif way == "blocked":
        said = host.workspace(longest, n_heads, head_dim, 384)
        # On a CPU with AMX, where this way is not taken, oneDNN's products take tensors of their own.
        with torch.backends.mkldnn.flags(enabled=False):
            check(lambda: host.varlen_attention_blocked(q, k, v, bounds, scale, 384), said, bounds[-1], result)
    elif way in ("registers", "tiles"):
        if not (host_avx512 if way == "registers" else host_amx).serves(head_dim):
            pytest.skip("this CPU, or numba's compiler, lacks the instructions")
        if way == "registers":
            said = host_avx512.workspace(longest, n_heads, head_dim, 384)
            check(lambda: host_avx512.varlen_attention_avx512(q, k, v, bounds, scale, 384), said, bounds[-1], result)
        else:
            said = host_amx.workspace(longest, head_dim)
            check(lambda: host_amx.varlen_attention_amx(q, k, v, bounds, scale, 384), said, bounds[-1], result)
    else:  # whatever way it is on this CPU
        cells = AttentionCells(torch.tensor(bounds), bounds[-1])
        said = sdpa.workspace(dtype, longest, n_heads, head_dim)
        # Of one cell, results are not there twice while its scores are.
        check(lambda: sdpa.attend(q, k, v, cells, scale, 0.0, None), said, bounds[-1], result, factor=1.8)


SHAPES = {"narrow": (128, 256), "wide": (320, 1024)}


@needs_avx2
@pytest.mark.parametrize(("width", "hidden"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("n_rows", [5, 700])
def test_linear_layers_of_float32(n_rows: int, width: int, hidden: int) -> None:
    x, result = torch.randn(n_rows, width), 4 * n_rows
    up, down = (torch.randn(hidden, width), torch.randn(hidden)), (torch.randn(width, hidden), None)
    said = float32_products.workspace([(hidden, width)])
    check(lambda: float32_products.linear(x, *up), said, n_rows, result * hidden, factor=1.15 if n_rows > 96 else 2)
    said = float32_products.workspace([(hidden, width), (width, hidden)], near=hidden)
    factor = 1.15 if n_rows > 96 else 2
    check(lambda: float32_products.feed_forward(x, up, down, "gelu"), said, n_rows, result * width, factor=factor)


@needs_avx2
def test_layer_norm_of_float32() -> None:
    x, residual, weight, bias = torch.randn(2, 700, 256).unbind(0) + torch.randn(2, 256).unbind(0)
    for is_post, n_results in ((True, 1), (False, 2)):
        check(
            lambda is_post=is_post: float32_norm.add_layer_norm(x, residual, weight, bias, 1e-12, is_post),
            float32_norm.workspace(256), 700, 4 * 700 * 256 * n_results,
        )  # fmt: skip


@needs_avx2
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_all_that_follows_attention_in_float32(activation: str) -> None:
    width, hidden, n_rows = 256, 512, 700
    shapes = [(width, width), (hidden * (2 if activation == "swiglu" else 1), width), (width, hidden)]
    layers = tuple(float32_block.Layer(torch.randn(shape), torch.randn(shape[0])) for shape in shapes)
    norm = float32_block.Norm(torch.randn(width), torch.randn(width), 1e-12, True)
    context, stream = torch.randn(2, n_rows, width).unbind(0)
    check(
        lambda: float32_block.after_attention(context, stream, layers, (norm, norm), activation),
        float32_block.workspace(shapes), n_rows, 4 * n_rows * width, factor=1.25,
    )  # fmt: skip


@pytest.mark.skipif(instruction_set() is None, reason="this CPU has no instructions for products of int8")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_that_follows_attention_in_int8(dtype: torch.dtype) -> None:
    from geneformer_kernels.cpu import int8_block

    width, hidden, n_rows = 256, 512, 700
    shapes = [(width, width), (hidden, width), (width, hidden)]
    layers = tuple(
        int8_block.Layer(torch.ones(shape, dtype=torch.int8), torch.rand(shape[0]), None, None) for shape in shapes
    )
    norm = int8_block.Norm(torch.randn(width), torch.randn(width), 1e-12, True, None)
    context, stream = torch.randn(n_rows, width).to(dtype), torch.randn(n_rows, width)
    check(
        lambda: int8_block.after_attention(context, stream, layers, (norm, norm), "gelu", dtype),
        int8_block.workspace(shapes, "gelu", dtype), n_rows, (4 + 1) * n_rows * width, factor=1.3,
    )  # fmt: skip
