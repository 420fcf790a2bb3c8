"""Pieces of device code that several operations share: no loads, no stores, triton only."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_row(seed, o_rows, threshold, BLOCK_C: tl.constexpr):
    """[R, BLOCK_C] booleans: which columns of the rows ``o_rows`` [R] dropout keeps; BLOCK_C is a multiple of 8.

    One philox call (Salmon et al., "Parallel random numbers", SC 2011) with the counter (row, column // 8) gives eight
    numbers of 16 bits to eight neighbouring columns, each word's low half before its high one; a column stays if its
    number is at least ``threshold``. The mask depends on seed, row and column only, so kernels that cut rows into other
    tiles regenerate it.
    """
    o_groups = tl.arange(0, BLOCK_C // 8)
    b_zero = (o_rows[:, None] * 0 + o_groups[None, :] * 0).to(tl.uint32)
    b_rows = o_rows[:, None].to(tl.uint32) + b_zero
    b_groups = o_groups[None, :].to(tl.uint32) + b_zero
    b_0, b_1, b_2, b_3 = tl.philox(seed, b_rows, b_groups, b_zero, b_zero)
    b_words = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))
    b_halves = tl.join(b_words & 0xFFFF, b_words >> 16)
    return tl.reshape(b_halves, [o_rows.shape[0], BLOCK_C]).to(tl.int32) >= threshold


@triton.jit
def row_moments(b_x, m_c, width, eps):
    """Mean and reciprocal standard deviation of each row of [R, C]; masked columns of ``b_x`` are zero.

    Two passes over registers: the difference of E[x^2] and E[x]^2 loses all digits where the mean is large.
    """
    share = 1.0 / width  # one division for all rows
    b_mean = tl.sum(b_x, 1) * share
    b_centred = tl.where(m_c[None, :], b_x - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_centred * b_centred, 1) * share + eps)
    return b_mean, b_rstd


@triton.jit
def layernorm_rows_bwd(b_dy, b_xhat, b_rstd, width):
    """Gradient of the rows [R, C] that were normalised; ``b_dy`` carries the weight, masked columns are zero."""
    share = 1.0 / width
    b_mean_dy = tl.sum(b_dy, 1) * share
    b_mean_dy_xhat = tl.sum(b_dy * b_xhat, 1) * share
    return (b_dy - b_mean_dy[:, None] - b_xhat * b_mean_dy_xhat[:, None]) * b_rstd[:, None]


@triton.jit
def keep_tile(seed, o_rows, o_c, threshold):
    """[R, C] booleans: which elements dropout keeps, computed where a matrix product left its result.

    o_rows [R] and o_c [C] are int32; threshold is the probability times 65,536, an int32 below 65,536. One call of
    philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; 7 rounds are the fewest that pass
    BigCrush) serves 8 elements: 2 rows that differ in bit 3 and 4 columns that differ in bits 3 and 4. Written for one
    element: in the registers of a matrix instruction's result a thread holds such patches, so the compiler computes a
    call once for all of them, and threads exchange nothing. The mask depends on seed, row and column only.
    """
    rows, c = o_rows[:, None], o_c[None, :]
    # Bits are shifted out, not masked: of masks LLVM makes different expressions for equal numbers.
    i_row = (((rows >> 4) << 3) + (rows & 7)).to(tl.uint32)
    i_c = (((c >> 5) << 3) + (c & 7)).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, i_row, i_c, 0, 0, n_rounds=7)
    words = tl.where((c & 16) != 0, tl.where((c & 8) != 0, w3, w2), tl.where((c & 8) != 0, w1, w0))
    # The upper 16 bits decide. Two elements compare the same word, once with its halves swapped.
    bits = tl.where((rows & 8) != 0, words, (words >> 16) | (words << 16))
    return bits >= (threshold.to(tl.uint32) << 16)


@triton.jit
def keep_rows(seed, first_row, threshold, BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The mask of :func:`keep_tile` for whole rows from ``first_row``, where no matrix product arranges the registers.

    One call of philox per 8 elements, spread by a permutation of axes. first_row and BLOCK_ROWS are multiples of 16,
    WIDTH is one of 32.
    """
    i_row = (first_row // 2 + tl.arange(0, BLOCK_ROWS // 2)).to(tl.uint32)[:, None]
    i_c = tl.arange(0, WIDTH // 4).to(tl.uint32)[None, :]
    w0, w1, w2, w3 = tl.philox(seed, i_row + i_c * 0, i_c + i_row * 0, 0, 0, n_rounds=7)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # then bit 3 and bit 4 of the column
    bits = tl.join((words >> 16) | (words << 16), words)  # then bit 3 of the row
    bits = tl.reshape(bits, [BLOCK_ROWS // 16, 8, WIDTH // 32, 8, 2, 2, 2])
    bits = tl.reshape(tl.permute(bits, [0, 6, 1, 2, 5, 4, 3]), [BLOCK_ROWS, WIDTH])
    return bits >= (threshold.to(tl.uint32) << 16)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """``"relu"``, ``"gelu"`` (error function), ``"gelu_tanh"`` or ``"silu"`` of float32 values; None leaves them."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)  # not a maximum, which loses NaN
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the logistic function of 2 u; 2 * sqrt(2 / pi) = 1.5957691216.
        x = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    """The derivative of :func:`activated`; of ReLU 0 at 0, as in torch."""
    if ACTIVATION == "relu":
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        slope = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        logistic = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        slope = logistic * (1.0 + x * (1.0 - logistic) * inner)
    else:
        logistic = tl.sigmoid(x)
        slope = logistic * (1.0 + x * (1.0 - logistic))
    return slope


@triton.jit
def to_nearest(x):
    """The nearest integers of small float32 numbers, ties to even: 1.5 * 2**23 leaves no bits behind the point."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def row_scales(b_largest, b_poison, tiny):
    """What rows are multiplied by before they are rounded, and after: of their largest magnitudes [R].

    b_poison is NaN where a row holds NaN or infinity, which a maximum loses or which has no scale, and zero elsewhere.
    """
    m_zero = b_largest < tiny
    b_inverse = tl.where(m_zero, 0.0, tl.div_rn(127.0, tl.where(m_zero, 1.0, b_largest)))
    return b_inverse, tl.where(m_zero, 1.0, tl.div_rn(b_largest, 127.0)) + b_poison


@triton.jit
def rounded_rows(b_x, tiny):
    """int8 [R, C] and scale [R] of float32 rows [R, C], whose columns past the end are zero."""
    b_inverse, b_scale = row_scales(tl.max(tl.abs(b_x), 1), tl.sum(b_x * 0.0, 1), tiny)
    return to_nearest(b_x * b_inverse[:, None]).to(tl.int8), b_scale


@triton.jit
def tile_of(n_rows, n_columns, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(block of rows, block of columns) of a program: GROUP blocks of rows before the next columns, for the cache."""
    n_row_blocks, n_column_blocks = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_columns, BLOCK_N)
    i_group, i_in_group = tl.program_id(0) // (GROUP * n_column_blocks), tl.program_id(0) % (GROUP * n_column_blocks)
    n_in_group = tl.minimum(n_row_blocks - i_group * GROUP, GROUP)
    return i_group * GROUP + i_in_group % n_in_group, i_in_group // n_in_group


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
    multiple of 16 queries and of 16 keys from the cell's start. drop_below is the probability times 2**32, uint32.

    One call of philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; 7 rounds are the fewest
    that pass BigCrush) serves 16 weights: those of queries and keys that differ in bits 0 and 3. Written for one
    weight, computed for eight: in the registers of a matrix instruction's result one thread holds half of such a patch,
    whether the block is transposed or not, so the compiler sees the same counter eight times and computes it once, and
    threads exchange nothing.
    """
    # Bits are shifted out, not masked: of masks LLVM makes different expressions for equal numbers.
    query = (first_query + (o_query >> 4) * 16 + ((o_query >> 1) & 3)).to(tl.uint32)
    key = (first_key + (o_key >> 4) * 16 + ((o_key >> 1) & 3)).to(tl.uint32)
    # Which argument goes where decides how much of the first two rounds is constant along a row.
    w0, w1, w2, w3 = tl.philox(seed, query, key, i_head, 0, n_rounds=7)
    # A thread's registers differ in bit 3 of both, which is known when the code is made, and in bit 0 of one of them.
    words = tl.where((o_query & 1) != 0, tl.where((o_key & 1) != 0, w3, w2), tl.where((o_key & 1) != 0, w1, w0))
    # Four weights compare the same 32 bits, rotated by 0, 8, 16 and 24 of them. Each is kept with exactly its
    # probability; for two of them to depend on each other, the first 8 bits must leave one undecided, 1 in 256.
    by_0_8 = tl.where((o_key & 8) != 0, (words << 8) | (words >> 24), words)
    by_16_24 = tl.where((o_key & 8) != 0, (words << 24) | (words >> 8), (words << 16) | (words >> 16))
    return tl.where((o_query & 8) != 0, by_16_24, by_0_8) >= drop_below


@triton.jit
def _bit_at(PLACE: tl.constexpr, LOG_N: tl.constexpr):
    """0 and 1 along the dimension of a hypercube [2] * LOG_N that holds this bit of the flat index."""
    return tl.reshape(tl.arange(0, 2), [1] * (LOG_N - 1 - PLACE) + [2] + [1] * PLACE)


@triton.jit
def _exchanged(cube, PLACE: tl.constexpr, FLIP_PLACE: tl.constexpr, LOG_N: tl.constexpr, IS_ACROSS: tl.constexpr):
    """One step of a bitonic sort: every element against its partner, which differs in one bit of the index."""
    if IS_ACROSS:
        flat = tl.reshape(cube, [1 << LOG_N])
        partner = tl.reshape(tl.gather(flat, tl.arange(0, 1 << LOG_N) ^ (1 << PLACE), 0), [2] * LOG_N)
    else:
        partner = tl.sum(cube, LOG_N - 1 - PLACE, keep_dims=True) - cube  # exact: integers wrap around
    takes_greater = _bit_at(PLACE, LOG_N)
    if FLIP_PLACE >= 0:
        takes_greater = takes_greater ^ _bit_at(FLIP_PLACE, LOG_N)
    return tl.where((cube > partner) != (takes_greater > 0), partner, cube)


@triton.jit
def sorted_places(x, LOG_N: tl.constexpr, LOG_EACH: tl.constexpr):
    """[N] int64, sorted upwards by a bitonic network, the element of position p at ``place_of(p)``.

    Of a position's bits the lower ones are compared most often. A thread holds elements that differ in the highest
    LOG_EACH bits of their place (N = 32 * warps * 2^LOG_EACH), a warp those that differ in the lowest five: so a
    position's lowest bits are the highest of its place. What leaves the thread goes by shuffle, what leaves the warp
    through shared memory, once per step. Against ``tl.sort`` that is 60 % of the instructions, half the shuffles and a
    quarter of the shared memory's traffic (2,048 int64 on 8 warps, sm_90, counted in the machine code).
    """
    cube = tl.reshape(x, [2] * LOG_N)
    for stage in tl.static_range(1, LOG_N + 1):
        for step in tl.static_range(stage):
            cube = _exchanged(
                cube,
                (stage - 1 - step + LOG_N - LOG_EACH) % LOG_N,
                (stage + LOG_N - LOG_EACH) % LOG_N if stage < LOG_N else -1,
                LOG_N,
                stage - 1 - step >= LOG_EACH + 5,
            )
    return tl.reshape(cube, [1 << LOG_N])


@triton.jit
def place_of(position, LOG_N: tl.constexpr, LOG_EACH: tl.constexpr):
    """Where :func:`sorted_places` puts the element of a position; both are below N."""
    return (position >> LOG_EACH) | ((position & ((1 << LOG_EACH) - 1)) << (LOG_N - LOG_EACH))


@triton.jit
def position_of(place, LOG_N: tl.constexpr, LOG_EACH: tl.constexpr):
    """The position of the element that :func:`sorted_places` put in a place."""
    return (place >> (LOG_N - LOG_EACH)) | ((place & ((1 << (LOG_N - LOG_EACH)) - 1)) << LOG_EACH)


@triton.jit
def in_order(x, LOG_N: tl.constexpr, LOG_EACH: tl.constexpr):
    """[N] elements in the order of their positions, from the order of their places."""
    return tl.reshape(tl.trans(tl.reshape(x, [1 << LOG_EACH, 1 << (LOG_N - LOG_EACH)])), [1 << LOG_N])
