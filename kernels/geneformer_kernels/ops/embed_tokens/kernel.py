"""Device code of the embedding front: lookups, layer normalisation and dropout in one pass, and its gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from geneformer_kernels.tiles import keep_row, layernorm_rows_bwd, row_moments


@triton.jit
def clamped(b_index, n):
    """Indices kept inside a table of ``n`` rows: a wrong id gives undefined values, never a read out of bounds."""
    return tl.minimum(tl.maximum(b_index, 0), n - 1).to(tl.int64)


@triton.jit
def position_in_cell(o_rows, cu_seqlens_ptr, n_cells, n_steps):
    """[R], how far each row is from the start of its cell: the last ``cu_seqlens`` that is not above it.

    A binary search in which all rows take ``n_steps`` steps. Empty cells share their start with the next one, and the
    last of equal starts is the one found.
    """
    b_low = o_rows * 0
    b_high = b_low + n_cells
    for _ in range(n_steps):
        b_middle = (b_low + b_high) // 2
        m_right = tl.load(cu_seqlens_ptr + b_middle).to(tl.int32) <= o_rows
        b_low = tl.where(m_right, b_middle, b_low)
        b_high = tl.where(m_right, b_high, b_middle)
    return o_rows - tl.load(cu_seqlens_ptr + b_low).to(tl.int32)


@triton.jit(do_not_specialize=["n_rows", "n_cells", "n_steps", "n_vocabulary", "n_positions", "threshold"])
def embed_tokens_fwd_kernel(
    token_ids_ptr,
    cu_seqlens_ptr,
    token_ptr,
    position_ptr,
    type_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    stream_ptr,
    out_ptr,
    positions_ptr,
    mean_ptr,
    rstd_ptr,
    n_rows,
    n_cells,
    n_steps,
    n_vocabulary,
    n_positions,
    width,
    eps,
    threshold,
    keep_scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """one program = BLOCK_ROWS tokens, whole rows.

    token_ids [n_rows]; cu_seqlens [n_cells + 1]; token [n_vocabulary, width]; position [n_positions, width]; type,
    weight, bias [width]; seed [1] int64; stream, out [n_rows, width]; positions [n_rows] int32; mean, rstd [n_rows].
    Absent are type, weight and bias (no normalisation), seed (no dropout), out (equal to stream), and positions, mean
    and rstd (no backward).
    """
    o_rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_c = tl.arange(0, BLOCK_C)
    m_rows, m_c = o_rows < n_rows, o_c < width
    m = m_rows[:, None] & m_c[None, :]
    # The tokens' rows are on their way while the positions are searched.
    b_ids = clamped(tl.load(token_ids_ptr + o_rows, mask=m_rows, other=0), n_vocabulary)
    b_total = tl.load(token_ptr + b_ids[:, None] * width + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    b_positions = clamped(position_in_cell(o_rows, cu_seqlens_ptr, n_cells, n_steps), n_positions)
    b_position = tl.load(position_ptr + b_positions[:, None] * width + o_c[None, :], mask=m, other=0.0)

    if type_ptr is not None:
        b_total += tl.load(type_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_total += b_position.to(tl.float32)
    if weight_ptr is not None:
        b_mean, b_rstd = row_moments(b_total, m_c, width, eps)
        b_weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_total = (b_total - b_mean[:, None]) * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
    if seed_ptr is not None:
        m_keep = keep_row(tl.load(seed_ptr), o_rows, threshold, BLOCK_C)
        b_total = tl.where(m_keep, b_total * keep_scale, 0.0)

    o = o_rows.to(tl.int64)[:, None] * width + o_c[None, :]
    tl.store(stream_ptr + o, b_total, mask=m)
    if out_ptr is not None:
        tl.store(out_ptr + o, b_total.to(out_ptr.dtype.element_ty), mask=m)
    if positions_ptr is not None:
        tl.store(positions_ptr + o_rows, b_positions.to(tl.int32), mask=m_rows)
    if mean_ptr is not None:
        tl.store(mean_ptr + o_rows, b_mean, mask=m_rows)
        tl.store(rstd_ptr + o_rows, b_rstd, mask=m_rows)


@triton.jit(do_not_specialize=["n_rows", "n_vocabulary", "threshold"])
def embed_tokens_bwd_rows_kernel(
    d_stream_ptr,
    d_out_ptr,
    token_ids_ptr,
    positions_ptr,
    token_ptr,
    position_ptr,
    type_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,
    d_total_ptr,
    partial_ptr,
    n_rows,
    n_vocabulary,
    width,
    threshold,
    keep_scale,
    N_PARTIALS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """one program = every n_programs-th block of BLOCK_ROWS tokens, and its part of the small parameters' gradients.

    d_stream, d_out, d_total [n_rows, width]; the forward's inputs and statistics as there; partial [n_programs,
    N_PARTIALS, width]: weight and bias where there is a normalisation, then the type row where there is one. d_total
    is the gradient of the sum of the looked-up rows, which is looked up again rather than kept. Absent are d_stream or
    d_out (zeros), type, weight with mean and rstd, seed, and partial where N_PARTIALS is 0.
    """
    pid, n_programs = tl.program_id(0), tl.num_programs(0)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < width
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    if weight_ptr is not None:
        b_weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_d_weight = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
        b_d_bias = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    if type_ptr is not None:
        b_type = tl.load(type_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_d_type = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)

    for i_block in range(pid, tl.cdiv(n_rows, BLOCK_ROWS), n_programs):
        o_rows = i_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        m_rows = o_rows < n_rows
        m = m_rows[:, None] & m_c[None, :]
        o = o_rows.to(tl.int64)[:, None] * width + o_c[None, :]
        b_d = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
        if d_stream_ptr is not None:
            b_d += tl.load(d_stream_ptr + o, mask=m, other=0.0).to(tl.float32)
        if d_out_ptr is not None:
            b_d += tl.load(d_out_ptr + o, mask=m, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            b_ids = clamped(tl.load(token_ids_ptr + o_rows, mask=m_rows, other=0), n_vocabulary)
            b_positions = tl.load(positions_ptr + o_rows, mask=m_rows, other=0).to(tl.int64)
            b_total = tl.load(token_ptr + b_ids[:, None] * width + o_c[None, :], mask=m, other=0.0).to(tl.float32)
            if type_ptr is not None:
                b_total += b_type[None, :]
            p_position = position_ptr + b_positions[:, None] * width + o_c[None, :]
            b_total += tl.load(p_position, mask=m, other=0.0).to(tl.float32)
            b_mean = tl.load(mean_ptr + o_rows, mask=m_rows, other=0.0)
            b_rstd = tl.load(rstd_ptr + o_rows, mask=m_rows, other=0.0)

        if seed_ptr is not None:
            m_keep = keep_row(seed, o_rows, threshold, BLOCK_C)
            b_d = tl.where(m_keep, b_d * keep_scale, 0.0)
        if weight_ptr is not None:
            b_xhat = tl.where(m_c[None, :], (b_total - b_mean[:, None]) * b_rstd[:, None], 0.0)
            b_d_weight += b_d * b_xhat
            b_d_bias += b_d
            b_d = layernorm_rows_bwd(b_d * b_weight[None, :], b_xhat, b_rstd, width)
        if type_ptr is not None:
            b_d_type += b_d

        tl.store(d_total_ptr + o, b_d, mask=m)

    if partial_ptr is not None:
        p_partial = partial_ptr + pid.to(tl.int64) * N_PARTIALS * width + o_c
        if weight_ptr is not None:
            tl.store(p_partial, tl.sum(b_d_weight, 0), mask=m_c)
            tl.store(p_partial + width, tl.sum(b_d_bias, 0), mask=m_c)
        if type_ptr is not None:
            tl.store(p_partial + (N_PARTIALS - 1) * width, tl.sum(b_d_type, 0), mask=m_c)


@triton.jit
def sum_listed_rows(rows_ptr, order_ptr, begin, end, width, o_c, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_C], the sum of columns ``o_c`` over the rows that ``order[begin:end]`` names, in a fixed order."""
    b_sum = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for i in range(begin, end, BLOCK_ROWS):
        o_items = i + tl.arange(0, BLOCK_ROWS)
        m_items = o_items < end
        b_rows = tl.load(order_ptr + o_items, mask=m_items, other=0).to(tl.int64)
        m = m_items[:, None] & (o_c < width)[None, :]
        b_sum += tl.load(rows_ptr + b_rows[:, None] * width + o_c[None, :], mask=m, other=0.0)
    return tl.sum(b_sum, 0)


@triton.jit(do_not_specialize=["n_rows", "chunk"])
def embed_tokens_bwd_chunks_kernel(
    d_total_ptr,
    keys_ptr,
    order_ptr,
    bounds_ptr,
    partial_ptr,
    n_rows,
    chunk,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """one program = ``chunk`` entries of the sorted list and BLOCK_C columns: the parts of table rows met too often.

    d_total [n_rows, width]; keys [n_rows], ascending, and order [n_rows], whose row of d_total each belongs to; bounds
    [n_keys + 1], where each key's entries begin; partial [n_chunks, 2, width]. A key with more than ``chunk`` entries
    (<cls> or <mask> in a large batch) spans chunks: partial 0 holds the sum over the entries of the chunk's first key,
    partial 1 that of its last key where it is another one. Keys with fewer entries leave them unwritten and unread.
    """
    i_chunk = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = i_chunk * chunk
    end = tl.minimum(begin + chunk, n_rows)
    p_partial = partial_ptr + i_chunk.to(tl.int64) * 2 * width + o_c
    first, last = tl.load(keys_ptr + begin), tl.load(keys_ptr + end - 1)
    first_end = tl.load(bounds_ptr + first + 1)
    last_begin = tl.load(bounds_ptr + last)

    if first_end - tl.load(bounds_ptr + first) > chunk:
        stop = tl.minimum(first_end, end)
        b_sum = sum_listed_rows(d_total_ptr, order_ptr, begin, stop, width, o_c, BLOCK_ROWS, BLOCK_C)
        tl.store(p_partial, b_sum, mask=o_c < width)
    if (last != first) & (tl.load(bounds_ptr + last + 1) - last_begin > chunk):
        b_sum = sum_listed_rows(d_total_ptr, order_ptr, last_begin, end, width, o_c, BLOCK_ROWS, BLOCK_C)
        tl.store(p_partial + width, b_sum, mask=o_c < width)


@triton.jit(do_not_specialize=["chunk"])
def embed_tokens_bwd_table_kernel(
    d_total_ptr,
    order_ptr,
    bounds_ptr,
    partial_ptr,
    d_table_ptr,
    chunk,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """one program = one row of a table and BLOCK_C columns: the sum over the tokens that looked it up.

    d_total, order, bounds, partial as in the kernel above; d_table [n_keys, width], every row written, with zeros where
    nobody looked. The grid is (n_keys, blocks of columns).
    """
    key = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end = tl.load(bounds_ptr + key), tl.load(bounds_ptr + key + 1)

    if end - begin <= chunk:
        b_sum = sum_listed_rows(d_total_ptr, order_ptr, begin, end, width, o_c, BLOCK_ROWS, BLOCK_C)
    else:
        i_first, i_stop = begin // chunk, (end - 1) // chunk + 1
        b_parts = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
        for i in range(i_first, i_stop, BLOCK_ROWS):
            o_chunks = i + tl.arange(0, BLOCK_ROWS)
            # The key is its chunk's first one everywhere but where it begins inside a chunk.
            b_rows = o_chunks.to(tl.int64) * 2 + (o_chunks * chunk < begin).to(tl.int64)
            m = (o_chunks < i_stop)[:, None] & (o_c < width)[None, :]
            b_parts += tl.load(partial_ptr + b_rows[:, None] * width + o_c[None, :], mask=m, other=0.0)
        b_sum = tl.sum(b_parts, 0)

    tl.store(d_table_ptr + key.to(tl.int64) * width + o_c, b_sum, mask=o_c < width)
