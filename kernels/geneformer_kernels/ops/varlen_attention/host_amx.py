"""Attention on a CPU with amx_bf16: products on tiles, and the softmax of one block of scores beside those of others.

As in ``host_avx512.py`` keys are centred, weights need no maximum taken away, and are rounded to bfloat16 once. A core
multiplies sixteen times as fast on tiles, so that ``2**x`` takes as long as both products: that of one block of scores
is computed while tiles multiply the next. (Half of it while they mix values was no faster, and has to keep all scores.)

One core of a Xeon, busy with others, a cell of 700 tokens, 4 heads of 64: 1.06 ms of processor time, where torch's own
attention takes 2.64 and ``host_avx512.py`` 5.7; of 2,048 tokens 5.9, 14.1 and 44 (2026-11-30).
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from geneformer_kernels.cpu.amx import configure_tiles, release_tiles
from geneformer_kernels.cpu.compiled import LOOP
from geneformer_kernels.cpu.row_arithmetic import address_of
from geneformer_kernels.ops.varlen_attention.amx import (
    BLOCK,
    BLOCK_BYTES,
    PANEL_BYTES,
    WEIGHT_OF_ZERO,
    finish_rows,
    lay_columns,
    lay_keys,
    lay_rows,
    mean_rows,
    multiply_block,
    soften_block,
    why_not,
)
from geneformer_kernels.ops.varlen_attention.host_avx512 import LEAST_TOTAL, MOST_TOTAL, Rooms, by_cells, size_of
from geneformer_kernels.workspace import Workspace

# Bytes of a row in a panel, of its sixteen sums, and of the mean of what stands in rows.
_ROW, _MEAN = 64, 128


def serves(head_dim: int) -> bool:
    """Whether these loops can be compiled here for heads of this dimension, and the system lets tiles be used."""
    return head_dim % BLOCK == 0 and why_not() is None


def varlen_attention_amx(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int], scale: float, block_rows: int
) -> torch.Tensor:
    """As :func:`host_avx512.varlen_attention_avx512`; cells may be as short as they like."""
    return by_cells(lambda length: _attend, _rooms, q, k, v, bounds, scale, block_rows)


def _rooms(longest: int, head_dim: int) -> Rooms:
    """Of one thread: keys, values; of 32 rows queries, scores of two blocks, weights, sums of these, outputs; means."""
    n_blocks, n_panels = -(-longest // BLOCK), head_dim // BLOCK
    return (
        ((n_blocks * n_panels * PANEL_BYTES,), torch.uint8),
        ((n_panels * n_blocks * PANEL_BYTES,), torch.uint8),
        ((n_panels * PANEL_BYTES,), torch.uint8),
        ((2 * BLOCK_BYTES,), torch.uint8),
        ((n_blocks * PANEL_BYTES,), torch.uint8),
        ((BLOCK, _ROW // 4), torch.float32),
        ((n_panels * BLOCK_BYTES,), torch.uint8),
        ((_MEAN,), torch.uint8),
    )


def workspace(longest: int, head_dim: int) -> Workspace:
    """For cells of at most ``longest`` tokens; one whose weights leave float32 is :mod:`host`'s, and takes more."""
    return Workspace(thread=size_of(_rooms(longest, head_dim)))


@numba.njit(**LOOP)
def _attend(
    q, q_step, k, k_step, v, v_step, start, stop, first_head, last_head, head_dim, scale, out,
    keys, values, queries, scores, weights, sums, mixed, mean,
):  # fmt: skip
    """Some heads of one cell; False if a sum of weights is out of bounds, and what was written means nothing."""
    length, n_panels = stop - start, head_dim // BLOCK
    n_blocks = -(-length // BLOCK)
    # A place behind the last key has a score of 0.
    excess = np.float32(n_blocks * BLOCK - length) * WEIGHT_OF_ZERO
    queries_at, weights_at, sums_at, mixed_at = (
        address_of(queries), address_of(weights), address_of(sums), address_of(mixed),
    )  # fmt: skip
    is_fine = True
    configure_tiles()
    for head in range(first_head, last_head):
        column = head * head_dim
        _lay_keys(address_of(k) + 2 * (start * k_step + column), 2 * k_step, length, n_panels, scale, keys, mean)
        _lay_values(address_of(v) + 2 * (start * v_step + column), 2 * v_step, length, n_panels, values)
        for row in range(0, length, BLOCK):
            n_rows = min(BLOCK, length - row)
            at = address_of(q) + 2 * ((start + row) * q_step + column)
            for panel in range(n_panels):
                lay_rows(at + panel * _ROW, 2 * q_step, n_rows, queries_at + panel * PANEL_BYTES)
            sums[:] = 0
            _weigh(queries_at, address_of(keys), n_blocks, n_panels, address_of(scores), weights_at, sums_at)
            for panel in range(n_panels):
                value = address_of(values) + panel * n_blocks * PANEL_BYTES
                block = (weights_at, value, n_blocks, mixed_at + panel * BLOCK_BYTES)
                multiply_block(block, (weights_at, weights_at, sums_at, 0, 0))
            to = address_of(out) + (start + row) * out.strides[0] + 2 * column
            rows = (mixed_at, n_panels, sums_at, n_rows, excess, LEAST_TOTAL, MOST_TOTAL)
            is_fine &= finish_rows(rows, (to, out.strides[0]))
    release_tiles()
    return is_fine


@numba.njit(**LOOP)
def _weigh(queries, keys, n_blocks, n_panels, scores, weights, sums):
    """Unnormalised weights of 32 queries and all keys of a cell, and their sums by lane."""
    # To begin with, no scores.
    rows_per_step = -(-BLOCK // n_panels)
    other = (scores, weights, sums, 0, rows_per_step)
    for i in range(n_blocks):
        at = scores + i % 2 * BLOCK_BYTES
        multiply_block((queries, keys + i * n_panels * PANEL_BYTES, n_panels, at), other)
        other = (at, weights + i * PANEL_BYTES, sums, BLOCK, rows_per_step)
    soften_block(*other[:3])


@numba.njit(**LOOP)
def _lay_keys(keys, row_bytes, length, n_panels, scale, out, mean):
    """Keys, centred and scaled, as panels [block of keys, 32 of a head] of columns."""
    for panel in range(n_panels):
        at = keys + panel * _ROW
        mean_rows(at, row_bytes, length, address_of(mean))
        for row in range(0, -(-length // BLOCK) * BLOCK, BLOCK // 2):
            i_panel = row // BLOCK * n_panels + panel
            to = address_of(out) + i_panel * PANEL_BYTES + row % BLOCK * _ROW
            lay_keys(
                at + min(row, length - 1) * row_bytes, row_bytes, max(length - row, 0), address_of(mean), scale, to
            )


@numba.njit(**LOOP)
def _lay_values(values, row_bytes, length, n_panels, out):
    """Values as panels [32 of a head, block of keys] of columns."""
    to = address_of(out)
    for panel in range(n_panels):
        for row in range(0, length, BLOCK):
            lay_columns(values + row * row_bytes + panel * _ROW, row_bytes, length - row, to)
            to += PANEL_BYTES
