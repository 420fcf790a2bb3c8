"""Attention in float32 on a CPU with AVX2: blocks of rows and keys whose scores stay in the nearest caches.

Torch's fused attention multiplies through MKL, whose products of 64 columns reach half of what large ones do, and takes
three passes over scores between them. Here six rows meet sixteen keys in registers, scores become ``2**x`` in the
first-level cache, and the sum of a row is known when its last key has been met (Dao et al., FlashAttention,
arXiv:2205.14135, without its running maximum: keys are centred, so that scores are near 0, and a cell whose weights
leave float32 all the same is computed by torch).

A row's numbers are computed in an order that depends on its own cell only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numba
import numpy as np
import torch

from geneformer_kernels.cpu import float32_tiles
from geneformer_kernels.cpu.compiled import LOG2_E, LOOP
from geneformer_kernels.cpu.float32_tiles import COLUMNS, STEP_BYTES, WIDE, copy_columns, multiply_row, shape_here
from geneformer_kernels.cpu.int8_transpose import pack_panels
from geneformer_kernels.cpu.lanes import LANES, largest_floats
from geneformer_kernels.cpu.row_arithmetic import address_of
from geneformer_kernels.cpu.shares import in_shares
from geneformer_kernels.workspace import Workspace

# Tiles as this CPU has registers for them; a row's numbers are the same whatever its tile, but for their sum.
_SHAPE = shape_here()
_ROWS = _SHAPE.rows
_add_tile = float32_tiles.add_wide_tile if _SHAPE == WIDE else float32_tiles.add_tile
_raise_two = float32_tiles.raise_two_widely if _SHAPE == WIDE else float32_tiles.raise_two
# Rows of a block and keys of a chunk: their weights take 26 of the 32 KB of the smallest first-level caches. With twice
# the rows, or half the keys, it takes 2 to 3 % longer (480 tokens, a Xeon held to AVX2, 2026-11-30).
_BLOCK_ROWS, _CHUNK = 24, 256
# In cells of more keys than this many, whose keys and values are in no near cache, so many blocks meet a chunk of them
# before the next one is read: those of a cell of 19,266 and a head of 32 are 4.9 MB.
_LONG, _BLOCKS = 4096, 8
# Weights of a row begin apart from those of the next by this, so that rows do not share places of a cache.
_WEIGHTS_WIDTH = _CHUNK + COLUMNS
# A sum of weights beyond this is computed otherwise: means of values as large as 2**67 are then float32 all the same.
# With keys centred a row's mean score is 0, and the sum at least the number of keys.
_MOST_TOTAL = np.float32(2.0**60)


def varlen_attention_float32(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: list[int],
    scale: float,
    by_torch: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Attention per cell for float32 q, k, v [T, H, D] without gradients; cells, or heads of cells, go to threads.

    ``by_torch`` computes q, k and v of one cell whose weights, or results, are no float32 numbers here.
    """
    n_tokens, n_heads, head_dim = q.shape
    factor = np.float32(scale * float(LOG2_E))
    out = torch.empty(n_tokens, n_heads, head_dim, dtype=torch.float32)
    rows = [_rows(x) for x in (q, k, v)]
    out_rows = out.view(-1).numpy()
    cells = [(start, stop) for start, stop in itertools.pairwise(bounds) if start < stop]
    # Whole cells, unless some threads would have none.
    n_shares = torch.get_num_threads()
    step = n_heads if len(cells) >= 4 * n_shares or n_shares == 1 else 1
    items = [(*cell, head, min(head + step, n_heads)) for cell in cells for head in range(0, n_heads, step)]
    left: set[tuple[int, int]] = set()

    def attend(items: list[tuple[int, int, int, int]]) -> None:
        buffers = _buffers(max(stop - start for start, stop, _, _ in items), head_dim)
        for start, stop, *heads in items:
            places = start, stop, *heads, head_dim
            if not _attend(*rows[0], *rows[1], *rows[2], *places, factor, out_rows, n_heads * head_dim, *buffers):
                left.add((start, stop))

    if items:
        in_shares(attend, items, lambda item: (item[1] - item[0]) ** 2 * (item[3] - item[2]))
    for start, stop in sorted(left):
        cell = slice(start, stop)
        out[cell] = by_torch(q[cell], k[cell], v[cell])
    return out


def _rows(x: torch.Tensor) -> tuple[np.ndarray, int]:
    """The memory of [T, H, D] as one row, and the distance from token to token in it."""
    n_tokens, n_heads, head_dim = x.shape
    if x.stride(2) != 1 or x.stride(1) != head_dim or x.stride(0) < n_heads * head_dim:
        x = x.contiguous()
    length = (n_tokens - 1) * x.stride(0) + n_heads * head_dim if n_tokens else 0
    return x.as_strided((length,), (1,)).numpy(), x.stride(0)


def _buffers(longest: int, head_dim: int) -> tuple[np.ndarray, ...]:
    """Keys, values, one panel of keys as they come, queries, weights, results, sums, zeros; torch aligns them."""
    *rooms, zeros = (torch.empty(shape, dtype=torch.float32).numpy() for shape in _rooms(longest, head_dim))
    zeros[:] = 0
    return *rooms, zeros


def _rooms(longest: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
    n_blocks = _BLOCKS if longest > _LONG else 1
    return (
        (-(-longest // COLUMNS), head_dim, COLUMNS),
        (head_dim // COLUMNS, longest, COLUMNS),
        (COLUMNS, head_dim),
        (n_blocks, _BLOCK_ROWS, head_dim),
        (_BLOCK_ROWS, _WEIGHTS_WIDTH),
        (n_blocks, _BLOCK_ROWS, head_dim),
        (n_blocks, _BLOCK_ROWS),
        (COLUMNS,),
    )


def workspace(longest: int, head_dim: int) -> Workspace:
    """For cells of at most ``longest`` tokens; a cell that is left to torch, which hardly ever comes, takes more."""
    return Workspace(thread=4 * sum(math.prod(shape) for shape in _rooms(longest, head_dim)))


@numba.njit(**LOOP)
def _attend(
    q, q_step, k, k_step, v, v_step, start, stop, first_head, last_head, head_dim, scale, out, out_step,
    keys, values, panel, queries, weights, mixed, sums, zeros,
):  # fmt: skip
    """Some heads of one cell; False if a sum of weights is too large, or a query, key or result is no number."""
    length = stop - start
    is_fine = True
    for head in range(first_head, last_head):
        column = head * head_dim
        is_fine &= _pack_keys(k, k_step, start, length, column, scale, keys, panel)
        _pack_values(v, v_step, start, length, column, values)
        at_once = _BLOCK_ROWS * (_BLOCKS if length > _LONG else 1)
        for first in range(0, length, at_once):
            n_blocks = -(-min(at_once, length - first) // _BLOCK_ROWS)
            for i in range(n_blocks):
                row = first + i * _BLOCK_ROWS
                n_rows = min(_BLOCK_ROWS, length - row)
                is_fine &= _take_queries(q, q_step, start + row, n_rows, column, queries[i])
                queries[i, n_rows : -(-n_rows // _ROWS) * _ROWS] = 0
                sums[i] = 0
            for chunk in range(0, length, _CHUNK):
                n_keys = min(_CHUNK, length - chunk)
                for i in range(n_blocks):
                    n_rows = min(_BLOCK_ROWS, length - first - i * _BLOCK_ROWS)
                    n_tiles = -(-n_rows // _ROWS)
                    _weigh(queries[i], keys, chunk, n_keys, n_rows, n_tiles, weights, sums[i], zeros)
                    _mix(weights, values, chunk, n_keys, n_tiles, mixed[i], zeros)
            for i in range(n_blocks):
                row = first + i * _BLOCK_ROWS
                n_rows = min(_BLOCK_ROWS, length - row)
                is_fine &= _divide(mixed[i], sums[i], n_rows, out, (start + row) * out_step + column, out_step)
    return is_fine


@numba.njit(**LOOP)
def _pack_keys(k, k_step, start, length, column, scale, keys, panel):
    """Keys, centred and scaled, as [panel, number of a head, key], zeros behind them; whether all are numbers."""
    head_dim = panel.shape[1]
    mean = np.zeros(head_dim, np.float32)
    for i in range(start, start + length):
        at = i * k_step + column
        _add(k[at : at + head_dim], mean)
    for j in range(head_dim):
        mean[j] /= np.float32(length)
    for i_panel in range(-(-length // COLUMNS)):
        for i in range(COLUMNS):
            i_key = i_panel * COLUMNS + i
            at = (start + i_key) * k_step + column
            if i_key < length:
                _centre(k[at : at + head_dim], mean, scale, panel[i])
            else:
                panel[i] = 0
        to = address_of(keys) + i_panel * head_dim * STEP_BYTES
        pack_panels(address_of(panel), 4 * head_dim, 1, head_dim, False, to)
    return _are_numbers(mean)


@numba.njit(**LOOP)
def _take_queries(q, q_step, start, n_rows, column, queries):
    """Rows of a block; whether all are numbers."""
    at, to, row_bytes = address_of(q) + 4 * (start * q_step + column), address_of(queries), 4 * queries.shape[1]
    for place in range(0, row_bytes, STEP_BYTES):
        copy_columns(at + place, 4 * q_step, n_rows, to + place, row_bytes)
    return _are_numbers(queries.reshape(-1)[: n_rows * queries.shape[1]])


@numba.njit(**LOOP)
def _pack_values(v, v_step, start, length, column, values):
    """Values as panels of columns of a head, [panel, key, column]."""
    at, panel_bytes = address_of(v) + 4 * (start * v_step + column), values.shape[1] * STEP_BYTES
    for i_panel in range(values.shape[0]):
        to = address_of(values) + i_panel * panel_bytes
        copy_columns(at + i_panel * STEP_BYTES, 4 * v_step, length, to, STEP_BYTES)


@numba.njit(**LOOP)
def _weigh(queries, keys, chunk, n_keys, n_rows, n_tiles, weights, sums, zeros):
    """Unnormalised weights of a block's rows and a chunk's keys; their sums are added to those of the rows."""
    head_dim = queries.shape[1]
    row_bytes, weights_row_bytes = 4 * head_dim, 4 * _WEIGHTS_WIDTH
    query, key, to = address_of(queries), address_of(keys), address_of(weights)
    for i_panel in range(-(-n_keys // COLUMNS)):
        panel = key + (chunk // COLUMNS + i_panel) * head_dim * STEP_BYTES
        for i_tile in range(n_tiles):
            row = i_tile * _ROWS
            _add_tile(
                address_of(zeros), 0, query + row * row_bytes, row_bytes, panel, head_dim,
                to + row * weights_row_bytes + i_panel * STEP_BYTES, weights_row_bytes,
            )  # fmt: skip
    for i in range(n_rows):
        sums[i] += _raise_two(to + i * weights_row_bytes, n_keys)


@numba.njit(**LOOP)
def _mix(weights, values, chunk, n_keys, n_tiles, mixed, zeros):
    """Adds a chunk's values under their weights to the rows of a block, with which the first chunk begins."""
    row_bytes, weights_row_bytes = 4 * mixed.shape[1], 4 * _WEIGHTS_WIDTH
    weight, value, first_out = address_of(weights), address_of(values), address_of(mixed)
    for i_panel in range(values.shape[0]):
        panel = value + (i_panel * values.shape[1] + chunk) * STEP_BYTES
        for i_tile in range(n_tiles):
            row = i_tile * _ROWS
            to = first_out + row * row_bytes + i_panel * STEP_BYTES
            start, start_row_bytes = to, row_bytes
            if chunk == 0:
                start, start_row_bytes = address_of(zeros), 0
            rows = weight + row * weights_row_bytes
            _add_tile(start, start_row_bytes, rows, weights_row_bytes, panel, n_keys, to, row_bytes)


@numba.njit(fastmath={"contract", "nsz"}, **LOOP)
def _add(row, total):
    for j in range(len(total)):
        total[j] += row[j]


@numba.njit(fastmath={"contract", "nsz"}, **LOOP)
def _centre(row, mean, scale, out):
    for j in range(len(out)):
        out[j] = (row[j] - mean[j]) * scale


@numba.njit(**LOOP)
def _divide(mixed, sums, n_rows, out, start, out_step):
    """Writes rows' results; whether their sums of weights and all of them are numbers that can be trusted."""
    is_fine = _are_numbers(mixed.reshape(-1)[: n_rows * mixed.shape[1]])
    for i in range(n_rows):
        is_fine &= sums[i] < _MOST_TOTAL
        factor, to = np.float32(1) / sums[i], address_of(out) + 4 * (start + i * out_step)
        multiply_row(address_of(mixed) + 4 * i * mixed.shape[1], factor, mixed.shape[1] // COLUMNS, to)
    return is_fine


@numba.njit(**LOOP)
def _are_numbers(row):
    """Whether nothing of a row of whole LANES is infinite, or NaN: magnitudes are in the order of their bits."""
    return largest_floats(address_of(row), len(row) // LANES) < np.uint32(0x7F800000)
