"""Device code of the masked-gene loss: the logits live in registers, a tile at a time, and are never written."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Below every finite logit and finite itself: where all logits so far are -inf, differences of maxima stay numbers.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def place_of(i_program, n_row_blocks, n_columns, GROUP_R: tl.constexpr):
    """Row block and column of a program, where GROUP_R row blocks go through all columns before the next ones start.

    Programs that run at the same time then share both their rows and their part of the vocabulary in the L2 cache.
    """
    i_first = i_program // (GROUP_R * n_columns) * GROUP_R
    n_in_group = tl.minimum(n_row_blocks - i_first, GROUP_R)
    i_inside = i_program - i_first * n_columns
    return i_first + i_inside % n_in_group, i_inside // n_in_group


@triton.jit
def matrix_block(matrix_ptr, o_r, m_r, width, k, BLOCK_K: tl.constexpr):
    """[rows, BLOCK_K] of the rows o_r of a matrix from column k on; zero where m_r is False and past the end."""
    o_k = k + tl.arange(0, BLOCK_K)
    p_block = matrix_ptr + o_r.to(tl.int64)[:, None] * width + o_k[None, :]
    return tl.load(p_block, mask=m_r[:, None] & (o_k < width)[None, :], other=0.0)


@triton.jit
def logit_tile(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    o_r,
    m_r,
    first_v,
    n_vocab,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logits [BLOCK_R, BLOCK_V] float32 of the rows o_r from entry first_v of the vocabulary on; -inf past its end."""
    o_v = first_v + tl.arange(0, BLOCK_V)
    m_v = o_v < n_vocab
    b_logits = tl.zeros([BLOCK_R, BLOCK_V], dtype=tl.float32)
    for k in range(0, width, BLOCK_K):
        b_hidden = matrix_block(hidden_ptr, o_r, m_r, width, k, BLOCK_K)
        b_weight = matrix_block(weight_ptr, o_v, m_v, width, k, BLOCK_K)
        b_logits = tl.dot(b_hidden, tl.trans(b_weight), b_logits, input_precision="tf32x3")
    # The bias masks the end of the vocabulary, at no cost per logit.
    b_bias = tl.load(bias_ptr + o_v, mask=m_v, other=float("-inf"))
    return b_logits + b_bias[None, :]


# The number of masked rows, and with it the splits, is another one in every batch: kernels are not compiled for each.
@triton.jit(do_not_specialize=["n_rows", "n_vocab", "n_splits", "blocks_per_split"])
def mlm_cross_entropy_fwd_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    n_rows,
    n_vocab,
    width,
    n_splits,
    blocks_per_split,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_R: tl.constexpr,
):
    """one program = BLOCK_R rows x one of n_splits parts of the vocabulary: the online softmax of their logits.

    hidden [R, C], weight [V, C], bias [V] float32 -> partial_max and partial_sum [n_splits, R] float32: each row's
    largest ``logit * log2(e)`` in that part, and the sum of ``exp2`` of the differences from it.
    """
    i_row_block, i_split = place_of(tl.program_id(0), tl.cdiv(n_rows, BLOCK_R), n_splits, GROUP_R)
    o_r = i_row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < n_rows
    first = i_split * blocks_per_split * BLOCK_V
    last = tl.minimum(n_vocab, first + blocks_per_split * BLOCK_V)

    row_max = tl.full([BLOCK_R], LOWEST, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_R], dtype=tl.float32)
    # Addresses are computed anew for each block: kept over the loop they take 40 registers per thread (164 against 124
    # on sm_90), and a second program no longer fits beside this one.
    for v in tl.range(first, last, BLOCK_V, disable_licm=True):
        b_logits = logit_tile(hidden_ptr, weight_ptr, bias_ptr, o_r, m_r, v, n_vocab, width, BLOCK_R, BLOCK_V, BLOCK_K)
        largest = tl.maximum(row_max, tl.max(b_logits, 1) * LOG2_E)
        b_weights = tl.exp2(b_logits * LOG2_E - largest[:, None])
        row_sum = row_sum * tl.exp2(row_max - largest) + tl.sum(b_weights, 1)
        row_max = largest

    o_partial = i_split.to(tl.int64) * n_rows + o_r
    tl.store(partial_max_ptr + o_partial, row_max, mask=m_r)
    tl.store(partial_sum_ptr + o_partial, row_sum, mask=m_r)


@triton.jit(do_not_specialize=["n_rows", "n_vocab", "n_splits", "ignore_index"])
def mlm_cross_entropy_fwd_combine_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    row_max_ptr,
    row_sum_ptr,
    loss_ptr,
    n_rows,
    n_vocab,
    width,
    n_splits,
    ignore_index,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """one program = BLOCK_R rows: the parts of their softmax put together, and the loss against the targets.

    partial_max, partial_sum [n_splits, R], targets [R] int64 -> row_max, row_sum [R] float32, the same over the whole
    vocabulary, and loss [R] float32: 0 where the target is ignore_index, NaN where it is outside the vocabulary.

    The target's logit is computed here, one row of the weight per row: looking for it in every tile of the other
    kernel would cost two more operations per logit.
    """
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < n_rows
    row_max = tl.full([BLOCK_R], LOWEST, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_R], dtype=tl.float32)
    for s in range(0, n_splits, BLOCK_S):
        o_s = s + tl.arange(0, BLOCK_S)
        o_partial = o_s.to(tl.int64)[:, None] * n_rows + o_r[None, :]
        m_partial = (o_s < n_splits)[:, None] & m_r[None, :]
        b_max = tl.load(partial_max_ptr + o_partial, mask=m_partial, other=LOWEST)
        b_sum = tl.load(partial_sum_ptr + o_partial, mask=m_partial, other=0.0)
        largest = tl.maximum(row_max, tl.max(b_max, 0))
        row_sum = row_sum * tl.exp2(row_max - largest) + tl.sum(b_sum * tl.exp2(b_max - largest[None, :]), 0)
        row_max = largest

    b_target = tl.load(targets_ptr + o_r, mask=m_r, other=ignore_index)
    m_counts = b_target != ignore_index
    m_target = m_counts & (b_target >= 0) & (b_target < n_vocab)
    b_products = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    for k in range(0, width, BLOCK_K):
        b_hidden = matrix_block(hidden_ptr, o_r, m_target, width, k, BLOCK_K)
        b_weight = matrix_block(weight_ptr, b_target, m_target, width, k, BLOCK_K)
        b_products += b_hidden.to(tl.float32) * b_weight.to(tl.float32)
    b_logit = tl.sum(b_products, 1) + tl.load(bias_ptr + b_target, mask=m_target, other=0.0)

    # The difference from the largest logit first: exact where the logits are huge.
    b_loss = (tl.log2(row_sum) - (b_logit * LOG2_E - row_max)) * LN_2
    # Two ways of adding up one logit may differ by a rounding; a loss is never negative. (NaN stays.)
    b_loss = tl.where(b_loss < 0.0, 0.0, b_loss)
    b_loss = tl.where(m_target, b_loss, float("nan"))
    tl.store(loss_ptr + o_r, tl.where(m_counts, b_loss, 0.0), mask=m_r)
    tl.store(row_max_ptr + o_r, row_max, mask=m_r)
    tl.store(row_sum_ptr + o_r, row_sum, mask=m_r)


# A chunk of the vocabulary may begin at any entry of the bias.
@triton.jit(do_not_specialize=["n_rows", "n_columns", "first_vocab"], do_not_specialize_on_alignment=["bias_ptr"])
def mlm_cross_entropy_bwd_dlogits_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    row_max_ptr,
    row_sum_ptr,
    row_scale_ptr,
    dlogits_ptr,
    partial_dbias_ptr,
    n_rows,
    n_columns,
    width,
    first_vocab,
    stride_dlogits_r,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_R: tl.constexpr,
):
    """one program = BLOCK_R rows x BLOCK_V columns of the gradient of the logits, in a chunk of the vocabulary.

    hidden [R, C]; weight [n_columns, C] and bias [n_columns], the entries from first_vocab on; targets [R] int64;
    row_max and row_sum [R] as the forward pass left them; row_scale [R] float32, 0 where a row does not count ->
    dlogits [R, n_columns] in the dtype of hidden, ``(softmax - onehot) * row_scale``, zeros up to the next multiple of
    BLOCK_V, and partial_dbias [row blocks, n_columns] float32, its column sums before rounding.
    """
    n_row_blocks = tl.cdiv(n_rows, BLOCK_R)
    i_row_block, i_column_block = place_of(tl.program_id(0), n_row_blocks, tl.cdiv(n_columns, BLOCK_V), GROUP_R)
    o_r = i_row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < n_rows
    first = i_column_block * BLOCK_V
    b_logits = logit_tile(
        hidden_ptr, weight_ptr, bias_ptr, o_r, m_r, first, n_columns, width, BLOCK_R, BLOCK_V, BLOCK_K
    )

    b_scale = tl.load(row_scale_ptr + o_r, mask=m_r, other=0.0)
    # Infinite past the end, where any logit may come out: the exponentials of every row are then at most 1.
    b_max = tl.load(row_max_ptr + o_r, mask=m_r, other=float("inf"))
    b_factor = b_scale / tl.load(row_sum_ptr + o_r, mask=m_r, other=1.0)
    b_column = (tl.load(targets_ptr + o_r, mask=m_r, other=-1) - first_vocab).to(tl.int32)
    o_v = first + tl.arange(0, BLOCK_V)
    b_dlogits = tl.exp2(b_logits * LOG2_E - b_max[:, None]) * b_factor[:, None]
    b_dlogits = tl.where(o_v[None, :] == b_column[:, None], b_dlogits - b_scale[:, None], b_dlogits)

    o_partial = i_row_block.to(tl.int64) * n_columns + o_v
    tl.store(partial_dbias_ptr + o_partial, tl.sum(b_dlogits, 0), mask=o_v < n_columns)
    # No mask along the vocabulary: with one, each value would be a store of its own.
    o_dlogits = o_r.to(tl.int64)[:, None] * stride_dlogits_r + o_v[None, :]
    tl.store(dlogits_ptr + o_dlogits, b_dlogits.to(dlogits_ptr.dtype.element_ty), mask=m_r[:, None])
