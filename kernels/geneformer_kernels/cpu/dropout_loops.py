"""Chance from a counter, in loops that become vector code on the CPU."""

from __future__ import annotations

import numba
import numpy as np

from geneformer_kernels.cpu.compiled import LOOP, from_bfloat16, to_bfloat16

# What a key gains from one place to the next: 2**32 over the golden ratio, odd.
WEYL = np.uint32(0x9E3779B9)


def threshold_of(p: float) -> np.uint32:
    """What is hashed to less than this is dropped."""
    return np.uint32(min(round(p * 2**32), 2**32 - 1))


def keep_scale_of(p: float) -> np.float32:
    """What is kept is multiplied by this."""
    return np.float32(1 / (1 - p))


def drop(x: np.ndarray, seed: int, first: int, p: float, out: np.ndarray) -> None:
    """Dropout of bfloat16 as uint16, from place ``first`` on; the seed is any int64."""
    _drop(x, np.uint64(seed % 2**64), np.uint64(first), threshold_of(p), keep_scale_of(p), out)


# Two 32-bit multiplications and shifts ("lowbias32", Wellons, "Prospecting for hash functions", 2018). Four times
# cheaper than Philox in vector code; dropout asks for a mask that looks like chance, not for cryptography.
@numba.njit(inline="always", **LOOP)
def hashed(x):
    """Uint32 to uint32."""
    x = np.uint32(x)
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@numba.njit(inline="always", **LOOP)
def key_of(seed, number):
    """Uint32 from a 64-bit seed and the 64-bit number of a row."""
    low = hashed(np.uint32(number) ^ hashed(np.uint32(seed)))
    return hashed(low ^ np.uint32(number >> np.uint64(32)) ^ np.uint32(seed >> np.uint64(32)))


@numba.njit(**LOOP)
def _drop(x, seed, first, threshold, keep_scale, out):
    key = key_of(seed, first)
    for i in range(len(x)):
        kept = hashed(key + np.uint32(i) * WEYL) >= threshold
        out[i] = to_bfloat16(from_bfloat16(x[i]) * keep_scale) if kept else np.uint16(0)
