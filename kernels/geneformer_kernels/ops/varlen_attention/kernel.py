"""Attention over packed cells on the GPU: a list of tiles, forward, and backward without atomics.

Shapes: T tokens, H heads, D head dimension, B cells. q, k, v, out and their gradients are [T, H, D] with any strides of
heads, strides of tokens up to 2^24, and adjacent elements. lse and delta are [H, T] float32.
"""

import triton
import triton.language as tl

from geneformer_kernels.tiles import keep_score, softmax_step


@triton.jit
def _tile(tiles_ptr, i_tile):
    """The cell's first token, its length, and the tile's first row within the cell."""
    p_tile = tiles_ptr + 4 * (1 + i_tile)
    return tl.load(p_tile).to(tl.int64), tl.load(p_tile + 1), tl.load(p_tile + 2)


@triton.jit
def _rows(ptr, stride_t, stride_h, row, i_head, o_rows, o_d):
    """Pointers to the rows row + o_rows of one head; heads of a tensor [H, T, D] may lie 2**31 elements apart."""
    return ptr + row * stride_t + i_head.to(tl.int64) * stride_h + o_rows[:, None] * stride_t + o_d[None, :]


@triton.jit
def _load(p_rows, m_rows, m_dims, IS_PARTIAL: tl.constexpr, HAS_PADDING: tl.constexpr):
    """Rows [N, BLOCK_D] of a tensor; 0 past the cell's end (IS_PARTIAL) and past the head dimension (HAS_PADDING)."""
    if IS_PARTIAL:
        if HAS_PADDING:
            block = tl.load(p_rows, mask=m_rows[:, None] & m_dims[None, :], other=0.0)
        else:
            block = tl.load(p_rows, mask=m_rows[:, None], other=0.0)
    elif HAS_PADDING:
        block = tl.load(p_rows, mask=m_dims[None, :], other=0.0)
    else:
        block = tl.load(p_rows)
    return block


@triton.jit(do_not_specialize=["n_cells", "n_tokens", "n_slots"])
def varlen_attention_tiles_kernel(
    cu_seqlens_ptr, tiles_ptr, n_cells, n_tokens, n_slots, BLOCK_ROWS: tl.constexpr, BLOCK_CELLS: tl.constexpr
):
    """one program = one cell: its tiles of BLOCK_ROWS rows go into the list of all tiles, longest cells first.

    cu_seqlens [B + 1]; tiles [n_slots + 1, 4] int32: the number of tiles, then per tile the cell's first token, the
    cell's length and the tile's first row within the cell. Long cells go first so that the last programs to run are
    short. Whatever cu_seqlens holds, tiles stay within n_tokens and n_slots.
    """
    i_cell = tl.program_id(0)
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + i_cell).to(tl.int32), 0), n_tokens)
    stop = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + i_cell + 1).to(tl.int32), start), n_tokens)
    length = stop - start
    n_before = tl.zeros([BLOCK_CELLS], tl.int32)
    n_all = tl.zeros([BLOCK_CELLS], tl.int32)
    for i_other in range(0, n_cells, BLOCK_CELLS):
        o_other = i_other + tl.arange(0, BLOCK_CELLS)
        m_other = o_other < n_cells
        starts = tl.load(cu_seqlens_ptr + o_other, mask=m_other, other=0).to(tl.int32)
        stops = tl.load(cu_seqlens_ptr + o_other + 1, mask=m_other, other=0).to(tl.int32)
        starts = tl.minimum(tl.maximum(starts, 0), n_tokens)
        lengths = tl.minimum(tl.maximum(stops, starts), n_tokens) - starts
        n_tiles = (lengths + BLOCK_ROWS - 1) // BLOCK_ROWS
        is_before = (lengths > length) | ((lengths == length) & (o_other < i_cell))
        n_before += tl.where(is_before, n_tiles, 0)
        n_all += n_tiles

    i_slot = tl.sum(n_before)
    if i_cell == 0:
        tl.store(tiles_ptr, tl.minimum(tl.sum(n_all), n_slots))
    n_tiles = (length + BLOCK_ROWS - 1) // BLOCK_ROWS
    for i_tile in range(0, n_tiles, BLOCK_CELLS):
        o_tile = i_tile + tl.arange(0, BLOCK_CELLS)
        m_tile = (o_tile < n_tiles) & (i_slot + o_tile < n_slots)
        p_tile = tiles_ptr + 4 * (1 + i_slot + o_tile)
        tl.store(p_tile, start, mask=m_tile)
        tl.store(p_tile + 1, length, mask=m_tile)
        tl.store(p_tile + 2, o_tile * BLOCK_ROWS, mask=m_tile)


@triton.jit(do_not_specialize=["n_tokens"])
def varlen_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, seed_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_out_t, stride_out_h,
    n_tokens, scale_log2, dropout_p,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """one program = BLOCK_M queries of one cell and head against all keys of the cell.

    out [T, H, D]; lse [H, T] the base-2 logarithm of ``sum(exp2(scores * scale_log2))``.
    """
    i_tile, i_head = tl.program_id(0), tl.program_id(1)
    if i_tile >= tl.load(tiles_ptr):
        return
    start, length, first_row = _tile(tiles_ptr, i_tile)
    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < length - first_row, o_d < HEAD_DIM
    HAS_PADDING: tl.constexpr = BLOCK_D != HEAD_DIM
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    drop_below = tl.cast(dropout_p * 4294967296.0, tl.uint32)
    row = start + first_row
    first_query = row.to(tl.int32)
    zero = scale_log2 * 0.0  # a constant would make two selections of 16 bits out of one of 32

    p_q = _rows(q_ptr, stride_q_t, stride_q_h, row, i_head, o_m, o_d)
    p_k = _rows(k_ptr, stride_k_t, stride_k_h, start, i_head, o_n, o_d)
    p_v = _rows(v_ptr, stride_v_t, stride_v_h, start, i_head, o_n, o_d)
    b_q = _load(p_q, m_m, m_d, True, HAS_PADDING)

    # Only the last block of keys may be partial. It goes first, with masks, so that the loop needs none.
    last_key = (length - 1) // BLOCK_N * BLOCK_N
    m_n = o_n < length - last_key
    b_k = _load(p_k + last_key.to(tl.int64) * stride_k_t, m_n, m_d, True, HAS_PADDING)
    b_v = _load(p_v + last_key.to(tl.int64) * stride_v_t, m_n, m_d, True, HAS_PADDING)
    scores = tl.where(m_n[None, :], tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), float("-inf"))
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    weights, _, row_max, row_sum = softmax_step(scores, row_max, row_sum, scale_log2)
    if HAS_DROPOUT:
        keep = keep_score(seed, i_head, first_query, o_m[:, None], last_key, o_n[None, :], drop_below)
        weights = tl.where(keep, weights, zero)
    acc = tl.dot(weights.to(b_v.dtype), b_v, input_precision=PRECISION)

    for first_key in range(0, last_key, BLOCK_N):
        b_k = _load(p_k, m_n, m_d, False, HAS_PADDING)
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        weights, factor, row_max, row_sum = softmax_step(scores, row_max, row_sum, scale_log2)
        if HAS_DROPOUT:
            keep = keep_score(seed, i_head, first_query, o_m[:, None], first_key, o_n[None, :], drop_below)
            weights = tl.where(keep, weights, zero)
        b_v = _load(p_v, m_n, m_d, False, HAS_PADDING)
        acc = tl.dot(weights.to(b_v.dtype), b_v, acc * factor[:, None], input_precision=PRECISION)
        p_k += BLOCK_N * stride_k_t
        p_v += BLOCK_N * stride_v_t

    acc = acc * (1.0 / ((1.0 - dropout_p) * row_sum))[:, None]
    p_out = _rows(out_ptr, stride_out_t, stride_out_h, row, i_head, o_m, o_d)
    tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
    p_lse = lse_ptr + i_head.to(tl.int64) * n_tokens + row + o_m
    tl.store(p_lse, row_max + tl.log2(row_sum), mask=m_m)


@triton.jit
def _add_dq(
    dq, b_q, b_do, b_k, b_v, lse, delta, seed, i_head, first_query, first_key, m_n, scale_log2, drop_below,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, IS_PARTIAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """dq [BLOCK_M, D] plus what one block of keys adds, without the factors that all blocks share."""
    scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    weights = tl.exp2(scores * scale_log2 - lse[:, None])
    if IS_PARTIAL:
        # Past the end keys are 0, but exp2(-lse) may be infinite.
        weights = tl.where(m_n[None, :], weights, 0.0)
    d_weights = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    if HAS_DROPOUT:
        o_m, o_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        keep = keep_score(seed, i_head, first_query, o_m[:, None], first_key, o_n[None, :], drop_below)
        d_weights = tl.where(keep, d_weights, 0.0)
    d_scores = weights * (d_weights - delta[:, None])
    return tl.dot(d_scores.to(b_k.dtype), b_k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["n_tokens"])
def varlen_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, dq_ptr, lse_ptr, delta_ptr, tiles_ptr, seed_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_out_t, stride_out_h,
    stride_d_out_t, stride_d_out_h, stride_dq_t, stride_dq_h,
    n_tokens, scale, scale_log2, dropout_p,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """one program = the gradient of BLOCK_M queries of one cell and head, over all keys of the cell.

    dq [T, H, D]; delta [H, T] is ``sum(d_out * out) * (1 - dropout_p)``, which the kernel for keys and values
    reads: inside, weights are not divided by 1 - dropout_p, the whole result is.
    """
    i_tile, i_head = tl.program_id(0), tl.program_id(1)
    if i_tile >= tl.load(tiles_ptr):
        return
    start, length, first_row = _tile(tiles_ptr, i_tile)
    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < length - first_row, o_d < HEAD_DIM
    HAS_PADDING: tl.constexpr = BLOCK_D != HEAD_DIM
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    drop_below = tl.cast(dropout_p * 4294967296.0, tl.uint32)
    row = start + first_row
    first_query = row.to(tl.int32)

    p_q = _rows(q_ptr, stride_q_t, stride_q_h, row, i_head, o_m, o_d)
    p_out = _rows(out_ptr, stride_out_t, stride_out_h, row, i_head, o_m, o_d)
    p_do = _rows(d_out_ptr, stride_d_out_t, stride_d_out_h, row, i_head, o_m, o_d)
    p_k = _rows(k_ptr, stride_k_t, stride_k_h, start, i_head, o_n, o_d)
    p_v = _rows(v_ptr, stride_v_t, stride_v_h, start, i_head, o_n, o_d)
    o_row = i_head.to(tl.int64) * n_tokens + row + o_m
    b_q = _load(p_q, m_m, m_d, True, HAS_PADDING)
    b_do = _load(p_do, m_m, m_d, True, HAS_PADDING)
    b_out = _load(p_out, m_m, m_d, True, HAS_PADDING)
    # Rows past the end: exp2(score - inf) is 0.
    lse = tl.load(lse_ptr + o_row, mask=m_m, other=float("inf"))
    delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1) * (1.0 - dropout_p)
    tl.store(delta_ptr + o_row, delta, mask=m_m)

    last_key = (length - 1) // BLOCK_N * BLOCK_N
    m_n = o_n < length - last_key
    b_k = _load(p_k + last_key.to(tl.int64) * stride_k_t, m_n, m_d, True, HAS_PADDING)
    b_v = _load(p_v + last_key.to(tl.int64) * stride_v_t, m_n, m_d, True, HAS_PADDING)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _add_dq(
        dq, b_q, b_do, b_k, b_v, lse, delta, seed, i_head, first_query, last_key, m_n, scale_log2, drop_below,
        BLOCK_M, BLOCK_N, PRECISION, True, HAS_DROPOUT,
    )  # fmt: skip
    for first_key in range(0, last_key, BLOCK_N):
        b_k = _load(p_k, m_n, m_d, False, HAS_PADDING)
        b_v = _load(p_v, m_n, m_d, False, HAS_PADDING)
        dq = _add_dq(
            dq, b_q, b_do, b_k, b_v, lse, delta, seed, i_head, first_query, first_key, m_n, scale_log2, drop_below,
            BLOCK_M, BLOCK_N, PRECISION, False, HAS_DROPOUT,
        )  # fmt: skip
        p_k += BLOCK_N * stride_k_t
        p_v += BLOCK_N * stride_v_t

    dq *= scale / (1.0 - dropout_p)
    p_dq = _rows(dq_ptr, stride_dq_t, stride_dq_h, row, i_head, o_m, o_d)
    tl.store(p_dq, dq.to(dq_ptr.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])


@triton.jit
def _add_dkdv(
    dk, dv, b_q, b_do, b_k, b_v, lse, delta, seed, i_head, first_query, first_key, scale_log2, drop_below,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """dk, dv [BLOCK_N, D] plus what one block of queries adds, without the factors that all blocks share.

    Scores are computed transposed, [BLOCK_N, BLOCK_M]: the weights then multiply from the left as they are.
    """
    scores = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    weights = tl.exp2(scores * scale_log2 - lse[None, :])
    d_weights = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    if HAS_DROPOUT:
        o_m, o_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        keep = keep_score(seed, i_head, first_query, o_m[None, :], first_key, o_n[:, None], drop_below)
        kept = tl.where(keep, weights, scale_log2 * 0.0)
        d_scores = kept * d_weights - weights * delta[None, :]
    else:
        kept = weights
        d_scores = weights * (d_weights - delta[None, :])
    dv = tl.dot(kept.to(b_do.dtype), b_do, dv, input_precision=PRECISION)
    dk = tl.dot(d_scores.to(b_q.dtype), b_q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["n_tokens"])
def varlen_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, tiles_ptr, seed_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_d_out_t, stride_d_out_h,
    stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h,
    n_tokens, scale, scale_log2, dropout_p,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """one program = the gradients of BLOCK_N keys and values of one cell and head, over all queries of the cell.

    dk, dv [T, H, D]; delta [H, T] as the kernel for queries wrote it.
    """
    i_tile, i_head = tl.program_id(0), tl.program_id(1)
    if i_tile >= tl.load(tiles_ptr):
        return
    start, length, first_key = _tile(tiles_ptr, i_tile)
    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < length - first_key, o_d < HEAD_DIM
    HAS_PADDING: tl.constexpr = BLOCK_D != HEAD_DIM
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    drop_below = tl.cast(dropout_p * 4294967296.0, tl.uint32)
    row = start + first_key

    p_k = _rows(k_ptr, stride_k_t, stride_k_h, row, i_head, o_n, o_d)
    p_v = _rows(v_ptr, stride_v_t, stride_v_h, row, i_head, o_n, o_d)
    p_q = _rows(q_ptr, stride_q_t, stride_q_h, start, i_head, o_m, o_d)
    p_do = _rows(d_out_ptr, stride_d_out_t, stride_d_out_h, start, i_head, o_m, o_d)
    o_row = i_head.to(tl.int64) * n_tokens + start + o_m
    b_k = _load(p_k, m_n, m_d, True, HAS_PADDING)
    b_v = _load(p_v, m_n, m_d, True, HAS_PADDING)

    last_query = (length - 1) // BLOCK_M * BLOCK_M
    m_m = o_m < length - last_query
    b_q = _load(p_q + last_query.to(tl.int64) * stride_q_t, m_m, m_d, True, HAS_PADDING)
    b_do = _load(p_do + last_query.to(tl.int64) * stride_d_out_t, m_m, m_d, True, HAS_PADDING)
    # Rows past the end: exp2(score - inf) is 0.
    lse = tl.load(lse_ptr + o_row + last_query, mask=m_m, other=float("inf"))
    delta = tl.load(delta_ptr + o_row + last_query, mask=m_m, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first_query = (start + last_query).to(tl.int32)
    dk, dv = _add_dkdv(
        dk, dv, b_q, b_do, b_k, b_v, lse, delta, seed, i_head, first_query, first_key, scale_log2, drop_below,
        BLOCK_M, BLOCK_N, PRECISION, HAS_DROPOUT,
    )  # fmt: skip
    for i_m in range(0, last_query, BLOCK_M):
        b_q = _load(p_q, m_m, m_d, False, HAS_PADDING)
        b_do = _load(p_do, m_m, m_d, False, HAS_PADDING)
        lse = tl.load(lse_ptr + o_row + i_m)
        delta = tl.load(delta_ptr + o_row + i_m)
        first_query = (start + i_m).to(tl.int32)
        dk, dv = _add_dkdv(
            dk, dv, b_q, b_do, b_k, b_v, lse, delta, seed, i_head, first_query, first_key, scale_log2, drop_below,
            BLOCK_M, BLOCK_N, PRECISION, HAS_DROPOUT,
        )  # fmt: skip
        p_q += BLOCK_M * stride_q_t
        p_do += BLOCK_M * stride_d_out_t

    m_out = m_n[:, None] & m_d[None, :]
    p_dk = _rows(dk_ptr, stride_dk_t, stride_dk_h, row, i_head, o_n, o_d)
    tl.store(p_dk, (dk * (scale / (1.0 - dropout_p))).to(dk_ptr.dtype.element_ty), mask=m_out)
    p_dv = _rows(dv_ptr, stride_dv_t, stride_dv_h, row, i_head, o_n, o_d)
    tl.store(p_dv, (dv * (1.0 / (1.0 - dropout_p))).to(dv_ptr.dtype.element_ty), mask=m_out)
