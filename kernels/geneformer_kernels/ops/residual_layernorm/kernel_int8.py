"""Device code of residual addition and layer normalisation whose value to compute on leaves as int8 rows."""

from __future__ import annotations

import triton
import triton.language as tl

from geneformer_kernels.tiles import rounded_rows, row_moments


@triton.jit(do_not_specialize=["n_rows"])
def residual_layernorm_int8_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    smooth_ptr,
    stream_ptr,
    q_ptr,
    scale_ptr,
    n_rows,
    width,
    eps,
    tiny,
    IS_POST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """one program = BLOCK_ROWS whole rows.

    x, residual, stream [n_rows, width]; weight, bias, smooth [width]; q [n_rows, width] int8 and scale [n_rows]: the
    normalised value times smooth, rounded. Absent may be residual (zeros) and smooth (ones). Compiled without fused
    multiply-add: the rows are exactly those that quantising the normalised value gives.
    """
    o_rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_c = tl.arange(0, BLOCK_C)
    m_rows, m_c = o_rows < n_rows, o_c < width
    m = m_rows[:, None] & m_c[None, :]
    o = o_rows.to(tl.int64)[:, None] * width + o_c[None, :]
    b_total = tl.load(x_ptr + o, mask=m, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        b_total += tl.load(residual_ptr + o, mask=m, other=0.0).to(tl.float32)
    b_weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)

    b_mean, b_rstd = row_moments(b_total, m_c, width, eps)
    b_normed = (b_total - b_mean[:, None]) * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
    tl.store(stream_ptr + o, b_normed if IS_POST else b_total, mask=m)
    if smooth_ptr is not None:
        b_normed *= tl.load(smooth_ptr + o_c, mask=m_c, other=0.0)[None, :]
    b_q, b_scale = rounded_rows(b_normed, tiny)
    tl.store(q_ptr + o, b_q, mask=m)
    tl.store(scale_ptr + o_rows, b_scale, mask=m_rows)
