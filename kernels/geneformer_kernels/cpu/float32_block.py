"""What follows attention in a transformer block of float32, on a CPU with AVX2: every row of it while it is near.

Projection, residual addition and LayerNorm, both layers of the feed-forward half, and the second LayerNorm. The numbers
are those of one loop after the other, to the bit; what passes between them does not go through memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from geneformer_kernels.cpu import float32_norm, float32_products
from geneformer_kernels.cpu.compiled import LOOP
from geneformer_kernels.cpu.float32_norm import norm_rows
from geneformer_kernels.cpu.float32_products import BLOCK_ROWS, for_thread, multiply_rows, pack, two_layers
from geneformer_kernels.cpu.parameters import copied
from geneformer_kernels.cpu.row_arithmetic import ACTIVATION_CODES
from geneformer_kernels.cpu.shares import in_pieces
from geneformer_kernels.ranges import ranged
from geneformer_kernels.workspace import Workspace, together


class Layer(NamedTuple):
    """A linear layer: [N, K] and [N] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class Norm(NamedTuple):
    """A LayerNorm: [C], [C], what is added to the variance, and whether the stream goes on normalised."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float
    is_post: bool


def serves(layers: tuple[Layer, Layer, Layer]) -> bool:
    """Whether these loops take the layers of a block."""
    shapes = [layer.weight.shape for layer in layers]
    return all(float32_products.serves(*shape) for shape in shapes) and float32_norm.serves(shapes[0][0])


def workspace(shapes: Sequence[tuple[int, int]]) -> Workspace:
    """Of :func:`after_attention` with layers [N, K]: as they and LayerNorms are packed, and what a block keeps near."""
    (width, _), (n_units, _), _ = shapes
    norms = [float32_norm.workspace(width)] * 2
    return together(float32_products.workspace(shapes, near=3 * width + n_units), *norms)


@ranged("after_attention")
def after_attention(
    context: torch.Tensor,
    stream: torch.Tensor,
    layers: tuple[Layer, Layer, Layer],
    norms: tuple[Norm, Norm | None],
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(stream, what to compute on) after a block; without a second LayerNorm (stream, what is to be added to it).

    Parameters
    ----------
    context
        [T, C] float32, what attention gives.
    stream
        [T, C] float32.
    layers
        Projection [C, C], up and down, of float32; see :func:`serves`.
    norms
        After the projection, and after down.
    activation
        As in ``geneformer_kernels.feed_forward``.
    """
    n_rows, width = context.shape
    packed = [pack(*layer) for layer in layers]
    rows, before = (each.detach().contiguous().numpy() for each in (context, stream))
    new_stream = torch.empty(n_rows, width, dtype=torch.float32)
    first, second = norms
    is_one = second is not None and second.is_post
    out = new_stream if is_one else torch.empty(n_rows, width, dtype=torch.float32)
    ways = [_way(norm) for norm in (first, second or first)]
    results, code, is_gated = (new_stream.numpy(), out.numpy()), ACTIVATION_CODES[activation], activation == "swiglu"

    def compute(start: int, stop: int) -> None:
        at_once = min(BLOCK_ROWS, stop - start)
        near = tuple(np.empty((at_once, size), np.float32) for size in (width, width, width, len(packed[1].bias)))
        own = tuple(for_thread(each) for each in packed)
        room = float32_norm.room(width)
        _compute(rows, before, *own, *ways, second is not None, code, is_gated, *results, near, room, start, stop)

    in_pieces(compute, n_rows, whole=BLOCK_ROWS)
    return new_stream, out


def _way(norm: Norm) -> tuple[Any, ...]:
    return (
        copied(norm.weight),
        copied(norm.bias),
        np.float32(norm.eps),
    ), norm.is_post


@numba.njit(**LOOP)
def _compute(
    x, before, projection, up, down, first_norm, second_norm, has_second, activation, is_gated, stream, out, near, room,
    start, stop,
):  # fmt: skip
    """Rows ``start`` to ``stop`` through everything."""
    affine, is_post = first_norm
    second_affine, is_second_post = second_norm
    for first in range(start, stop, BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, stop)
        n_rows = last - first
        made, going, normed, hidden = (
            near[0][:n_rows], near[1][:n_rows], near[2][:n_rows], near[3][:n_rows],
        )  # fmt: skip
        multiply_rows(x[first:last], projection, made)
        if is_post:
            normed = going
        if not has_second:
            going = stream[first:last]
            if is_post:
                normed = going
        norm_rows(made, before[first:last], True, affine, is_post, going, normed, room)
        if has_second:
            two_layers(normed, up, down, activation, is_gated, hidden, made)
            norm_rows(made, going, True, second_affine, is_second_post, stream[first:last], out[first:last], room)
        else:
            two_layers(normed, up, down, activation, is_gated, hidden, out[first:last])
