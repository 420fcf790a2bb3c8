"""Pieces of device code that several operations share: no loads, no stores, triton only."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_row(seed, o_rows, threshold, BLOCK_C: tl.constexpr):
    """[R, BLOCK_C] booleans: which columns of the rows ``o_rows`` [R] dropout keeps; BLOCK_C is a multiple of 8.

    One philox call (Salmon et al., "Parallel random numbers", SC 2011) with the counter (row, column // 8) gives eight
    numbers of 16 bits to eight neighbouring columns, each word's low half before its high one; a column stays if its
    number is at least ``threshold``. The mask depends on seed, row and column only, so kernels that cut rows into other
    tiles regenerate it.
    """
    o_groups = tl.arange(0, BLOCK_C // 8)
    b_zero = (o_rows[:, None] * 0 + o_groups[None, :] * 0).to(tl.uint32)
    b_rows = o_rows[:, None].to(tl.uint32) + b_zero
    b_groups = o_groups[None, :].to(tl.uint32) + b_zero
    b_0, b_1, b_2, b_3 = tl.philox(seed, b_rows, b_groups, b_zero, b_zero)
    b_words = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))
    b_halves = tl.join(b_words & 0xFFFF, b_words >> 16)
    return tl.reshape(b_halves, [o_rows.shape[0], BLOCK_C]).to(tl.int32) >= threshold


@triton.jit
def row_moments(b_x, m_c, width, eps):
    """Mean and reciprocal standard deviation of each row of [R, C]; masked columns of ``b_x`` are zero.

    Two passes over registers: the difference of E[x^2] and E[x]^2 loses all digits where the mean is large.
    """
    b_mean = tl.sum(b_x, 1) / width
    b_centred = tl.where(m_c[None, :], b_x - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_centred * b_centred, 1) / width + eps)
    return b_mean, b_rstd


@triton.jit
def layernorm_rows_bwd(b_dy, b_xhat, b_rstd, width):
    """Gradient of the rows [R, C] that were normalised; ``b_dy`` carries the weight, masked columns are zero."""
    b_mean_dy = tl.sum(b_dy, 1) / width
    b_mean_dy_xhat = tl.sum(b_dy * b_xhat, 1) / width
    return (b_dy - b_mean_dy[:, None] - b_xhat * b_mean_dy_xhat[:, None]) * b_rstd[:, None]
