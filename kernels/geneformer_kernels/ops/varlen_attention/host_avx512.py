"""Attention on a CPU with avx512_bf16: a tile of scores lives in registers and leaves them as weights.

oneDNN's products (``host.py``) write scores to memory, read keys and values in an order they make anew for every block
of rows, and leave the softmax two passes over the scores. Here six rows meet 64 keys in 24 registers, go through
``2**x`` there, and are rounded to bfloat16 once, as weights whose sum is known when the row is done (Dao et al.,
FlashAttention, arXiv:2205.14135, without its running maximum: keys are centred, so scores are near 0, and a cell whose
weights leave float32 all the same is computed by ``host.py``).

One core of an EPYC, 32 real cells of 759 tokens on average, 4 heads of 64: 5.3 us a token and layer against 6.4
by blocks of rows (2026-11-26).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numba
import numpy as np
import torch

from geneformer_kernels.cpu.compiled import LOG2_E, LOOP, POWER_COEFFICIENTS, from_bfloat16, to_bfloat16
from geneformer_kernels.cpu.shares import in_shares
from geneformer_kernels.ops.varlen_attention import host
from geneformer_kernels.ops.varlen_attention.avx512 import LANES, ROWS, is_compilable, mix_values, weigh_keys
from geneformer_kernels.workspace import Workspace, one_by_one

#: Keys of a tile of scores.
_KEYS = 4 * LANES
# In cells of more keys than this many, whose keys and values are in no near cache, so many tiles of rows meet a chunk
# of keys before the next is read: those of a cell of 19,266 and a head of 32 are 2.5 MB, weights of all keys 230 KB.
# There it takes 6 % less time where a core has 2 MB of its own; at 6,000 keys, which fit, 4 % more (a Xeon).
_LONG, _CHUNK, _TILES = 8192, 16 * _KEYS, 16
# Sums of weights beyond these are computed otherwise. With keys centred a row's mean score is 0, so the sum is at least
# about the number of keys; what empty places add to it and is taken away again is then lost in rounding.
LEAST_TOTAL, MOST_TOTAL = np.float32(2.0**-4), np.float32(2.0**100)

#: Shapes and dtypes of the buffers of one thread.
Rooms = tuple[tuple[tuple[int, ...], torch.dtype], ...]


def serves(head_dim: int) -> bool:
    """Whether these loops can be compiled here for heads of this dimension."""
    return head_dim % LANES == 0 and is_compilable()


def varlen_attention_avx512(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int], scale: float, block_rows: int
) -> torch.Tensor:
    """Attention per cell for bfloat16 q, k, v [T, H, D] without gradients; cells, or heads of cells, go to threads.

    ``block_rows`` is for cells that :func:`host.varlen_attention_blocked` computes: of fewer rows than are in work at a
    time, or with weights that leave float32.
    """

    def loop_for(length: int) -> Callable[..., bool] | None:
        return None if length < ROWS else _attend_long if length > _LONG else _attend

    return by_cells(loop_for, _rooms, q, k, v, bounds, scale, block_rows)


def by_cells(
    loop_for: Callable[[int], Callable[..., bool] | None],
    rooms: Callable[[int, int], Rooms],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: list[int],
    scale: float,
    block_rows: int,
) -> torch.Tensor:
    """As :func:`varlen_attention_avx512`, by a loop over heads of a cell such as :func:`_attend`, in rooms of its own.

    Cells of a length for which there is none, and those of which it says that it means nothing, are :mod:`host`'s.
    """
    n_tokens, n_heads, head_dim = q.shape
    factor = np.float32(scale * float(LOG2_E))
    out = q.new_empty(n_tokens, n_heads, head_dim)
    rows = [_rows(x) for x in (q, k, v)]
    out_rows = out.view(n_tokens, n_heads * head_dim).view(torch.uint16).numpy()
    cells = [(start, stop) for start, stop in itertools.pairwise(bounds) if start < stop]
    # Whole cells, unless some threads would have none.
    n_shares = torch.get_num_threads()
    step = n_heads if len(cells) >= 4 * n_shares or n_shares == 1 else 1
    items = [(*cell, head, min(head + step, n_heads)) for cell in cells for head in range(0, n_heads, step)]
    left: set[tuple[int, int]] = set()

    def attend(items: list[tuple[int, int, int, int]]) -> None:
        longest = max(stop - start for start, stop, _, _ in items)
        # Torch aligns them to whole registers.
        buffers = [torch.empty(shape, dtype=dtype).numpy() for shape, dtype in rooms(longest, head_dim)]
        for start, stop, *heads in items:
            loop = loop_for(stop - start)
            if loop is None or not loop(
                *rows[0], *rows[1], *rows[2], start, stop, *heads, head_dim, factor, out_rows, *buffers,
            ):  # fmt: skip
                left.add((start, stop))

    if items:
        in_shares(attend, items, lambda item: (item[1] - item[0]) ** 2 * (item[3] - item[2]))
    for start, stop in sorted(left):
        cell = slice(start, stop)
        out[cell] = host.varlen_attention_blocked(q[cell], k[cell], v[cell], [0, stop - start], scale, block_rows)
    return out


def _rows(x: torch.Tensor) -> tuple[np.ndarray, int]:
    """The memory of [T, H, D] as one row of uint16, and the distance from token to token in it."""
    n_tokens, n_heads, head_dim = x.shape
    if x.stride(2) != 1 or x.stride(1) != head_dim:
        x = x.contiguous()
    length = (n_tokens - 1) * x.stride(0) + n_heads * head_dim
    return x.as_strided((length,), (1,)).view(torch.uint16).numpy(), x.stride(0)


def _rooms(longest: int, head_dim: int) -> Rooms:
    """Of one thread: keys, values, a tile of keys as they come, weights, sums, outputs and their totals."""
    n_tiles, n_at_once = -(-longest // _KEYS), _TILES if longest > _LONG else 1
    return (
        ((n_tiles, head_dim // 2, _KEYS), torch.uint32),
        ((n_tiles * _KEYS // 2 * head_dim,), torch.uint32),
        ((_KEYS, head_dim), torch.uint16),
        ((ROWS, min(n_tiles * _KEYS, max(_LONG, _CHUNK))), torch.uint16),
        ((n_at_once, ROWS, LANES), torch.float32),
        ((ROWS, _KEYS), torch.float32),
        ((n_at_once, ROWS, head_dim), torch.float32),
    )


def workspace(longest: int, n_heads: int, head_dim: int, block_rows: int) -> Workspace:
    """For cells of at most ``longest`` tokens; one whose weights leave float32 is :mod:`host`'s, and takes more."""
    thread = size_of(_rooms(longest, head_dim))
    short = host.workspace(min(longest, ROWS - 1), n_heads, head_dim, block_rows)
    return one_by_one(Workspace(thread=thread), short)


def size_of(rooms: Rooms) -> int:
    """Bytes of all of them."""
    return sum(dtype.itemsize * math.prod(shape) for shape, dtype in rooms)


@numba.njit(**LOOP)
def _attend(
    q, q_step, k, k_step, v, v_step, start, stop, first_head, last_head, head_dim, scale, out,
    keys, values, tile, weights, all_sums, mixed, totals,
):  # fmt: skip
    """Some heads of one cell; False if a sum of weights is out of bounds, and what was written means nothing."""
    length, sums = stop - start, all_sums[0]
    is_fine = True
    for head in range(first_head, last_head):
        _pack_keys(k, k_step, start, length, head, head_dim, scale, keys, tile)
        _pack_values(v, v_step, start, length, head, head_dim, values)
        for row in range(0, length, ROWS):
            row = min(row, length - ROWS)  # the last rows once more, rather than fewer of them
            query = q.ctypes.data + ((start + row) * q_step + head * head_dim) * 2
            _weigh(query, q_step * 2, keys, length, head_dim // 2, weights, sums)
            is_fine &= _totals(sums, length)
            _mix(weights, values, length, head_dim, sums, mixed, out[start + row : start + row + ROWS], head * head_dim)
    return is_fine


@numba.njit(**LOOP)
def _attend_long(
    q, q_step, k, k_step, v, v_step, start, stop, first_head, last_head, head_dim, scale, out,
    keys, values, tile, weights, sums, mixed, totals,
):  # fmt: skip
    """As :func:`_attend`, for a cell of many keys: chunk by chunk of them, each for some tiles of rows."""
    length = stop - start
    n_pairs, at_once = (length + 1) // 2, _TILES * ROWS
    is_fine = True
    for head in range(first_head, last_head):
        _pack_keys(k, k_step, start, length, head, head_dim, scale, keys, tile)
        _pack_values(v, v_step, start, length, head, head_dim, values)
        for first in range(0, length, at_once):
            n_tiles = -(-min(at_once, length - first) // ROWS)
            sums[:n_tiles] = 0
            totals[:n_tiles] = 0
            for chunk in range(0, length, _CHUNK):
                n_keys = min(_CHUNK, length - chunk)
                for i in range(n_tiles):
                    row = min(first + i * ROWS, length - ROWS)
                    query = q.ctypes.data + ((start + row) * q_step + head * head_dim) * 2
                    _weigh_some(query, q_step * 2, keys, chunk, n_keys, head_dim // 2, weights, sums[i])
                    _mix_some(weights, values, n_pairs, chunk, n_keys, mixed, totals[i])
            for i in range(n_tiles):
                row = start + min(first + i * ROWS, length - ROWS)
                is_fine &= _totals(sums[i], length)
                for j in range(ROWS):
                    to = out[row + j, head * head_dim : (head + 1) * head_dim]
                    _divide(totals[i, j], np.float32(1) / sums[i, j, 0], to)
    return is_fine


@numba.njit(**LOOP)
def _pack_keys(k, k_step, start, length, head, head_dim, scale, keys, tile):
    """Keys, centred and scaled, as [tile, pair of a head, key]; zeros behind the last one."""
    mean = np.zeros(head_dim, np.float32)
    for i in range(start, start + length):
        at = i * k_step + head * head_dim
        _add(k[at : at + head_dim], mean)
    for j in range(head_dim):
        mean[j] /= np.float32(length)
    pairs = tile.view(np.uint32)
    for i_tile in range(-(-length // _KEYS)):
        for i in range(_KEYS):
            at = (start + i_tile * _KEYS + i) * k_step + head * head_dim
            if i_tile * _KEYS + i < length:
                _centre(k[at : at + head_dim], mean, scale, tile[i])
            else:
                tile[i] = 0
        for j in range(head_dim // 2):
            for i in range(_KEYS):
                keys[i_tile, j, i] = pairs[i, j]


@numba.njit(**LOOP)
def _pack_values(v, v_step, start, length, head, head_dim, values):
    """Values as [up to 64 columns at a time, pair of keys, column]; a zero behind the last of an odd number."""
    n_pairs = (length + 1) // 2
    for column in range(0, head_dim, _KEYS):
        width = min(_KEYS, head_dim - column)
        for i in range(n_pairs):
            at = (start + 2 * i) * v_step + head * head_dim + column
            to = n_pairs * column + i * width
            if 2 * i + 1 < length:
                _interleave(v[at : at + width], v[at + v_step : at + v_step + width], values[to : to + width])
            else:
                for j in range(width):
                    values[to + j] = np.uint32(v[at + j])


@numba.njit(**LOOP)
def _weigh(query, query_row, keys, length, n_pairs, weights, sums):
    """Unnormalised weights of ROWS queries and all keys of a cell, and their sums by lane."""
    sums[:] = 0
    for i_tile in range(-(-length // _KEYS)):
        key, to = keys.ctypes.data + i_tile * keys.strides[0], weights.ctypes.data + i_tile * _KEYS * 2
        arguments = (query, query_row, key, n_pairs, to, weights.strides[0], sums.ctypes.data)
        weigh_keys(min(4, -(-(length - i_tile * _KEYS) // LANES)), arguments)


@numba.njit(**LOOP)
def _weigh_some(query, query_row, keys, first, n_keys, n_pairs, weights, sums):
    """Unnormalised weights of ROWS queries and some keys from ``first`` on; their sums are added to those by lane."""
    for i_tile in range(-(-n_keys // _KEYS)):
        key = keys.ctypes.data + (first // _KEYS + i_tile) * keys.strides[0]
        to = weights.ctypes.data + i_tile * _KEYS * 2
        arguments = (query, query_row, key, n_pairs, to, weights.strides[0], sums.ctypes.data)
        weigh_keys(min(4, -(-(n_keys - i_tile * _KEYS) // LANES)), arguments)


@numba.njit(**LOOP)
def _mix_some(weights, values, n_pairs, first, n_keys, mixed, totals):
    """Adds values of some keys from ``first`` on, under unnormalised weights, to the totals of ROWS queries."""
    for column in range(0, totals.shape[1], _KEYS):
        width = min(_KEYS, totals.shape[1] - column)
        value = values.ctypes.data + (n_pairs * column + first // 2 * width) * 4
        mix_values(
            width // LANES, (weights.ctypes.data, weights.strides[0], value, (n_keys + 1) // 2, mixed.ctypes.data)
        )
        for row in range(ROWS):
            _add_floats(mixed[row, :width], totals[row, column : column + width])


@numba.njit(**LOOP)
def _totals(sums, length):
    """Puts every row's sum into its first lane; whether all are within bounds."""
    # A place behind the last key had a score of 0.
    n_behind = np.float32(-(-length // LANES) * LANES - length)
    is_fine = True
    for row in range(ROWS):
        total = np.float32(0)
        for lane in range(LANES):
            total += sums[row, lane]
        total -= n_behind * POWER_COEFFICIENTS[3]
        if not LEAST_TOTAL < total < MOST_TOTAL:
            is_fine = False
        sums[row, 0] = total
    return is_fine


@numba.njit(**LOOP)
def _mix(weights, values, length, head_dim, sums, mixed, out, first_column):
    """Means of values under normalised weights, for ROWS queries."""
    n_pairs = (length + 1) // 2
    for column in range(0, head_dim, _KEYS):
        width = min(_KEYS, head_dim - column)
        value = values.ctypes.data + n_pairs * column * 4
        arguments = (weights.ctypes.data, weights.strides[0], value, n_pairs, mixed.ctypes.data)
        mix_values(width // LANES, arguments)
        for row in range(ROWS):
            to = out[row, first_column + column : first_column + column + width]
            _divide(mixed[row, :width], np.float32(1) / sums[row, 0], to)


@numba.njit(fastmath={"contract", "nsz"}, **LOOP)
def _add(row, total):
    for j in range(len(total)):
        total[j] += from_bfloat16(row[j])


@numba.njit(fastmath={"contract", "nsz"}, **LOOP)
def _centre(row, mean, scale, out):
    for j in range(len(out)):
        out[j] = to_bfloat16((from_bfloat16(row[j]) - mean[j]) * scale)


@numba.njit(fastmath={"contract", "nsz"}, **LOOP)
def _add_floats(row, total):
    for j in range(len(total)):
        total[j] += row[j]


@numba.njit(**LOOP)
def _interleave(low, high, out):
    for j in range(len(out)):
        out[j] = np.uint32(low[j]) | (np.uint32(high[j]) << np.uint32(16))


@numba.njit(fastmath={"contract", "nsz"}, **LOOP)
def _divide(row, factor, out):
    for j in range(len(out)):
        out[j] = to_bfloat16(row[j] * factor)
