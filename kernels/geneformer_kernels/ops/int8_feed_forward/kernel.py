"""Device code of the feed-forward half of a block with int8 weights: both products, the first one's rows rounded."""

from __future__ import annotations

import triton
import triton.language as tl

from geneformer_kernels.tiles import activated, rounded_rows, tile_of


@triton.jit(do_not_specialize=["n_rows", "ff_width"])
def int8_feed_forward_up_kernel(
    q_ptr,
    row_scale_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    hidden_ptr,
    hidden_scale_ptr,
    n_rows,
    ff_width,
    width,
    tiny,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """one program = BLOCK_N hidden units of BLOCK_ROWS rows, as int8 with one scale per row.

    q [n_rows, width] int8, row_scale [n_rows], weight [ff_width, width] int8, scale and bias [ff_width], of SwiGLU
    twice as many, gate rows first; bias may be absent. hidden [n_rows, P] int8 and hidden_scale [n_rows, P / BLOCK_N],
    P the next multiple of BLOCK_N, zero behind ff_width. width is a multiple of BLOCK_K. Sums are int32 and exact.
    """
    i_rows, i_n = tile_of(n_rows, ff_width, BLOCK_ROWS, BLOCK_N, GROUP)
    o_rows = i_rows * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_rows, m_n = o_rows < n_rows, o_n < ff_width
    p_q = q_ptr + o_rows.to(tl.int64)[:, None] * width + o_k[None, :]
    p_weight = weight_ptr + o_n.to(tl.int64)[None, :] * width + o_k[:, None]
    IS_GATED: tl.constexpr = ACTIVATION == "swiglu"

    b_sum = tl.zeros([BLOCK_ROWS, BLOCK_N], tl.int32)
    if IS_GATED:
        p_up = p_weight + ff_width.to(tl.int64) * width
        b_up_sum = tl.zeros([BLOCK_ROWS, BLOCK_N], tl.int32)
    for i_k in range(0, width, BLOCK_K):
        b_q = tl.load(p_q + i_k, mask=m_rows[:, None], other=0)
        b_weight = tl.load(p_weight + i_k, mask=m_n[None, :], other=0)
        b_sum = tl.dot(b_q, b_weight, b_sum, out_dtype=tl.int32)
        if IS_GATED:
            b_up_weight = tl.load(p_up + i_k, mask=m_n[None, :], other=0)
            b_up_sum = tl.dot(b_q, b_up_weight, b_up_sum, out_dtype=tl.int32)

    b_row_scale = tl.load(row_scale_ptr + o_rows, mask=m_rows, other=0.0)
    b_scale = tl.load(scale_ptr + o_n, mask=m_n, other=0.0)
    b_hidden = b_sum.to(tl.float32) * b_row_scale[:, None] * b_scale[None, :]
    if bias_ptr is not None:
        b_hidden += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if IS_GATED:
        b_scale = tl.load(scale_ptr + ff_width + o_n, mask=m_n, other=0.0)
        b_up = b_up_sum.to(tl.float32) * b_row_scale[:, None] * b_scale[None, :]
        if bias_ptr is not None:
            b_up += tl.load(bias_ptr + ff_width + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        b_hidden = activated(b_hidden, "silu") * b_up
    else:
        b_hidden = activated(b_hidden, ACTIVATION)

    n_blocks = tl.cdiv(ff_width, BLOCK_N)
    b_hidden_q, b_hidden_scale = rounded_rows(b_hidden, tiny)
    p_hidden = hidden_ptr + o_rows.to(tl.int64)[:, None] * (n_blocks * BLOCK_N) + o_n[None, :]
    tl.store(p_hidden, b_hidden_q, mask=m_rows[:, None])
    tl.store(hidden_scale_ptr + o_rows.to(tl.int64) * n_blocks + i_n, b_hidden_scale, mask=m_rows)


@triton.jit(do_not_specialize=["n_rows", "n_groups"])
def int8_feed_forward_down_kernel(
    hidden_ptr,
    hidden_scale_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    n_rows,
    n_columns,
    n_groups,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """one program = a tile [BLOCK_ROWS, BLOCK_N] of ``hidden @ weight.T * scale + bias``.

    hidden [n_rows, n_groups * BLOCK_K] int8, hidden_scale [n_rows, n_groups], weight [n_columns, n_groups * BLOCK_K]
    int8, scale [n_columns], bias [n_columns] or absent, out [n_rows, n_columns]. The int32 sums of BLOCK_K products are
    exact; they are scaled and added up as float32, so that no width is too large.
    """
    i_rows, i_n = tile_of(n_rows, n_columns, BLOCK_ROWS, BLOCK_N, GROUP)
    o_rows = i_rows * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_rows, m_n = o_rows < n_rows, o_n < n_columns
    p_hidden = hidden_ptr + o_rows.to(tl.int64)[:, None] * (n_groups * BLOCK_K) + o_k[None, :]
    p_weight = weight_ptr + o_n.to(tl.int64)[None, :] * (n_groups * BLOCK_K) + o_k[:, None]
    p_hidden_scale = hidden_scale_ptr + o_rows.to(tl.int64) * n_groups

    b_out = tl.zeros([BLOCK_ROWS, BLOCK_N], tl.float32)
    for i_group in range(0, n_groups):
        b_hidden = tl.load(p_hidden + i_group * BLOCK_K, mask=m_rows[:, None], other=0)
        b_weight = tl.load(p_weight + i_group * BLOCK_K, mask=m_n[None, :], other=0)
        b_hidden_scale = tl.load(p_hidden_scale + i_group, mask=m_rows, other=0.0)
        b_out += tl.dot(b_hidden, b_weight, out_dtype=tl.int32).to(tl.float32) * b_hidden_scale[:, None]

    b_out *= tl.load(scale_ptr + o_n, mask=m_n, other=0.0)[None, :]
    if bias_ptr is not None:
        b_out += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_out = out_ptr + o_rows.to(tl.int64)[:, None] * n_columns + o_n[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_rows[:, None] & m_n[None, :])
