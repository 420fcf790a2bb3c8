"""Device code of residual addition with dropout and layer normalisation, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl

from geneformer_kernels.tiles import keep_row, layernorm_rows_bwd, row_moments


@triton.jit(do_not_specialize=["n_rows", "threshold"])
def residual_layernorm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    stream_ptr,
    out_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    n_rows,
    width,
    eps,
    threshold,
    keep_scale,
    IS_POST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """one program = BLOCK_ROWS whole rows.

    x, residual, stream, out, total [n_rows, width]; weight, bias [width]; seed [1] int64; mean, rstd [n_rows]. Absent
    are residual (zeros), seed (no dropout), stream (the caller has it), out (equal to stream), total, mean and rstd
    (no backward, or total equal to stream).
    """
    o_rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_c = tl.arange(0, BLOCK_C)
    m_rows, m_c = o_rows < n_rows, o_c < width
    m = m_rows[:, None] & m_c[None, :]
    o = o_rows.to(tl.int64)[:, None] * width + o_c[None, :]
    b_total = tl.load(x_ptr + o, mask=m, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        b_residual = tl.load(residual_ptr + o, mask=m, other=0.0).to(tl.float32)
    b_weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)

    if seed_ptr is not None:
        m_keep = keep_row(tl.load(seed_ptr), o_rows, threshold, BLOCK_C)
        b_total = tl.where(m_keep, b_total * keep_scale, 0.0)
    if residual_ptr is not None:
        b_total += b_residual
    b_mean, b_rstd = row_moments(b_total, m_c, width, eps)
    b_normed = (b_total - b_mean[:, None]) * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]

    if stream_ptr is not None:
        tl.store(stream_ptr + o, b_normed if IS_POST else b_total, mask=m)
    if out_ptr is not None:
        tl.store(out_ptr + o, b_normed.to(out_ptr.dtype.element_ty), mask=m)
    if total_ptr is not None:
        tl.store(total_ptr + o, b_total, mask=m)
    if mean_ptr is not None:
        tl.store(mean_ptr + o_rows, b_mean, mask=m_rows)
        tl.store(rstd_ptr + o_rows, b_rstd, mask=m_rows)


@triton.jit(do_not_specialize=["n_rows", "threshold"])
def residual_layernorm_bwd_kernel(
    d_stream_ptr,
    d_out_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    seed_ptr,
    dx_ptr,
    d_residual_ptr,
    partial_ptr,
    n_rows,
    width,
    threshold,
    keep_scale,
    IS_POST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """one program = every n_programs-th block of BLOCK_ROWS whole rows, and its part of the parameters' gradients.

    d_stream, d_out, total, dx, d_residual [n_rows, width]; mean, rstd [n_rows]; weight [width]; seed [1] int64; partial
    [n_programs, 2, width], weight then bias. Absent are d_stream or d_out (zeros), seed (no dropout), dx or d_residual
    (nobody asks, or both are one), partial (the parameters are frozen). Sums run in a fixed order: no atomics.
    """
    pid, n_programs = tl.program_id(0), tl.num_programs(0)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < width
    b_weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    if partial_ptr is not None:
        b_d_weight = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
        b_d_bias = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)

    for i_block in range(pid, tl.cdiv(n_rows, BLOCK_ROWS), n_programs):
        o_rows = i_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        m_rows = o_rows < n_rows
        m = m_rows[:, None] & m_c[None, :]
        o = o_rows.to(tl.int64)[:, None] * width + o_c[None, :]
        b_total = tl.load(total_ptr + o, mask=m, other=0.0).to(tl.float32)
        b_mean = tl.load(mean_ptr + o_rows, mask=m_rows, other=0.0)
        b_rstd = tl.load(rstd_ptr + o_rows, mask=m_rows, other=0.0)
        b_d_stream = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
        b_d_normed = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
        if d_stream_ptr is not None:
            b_d_stream = tl.load(d_stream_ptr + o, mask=m, other=0.0).to(tl.float32)
        if d_out_ptr is not None:
            b_d_normed = tl.load(d_out_ptr + o, mask=m, other=0.0).to(tl.float32)

        if IS_POST:
            b_d_normed += b_d_stream
        b_xhat = tl.where(m_c[None, :], (b_total - b_mean[:, None]) * b_rstd[:, None], 0.0)
        b_d_total = layernorm_rows_bwd(b_d_normed * b_weight[None, :], b_xhat, b_rstd, width)
        if not IS_POST:
            b_d_total += b_d_stream
        if partial_ptr is not None:
            b_d_weight += b_d_normed * b_xhat
            b_d_bias += b_d_normed

        if d_residual_ptr is not None:
            tl.store(d_residual_ptr + o, b_d_total, mask=m)
        if dx_ptr is not None:
            if seed_ptr is not None:
                m_keep = keep_row(seed, o_rows, threshold, BLOCK_C)
                b_d_total = tl.where(m_keep, b_d_total * keep_scale, 0.0)
            tl.store(dx_ptr + o, b_d_total.to(dx_ptr.dtype.element_ty), mask=m)

    if partial_ptr is not None:
        p_partial = partial_ptr + pid.to(tl.int64) * 2 * width + o_c
        tl.store(p_partial, tl.sum(b_d_weight, 0), mask=m_c)
        tl.store(p_partial + width, tl.sum(b_d_bias, 0), mask=m_c)
