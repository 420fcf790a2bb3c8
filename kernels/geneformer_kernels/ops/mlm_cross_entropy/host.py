"""Bfloat16 on the CPU: logits of a block of rows and a chunk of the vocabulary at a time, chunks shared by threads.

One compiled pass over a chunk that is still in the cache takes the place of six or seven of torch's, and a chunk of the
vocabulary, unlike one of rows, has its part of the decoder's gradient to itself: no sums over chunks of V x C numbers.
Every chunk has its own part of the gradient of hidden, though, and chunks get narrower the more rows there are, so
rows are cut as well, where all parts together are as large as the decoder's gradient in float32.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch

from geneformer_kernels.cpu.compiled import (
    LOG2_E,
    LOOP,
    add_in_any_order,
    as_bits,
    as_float,
    from_bfloat16,
    power_of_two_float32,
    to_bfloat16,
)
from geneformer_kernels.cpu.shares import in_shares
from geneformer_kernels.ops.mlm_cross_entropy import row_chunks

# Of one thread's logits. They travel through the shared cache; larger chunks leave it, smaller ones are many products.
_CHUNK_BYTES = 4 * 2**20
_STEP = 32
_NAN_BITS = np.int32(0x7FC00000)


def forward(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, largest logit and sum of ``exp(logit - largest)``: [R] float32 each.

    Raises
    ------
    ValueError
        A target is outside the vocabulary.
    """
    column, is_counted, _ = row_chunks.columns(targets, ignore_index, len(weight))
    # Not three rows of one tensor: an operator's results share no memory.
    row_max, row_sum, picked = (torch.empty(len(hidden), dtype=torch.float32) for _ in range(3))
    for rows in _row_blocks(len(hidden)):
        row_max[rows], row_sum[rows] = _softmax_of(hidden[rows], weight, bias, column[rows], picked[rows])
    # The difference from the largest logit first: exact where logits are huge.
    return torch.where(is_counted, row_sum.log() - (picked - row_max), 0), row_max, row_sum


def _softmax_of(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, column: torch.Tensor, picked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(largest logit, sum of exponentials) of a block of rows; fills ``picked`` with the logits of the targets."""
    bounds = _bounds(len(hidden), len(weight))
    largest, total = torch.empty(2, len(bounds), len(hidden), dtype=torch.float32)

    def compute(chunks: list[tuple[int, int, int]]) -> None:
        buffer = _buffer(hidden, chunks)
        for i_chunk, first, last in chunks:
            logits = torch.mm(hidden, weight[first:last].t(), out=_of(buffer, hidden, last - first))
            _reduce(
                _bits(logits), bias[first:last].numpy(), column.numpy() - first, largest[i_chunk].numpy(),
                total[i_chunk].numpy(), picked.numpy(),
            )  # fmt: skip

    in_shares(compute, bounds, _width)
    row_max = largest.amax(0)
    return row_max, (total * (largest - row_max).exp_()).sum(0)


def backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    targets: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    row_scale: torch.Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients in float32 for rows weighted by row_scale."""
    needs_hidden, needs_weight, _ = needs
    d_hidden = torch.empty(hidden.shape, dtype=torch.float32) if needs_hidden else None
    d_weight = torch.zeros(weight.shape, dtype=torch.float32) if needs_weight else None
    d_bias = torch.zeros(len(bias), dtype=torch.float32)
    for rows in _row_blocks(len(hidden)):
        part = _differentiate_rows(
            hidden[rows], weight, bias, targets[rows], row_max[rows], row_sum[rows], row_scale[rows],
            needs_hidden, d_weight, d_bias,
        )  # fmt: skip
        if d_hidden is not None:
            torch.sum(part, 0, dtype=torch.float32, out=d_hidden[rows])
    return d_hidden, d_weight, d_bias


def _differentiate_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    targets: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    row_scale: torch.Tensor,
    needs_hidden: bool,
    d_weight: torch.Tensor | None,
    d_bias: torch.Tensor,
) -> torch.Tensor:
    """Every chunk's part of the gradient of a block of hidden rows; what they give the others is added to those."""
    bounds = _bounds(len(hidden), len(weight))
    parts = hidden.new_empty(len(bounds) if needs_hidden else 0, *hidden.shape)
    factor = (row_scale / row_sum).numpy()

    def compute(chunks: list[tuple[int, int, int]]) -> None:
        buffer = _buffer(hidden, chunks)
        for i_chunk, first, last in chunks:
            logits = torch.mm(hidden, weight[first:last].t(), out=_of(buffer, hidden, last - first))
            _differentiate(
                _bits(logits), bias[first:last].numpy(), targets.numpy() - first, row_max.numpy(), factor,
                row_scale.numpy(), d_bias[first:last].numpy(),
            )  # fmt: skip
            if needs_hidden:
                torch.mm(logits, weight[first:last], out=parts[i_chunk])
            if d_weight is not None:
                d_weight[first:last] += torch.mm(logits.t(), hidden)

    in_shares(compute, bounds, _width)
    return parts


def _row_blocks(n_rows: int) -> list[slice]:
    """Blocks of about the same size, of so many rows that a chunk of the vocabulary is half as wide."""
    n_blocks = -(-n_rows // math.isqrt(_CHUNK_BYTES))
    size = -(-n_rows // n_blocks)
    return [slice(first, min(first + size, n_rows)) for first in range(0, n_rows, size)]


def _bounds(n_rows: int, n_vocab: int) -> list[tuple[int, int, int]]:
    """(number, first, last) of chunks of the vocabulary; they do not depend on the number of threads."""
    width = max(_STEP, _CHUNK_BYTES // (2 * n_rows) // _STEP * _STEP)
    return [(i, first, min(first + width, n_vocab)) for i, first in enumerate(range(0, n_vocab, width))]


def _width(chunk: tuple[int, int, int]) -> int:
    return chunk[2] - chunk[1]


def _buffer(hidden: torch.Tensor, chunks: list[tuple[int, int, int]]) -> torch.Tensor:
    return hidden.new_empty(len(hidden) * max(map(_width, chunks), default=0))


def _of(buffer: torch.Tensor, hidden: torch.Tensor, width: int) -> torch.Tensor:
    return buffer[: len(hidden) * width].view(len(hidden), width)


def _bits(x: torch.Tensor) -> np.ndarray:
    found: np.ndarray = x.view(torch.uint16).numpy()
    return found


@numba.njit(**LOOP)
def _reduce(logits, bias, column, largest, total, picked):
    """Per row the largest logit, the sum of exponentials of the differences from it, and the logit of its target."""
    row = np.empty(logits.shape[1], np.float32)
    for i in range(logits.shape[0]):
        _add(logits[i], bias, row)
        largest[i] = _largest(row)
        if 0 <= column[i] < len(row):
            picked[i] = row[column[i]]
        total[i] = _exponentials(row, largest[i], np.float32(1))


@numba.njit(**LOOP)
def _differentiate(logits, bias, column, row_max, factor, row_scale, d_bias):
    """Logits become their gradients in place: ``factor * exp(logit - row_max)``, less ``row_scale`` at the target."""
    row = np.empty(logits.shape[1], np.float32)
    for i in range(logits.shape[0]):
        _add(logits[i], bias, row)
        _exponentials(row, row_max[i], factor[i])
        if 0 <= column[i] < len(row):
            row[column[i]] -= row_scale[i]
        for j in range(len(row)):
            d_bias[j] += row[j]
            logits[i, j] = to_bfloat16(row[j])


@numba.njit(**LOOP)
def _add(logits, bias, row):
    for j in range(len(row)):
        row[j] = from_bfloat16(logits[j]) + bias[j]


@numba.njit(**LOOP)
def _largest(row):
    # As integers, which become vector code and let NaN win, once it is positive: flipping the lower bits of negative
    # floats sorts them.
    largest = np.int32(-(2**31))
    for j in range(len(row)):
        bits = np.int32(as_bits(row[j])) if row[j] == row[j] else _NAN_BITS
        largest = max(largest, bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return as_float(np.uint32(largest ^ ((largest >> np.int32(31)) & np.int32(0x7FFFFFFF))))


@numba.njit(fastmath={"contract", "nsz"}, forceinline=True, **LOOP)
def _exponentials(row, largest, factor):
    """``factor * exp(row - largest)`` in place; returns the sum."""
    total = np.float32(0)
    for j in range(len(row)):
        row[j] = power_of_two_float32((row[j] - largest) * LOG2_E) * factor
        total = add_in_any_order(total, row[j])
    return total
