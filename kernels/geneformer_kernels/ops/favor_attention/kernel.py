"""Linear attention by random features on the GPU: features live in registers, a tile at a time, and are never written.

Shapes: T tokens, H heads, D head dimension, B cells, M features. q, k, v and the output's gradient are [T, H, D] with
any strides of tokens and heads and adjacent elements, D a power of two; what is written is contiguous. Numbers of
tokens are [H, T] float32. ``1 / sqrt(M)`` is left out of the features: it cancels.

The projection comes as one matrix [M, D], or as two whose sum it is: in half precision the second holds what rounding
the first one lost, so that features have float32's accuracy as far as queries and keys are exact.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_block(ptr, stride_t, stride_h, first, i_head, o_rows, m_rows, HEAD_DIM: tl.constexpr):
    """Rows [N, HEAD_DIM] of one head, ``first + o_rows`` of all tokens; zero where m_rows is False."""
    o_d = tl.arange(0, HEAD_DIM)
    p_rows = ptr + first * stride_t + i_head.to(tl.int64) * stride_h + o_rows[:, None] * stride_t + o_d[None, :]
    return tl.load(p_rows, mask=m_rows[:, None], other=0.0)


@triton.jit
def feature_block(matrix_ptr, o_f, n_features, HEAD_DIM: tl.constexpr):
    """Rows [F, HEAD_DIM] of a contiguous matrix [n_features, D]; zero past its end."""
    o_d = tl.arange(0, HEAD_DIM)
    p_rows = matrix_ptr + o_f[:, None] * HEAD_DIM + o_d[None, :]
    return tl.load(p_rows, mask=(o_f < n_features)[:, None], other=0.0)


@triton.jit
def projected(
    b_x,
    weight_ptr,
    o_f,
    n_features,
    scale,
    HEAD_DIM: tl.constexpr,
    N_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[N, F] float32, rows b_x [N, HEAD_DIM] by features o_f, times scale; -inf past the last feature."""
    b_weight = feature_block(weight_ptr, o_f, n_features, HEAD_DIM)
    b_projected = tl.dot(b_x, tl.trans(b_weight), input_precision=PRECISION)
    if N_PARTS == 2:
        b_rest = feature_block(weight_ptr + n_features * HEAD_DIM, o_f, n_features, HEAD_DIM)
        b_projected = tl.dot(b_x, tl.trans(b_rest), b_projected, input_precision=PRECISION)
    return tl.where((o_f < n_features)[None, :], b_projected * scale, float("-inf"))


@triton.jit
def half_norms(b_x, scale):
    """[N], half of the squared length of rows times scale."""
    b_wide = b_x.to(tl.float32)
    return tl.sum(b_wide * b_wide, 1) * (0.5 * scale * scale)


@triton.jit(do_not_specialize=["n_tokens", "n_features"])
def favor_attention_top_kernel(
    k_ptr,
    weight_ptr,
    top_ptr,
    stride_k_t,
    stride_k_h,
    n_tokens,
    n_features,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    N_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """one program = BLOCK_T keys of one head, whatever their cells: the largest of each one's projections.

    k [T, H, D], weight [N_PARTS, M, D] -> top [H, T].
    """
    i_head = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    o_t = tl.arange(0, BLOCK_T)
    m_t = o_t < n_tokens - first
    b_k = row_block(k_ptr, stride_k_t, stride_k_h, first, i_head, o_t, m_t, HEAD_DIM)
    b_top = tl.full([BLOCK_T], float("-inf"), tl.float32)
    for f in range(0, n_features, BLOCK_F):
        o_f = f + tl.arange(0, BLOCK_F)
        b_projected = projected(b_k, weight_ptr, o_f, n_features, scale, HEAD_DIM, N_PARTS, PRECISION)
        b_top = tl.maximum(b_top, tl.max(b_projected, 1))
    tl.store(top_ptr + i_head.to(tl.int64) * n_tokens + first + o_t, b_top, mask=m_t)


@triton.jit(do_not_specialize=["n_tokens", "n_features", "n_blocks", "n_splits"])
def favor_attention_sums_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    largest_ptr,
    total_ptr,
    delta_ptr,
    cu_seqlens_ptr,
    partial_ptr,
    partial_sum_ptr,
    stride_x_t,
    stride_x_h,
    stride_y_t,
    stride_y_h,
    n_tokens,
    n_features,
    n_blocks,
    n_splits,
    scale,
    eps,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    N_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """one program = BLOCK_F features of one head over one of n_splits parts of a cell's tokens.

    x, y [T, H, D]; weight [N_PARTS, M, D] -> partial [n_splits, B, H, M, D] and partial_sum [n_splits, B, H, M]
    float32: ``phi(x).T y`` and the column sums of phi(x). These are keys and values, largest [B] that of each cell.
    With total and delta [H, T] they are queries and the output's gradient: largest [H, T], features are divided by
    total, and the second result is that of ``-phi(x).T delta``.
    """
    i_head, i = tl.program_id(1), tl.program_id(0)
    i_block, i_split, i_cell = i % n_blocks, i // n_blocks % n_splits, i // n_blocks // n_splits
    n_cells = tl.num_programs(0) // n_blocks // n_splits
    start = tl.load(cu_seqlens_ptr + i_cell).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + i_cell + 1).to(tl.int64) - start).to(tl.int32)
    n_each = tl.cdiv(tl.cdiv(length, n_splits), BLOCK_T) * BLOCK_T
    low = tl.minimum(i_split * n_each, length)
    high = tl.minimum(low + n_each, length)
    o_f, o_d, o_t = i_block * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK_T)
    if total_ptr is None:
        largest = tl.load(largest_ptr + i_cell)

    acc = tl.zeros([BLOCK_F, HEAD_DIM], tl.float32)
    b_sum = tl.zeros([BLOCK_F], tl.float32)
    for t in range(low, high, BLOCK_T):
        m_t = o_t < high - t
        first = start + t
        b_x = row_block(x_ptr, stride_x_t, stride_x_h, first, i_head, o_t, m_t, HEAD_DIM)
        b_y = row_block(y_ptr, stride_y_t, stride_y_h, first, i_head, o_t, m_t, HEAD_DIM)
        b_projected = projected(b_x, weight_ptr, o_f, n_features, scale, HEAD_DIM, N_PARTS, PRECISION)
        o_row = i_head.to(tl.int64) * n_tokens + first + o_t
        b_shift = half_norms(b_x, scale)
        if total_ptr is None:
            b_shift += largest
        else:
            b_shift += tl.load(largest_ptr + o_row, mask=m_t, other=0.0)
        b_phi = tl.exp2((b_projected - b_shift[:, None]) * LOG2_E) + eps
        if total_ptr is not None:
            b_phi = b_phi / tl.load(total_ptr + o_row, mask=m_t, other=1.0)[:, None]
        b_phi = tl.where(m_t[:, None], b_phi, 0.0)
        acc = tl.dot(tl.trans(b_phi.to(b_y.dtype)), b_y, acc, input_precision=PRECISION)
        if delta_ptr is None:
            b_sum += tl.sum(b_phi, 0)
        else:
            b_sum -= tl.sum(b_phi * tl.load(delta_ptr + o_row, mask=m_t, other=0.0)[:, None], 0)

    i_out = (i_split.to(tl.int64) * n_cells + i_cell) * tl.num_programs(1) + i_head
    m_f = o_f < n_features
    p_partial = partial_ptr + (i_out * n_features + o_f)[:, None] * HEAD_DIM + o_d[None, :]
    tl.store(p_partial, acc, mask=m_f[:, None])
    tl.store(partial_sum_ptr + i_out * n_features + o_f, b_sum, mask=m_f)


@triton.jit(do_not_specialize=["n_tokens", "n_features", "n_tiles"])
def favor_attention_fwd_kernel(
    q_ptr,
    weight_ptr,
    context_ptr,
    sums_ptr,
    cu_seqlens_ptr,
    out_ptr,
    largest_ptr,
    total_ptr,
    stride_q_t,
    stride_q_h,
    n_tokens,
    n_features,
    n_tiles,
    scale,
    eps,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    N_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """one program = BLOCK_T queries of one cell and head; programs past a cell's end find nothing to do.

    q [T, H, D], weight [N_PARTS, M, D], context [B, H, M, D], sums [B, H, M] float32 -> out [T, H, D], and what the
    backward pass needs, or neither: largest [H, T], each query's largest projection, and total [H, T],
    ``phi(q) @ sums``. The projections are computed twice: once for the largest.
    """
    i_head, i = tl.program_id(1), tl.program_id(0)
    i_cell, i_tile = i // n_tiles, i % n_tiles
    start = tl.load(cu_seqlens_ptr + i_cell).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + i_cell + 1).to(tl.int64) - start).to(tl.int32)
    low = i_tile * BLOCK_T
    if low >= length:
        return
    first = start + low
    o_t, o_d = tl.arange(0, BLOCK_T), tl.arange(0, HEAD_DIM)
    m_t = o_t < length - low
    i_group = i_cell.to(tl.int64) * tl.num_programs(1) + i_head
    context_ptr += i_group * n_features * HEAD_DIM
    sums_ptr += i_group * n_features
    b_q = row_block(q_ptr, stride_q_t, stride_q_h, first, i_head, o_t, m_t, HEAD_DIM)

    b_largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    for f in range(0, n_features, BLOCK_F):
        o_f = f + tl.arange(0, BLOCK_F)
        b_projected = projected(b_q, weight_ptr, o_f, n_features, scale, HEAD_DIM, N_PARTS, PRECISION)
        b_largest = tl.maximum(b_largest, tl.max(b_projected, 1))
    b_shift = b_largest + half_norms(b_q, scale)
    acc = tl.zeros([BLOCK_T, HEAD_DIM], tl.float32)
    b_total = tl.zeros([BLOCK_T], tl.float32)
    for f in range(0, n_features, BLOCK_F):
        o_f = f + tl.arange(0, BLOCK_F)
        b_projected = projected(b_q, weight_ptr, o_f, n_features, scale, HEAD_DIM, N_PARTS, PRECISION)
        b_phi = tl.exp2((b_projected - b_shift[:, None]) * LOG2_E) + eps
        b_context = feature_block(context_ptr, o_f, n_features, HEAD_DIM)  # zero past the last feature
        acc = tl.dot(b_phi.to(b_context.dtype), b_context, acc, input_precision=PRECISION)
        b_total += tl.sum(b_phi * tl.load(sums_ptr + o_f, mask=o_f < n_features, other=0.0)[None, :], 1)

    p_out = out_ptr + ((first + o_t) * tl.num_programs(1) + i_head)[:, None] * HEAD_DIM + o_d[None, :]
    b_out = (acc / b_total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(p_out, b_out, mask=m_t[:, None])
    if total_ptr is not None:
        o_row = i_head.to(tl.int64) * n_tokens + first + o_t
        tl.store(largest_ptr + o_row, b_largest, mask=m_t)
        tl.store(total_ptr + o_row, b_total, mask=m_t)


@triton.jit(do_not_specialize=["n_tokens", "n_features", "n_tiles"])
def favor_attention_bwd_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    context_ptr,
    sums_ptr,
    factor_ptr,
    largest_ptr,
    total_ptr,
    delta_ptr,
    cu_seqlens_ptr,
    dx_ptr,
    dv_ptr,
    flow_ptr,
    stride_x_t,
    stride_x_h,
    stride_y_t,
    stride_y_h,
    n_tokens,
    n_features,
    n_tiles,
    scale,
    eps,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    N_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """one program = the gradients of BLOCK_T rows of one cell and head; programs past a cell's end do nothing.

    With total and delta [H, T] the rows x are queries, y the output's gradient, context [B, H, M, D] and sums [B, H, M]
    those of the forward pass, largest [H, T]; dx [T, H, D] is whole. Without them x are keys, y values, context and
    sums the gradients of those, which are to be multiplied by factor [B, H], largest [B]; dx lacks what flows through
    the cell's largest projection, the negative sum of flow [H, T] over the cell; dv [T, H, D].
    """
    i_head, i = tl.program_id(1), tl.program_id(0)
    i_cell, i_tile = i // n_tiles, i % n_tiles
    start = tl.load(cu_seqlens_ptr + i_cell).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + i_cell + 1).to(tl.int64) - start).to(tl.int32)
    low = i_tile * BLOCK_T
    if low >= length:
        return
    first = start + low
    o_t, o_d = tl.arange(0, BLOCK_T), tl.arange(0, HEAD_DIM)
    m_t = o_t < length - low
    i_group = i_cell.to(tl.int64) * tl.num_programs(1) + i_head
    context_ptr += i_group * n_features * HEAD_DIM
    sums_ptr += i_group * n_features
    o_row = i_head.to(tl.int64) * n_tokens + first + o_t
    b_x = row_block(x_ptr, stride_x_t, stride_x_h, first, i_head, o_t, m_t, HEAD_DIM)
    b_y = row_block(y_ptr, stride_y_t, stride_y_h, first, i_head, o_t, m_t, HEAD_DIM)
    b_shift = half_norms(b_x, scale)
    if total_ptr is None:
        b_shift += tl.load(largest_ptr + i_cell)
        acc_v = tl.zeros([BLOCK_T, HEAD_DIM], tl.float32)
    else:
        b_shift += tl.load(largest_ptr + o_row, mask=m_t, other=0.0)
        b_inverse = 1.0 / tl.load(total_ptr + o_row, mask=m_t, other=1.0)
        b_delta = tl.load(delta_ptr + o_row, mask=m_t, other=0.0)
        b_best = tl.full([BLOCK_T], float("-inf"), tl.float32)
        i_best = tl.zeros([BLOCK_T], tl.int32)

    acc = tl.zeros([BLOCK_T, HEAD_DIM], tl.float32)
    b_flow = tl.zeros([BLOCK_T], tl.float32)
    for f in range(0, n_features, BLOCK_F):
        o_f = f + tl.arange(0, BLOCK_F)
        b_projected = projected(b_x, weight_ptr, o_f, n_features, scale, HEAD_DIM, N_PARTS, PRECISION)
        b_power = tl.exp2((b_projected - b_shift[:, None]) * LOG2_E)
        b_context = feature_block(context_ptr, o_f, n_features, HEAD_DIM)  # zero past the last feature
        b_sums = tl.load(sums_ptr + o_f, mask=o_f < n_features, other=0.0)
        b_d_phi = tl.dot(b_y, tl.trans(b_context), input_precision=PRECISION)
        if total_ptr is None:
            b_d_phi += b_sums[None, :]
            acc_v = tl.dot((b_power + eps).to(b_context.dtype), b_context, acc_v, input_precision=PRECISION)
        else:
            b_d_phi = (b_d_phi - b_delta[:, None] * b_sums[None, :]) * b_inverse[:, None]
            b_top, i_top = tl.max(b_projected, 1, return_indices=True)
            i_best = tl.where(b_top > b_best, f + i_top, i_best)
            b_best = tl.maximum(b_best, b_top)
        b_d_projected = b_power * b_d_phi
        b_flow += tl.sum(b_d_projected, 1)
        b_weight = feature_block(weight_ptr, o_f, n_features, HEAD_DIM)
        acc = tl.dot(b_d_projected.to(b_weight.dtype), b_weight, acc, input_precision=PRECISION)

    m = m_t[:, None]
    if total_ptr is not None:
        # What makes the largest projection larger makes all features smaller.
        p_best = weight_ptr + i_best[:, None] * HEAD_DIM + o_d[None, :]
        acc -= b_flow[:, None] * tl.load(p_best, mask=m, other=0.0).to(tl.float32)
    b_dx = acc * scale - (b_flow * (scale * scale))[:, None] * b_x.to(tl.float32)
    o_out = ((first + o_t) * tl.num_programs(1) + i_head)[:, None] * HEAD_DIM + o_d[None, :]
    if total_ptr is None:
        factor = tl.load(factor_ptr + i_group)
        b_dx *= factor
        tl.store(dv_ptr + o_out, (acc_v * factor).to(dv_ptr.dtype.element_ty), mask=m)
        tl.store(flow_ptr + o_row, b_flow * factor, mask=m_t)
    tl.store(dx_ptr + o_out, b_dx.to(dx_ptr.dtype.element_ty), mask=m)
