"""Device code of the linear layer with int8 weights: quantising rows, and both kinds of product."""

from __future__ import annotations

import triton
import triton.language as tl

from geneformer_kernels.tiles import activated, row_scales, to_nearest


@triton.jit(do_not_specialize=["n_rows"])
def quantize_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    n_rows,
    width,
    tiny,
    IS_ONE_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """one program = BLOCK_ROWS whole rows.

    x [n_rows, width]; q [n_rows, width] int8; scale [n_rows] float32. IS_ONE_BLOCK: a row fits into BLOCK_C columns and
    is read once; otherwise it is read twice. Compiled without fused multiply-add, so that every rounding is the
    reference's.
    """
    o_rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_c = tl.arange(0, BLOCK_C)
    m_rows = o_rows < n_rows
    m = m_rows[:, None] & (o_c < width)[None, :]
    o = o_rows.to(tl.int64)[:, None] * width + o_c[None, :]
    b_x = tl.load(x_ptr + o, mask=m, other=0.0).to(tl.float32)
    b_largest = tl.max(tl.abs(b_x), 1)
    # A maximum loses NaN, and infinity has no scale: either makes this sum NaN.
    b_poison = tl.sum(b_x * 0.0, 1)
    if not IS_ONE_BLOCK:
        for i_c in range(BLOCK_C, width, BLOCK_C):
            m_more = m_rows[:, None] & (o_c < width - i_c)[None, :]
            b_more = tl.load(x_ptr + o + i_c, mask=m_more, other=0.0).to(tl.float32)
            b_largest = tl.maximum(b_largest, tl.max(tl.abs(b_more), 1))
            b_poison += tl.sum(b_more * 0.0, 1)

    b_inverse, b_scale = row_scales(b_largest, b_poison, tiny)
    tl.store(scale_ptr + o_rows, b_scale, mask=m_rows)
    tl.store(q_ptr + o, to_nearest(b_x * b_inverse[:, None]).to(tl.int8), mask=m)
    if not IS_ONE_BLOCK:
        for i_c in range(BLOCK_C, width, BLOCK_C):
            m_more = m_rows[:, None] & (o_c < width - i_c)[None, :]
            b_more = tl.load(x_ptr + o + i_c, mask=m_more, other=0.0).to(tl.float32)
            tl.store(q_ptr + o + i_c, to_nearest(b_more * b_inverse[:, None]).to(tl.int8), mask=m_more)


@triton.jit(do_not_specialize=["n_rows"])
def int8_linear_dynamic_kernel(
    q_ptr,
    row_scale_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    n_rows,
    n_columns,
    width,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """one program = a tile [BLOCK_ROWS, BLOCK_N] of ``activation((q @ weight.T) * row_scale * scale + bias)``.

    q [n_rows, width] int8, row_scale [n_rows], weight [n_columns, width] int8, scale [n_columns], bias [n_columns] or
    absent, out [n_rows, n_columns]. width is a multiple of BLOCK_K. Sums are int32 and exact up to a width of 133,144.
    Programs walk through GROUP blocks of rows before they take the next columns, for the second-level cache.
    """
    n_row_blocks, n_column_blocks = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_columns, BLOCK_N)
    i_group, i_in_group = tl.program_id(0) // (GROUP * n_column_blocks), tl.program_id(0) % (GROUP * n_column_blocks)
    n_in_group = tl.minimum(n_row_blocks - i_group * GROUP, GROUP)
    o_rows = (i_group * GROUP + i_in_group % n_in_group) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_n = (i_in_group // n_in_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_rows, m_n = o_rows < n_rows, o_n < n_columns
    p_q = q_ptr + o_rows.to(tl.int64)[:, None] * width + o_k[None, :]
    p_weight = weight_ptr + o_n.to(tl.int64)[None, :] * width + o_k[:, None]

    b_sum = tl.zeros([BLOCK_ROWS, BLOCK_N], tl.int32)
    for i_k in range(0, width, BLOCK_K):
        b_q = tl.load(p_q + i_k, mask=m_rows[:, None], other=0)
        b_weight = tl.load(p_weight + i_k, mask=m_n[None, :], other=0)
        b_sum = tl.dot(b_q, b_weight, b_sum, out_dtype=tl.int32)

    b_row_scale = tl.load(row_scale_ptr + o_rows, mask=m_rows, other=0.0)
    b_scale = tl.load(scale_ptr + o_n, mask=m_n, other=0.0)
    b_out = b_sum.to(tl.float32) * b_row_scale[:, None] * b_scale[None, :]
    if bias_ptr is not None:
        b_out += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_out = activated(b_out, ACTIVATION)
    p_out = out_ptr + o_rows.to(tl.int64)[:, None] * n_columns + o_n[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_rows[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def int8_linear_weight_only_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    n_rows,
    n_columns,
    width,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """one program = a tile of ``activation((x @ weight.T) * scale + bias)``, computed as its transpose.

    x [n_rows, width], weight [n_columns, width] int8, scale [n_columns], bias [n_columns] or absent, out [n_rows,
    n_columns]. width is a multiple of BLOCK_K. The weight is the left operand, which tensor cores take from
    the registers where it was widened, and the few rows are the side whose least size is small. Neighbouring programs
    share columns, so that a weight is read from memory once.
    """
    n_row_blocks = tl.cdiv(n_rows, BLOCK_ROWS)
    o_rows = (tl.program_id(0) % n_row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_n = (tl.program_id(0) // n_row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_rows, m_n = o_rows < n_rows, o_n < n_columns
    p_x = x_ptr + o_rows.to(tl.int64)[None, :] * width + o_k[:, None]
    p_weight = weight_ptr + o_n.to(tl.int64)[:, None] * width + o_k[None, :]

    b_out = tl.zeros([BLOCK_N, BLOCK_ROWS], tl.float32)
    for i_k in range(0, width, BLOCK_K):
        b_weight = tl.load(p_weight + i_k, mask=m_n[:, None], other=0).to(x_ptr.dtype.element_ty)
        b_x = tl.load(p_x + i_k, mask=m_rows[None, :], other=0.0)
        b_out = tl.dot(b_weight, b_x, b_out, input_precision=PRECISION)

    b_out *= tl.load(scale_ptr + o_n, mask=m_n, other=0.0)[:, None]
    if bias_ptr is not None:
        b_out += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    b_out = activated(b_out, ACTIVATION)
    p_out = out_ptr + o_rows.to(tl.int64)[None, :] * n_columns + o_n[:, None]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_rows[None, :] & m_n[:, None])
