"""What follows attention in a transformer block of int8, on the CPU: every row of it while it is near.

Projection, residual addition and LayerNorm, both layers of the feed-forward half, and the second LayerNorm: of a block
of rows, what passes between them stays in the second-level cache. One by one, each writes and reads all rows in memory,
which takes as long as products on tiles. The numbers are those of one after the other, to the bit, as the same loops
make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from geneformer_kernels.cpu.compiled import LOOP
from geneformer_kernels.cpu.int8_dot import SLACK
from geneformer_kernels.cpu.int8_loops import compute_rows
from geneformer_kernels.cpu.int8_norm import affine_of, norm_rows
from geneformer_kernels.cpu.int8_products import (
    Source,
    buffer_bytes,
    buffers,
    factors_of,
    kinds_of,
    packed_bytes,
    packed_for,
    rows_at_once,
    weight_of,
)
from geneformer_kernels.cpu.lanes import LANES
from geneformer_kernels.cpu.row_arithmetic import ACTIVATION_CODES, address_of
from geneformer_kernels.cpu.shares import in_pieces
from geneformer_kernels.ranges import ranged
from geneformer_kernels.workspace import Workspace


class Layer(NamedTuple):
    """A linear layer: int8 [N, K], float32 [N], [N] or None, and [K] or None, what its input is multiplied by."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    smooth: torch.Tensor | None


class Norm(NamedTuple):
    """A LayerNorm: [C], [C], what is added to the variance, whether the stream goes on normalised, and [C] or None,
    what the rows that leave are multiplied by before they are rounded."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float
    is_post: bool
    smooth: torch.Tensor | None


def workspace(shapes: Sequence[tuple[int, int]], activation: str, dtype: torch.dtype) -> Workspace:
    """Of :func:`after_attention` with layers [N, K]: as they are packed, and what a block of rows keeps near."""
    (width, _), (n_units, _), (_, hidden_width) = shapes
    kind, down_kind = kinds_of(activation)
    kinds = kind, kind, down_kind
    packed = sum(packed_bytes(*shape, each) for shape, each in zip(shapes, kinds, strict=True))
    n_rows = rows_at_once(n_units)
    near = n_rows * (dtype.itemsize + 4) * width + (n_rows + SLACK) * (width + 4) + 4 * 4 * width
    near += 4 * n_rows * -(-n_units // LANES) * LANES
    own = buffer_bytes(n_rows, width, kind) + buffer_bytes(n_rows, hidden_width, down_kind)
    return Workspace(call=packed + 2 * 3 * 4 * width, thread=own + near)


@ranged("after_attention")
def after_attention(
    context: torch.Tensor,
    stream: torch.Tensor,
    layers: tuple[Layer, Layer, Layer],
    norms: tuple[Norm, Norm | None],
    activation: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(stream, int8 rows, their scales) after a block; without a second LayerNorm (stream, what is to be added, None).

    Parameters
    ----------
    context
        [T, C], what attention gives, at least one row; float32 or bfloat16. C is a multiple of 64.
    stream
        [T, C] float32.
    layers
        Projection [C, C], up and down; down without a smoothing.
    norms
        After the projection, and after down.
    activation
        As in ``geneformer_kernels.int8_feed_forward``.
    dtype
        Of what layers give: float32 or bfloat16.
    """
    n_rows, width = context.shape
    (out, up, down), (first, second) = layers, norms
    kind, down_kind = kinds_of(activation)
    kinds, codes = (kind, kind, down_kind), [ACTIVATION_CODES[each] for each in (None, activation, None)]
    packed = [packed_for(*layer[:3], each) for layer, each in zip(layers, kinds, strict=True)]
    source, before = Source(context, None), stream.detach().float().contiguous()
    new_stream, scale = torch.empty(n_rows, width, dtype=torch.float32), torch.empty(n_rows, dtype=torch.float32)
    last = torch.empty(n_rows, width, dtype=dtype if second is None else torch.int8)
    at = (before.data_ptr(), new_stream.data_ptr(), last.data_ptr(), second is not None)
    ways = [_way(norm) for norm in (first, second or first)]
    hidden_width, n_units, is_gated = down.weight.shape[1], len(up.weight), activation == "swiglu"

    def compute(start: int, stop: int) -> None:
        at_once = min(rows_at_once(n_units), stop - start)
        rows = buffers(at_once, width, kind)
        blocks = (rows, rows, buffers(at_once, hidden_width, down_kind))
        loops = [
            (factors_of(layer.smooth, each.width), weight_of(each), kinds[i], codes[i], blocks[i])
            for i, (layer, each) in enumerate(zip((out, up._replace(smooth=None), down), packed, strict=True))
        ]
        near = _Near(at_once, width, n_units, dtype)
        _compute(source.arrays, *loops, *ways, is_gated, *near.arrays, at, scale.numpy(), start, stop, at_once)

    in_pieces(compute, n_rows)
    return new_stream, last, None if second is None else scale


def _way(norm: Norm) -> tuple[Any, ...]:
    return affine_of(norm.weight, norm.bias, norm.smooth), norm.smooth is not None, np.float32(norm.eps), norm.is_post


class _Near:
    """What is between layers, of a block of rows."""

    def __init__(self, n_rows: int, width: int, n_units: int, dtype: torch.dtype) -> None:
        self._given = torch.empty(n_rows, width, dtype=dtype)
        stream = np.empty((n_rows, width), np.float32)
        # Where tiles can take them: from whole registers on, as torch's memory begins.
        rows = torch.empty(n_rows + SLACK, width, dtype=torch.int8).numpy()
        rounded = (0, 0, width, False, rows, np.empty(n_rows + SLACK, np.float32), True)
        given = (self._given.data_ptr(), width * self._given.element_size(), dtype == torch.bfloat16)
        hidden = np.zeros((n_rows, -(-n_units // LANES) * LANES), np.float32)
        self.arrays = (given, stream, rounded, hidden, np.zeros((4, width), np.float32))


@numba.njit(**LOOP)
def _compute(
    source, out, up, down, first_norm, second_norm, is_gated, given, stream, rounded, hidden, scratch, at, scale, start,
    stop, block_rows,
):  # fmt: skip
    """Rows ``start`` to ``stop`` through everything; ``at``: addresses of the stream before and after, and of rows or
    of what is to be added, and whether those are rows."""
    x, x_row_bytes, width, x_is_half, none, no_scale, is_given = source
    before, after, last, has_second = at
    given_at, given_row_bytes, is_half = given
    rows, row_scale = rounded[4], rounded[5]
    row_bytes, near = 4 * width, address_of(stream)
    for first in range(start, stop, block_rows):
        n_rows = min(block_rows, stop - first)
        here = (x + first * x_row_bytes, x_row_bytes, width, x_is_half, none, no_scale, is_given)
        compute_rows(here, out, out, 1, False, hidden, given, 0, n_rows, n_rows)
        affine, has_smooth, eps, is_post = first_norm
        going = near if has_second else after + first * row_bytes
        norm_rows(
            given_at, is_half, before + first * row_bytes, going, address_of(rows), row_scale, width, width, affine,
            has_smooth, eps, is_post, scratch, 0, n_rows,
        )  # fmt: skip
        if has_second:
            compute_rows(rounded, up, down, 2, is_gated, hidden, given, 0, n_rows, n_rows)
            affine, has_smooth, eps, is_post = second_norm
            norm_rows(
                given_at, is_half, going, after + first * row_bytes, last + first * width, scale[first:], width, width,
                affine, has_smooth, eps, is_post, scratch, 0, n_rows,
            )  # fmt: skip
        else:
            there = (last + first * given_row_bytes, given_row_bytes, is_half)
            compute_rows(rounded, up, down, 2, is_gated, hidden, there, 0, n_rows, n_rows)
