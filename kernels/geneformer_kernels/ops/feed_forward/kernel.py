"""Device code of the feed-forward half of a block: fused for compact widths, a matrix product for wide ones."""

from __future__ import annotations

import triton
import triton.language as tl

from geneformer_kernels.tiles import activated, activation_slope, keep_rows, keep_tile, layernorm_rows_bwd


@triton.jit(do_not_specialize=["n_rows", "threshold"])
def feed_forward_fwd_kernel(
    x_ptr,
    residual_ptr,
    up_weight_ptr,
    up_bias_ptr,
    down_weight_ptr,
    down_bias_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    stream_ptr,
    out_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    n_rows,
    ff_width,
    eps,
    threshold,
    keep_scale,
    ACTIVATION: tl.constexpr,
    IS_POST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_NORM: tl.constexpr,
):
    """one program = BLOCK_ROWS whole rows, from the input to the next residual stream.

    x, residual, stream, out, total [n_rows, WIDTH]; up_weight [ff_width, WIDTH] (SwiGLU: [2 ff_width, WIDTH], gate rows
    first), up_bias [ff_width or 2 ff_width], down_weight [WIDTH, ff_width], down_bias, weight, bias [WIDTH]; seed [1]
    int64; mean, rstd [n_rows]. ff_width is a multiple of BLOCK_F. Without weight there is no LayerNorm: out is the sum
    itself. Otherwise absent are what is not needed: residual (zeros), biases (zeros), seed (no dropout), out (equal to
    stream), total, mean and rstd (no backward, or total equal to stream). BLOCK_NORM rows at a time pass the LayerNorm:
    all at once, in registers, or 16 or more.
    """
    o_rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_c = tl.arange(0, WIDTH)
    o_f = tl.arange(0, BLOCK_F)
    m_rows = o_rows < n_rows
    m = m_rows[:, None]
    o = o_rows.to(tl.int64)[:, None] * WIDTH + o_c[None, :]
    b_x = tl.load(x_ptr + o, mask=m, other=0.0)
    p_up = up_weight_ptr + o_f[None, :] * WIDTH + o_c[:, None]
    p_down = down_weight_ptr + o_c[None, :] * ff_width + o_f[:, None]

    b_total = tl.zeros([BLOCK_ROWS, WIDTH], tl.float32)
    for i_f in range(0, ff_width, BLOCK_F):
        b_hidden = tl.dot(b_x, tl.load(p_up + i_f * WIDTH), input_precision=PRECISION)
        if up_bias_ptr is not None:
            b_hidden += tl.load(up_bias_ptr + i_f + o_f).to(tl.float32)[None, :]
        if ACTIVATION == "swiglu":
            b_up = tl.dot(b_x, tl.load(p_up + (ff_width + i_f) * WIDTH), input_precision=PRECISION)
            if up_bias_ptr is not None:
                b_up += tl.load(up_bias_ptr + ff_width + i_f + o_f).to(tl.float32)[None, :]
            b_hidden = activated(b_hidden, "silu") * b_up
        else:
            b_hidden = activated(b_hidden, ACTIVATION)
        b_total = tl.dot(b_hidden.to(b_x.dtype), tl.load(p_down + i_f), b_total, input_precision=PRECISION)

    # One vector width for float32 and halves, so that the epilogue holds its values in one layout rather than in two.
    o_c = tl.max_contiguous(tl.arange(0, WIDTH), 4)
    o = o_rows.to(tl.int64)[:, None] * WIDTH + o_c[None, :]
    if down_bias_ptr is not None:
        b_total += tl.load(down_bias_ptr + o_c).to(tl.float32)[None, :]
    if BLOCK_NORM < BLOCK_ROWS:
        # The sums fill the registers: they go where the stream will stand, and come back a few rows at a time.
        p_sum = stream_ptr if total_ptr is None else total_ptr
        tl.store(p_sum + o, b_total, mask=m)
        tl.debug_barrier()
        for i_row in range(0, BLOCK_ROWS, BLOCK_NORM):
            first_row = tl.program_id(0) * BLOCK_ROWS + i_row
            o_part = first_row + tl.arange(0, BLOCK_NORM)
            o_few = o_part.to(tl.int64)[:, None] * WIDTH + o_c[None, :]
            b_few = tl.load(p_sum + o_few, mask=(o_part < n_rows)[:, None], other=0.0)
            tl.debug_barrier()  # in place: everything is read before anything is written
            if seed_ptr is not None:
                m_kept = keep_rows(tl.load(seed_ptr), first_row, threshold, BLOCK_NORM, WIDTH)
                b_few = tl.where(m_kept, b_few * keep_scale, 0.0)
            _finish_rows(
                b_few, residual_ptr, weight_ptr, bias_ptr, stream_ptr, out_ptr, total_ptr, mean_ptr, rstd_ptr, o_part,
                o_c, n_rows, eps, IS_POST, WIDTH,
            )  # fmt: skip
    else:
        if seed_ptr is not None:
            m_keep = keep_tile(tl.load(seed_ptr), o_rows, o_c, threshold)
            b_total = tl.where(m_keep, b_total * keep_scale, 0.0)
        _finish_rows(
            b_total, residual_ptr, weight_ptr, bias_ptr, stream_ptr, out_ptr, total_ptr, mean_ptr, rstd_ptr, o_rows,
            o_c, n_rows, eps, IS_POST, WIDTH,
        )  # fmt: skip


@triton.jit
def _finish_rows(
    b_total, residual_ptr, weight_ptr, bias_ptr, stream_ptr, out_ptr, total_ptr, mean_ptr, rstd_ptr, o_rows, o_c,
    n_rows, eps, IS_POST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Residual and LayerNorm of whole rows, and all that is stored of them."""
    m_rows = o_rows < n_rows
    m = m_rows[:, None]
    o = o_rows.to(tl.int64)[:, None] * WIDTH + o_c[None, :]
    if residual_ptr is not None:
        b_total += tl.load(residual_ptr + o, mask=m, other=0.0).to(tl.float32)
    if weight_ptr is None:
        tl.store(out_ptr + o, b_total.to(out_ptr.dtype.element_ty), mask=m)
    else:
        # What is stored as soon as it is known needs no registers afterwards.
        if total_ptr is not None:
            tl.store(total_ptr + o, b_total, mask=m)
        if not IS_POST:
            tl.store(stream_ptr + o, b_total, mask=m)
        # Two passes over registers: the difference of E[x^2] and E[x]^2 loses all digits where the mean is large.
        b_mean = tl.sum(b_total, 1) / WIDTH
        b_total -= b_mean[:, None]
        b_rstd = tl.rsqrt(tl.sum(b_total * b_total, 1) / WIDTH + eps)
        if mean_ptr is not None:
            tl.store(mean_ptr + o_rows, b_mean, mask=m_rows)
            tl.store(rstd_ptr + o_rows, b_rstd, mask=m_rows)
        b_weight = tl.load(weight_ptr + o_c).to(tl.float32)
        b_bias = tl.load(bias_ptr + o_c).to(tl.float32)
        b_normed = b_total * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
        if IS_POST:
            tl.store(stream_ptr + o, b_normed, mask=m)
        if out_ptr is not None:
            tl.store(out_ptr + o, b_normed.to(out_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["n_rows"])
def feed_forward_up_kernel(
    x_ptr,
    weight_ptr,
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
    GROUP: tl.constexpr,
):
    """one program = a tile [BLOCK_ROWS, BLOCK_N] of ``activation(x @ weight.T + bias)``.

    x [n_rows, width], weight [n_columns, width] (SwiGLU: [2 n_columns, width], gate rows first), bias [n_columns or
    2 n_columns] or absent, out [n_rows, n_columns]. width is a multiple of BLOCK_K. Programs walk through GROUP blocks
    of rows before they take the next columns, so that both operands stay in the second-level cache.
    """
    n_row_blocks, n_column_blocks = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_columns, BLOCK_N)
    i_group, i_in_group = tl.program_id(0) // (GROUP * n_column_blocks), tl.program_id(0) % (GROUP * n_column_blocks)
    n_in_group = tl.minimum(n_row_blocks - i_group * GROUP, GROUP)
    o_rows = (i_group * GROUP + i_in_group % n_in_group) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_n = (i_in_group // n_in_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_rows, m_n = o_rows < n_rows, o_n < n_columns
    p_x = x_ptr + o_rows.to(tl.int64)[:, None] * width + o_k[None, :]
    p_weight = weight_ptr + o_n.to(tl.int64)[None, :] * width + o_k[:, None]
    p_up = weight_ptr + (o_n + n_columns).to(tl.int64)[None, :] * width + o_k[:, None]

    b_hidden = tl.zeros([BLOCK_ROWS, BLOCK_N], tl.float32)
    b_up = tl.zeros([BLOCK_ROWS, BLOCK_N], tl.float32)
    for i_k in range(0, width, BLOCK_K):
        b_x = tl.load(p_x + i_k, mask=m_rows[:, None], other=0.0)
        b_weight = tl.load(p_weight + i_k, mask=m_n[None, :], other=0.0)
        b_hidden = tl.dot(b_x, b_weight, b_hidden, input_precision=PRECISION)
        if ACTIVATION == "swiglu":
            b_weight = tl.load(p_up + i_k, mask=m_n[None, :], other=0.0)
            b_up = tl.dot(b_x, b_weight, b_up, input_precision=PRECISION)

    if bias_ptr is not None:
        b_hidden += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "swiglu":
        if bias_ptr is not None:
            b_up += tl.load(bias_ptr + n_columns + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        b_hidden = activated(b_hidden, "silu") * b_up
    else:
        b_hidden = activated(b_hidden, ACTIVATION)
    p_out = out_ptr + o_rows.to(tl.int64)[:, None] * n_columns + o_n[None, :]
    tl.store(p_out, b_hidden.to(out_ptr.dtype.element_ty), mask=m_rows[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def feed_forward_bwd_activation_kernel(
    hidden_ptr,
    d_hidden_ptr,
    bias_ptr,
    partial_ptr,
    n_rows,
    ff_width,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """one program = BLOCK_F hidden units of every n_programs-th block of rows, and its part of the bias's gradient.

    hidden [n_rows, ff_width] (SwiGLU: [n_rows, 2 ff_width], gates first) comes as ``x @ up_weight.T`` without the bias
    and leaves as its gradient; d_hidden [n_rows, ff_width] comes as the gradient after the activation and leaves as
    the activation's value, which the second weight's gradient needs. bias [ff_width or 2 ff_width] or absent; partial
    [n_programs, ff_width or 2 ff_width] or absent (the bias is frozen). Sums run in a fixed order: no atomics.
    """
    pid, n_programs = tl.program_id(0), tl.num_programs(0)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < ff_width
    n_columns = ff_width * 2 if ACTIVATION == "swiglu" else ff_width
    b_bias = tl.zeros([BLOCK_F], tl.float32)
    b_up_bias = tl.zeros([BLOCK_F], tl.float32)
    if bias_ptr is not None:
        b_bias = tl.load(bias_ptr + o_f, mask=m_f, other=0.0).to(tl.float32)
        if ACTIVATION == "swiglu":
            b_up_bias = tl.load(bias_ptr + ff_width + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_sum = tl.zeros([BLOCK_ROWS, BLOCK_F], tl.float32)
    b_up_sum = tl.zeros([BLOCK_ROWS, BLOCK_F], tl.float32)

    for i_block in range(pid, tl.cdiv(n_rows, BLOCK_ROWS), n_programs):
        o_rows = (i_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        m = (o_rows < n_rows)[:, None] & m_f[None, :]
        p_hidden = hidden_ptr + o_rows[:, None] * n_columns + o_f[None, :]
        p_d_hidden = d_hidden_ptr + o_rows[:, None] * ff_width + o_f[None, :]
        b_hidden = tl.load(p_hidden, mask=m, other=0.0).to(tl.float32) + b_bias[None, :]
        b_d_hidden = tl.load(p_d_hidden, mask=m, other=0.0).to(tl.float32)
        if ACTIVATION == "swiglu":
            b_up = tl.load(p_hidden + ff_width, mask=m, other=0.0).to(tl.float32) + b_up_bias[None, :]
        # In place: everything is read before anything is written, whichever threads the compiler gives either to.
        tl.debug_barrier()
        if ACTIVATION == "swiglu":
            b_gate = activated(b_hidden, "silu")
            b_d_up = b_d_hidden * b_gate
            b_d_pre = b_d_hidden * b_up * activation_slope(b_hidden, "silu")
            b_value = b_gate * b_up
            tl.store(p_hidden + ff_width, b_d_up.to(hidden_ptr.dtype.element_ty), mask=m)
            b_up_sum += b_d_up
        else:
            b_d_pre = b_d_hidden * activation_slope(b_hidden, ACTIVATION)
            b_value = activated(b_hidden, ACTIVATION)
        b_sum += b_d_pre
        tl.store(p_hidden, b_d_pre.to(hidden_ptr.dtype.element_ty), mask=m)
        tl.store(p_d_hidden, b_value.to(d_hidden_ptr.dtype.element_ty), mask=m)

    if partial_ptr is not None:
        p_partial = partial_ptr + pid.to(tl.int64) * n_columns + o_f
        tl.store(p_partial, tl.sum(b_sum, 0), mask=m_f)
        if ACTIVATION == "swiglu":
            tl.store(p_partial + ff_width, tl.sum(b_up_sum, 0), mask=m_f)


@triton.jit(do_not_specialize=["n_rows", "threshold"])
def feed_forward_bwd_layernorm_kernel(
    d_stream_ptr,
    d_out_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    seed_ptr,
    dy_ptr,
    d_residual_ptr,
    partial_ptr,
    n_rows,
    threshold,
    keep_scale,
    IS_POST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """one program = every n_programs-th block of BLOCK_ROWS whole rows, and its part of the parameters' gradients.

    d_stream, d_out, total, dy, d_residual [n_rows, WIDTH], where dy is the gradient of what the feed-forward half
    computes before dropout; mean, rstd [n_rows]; weight [WIDTH]; seed [1] int64; partial [n_programs, 3, WIDTH]:
    weight, bias, down_bias. Absent are d_stream or d_out (zeros), seed (no dropout), d_residual (nobody asks), partial
    (the parameters are frozen). Sums run in a fixed order: no atomics.
    """
    pid, n_programs = tl.program_id(0), tl.num_programs(0)
    o_c = tl.arange(0, WIDTH)
    b_weight = tl.load(weight_ptr + o_c).to(tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    # Columns are summed over the rows of a block at the end. At 512 those registers would spill: every block is summed.
    SUM_ROWS: tl.constexpr = BLOCK_ROWS if WIDTH <= 256 else 1
    b_d_weight = tl.zeros([SUM_ROWS, WIDTH], tl.float32)
    b_d_bias = tl.zeros([SUM_ROWS, WIDTH], tl.float32)
    b_d_down_bias = tl.zeros([SUM_ROWS, WIDTH], tl.float32)

    for i_block in range(pid, tl.cdiv(n_rows, BLOCK_ROWS), n_programs):
        o_rows = i_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        m_rows = o_rows < n_rows
        m = m_rows[:, None]
        o = o_rows.to(tl.int64)[:, None] * WIDTH + o_c[None, :]
        b_total = tl.load(total_ptr + o, mask=m, other=0.0)
        b_mean = tl.load(mean_ptr + o_rows, mask=m_rows, other=0.0)
        b_rstd = tl.load(rstd_ptr + o_rows, mask=m_rows, other=0.0)
        b_d_stream = tl.zeros([BLOCK_ROWS, WIDTH], tl.float32)
        b_d_normed = tl.zeros([BLOCK_ROWS, WIDTH], tl.float32)
        if d_stream_ptr is not None:
            b_d_stream = tl.load(d_stream_ptr + o, mask=m, other=0.0).to(tl.float32)
        if d_out_ptr is not None:
            b_d_normed = tl.load(d_out_ptr + o, mask=m, other=0.0).to(tl.float32)

        if IS_POST:
            b_d_normed += b_d_stream
        b_xhat = (b_total - b_mean[:, None]) * b_rstd[:, None]
        b_d_total = layernorm_rows_bwd(b_d_normed * b_weight[None, :], b_xhat, b_rstd, WIDTH)
        if not IS_POST:
            b_d_total += b_d_stream
        if d_residual_ptr is not None:
            tl.store(d_residual_ptr + o, b_d_total, mask=m)
        if seed_ptr is not None:
            m_keep = keep_rows(seed, i_block * BLOCK_ROWS, threshold, BLOCK_ROWS, WIDTH)
            b_d_total = tl.where(m_keep, b_d_total * keep_scale, 0.0)
        tl.store(dy_ptr + o, b_d_total.to(dy_ptr.dtype.element_ty), mask=m)
        if SUM_ROWS == 1:
            b_d_weight += tl.sum(b_d_normed * b_xhat, 0, keep_dims=True)
            b_d_bias += tl.sum(b_d_normed, 0, keep_dims=True)
            b_d_down_bias += tl.sum(b_d_total, 0, keep_dims=True)
        else:
            b_d_weight += b_d_normed * b_xhat
            b_d_bias += b_d_normed
            b_d_down_bias += b_d_total

    if partial_ptr is not None:
        p_partial = partial_ptr + pid.to(tl.int64) * 3 * WIDTH + o_c
        tl.store(p_partial, tl.sum(b_d_weight, 0))
        tl.store(p_partial + WIDTH, tl.sum(b_d_bias, 0))
        tl.store(p_partial + 2 * WIDTH, tl.sum(b_d_down_bias, 0))
