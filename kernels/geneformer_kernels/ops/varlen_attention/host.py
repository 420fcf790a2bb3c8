"""Attention on the CPU by blocks of query rows: oneDNN's bfloat16 products around a softmax of our own."""

from __future__ import annotations

import itertools

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
    power_of_two,
    to_bfloat16,
)
from geneformer_kernels.workspace import Workspace

# Sums of unshifted weights within these lost nothing: none was held back, and the largest is far from underflow.
_LEAST_TOTAL, _MOST_TOTAL = np.float32(2.0**-20), np.float32(2.0**100)


def varlen_attention_blocked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int], scale: float, block_rows: int
) -> torch.Tensor:
    """Attention per cell for bfloat16 q, k, v [T, H, D] without gradients; scores live for one block of rows at a time.

    Keys are centred per cell and head first. That adds the same number to all scores of a row, which the softmax does
    not see, and it keeps scores small so that rounding them to bfloat16 costs less (Zhang et al., SageAttention,
    arXiv:2410.02367, smooth keys for the same reason before rounding to int8).

    Lengths are rounded up to multiples of `_STEP`: oneDNN builds a program for every new shape, which takes as long as
    two hundred rows, and its inner loops have no remainder then.
    """
    n_tokens, n_heads, head_dim = q.shape
    out = q.new_empty(n_tokens, n_heads, head_dim)
    longest = whole_steps(max((stop - start for start, stop in itertools.pairwise(bounds)), default=0))
    rows = min(whole_steps(block_rows), longest)
    places = {"keys": longest * head_dim, "values": longest * head_dim, "queries": rows * head_dim}
    buffers = {name: q.new_zeros(n_heads * size) for name, size in places.items()}
    context, scores = torch.empty_like(buffers["queries"]), q.new_empty(n_heads * rows * longest)
    for start, stop in itertools.pairwise(bounds):
        length = stop - start
        if not length:
            continue
        padded = whole_steps(length)
        keys, values = (_heads_first(x[start:stop], buffers[name], padded) for x, name in ((k, "keys"), (v, "values")))
        centre(keys.view(torch.uint16).numpy(), length, scale)
        # Blocks of about one height: a short one at the end would hardly pay for its calls.
        n_blocks = -(-padded // rows)
        most = whole_steps(-(-padded // n_blocks))
        for low in range(0, padded, most):
            height = min(most, padded - low)
            end = min(low + height, length)
            queries = _heads_first(q[start + low : start + end], buffers["queries"], height)
            block = scores[: n_heads * height * padded].view(n_heads, height, padded)
            torch.bmm(queries, keys.transpose(1, 2), out=block)
            softmax_(block, length)
            mixed = torch.bmm(block, values, out=context[: queries.numel()].view_as(queries))
            out[start + low : start + end] = mixed[:, : end - low].transpose(0, 1)
    return out


def workspace(longest: int, n_heads: int, head_dim: int, block_rows: int) -> Workspace:
    """For cells of at most ``longest`` tokens: keys, values, and a block's queries, results, scores and softmax."""
    longest = whole_steps(longest)
    rows = min(whole_steps(block_rows), longest)
    # With more threads torch computes the softmax, of scores that it copies.
    softmax = n_heads * 2 * rows * longest if torch.get_num_threads() > 2 else 4 * longest
    return Workspace(call=n_heads * 2 * (2 * longest * head_dim + 2 * rows * head_dim + rows * longest) + softmax)


# Keys and rows per step: one vector of bfloat16 products.
_STEP = 32


def whole_steps(length: int) -> int:
    return -(-length // _STEP) * _STEP


def _heads_first(x: torch.Tensor, buffer: torch.Tensor, padded: int) -> torch.Tensor:
    """[L, H, D] -> [H, padded, D] in the buffer, zeros behind: batched products would copy strided operands anyway."""
    length, n_heads, head_dim = x.shape
    heads = buffer[: n_heads * padded * head_dim].view(n_heads, padded, head_dim)
    heads[:, :length] = x.transpose(0, 1)
    if length < padded:
        heads[:, length:] = 0
    return heads


def softmax_(scores: torch.Tensor, length: int | None = None) -> None:
    """Softmax of contiguous bfloat16 [..., L] over the first ``length`` of the last axis, in place; zeros behind them.

    Torch's own takes longer than both products together: 1.5 G elements/s on one core against 3.3 here (EPYC with
    avx512_bf16, 2026-11-21). This one stays in the calling thread, so torch's is used where it may take many cores.
    """
    length = scores.shape[-1] if length is None else length
    if torch.get_num_threads() > 2:
        valid = scores[..., :length]
        valid.copy_(torch.softmax(valid, dim=-1))
        scores[..., length:] = 0
        return
    rows = scores.view(-1, scores.shape[-1]).view(torch.uint16).numpy()
    _softmax_rows(rows, np.empty(length, np.float32))


@numba.njit(**LOOP)
def centre(heads, length, scale):
    for head in range(heads.shape[0]):
        _centre_head(heads[head], length, np.float32(scale), np.zeros(heads.shape[2], np.float32))


@numba.njit(fastmath={"contract", "nsz"}, **LOOP)
def _centre_head(rows, length, scale, mean):
    for i in range(length):
        for j in range(rows.shape[1]):
            mean[j] += from_bfloat16(rows[i, j])
    for j in range(len(mean)):
        mean[j] = mean[j] / np.float32(length)
    for i in range(length):
        for j in range(rows.shape[1]):
            rows[i, j] = to_bfloat16((from_bfloat16(rows[i, j]) - mean[j]) * scale)


# Each act is a loop of its own over a row that stays in the first-level cache: simple enough to become vector code.
@numba.njit(**LOOP)
def _softmax_rows(rows, weights):
    length = len(weights)
    for i in range(rows.shape[0]):
        _, total = weigh(rows[i, :length], weights)
        narrow(weights, np.float32(1) / total, rows[i, :length])
        rows[i, length:] = 0


@numba.njit(**LOOP)
def weigh(row, weights):
    """Fills weights with ``2**(row * log2(e) - shift)``; returns the shift and the sum."""
    # Scores need no shift as long as their powers and the sum of these are float32 numbers: with keys centred a row's
    # mean is 0, so only rows with a score near 69 or beyond need a second try with the largest taken away.
    shift = np.float32(0)
    total = exp2_of(row, shift, weights)
    if not _LEAST_TOTAL < total < _MOST_TOTAL:
        shift = as_float(np.uint32(np.uint16(largest_of(row.view(np.int16)))) << np.uint32(16)) * LOG2_E
        total = exp2_of(row, shift, weights)
    return shift, total


@numba.njit(**LOOP)
def largest_of(row):
    # Flipping the lower bits of negative numbers makes bfloat16 sort as integers do, whose maximum becomes vector code.
    largest = np.int16(-32768)
    for j in range(len(row)):
        key = row[j] ^ ((row[j] >> np.int16(15)) & np.int16(0x7FFF))
        largest = max(largest, key)
    return largest ^ ((largest >> np.int16(15)) & np.int16(0x7FFF))


@numba.njit(fastmath={"contract", "nsz"}, forceinline=True, **LOOP)
def exp2_of(row, shift, weights):
    """Fills weights with ``2**(row * log2(e) - shift)``, at most 2**127; returns their sum."""
    total = np.float32(0)
    for j in range(len(row)):
        power = from_bfloat16(row[j]) * LOG2_E - shift
        power = np.float32(127) if power > np.float32(127) else power
        weights[j] = power_of_two(power)
        total = add_in_any_order(total, weights[j])
    return total


# Ties round up here, not to even: half the instructions, and no weight is negative.
@numba.njit(**LOOP)
def narrow(weights, factor, row):
    for j in range(len(row)):
        row[j] = np.uint16((as_bits(weights[j] * factor) + np.uint32(0x8000)) >> np.uint32(16))
