"""Ranking on a GPU: one pass that scores and sorts all cells but the few that one sort cannot settle.

One program takes a cell at a time: it reads the row's CSR entries straight into registers, one entry to each of
2^LOG_N slots, scores them in float64, sorts the slots and writes tokens. No matrix is ever dense, the counts are read
once and scores stay in registers, but for genes that several columns share. Cells are put in buckets by how many
entries their rows have, which is known before anything is read of them, so each bucket has a sort just wide enough.

A packed cell begins where the cells before it end, and their sizes are known only when all are ranked. So tokens of
packed cells are staged as int32 where the cell's CSR entries stand, and copied to their place when the sizes are
summed: 8 bytes more per token, where scores that pass from one launch to another take 24 bytes per entry; and no cell
waits for another. Padded rows are written where they belong at once.

*Hard* cells are those of more entries than the widest sort has slots, and those whose sort leaves a pair open (below).
Only they are scored to memory, when the others are done (``kernel_hard.py``): the bits of the float64 score, which
order positive numbers like the numbers themselves, and the *rank* of the gene, its place among all genes in order of
token id, without gaps where the CSR entries stand. From there wide cells are cut to what one sort takes, and open ones
are sorted twice more.

Why sorting words of 64 bits is exact
-------------------------------------
A word is the leading ``63 - rank_bits`` bits of the score's complement with the gene's rank below them, which names the
token and decides between equal scores. Sorting words upwards is right for all but neighbours that agree in those
leading bits and yet differ in score. Of two neighbours that agree, it is certain that their scores are equal, so that
the ranks decided rightly, if

- both genes have the same weight (the median or its reciprocal, bit for bit),
- the counts have at most 31 significant bits, as integers below 2^31 and float32 numbers have, and
- the score is no subnormal number.

Then different counts differ by 2^-31 of themselves at least, and so do the scores but for three roundings of 2^-53,
while the leading bits, with ``rank_bits`` at most 18, tell numbers apart that differ by 2^-34. Having the same weight
carries over from neighbour to neighbour, so a whole run of equal leading bits is settled pair by pair; genes that share
a median, or medians that are all alike, cost nothing. A pair that is not settled this way is *open*: with the published
medians none of 7,383 real cells has one (pbmc_facs, pbmc3k, mix_celseq2_5cl), with medians like 1, 1.5 and 2 many have.

A cell with an open pair is sorted twice more. First words of (leading ``63 - LOG_N`` bits | the entry's index), after
which every entry's whole score is at hand in that order; then words of (number of the group of equal leading bits | the
other LOG_N bits | rank), 13 + 13 + 18 bits at most. That order is exact for any scores, and no run is too long for it.

No arithmetic here may be contracted to fused multiply-add: the launch says ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

from geneformer_kernels.tiles import in_order, place_of, position_of, sorted_places

GREATEST = tl.constexpr(0x7FFFFFFFFFFFFFFF)
# Bits of a cell's status. Wrong ones and a repeated column are mistakes, which device.wait says in words; of columns
# that do not ascend another kernel asks whether they repeat; fine counts have more bits than two words can settle.
WRONG_INDPTR = tl.constexpr(1)
WRONG_COLUMN = tl.constexpr(2)
WRONG_TOTAL = tl.constexpr(4)
NOT_ASCENDING = tl.constexpr(8)
REPEATED_COLUMN = tl.constexpr(16)
IS_FINE = tl.constexpr(32)
IS_OPEN = tl.constexpr(64)
# Columns of the counts by bucket: up to five sorts, what goes to none, wide cells, and the end of these.
_N_BUCKETS = tl.constexpr(8)


@triton.jit
def factor_of(n, IS_DIVISION: tl.constexpr):
    """What a cell's counts are divided by, or multiplied with: 1 / n rounded in the precision that n has."""
    factor = n.to(tl.float64)
    if not IS_DIVISION:
        # A quotient of float32 numbers may be rounded to float64 first: 53 bits are more than 2 * 24 + 2.
        factor = 1.0 / factor
        if n.dtype == tl.float32:
            factor = factor.to(tl.float32).to(tl.float64)
    return factor


@triton.jit
def _score_bits(x, factor, weight, IS_SINGLE: tl.constexpr, IS_DIVISION: tl.constexpr):
    """Bits of the score ``x / n * 10000 / median``, rounded after each step as numpy and scipy round."""
    if IS_SINGLE:
        if IS_DIVISION:
            share = tl.div_rn(x.to(tl.float32), factor.to(tl.float32))
        else:
            share = x.to(tl.float32) * factor.to(tl.float32)
        share = (share * 10000.0).to(tl.float64)
    else:
        share = x.to(tl.float64) / factor if IS_DIVISION else x.to(tl.float64) * factor
        share = share * 10000.0
    score = share / weight if IS_DIVISION else share * weight
    # Nothing is negative unless a count is, which is not allowed; the sorts rely on it.
    return tl.maximum(score.to(tl.int64, bitcast=True), 0)


@triton.jit
def loaded(indices_ptr, data_ptr, codes_ptr, o_entry, length, n_columns):
    """Entries of a row: codes (-1 where there is nothing to rank), counts, and bits of the cell's status.

    The pointers point at the row; a code that is not negative is the gene's rank, ``-2 - rank`` waits for its sum.
    """
    m_entry = o_entry < length
    column = tl.load(indices_ptr + o_entry, mask=m_entry, other=0)
    before = tl.load(indices_ptr + o_entry - 1, mask=m_entry & (o_entry > 0), other=-1)
    x = tl.load(data_ptr + o_entry, mask=m_entry, other=0)
    m_column = m_entry & (column >= 0) & (column < n_columns)
    code = tl.load(codes_ptr + column, mask=m_column, other=-1)
    code = tl.where(x != 0, code, -1)
    found = tl.where(m_entry & (column <= before), NOT_ASCENDING, 0)
    found |= tl.where(m_entry & (m_column == 0), WRONG_COLUMN, 0)
    if data_ptr.dtype.element_ty.primitive_bitwidth == 64:
        is_fine = x.to(tl.float32).to(tl.float64) != x.to(tl.float64)
        found |= tl.where((code >= 0) & is_fine, IS_FINE, 0)
    return code, x, found


@triton.jit
def scored(x, code, factor, weights_ptr, IS_SINGLE: tl.constexpr, IS_DIVISION: tl.constexpr):
    """Score bits of counts whose codes are ranks; of others something."""
    weight = tl.load(weights_ptr + code, mask=code >= 0, other=1.0)
    return _score_bits(x, factor, weight, IS_SINGLE, IS_DIVISION)


@triton.jit
def status_of(found, n):
    """Status of a cell that has entries, from what was found in each, and its total."""
    status = tl.max(found & NOT_ASCENDING, 0) + tl.max(found & WRONG_COLUMN, 0) + tl.max(found & IS_FINE, 0)
    is_total = (n > 0) & (n < float("inf"))
    return status + tl.where(is_total, 0, WRONG_TOTAL)


@triton.jit
def summed_genes(shared_x_ptr, shared_ranks_ptr, o_entry, n_shared, IS_ROUNDED: tl.constexpr):
    """Sums of the genes of a cell's shared entries, their ranks, and which entries are the first of their gene.

    Summed in the order of the row, in twice float64's precision (Knuth's two-sum), as the CPU does; IS_ROUNDED: counts
    are float32, and the sum is rounded to it. Every entry gathers the sum of its gene, the gene's first entry keeps it:
    quadratic, but a cell has some dozens of them, and no order of execution can change the sum.
    """
    rank = tl.load(shared_ranks_ptr + o_entry, mask=o_entry < n_shared, other=-1)
    total = tl.zeros(o_entry.shape, dtype=tl.float64)
    error = tl.zeros(o_entry.shape, dtype=tl.float64)
    n_earlier = tl.zeros(o_entry.shape, dtype=tl.int32)
    for i_other in range(0, n_shared):
        x = tl.load(shared_x_ptr + i_other)
        is_same = rank == tl.load(shared_ranks_ptr + i_other)
        grown = total + x
        part = grown - total
        error = tl.where(is_same, error + ((total - (grown - part)) + (x - part)), error)
        total = tl.where(is_same, grown, total)
        n_earlier += (is_same & (i_other < o_entry)).to(tl.int32)
    total += error
    if IS_ROUNDED:
        total = total.to(tl.float32).to(tl.float64)
    return total, rank, (rank >= 0) & (n_earlier == 0)


@triton.jit
def word_of(bits, rank, rank_bits):
    """What is sorted: leading bits of the score's complement, and the rank below them."""
    return (((bits ^ GREATEST) >> rank_bits) << rank_bits) | rank.to(tl.int64)


@triton.jit
def _words(
    x, code, length, factor, weights_ptr, rank_bits,
    IS_SINGLE: tl.constexpr, IS_DIVISION: tl.constexpr, LOG_N: tl.constexpr, LOG_EACH: tl.constexpr,
):  # fmt: skip
    """Words of a row's 2^LOG_N slots: -1 where there is nothing to rank, -2 for entries of shared genes."""
    word = tl.minimum(tl.maximum(code, -2), -1).to(tl.int64)
    if IS_DIVISION:
        # A division of float64 takes 20 registers for itself, so only one of a thread's slots is scored at a time.
        SIDE: tl.constexpr = 1 << (LOG_N - LOG_EACH)
        o_row = tl.arange(0, 1 << LOG_EACH)[:, None]
        x = tl.reshape(x, [1 << LOG_EACH, SIDE])
        code = tl.reshape(code, [1 << LOG_EACH, SIDE])
        word = tl.reshape(word, [1 << LOG_EACH, SIDE])
        for i_row in range(0, tl.cdiv(length, SIDE)):
            x_row = tl.sum(tl.where(o_row == i_row, x, 0), 0)
            code_row = tl.sum(tl.where(o_row == i_row, code, 0), 0)
            bits = scored(x_row, code_row, factor, weights_ptr, IS_SINGLE, True)
            m_scored = (o_row == i_row) & (code >= 0)
            word = tl.where(m_scored, word_of(bits, code_row, rank_bits)[None, :], word)
        word = tl.reshape(word, [1 << LOG_N])
    else:
        bits = scored(x, code, factor, weights_ptr, IS_SINGLE, False)
        word = tl.where(code >= 0, word_of(bits, code, rank_bits), word)
    return word


@triton.jit
def _buckets(
    indptr_ptr, status_ptr, o_cell, n_cells, n_entries, select_above,
    IS_HARD: tl.constexpr, LOG_FIRST: tl.constexpr, N_SORTS: tl.constexpr,
):  # fmt: skip
    """Bucket of each cell, and whether its row lies within the entries.

    0: nothing to do, for cells without entries, cells that are not there, and with IS_HARD those that are not hard.
    From 1 on the sort that takes the row, 2^LOG_FIRST entries and twice as many each time; after the last, wide cells.
    """
    m_cell = o_cell < n_cells
    begin = tl.load(indptr_ptr + o_cell, mask=m_cell, other=0)
    end = tl.load(indptr_ptr + o_cell + 1, mask=m_cell, other=0)
    is_fit = (begin >= 0) & (begin <= end) & (end <= n_entries)
    length = tl.where(is_fit, end - begin, 0)
    bucket = (length > 0).to(tl.int32)
    for i_sort in tl.static_range(N_SORTS):
        bucket += (length > (1 << (LOG_FIRST + i_sort))).to(tl.int32)
    is_wide = length > select_above
    bucket = tl.where(is_wide, N_SORTS + 1, bucket)
    if IS_HARD:
        is_open = (tl.load(status_ptr + o_cell, mask=m_cell, other=0) & IS_OPEN) != 0
        bucket = tl.where(is_wide | is_open, bucket, 0)
    return bucket, is_fit


@triton.jit(do_not_specialize=["n_cells", "n_entries", "select_above"])
def rank_genes_count_kernel(
    indptr_ptr, sizes_ptr, status_ptr, counts_ptr, n_cells, n_entries, select_above,
    IS_HARD: tl.constexpr, LOG_FIRST: tl.constexpr, N_SORTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """one program = BLOCK cells: how many of them are in each bucket.

    indptr [B + 1] i64 -> counts [n blocks, 8] i32; and unless IS_HARD, sizes [B] i32 of cells without entries and
    status [B] i32 of rows that do not fit, which no later kernel looks at.
    """
    o_cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bucket, is_fit = _buckets(
        indptr_ptr, status_ptr, o_cell, n_cells, n_entries, select_above, IS_HARD, LOG_FIRST, N_SORTS
    )
    if not IS_HARD:
        tl.store(sizes_ptr + o_cell, tl.zeros([BLOCK], dtype=tl.int32), mask=o_cell < n_cells)
        tl.store(status_ptr + o_cell, tl.where(is_fit, 0, WRONG_INDPTR), mask=o_cell < n_cells)
    o_bucket = tl.arange(0, _N_BUCKETS)
    is_in = (bucket[:, None] == o_bucket[None, :]) & (bucket[:, None] > 0)
    tl.store(counts_ptr + tl.program_id(0) * _N_BUCKETS + o_bucket, tl.sum(is_in.to(tl.int32), 0))


@triton.jit(do_not_specialize=["n_cells", "n_entries", "select_above", "n_blocks"])
def rank_genes_list_kernel(
    indptr_ptr, status_ptr, counts_ptr, items_ptr, bounds_ptr, n_cells, n_entries, select_above, n_blocks,
    IS_HARD: tl.constexpr, LOG_FIRST: tl.constexpr, N_SORTS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """one program = BLOCK cells: their places in the list of cells by bucket.

    counts [n blocks, 8] i32 -> items [B] i32, the cells of bucket 1, then of bucket 2 and so on, each in ascending
    order, and bounds [8] i32, where in items each bucket begins (and the one before it ends). A stable sort would do,
    but takes several times as long.
    """
    o_bucket = tl.arange(0, _N_BUCKETS)
    n_before = tl.zeros([_N_BUCKETS], dtype=tl.int32)
    n_all = tl.zeros([_N_BUCKETS], dtype=tl.int32)
    for start in range(0, n_blocks, ROWS):
        o_block = start + tl.arange(0, ROWS)
        counts = tl.load(
            counts_ptr + o_block[:, None] * _N_BUCKETS + o_bucket[None, :], mask=o_block[:, None] < n_blocks, other=0
        )
        n_all += tl.sum(counts, 0)
        n_before += tl.sum(tl.where(o_block[:, None] < tl.program_id(0), counts, 0), 0)
    bound = tl.cumsum(n_all, 0) - n_all
    tl.store(bounds_ptr + o_bucket, bound, mask=tl.program_id(0) + o_bucket * 0 == 0)

    o_cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bucket, _ = _buckets(indptr_ptr, status_ptr, o_cell, n_cells, n_entries, select_above, IS_HARD, LOG_FIRST, N_SORTS)
    is_in = ((bucket[:, None] == o_bucket[None, :]) & (bucket[:, None] > 0)).to(tl.int32)
    place = (bound + n_before)[None, :] + tl.cumsum(is_in, 0) - is_in
    tl.store(items_ptr + tl.sum(place * is_in, 1), o_cell, mask=bucket > 0)


@triton.jit
def has_open_pair(word, size, classes_ptr, rank_bits, is_fine, LOG_N: tl.constexpr, LOG_EACH: tl.constexpr):
    """Whether sorted words have neighbours whose leading bits agree and whose scores may differ all the same."""
    following_position = position_of(tl.arange(0, 1 << LOG_N), LOG_N, LOG_EACH) + 1
    following = tl.gather(word, place_of(following_position & ((1 << LOG_N) - 1), LOG_N, LOG_EACH), 0)
    rank_mask = (tl.full((), 1, tl.int64) << rank_bits) - 1
    is_alike = (following_position < size) & (((word ^ following) >> rank_bits) == 0)
    class_ = tl.load(classes_ptr + (word & rank_mask).to(tl.int32), mask=is_alike, other=0)
    following_class = tl.load(classes_ptr + (following & rank_mask).to(tl.int32), mask=is_alike, other=0)
    # The exponent of a subnormal number is 0, and its complement 2047.
    is_open = is_alike & ((class_ != following_class) | ((word >> 52) == 2047) | is_fine)
    return tl.max(is_open.to(tl.int32), 0)


@triton.jit
def _with_sums(
    word, factor, begin_ptr, indices_ptr, data_ptr, codes_ptr, weights_ptr, shared_x_ptr, shared_ranks_ptr, summed_ptr,
    rank_bits, IS_SINGLE: tl.constexpr, IS_DIVISION: tl.constexpr, IS_ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Words of a cell with the sums of its shared genes, each in the gene's first slot; and IS_FINE if a sum is that.

    A slot whose word is -2 waits for it. The entries of shared genes meet in memory, where the row's entries stand, and
    each slot fetches its word there; until then its place among them stands in its word, as -2 - place.
    """
    found = tl.zeros([BLOCK], dtype=tl.int32)
    is_shared = (word == -2).to(tl.int32)
    n_shared = tl.sum(is_shared, 0)
    if n_shared > 0:
        # Registers are short: what the slots had loaded is loaded again, and from a row that begins where memory says
        # once more, or else the compiler keeps the 64-bit addresses of all slots from the first time.
        begin = tl.load(begin_ptr)
        o_word = tl.arange(0, word.shape[0])
        m_shared = word == -2
        place = tl.cumsum(is_shared, 0) - is_shared
        word = tl.where(m_shared, -2 - place, word)
        x = tl.load(data_ptr + begin + o_word, mask=m_shared, other=0)
        tl.store(shared_x_ptr + begin + place, x.to(tl.float64), mask=m_shared)
        column = tl.load(indices_ptr + begin + o_word, mask=m_shared, other=0)
        code = tl.load(codes_ptr + column, mask=m_shared, other=-2)
        tl.store(shared_ranks_ptr + begin + place, -2 - code, mask=m_shared)
        tl.debug_barrier()
        for start in range(0, n_shared, BLOCK):
            o_shared = start + tl.arange(0, BLOCK)
            total, rank, m_first = summed_genes(
                shared_x_ptr + begin, shared_ranks_ptr + begin, o_shared, n_shared, IS_ROUNDED
            )
            bits = scored(total, tl.where(m_first, rank, -1), factor, weights_ptr, IS_SINGLE, IS_DIVISION)
            found |= tl.where(m_first & (total.to(tl.float32).to(tl.float64) != total), IS_FINE, 0)
            summed = tl.where(m_first, word_of(bits, rank, rank_bits), -1)
            tl.store(summed_ptr + begin + o_shared, summed, mask=o_shared < n_shared)
        tl.debug_barrier()
        summed = tl.load(summed_ptr + begin + (-2 - word), mask=word < -1, other=-1)
        word = tl.where(word < -1, summed, word)
    return word, tl.max(found, 0)


@triton.jit
def store_specials(out_ptr, start, n_ranked, first, last, capacity):
    """The tokens around a cell's genes, where it has any of both."""
    end = start + (first >= 0).to(tl.int64) + n_ranked
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + start, first.to(kind), mask=(n_ranked > 0) & (first >= 0) & (start < capacity))
    tl.store(out_ptr + end, last.to(kind), mask=(n_ranked > 0) & (last >= 0) & (end < capacity))


@triton.jit(
    do_not_specialize=["n_columns", "keep", "first", "last", "rank_bits", "padded_length", "capacity", "i_bucket"]
)
def rank_genes_cells_kernel(
    indptr_ptr, indices_ptr, data_ptr, n_counts_ptr, codes_ptr, weights_ptr, tokens_ptr, classes_ptr, items_ptr,
    bounds_ptr, shared_x_ptr, shared_ranks_ptr, bits_ptr, sizes_ptr, status_ptr, out_ptr,
    n_columns, keep, first, last, rank_bits, padded_length, capacity, i_bucket,
    IS_SINGLE: tl.constexpr, IS_DIVISION: tl.constexpr, IS_ROUNDED: tl.constexpr, HAS_SHARED: tl.constexpr,
    LOG_N: tl.constexpr, LOG_EACH: tl.constexpr,
):  # fmt: skip
    """one program = cells of one bucket, one after another: CSR entries -> ranked tokens, if no pair is open.

    indptr [B + 1] i64, indices and data [nnz], n_counts [B], codes [G] i32 (rank; -1 dropped; -2 - rank shared by
    columns); weights f64, tokens and classes i32 [n] by rank, classes equal where weights are; items [B] and bounds [8]
    i32, the cells by bucket, of which this launch takes those of i_bucket; rows have at most 2^LOG_N entries.
    -> sizes (genes that are not zero) and status i32 [B]; out [capacity], i32 where a packed cell's tokens stand at its
    indptr (padded_length 0; no specials), or rows of padded_length i64. shared_x f64, shared_ranks i32 and bits i64
    [nnz] are room for the sums of shared genes. A cell with an open pair is marked in its status and sorted again.
    """
    o_word = tl.arange(0, 1 << LOG_N)
    rank_mask = (tl.full((), 1, tl.int64) << rank_bits) - 1
    stop = tl.load(bounds_ptr + i_bucket + 1)
    for i_item in range(tl.load(bounds_ptr + i_bucket) + tl.program_id(0), stop, tl.num_programs(0)):
        i_cell = tl.load(items_ptr + i_item).to(tl.int64)
        begin = tl.load(indptr_ptr + i_cell)
        length = (tl.load(indptr_ptr + i_cell + 1) - begin).to(tl.int32)
        n = tl.load(n_counts_ptr + i_cell)
        factor = factor_of(n, IS_DIVISION)
        code, x, found = loaded(indices_ptr + begin, data_ptr + begin, codes_ptr, o_word, length, n_columns)
        status = status_of(found, n)
        word = _words(x, code, length, factor, weights_ptr, rank_bits, IS_SINGLE, IS_DIVISION, LOG_N, LOG_EACH)
        if HAS_SHARED:
            word, found_in_sums = _with_sums(
                word, factor, indptr_ptr + i_cell, indices_ptr, data_ptr, codes_ptr, weights_ptr, shared_x_ptr,
                shared_ranks_ptr, bits_ptr, rank_bits, IS_SINGLE, IS_DIVISION, IS_ROUNDED, 1 << (LOG_N - LOG_EACH),
            )  # fmt: skip
            status |= found_in_sums
        size = tl.sum((word >= 0).to(tl.int32), 0)
        word = sorted_places(tl.where(word >= 0, word, GREATEST), LOG_N, LOG_EACH)
        is_fine = (status & IS_FINE) != 0
        status |= has_open_pair(word, size, classes_ptr, rank_bits, is_fine, LOG_N, LOG_EACH) * IS_OPEN
        tl.store(sizes_ptr + i_cell, size)
        tl.store(status_ptr + i_cell, status)

        n_ranked = tl.minimum(size, keep)
        start = tl.where(padded_length > 0, i_cell * padded_length, begin)
        out = start + (first >= 0).to(tl.int64)
        n_out = tl.minimum(n_ranked.to(tl.int64), capacity - out).to(tl.int32)
        rank = in_order((word & rank_mask).to(tl.int32), LOG_N, LOG_EACH)
        token = tl.load(tokens_ptr + rank, mask=o_word < n_out, other=0)
        tl.store(out_ptr + out + o_word, token.to(out_ptr.dtype.element_ty), mask=o_word < n_out)
        store_specials(out_ptr, start, n_ranked, first, last, capacity)


@triton.jit(do_not_specialize=["keep", "first", "last", "capacity"])
def rank_genes_place_kernel(
    staged_ptr, indptr_ptr, sizes_ptr, offsets_ptr, values_ptr, keep, first, last, capacity, BLOCK: tl.constexpr
):  # fmt: skip
    """one program = one packed cell: its tokens from staged i32 [nnz], at its indptr, to values i64, at its offset.

    Of hard cells there is something else in ``staged``, and what is written here is overwritten with their tokens.
    """
    i_cell = tl.program_id(0).to(tl.int64)
    begin = tl.load(indptr_ptr + i_cell)
    n_ranked = tl.minimum(tl.load(sizes_ptr + i_cell), keep)
    start = tl.load(offsets_ptr + i_cell)
    out = start + (first >= 0).to(tl.int64)
    for i_block in range(0, n_ranked, BLOCK):
        o_token = i_block + tl.arange(0, BLOCK)
        token = tl.load(staged_ptr + begin + o_token, mask=o_token < n_ranked, other=0)
        m_out = (o_token < n_ranked) & (out + o_token < capacity)
        tl.store(values_ptr + out + o_token, token.to(tl.int64), mask=m_out)
    store_specials(values_ptr, start, n_ranked, first, last, capacity)
