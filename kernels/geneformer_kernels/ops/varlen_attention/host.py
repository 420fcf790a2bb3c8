"""Attention on the CPU by blocks of query rows: oneDNN's bfloat16 products around a softmax of our own."""

from __future__ import annotations

import itertools

import numba
import numpy as np
import torch

from geneformer_kernels.compiled import LOOP, as_float, from_bfloat16, to_bfloat16

_LOG2_E = np.float32(1.4426950408889634)
# Adding and taking away 1.5 * 2**23 rounds a float32 to the nearest integer.
_ROUND = np.float32(12582912.0)
# 2**f for f in [-1/2, 1/2], minimax of degree 4: relative error 2.6e-6, less than a hundredth of bfloat16's rounding.
_C4, _C3, _C2 = np.float32(9.570099582e-03), np.float32(5.591786014e-02), np.float32(2.402474489e-01)
_C1, _C0 = np.float32(6.931218148e-01), np.float32(9.999992614e-01)


def varlen_attention_blocked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int], scale: float, block_rows: int
) -> torch.Tensor:
    """Attention per cell for bfloat16 q, k, v [T, H, D] without gradients; scores live for one block of rows at a time.

    Keys are centred per cell and head first. That adds the same number to all scores of a row, which the softmax does
    not see, and it keeps scores small so that rounding them to bfloat16 costs less (Zhang et al., SageAttention,
    arXiv:2410.02367, smooth keys for the same reason before rounding to int8).
    """
    n_tokens, n_heads, head_dim = q.shape
    out = q.new_empty(n_tokens, n_heads, head_dim)
    longest = max((stop - start for start, stop in itertools.pairwise(bounds)), default=0)
    rows = min(block_rows, longest)
    buffer = q.new_empty(n_heads * rows * longest)
    for start, stop in itertools.pairwise(bounds):
        length = stop - start
        # Batched products copy operands that are not contiguous, every time: one copy here saves one per block.
        values = v[start:stop].transpose(0, 1).contiguous()
        keys = k[start:stop].transpose(0, 1).contiguous().float()
        keys = keys.sub_(keys.mean(1, keepdim=True)).mul_(scale).to(k.dtype).transpose(1, 2)
        for low in range(start, stop, rows):
            high = min(low + rows, stop)
            queries = q[low:high].transpose(0, 1).contiguous()
            scores = buffer[: n_heads * (high - low) * length].view(n_heads, high - low, length)
            torch.bmm(queries, keys, out=scores)
            softmax_(scores)
            out[low:high] = torch.bmm(scores, values).transpose(0, 1)
    return out


def softmax_(scores: torch.Tensor) -> None:
    """Softmax of contiguous bfloat16 [..., L] over the last axis, in place.

    Torch's own takes longer than both products together: 1.5 G elements/s on one core against 3.3 here (EPYC with
    avx512_bf16, 2026-11-21). This one stays in the calling thread, so torch's is used where it may take many cores.
    """
    if torch.get_num_threads() > 2:
        torch.softmax(scores, dim=-1, out=scores)
        return
    rows = scores.view(-1, scores.shape[-1]).view(torch.uint16).numpy()
    _softmax_rows(rows, np.empty(rows.shape[1], np.float32))


# Each act is a loop of its own over a row that stays in the first-level cache: simple enough to become vector code,
# and each may relax floating point as far as it is safe there.
@numba.njit(**LOOP)
def _softmax_rows(rows, weights):
    signed = rows.view(np.int16)
    for i in range(rows.shape[0]):
        largest = as_float(np.uint32(np.uint16(_largest(signed[i]))) << np.uint32(16))
        _exp2(rows[i], largest * _LOG2_E, weights)
        _narrow(weights, np.float32(1) / _sum(weights), rows[i])


@numba.njit(**LOOP)
def _largest(row):
    # Flipping the lower bits of negative numbers makes bfloat16 sort as integers do, whose maximum becomes vector code.
    largest = np.int16(-32768)
    for j in range(len(row)):
        key = row[j] ^ ((row[j] >> np.int16(15)) & np.int16(0x7FFF))
        largest = max(largest, key)
    return largest ^ ((largest >> np.int16(15)) & np.int16(0x7FFF))


# No licence to reorder here: it would simplify the rounding away.
@numba.njit(fastmath={"contract", "nsz"}, **LOOP)
def _exp2(row, largest, weights):
    for j in range(len(row)):
        power = from_bfloat16(row[j]) * _LOG2_E - largest
        # Written so that NaN stays NaN: it must not come out as a weight.
        power = np.float32(-126) if power < np.float32(-126) else power
        whole = (power + _ROUND) - _ROUND
        rest = power - whole
        fraction = (((_C4 * rest + _C3) * rest + _C2) * rest + _C1) * rest + _C0
        weights[j] = fraction * as_float((np.int32(whole) + np.int32(127)) << np.int32(23))


@numba.njit(fastmath={"reassoc", "contract", "nsz"}, **LOOP)
def _sum(weights):
    total = np.float32(0)
    for j in range(len(weights)):
        total += weights[j]
    return total


@numba.njit(**LOOP)
def _narrow(weights, factor, row):
    for j in range(len(row)):
        row[j] = to_bfloat16(weights[j] * factor)
