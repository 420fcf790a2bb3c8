"""Pieces of device code that several kernels share. They compute on blocks of values and neither load nor store."""

import triton
import triton.language as tl


@triton.jit
def softmax_step(scores, row_max, row_sum, scale_log2):
    """One block of an online softmax (Milakov and Gimelshein, arXiv:1805.02867), in base 2.

    scores [M, N] float32, of which each row so far has the largest scaled value row_max [M] and the sum row_sum [M] of
    ``exp2(scaled score - row_max)``. Returns this block's weights [M, N], the factor [M] that brings earlier sums to
    the new largest value, and the new row_max and row_sum. scale_log2 must be positive.
    """
    largest = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    # One fused multiply-add and one exp2 per score: this is what limits attention at small head dimensions.
    weights = tl.exp2(scores * scale_log2 - largest[:, None])
    factor = tl.exp2(row_max - largest)
    return weights, factor, largest, row_sum * factor + tl.sum(weights, 1)


@triton.jit
def keep_score(seed, i_head, first_query, o_query, first_key, o_key, drop_below):
    """Which attention weights survive dropout: a block of booleans, the same however weights are cut into blocks.

    The block's queries are first_query + o_query, counted over all tokens, and its keys first_key + o_key, counted
    from the cell's start; o_query and o_key are [M, 1] and [1, N] int32, or [1, M] and [N, 1]. A block starts at a
    multiple of 16 queries and of 32 keys from the cell's start. drop_below is the probability times 2**32, uint32.

    One call of philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; 7 rounds are the fewest
    that pass BigCrush) serves 8 weights: 2 queries that differ in bit 3 and 4 keys that differ in bits 3 and 4.
    Written for one weight, computed for eight: in the registers of a matrix instruction's result one thread holds
    exactly such patches (half of one where the block is transposed), so the compiler sees the same counter eight times
    and computes it once, and threads exchange nothing.
    """
    # Bits 3 and 4 are shifted out, not masked with ~24: of that LLVM makes different expressions for equal numbers.
    query = (first_query + (o_query >> 4) * 16 + (o_query & 7)).to(tl.uint32)
    key = (first_key + (o_key >> 5) * 32 + (o_key & 7)).to(tl.uint32)
    # Which argument goes where decides how much of the first two rounds is constant along a row.
    w0, w1, w2, w3 = tl.philox(seed, query, key, i_head, 0, n_rounds=7)
    words = tl.where((o_key & 16) != 0, tl.where((o_key & 8) != 0, w3, w2), tl.where((o_key & 8) != 0, w1, w0))
    # Two weights compare the same 32 bits, once with the halves swapped: 16 bits of each decide all but 1 in 65,536.
    # Were the lower half compared alone, the compiler would compute it a second time, in 16 bits.
    bits = tl.where((o_query & 8) != 0, words, (words >> 16) | (words << 16))
    return bits >= drop_below
