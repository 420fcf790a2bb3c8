"""Ranking on a GPU: scores, exact sums of columns that share a gene, selection in wide cells, and the sort.

Between the kernels a cell's scored entries stand where its CSR entries stand, without gaps: the bits of the float64
score, which order positive numbers like the numbers themselves, and the *rank* of the gene, its place among all genes
in order of token id. The rank names the token and decides between equal scores.

The counts are read once, and no matrix is ever dense. Scoring and sorting are launches of their own because a packed
cell can only be written when the sizes of all cells before it are known, and because it then takes a sort as wide as
its kept genes rather than its row. Between them lie 12 bytes per kept entry, by estimate 5 % of the time a sort takes.

Why sorting words of 64 bits is exact
-------------------------------------
A word is the leading ``63 - rank_bits`` bits of the score's complement with the gene's rank below them. Sorting words
upwards is right for all but neighbours that agree in those leading bits and yet differ in score. Of two neighbours that
agree, it is certain that their scores are equal, so that the ranks decided rightly, if

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

_GREATEST = tl.constexpr(0x7FFFFFFFFFFFFFFF)
# Bits of a cell's status; plan.py says in words what each means.
_WRONG_INDPTR = tl.constexpr(1)
_WRONG_COLUMN = tl.constexpr(2)
_WRONG_TOTAL = tl.constexpr(4)
_NOT_ASCENDING = tl.constexpr(8)
_REPEATED_COLUMN = tl.constexpr(16)
_IS_FINE = tl.constexpr(32)
_IS_OPEN = tl.constexpr(64)


@triton.jit
def _factor(n, IS_DIVISION: tl.constexpr):
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


@triton.jit(do_not_specialize=["n_entries", "n_columns"])
def rank_genes_score_kernel(
    indptr_ptr, indices_ptr, data_ptr, n_counts_ptr, codes_ptr, weights_ptr, bits_ptr, ranks_ptr, shared_x_ptr,
    shared_ranks_ptr, sizes_ptr, n_shared_ptr, status_ptr, n_entries, n_columns,
    IS_SINGLE: tl.constexpr, IS_DIVISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """one program = one cell: its CSR entries -> scored entries without gaps, and how many there are.

    indptr [B + 1] i64, indices and data [nnz], n_counts [B], codes [G] i32 (rank; -1 dropped; -2 - rank shared by
    columns), weights [n] f64 by rank -> bits i64 and ranks i32 [nnz], shared_x f64 and shared_ranks i32 [nnz] (entries
    of shared genes as they are, for the next kernel), sizes, n_shared and status i32 [B].
    """
    i_cell = tl.program_id(0).to(tl.int64)
    begin = tl.load(indptr_ptr + i_cell)
    end = tl.load(indptr_ptr + i_cell + 1)
    is_fit = (begin >= 0) & (begin <= end) & (end <= n_entries)
    begin = tl.where(is_fit, begin, 0)
    end = tl.where(is_fit, end, 0)
    n = tl.load(n_counts_ptr + i_cell)
    factor = _factor(n, IS_DIVISION)
    n_kept = 0
    n_shared = 0
    found = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(begin, end, BLOCK):
        o_entry = start + tl.arange(0, BLOCK)
        m_entry = o_entry < end
        column = tl.load(indices_ptr + o_entry, mask=m_entry, other=0)
        before = tl.load(indices_ptr + o_entry - 1, mask=m_entry & (o_entry > begin), other=-1)
        x = tl.load(data_ptr + o_entry, mask=m_entry, other=0)
        m_column = m_entry & (column >= 0) & (column < n_columns)
        code = tl.load(codes_ptr + column, mask=m_column, other=-1)
        m_kept = (code >= 0) & (x != 0)
        m_shared = (code < -1) & (x != 0)
        weight = tl.load(weights_ptr + code, mask=m_kept, other=1.0)

        bits = _score_bits(x, factor, weight, IS_SINGLE, IS_DIVISION)
        found |= tl.where(m_entry & (column <= before), _NOT_ASCENDING, 0)
        found |= tl.where(m_entry & (m_column == 0), _WRONG_COLUMN, 0)
        if data_ptr.dtype.element_ty.primitive_bitwidth == 64:
            is_fine = x.to(tl.float32).to(tl.float64) != x.to(tl.float64)
            found |= tl.where(m_kept & is_fine, _IS_FINE, 0)
        # One scan counts both kinds: a block has less than 2^15 entries.
        both = m_kept.to(tl.int32) + (m_shared.to(tl.int32) << 16)
        place = tl.cumsum(both, 0) - both
        to = begin + n_kept + (place & 0xFFFF)
        shared_to = begin + n_shared + (place >> 16)

        tl.store(bits_ptr + to, bits, mask=m_kept)
        tl.store(ranks_ptr + to, code, mask=m_kept)
        tl.store(shared_x_ptr + shared_to, x.to(tl.float64), mask=m_shared)
        tl.store(shared_ranks_ptr + shared_to, -2 - code, mask=m_shared)
        total = tl.sum(both, 0)
        n_kept += total & 0xFFFF
        n_shared += total >> 16
    status = tl.max(found & _NOT_ASCENDING, 0) + tl.max(found & _WRONG_COLUMN, 0) + tl.max(found & _IS_FINE, 0)
    is_total = (n > 0) & (n < float("inf"))
    status += tl.where((end > begin) & (is_total == 0), _WRONG_TOTAL, 0)
    status += tl.where(is_fit, 0, _WRONG_INDPTR)
    tl.store(sizes_ptr + i_cell, n_kept)
    tl.store(n_shared_ptr + i_cell, n_shared)
    tl.store(status_ptr + i_cell, status)


@triton.jit
def rank_genes_sum_kernel(
    indptr_ptr, n_counts_ptr, weights_ptr, shared_x_ptr, shared_ranks_ptr, n_shared_ptr, bits_ptr, ranks_ptr,
    sizes_ptr, status_ptr,
    IS_SINGLE: tl.constexpr, IS_DIVISION: tl.constexpr, IS_ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """one program = one cell: entries of genes that several columns share -> one scored entry per gene.

    Summed in the order of the row, in twice float64's precision (Knuth's two-sum), as the CPU does; IS_ROUNDED: counts
    are float32, and the sum is rounded to it. Every entry gathers the sum of its gene, the gene's first entry keeps it:
    quadratic, but a cell has some dozens of them, and no order of execution can change the sum.
    """
    i_cell = tl.program_id(0).to(tl.int64)
    begin = tl.load(indptr_ptr + i_cell)
    n_shared = tl.load(n_shared_ptr + i_cell)
    if n_shared > 0:
        size = tl.load(sizes_ptr + i_cell)
        factor = _factor(tl.load(n_counts_ptr + i_cell), IS_DIVISION)
        is_fine = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, n_shared, BLOCK):
            o_entry = start + tl.arange(0, BLOCK)
            rank = tl.load(shared_ranks_ptr + begin + o_entry, mask=o_entry < n_shared, other=-1)
            total = tl.zeros([BLOCK], dtype=tl.float64)
            error = tl.zeros([BLOCK], dtype=tl.float64)
            n_earlier = tl.zeros([BLOCK], dtype=tl.int32)
            for i_other in range(0, n_shared):
                x = tl.load(shared_x_ptr + begin + i_other)
                is_same = rank == tl.load(shared_ranks_ptr + begin + i_other)
                grown = total + x
                part = grown - total
                error = tl.where(is_same, error + ((total - (grown - part)) + (x - part)), error)
                total = tl.where(is_same, grown, total)
                n_earlier += (is_same & (i_other < o_entry)).to(tl.int32)
            x = total + error
            if IS_ROUNDED:
                x = x.to(tl.float32).to(tl.float64)
            m_first = (rank >= 0) & (n_earlier == 0)
            weight = tl.load(weights_ptr + rank, mask=m_first, other=1.0)
            bits = _score_bits(x, factor, weight, IS_SINGLE, IS_DIVISION)
            is_fine |= (m_first & (x.to(tl.float32).to(tl.float64) != x)).to(tl.int32)

            is_first = m_first.to(tl.int32)
            to = begin + size + tl.cumsum(is_first, 0) - is_first
            tl.store(bits_ptr + to, bits, mask=m_first)
            tl.store(ranks_ptr + to, rank, mask=m_first)
            size += tl.sum(is_first, 0)
        status = tl.load(status_ptr + i_cell)
        tl.store(status_ptr + i_cell, status | (tl.max(is_fine, 0) * _IS_FINE))
        tl.store(sizes_ptr + i_cell, size)


@triton.jit
def rank_genes_repeats_kernel(
    indptr_ptr, indices_ptr, status_ptr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):  # fmt: skip
    """one program = one cell whose columns do not ascend: whether it names one of them twice.

    Compares all pairs, tile by tile; a row in order never comes here.
    """
    i_cell = tl.program_id(0).to(tl.int64)
    status = tl.load(status_ptr + i_cell)
    if (status & _NOT_ASCENDING) != 0:
        begin = tl.load(indptr_ptr + i_cell)
        end = tl.load(indptr_ptr + i_cell + 1)
        n_equal = tl.zeros([BLOCK_I, BLOCK_J], dtype=tl.int32)
        for start_i in range(begin, end, BLOCK_I):
            o_i = start_i + tl.arange(0, BLOCK_I)
            column_i = tl.load(indices_ptr + o_i, mask=o_i < end, other=-1)
            for start_j in range(start_i, end, BLOCK_J):
                o_j = start_j + tl.arange(0, BLOCK_J)
                column_j = tl.load(indices_ptr + o_j, mask=o_j < end, other=-2)
                is_equal = (column_i[:, None] == column_j[None, :]) & (o_i[:, None] < o_j[None, :])
                n_equal |= is_equal.to(tl.int32)
        is_repeated = tl.max(tl.max(n_equal, 1), 0)
        tl.store(status_ptr + i_cell, status | (is_repeated * _REPEATED_COLUMN))


@triton.jit
def _is_up_to(bits, rank, bound, rank_bound):
    """Whether an entry stands before (bound, rank_bound) in the final order, or is that entry."""
    return (bits > bound) | ((bits == bound) & (rank <= rank_bound))


@triton.jit
def _count_up_to(bits_ptr, ranks_ptr, size, bound, rank_bound, HAS_RANK: tl.constexpr, BLOCK: tl.constexpr):
    """How many of a cell's entries stand up to a bound; without ranks all entries of that score."""
    count = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, size, BLOCK):
        o_entry = start + tl.arange(0, BLOCK)
        m_entry = o_entry < size
        bits = tl.load(bits_ptr + o_entry, mask=m_entry, other=-1)
        if HAS_RANK:
            rank = tl.load(ranks_ptr + o_entry, mask=m_entry, other=0)
            count += _is_up_to(bits, rank, bound, rank_bound).to(tl.int32)
        else:
            count += (bits >= bound).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _cut(bits_ptr, ranks_ptr, size, n_wanted, rank_bits, BLOCK: tl.constexpr):
    """(bits, rank) of the last of the ``n_wanted`` best entries, by bisection; n_wanted is between 1 and size."""
    low = tl.full((), 0, tl.int64)
    high = tl.full((), _GREATEST, tl.int64)
    while low < high:
        middle = high - ((high - low) >> 1)
        if _count_up_to(bits_ptr, ranks_ptr, size, middle, 0, False, BLOCK) >= n_wanted:
            low = middle
        else:
            high = middle - 1
    # Of the entries with this very score those of the smallest ranks, unless all of them are wanted.
    high_rank = (tl.full((), 1, tl.int32) << rank_bits) - 1
    n_found = _count_up_to(bits_ptr, ranks_ptr, size, low, 0, False, BLOCK)
    low_rank = tl.where(n_found > n_wanted, 0, high_rank)
    while low_rank < high_rank:
        middle_rank = low_rank + ((high_rank - low_rank) >> 1)
        if _count_up_to(bits_ptr, ranks_ptr, size, low, middle_rank, True, BLOCK) >= n_wanted:
            high_rank = middle_rank
        else:
            low_rank = middle_rank + 1
    return low, low_rank


@triton.jit(do_not_specialize=["keep", "first", "rank_bits", "capacity", "i_bucket"])
def rank_genes_select_kernel(
    bits_ptr, ranks_ptr, indptr_ptr, sizes_ptr, items_ptr, bounds_ptr, offsets_ptr, values_ptr,
    keep, first, rank_bits, capacity, i_bucket, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """one program = cells of more entries than one sort takes, one after another: which entries each sort gets.

    The cell's best ``keep`` entries are cut, exactly, into slabs of WIDTH in their final order. Where the slab's tokens
    will stand in ``values`` the indices of its entries are written, in any order; the sort reads them there.
    """
    stop = tl.load(bounds_ptr + i_bucket + 1)
    for i_item in range(tl.load(bounds_ptr + i_bucket) + tl.program_id(0), stop, tl.num_programs(0)):
        i_cell = tl.load(items_ptr + i_item)
        begin = tl.load(indptr_ptr + i_cell)
        size = tl.load(sizes_ptr + i_cell)
        n_ranked = tl.minimum(size, keep)
        out = tl.load(offsets_ptr + i_cell) + (first >= 0).to(tl.int64)
        # The last entry of the slab before; at first there is none, and nothing stands up to it.
        upper = tl.full((), _GREATEST, tl.int64)
        upper_rank = tl.full((), -1, tl.int32)
        for slab in range(0, n_ranked, WIDTH):
            n_wanted = tl.minimum(n_ranked, slab + WIDTH)
            lower, lower_rank = _cut(bits_ptr + begin, ranks_ptr + begin, size, n_wanted, rank_bits, BLOCK)
            cursor = slab
            for start in range(0, size, BLOCK):
                o_entry = start + tl.arange(0, BLOCK)
                m_entry = o_entry < size
                bits = tl.load(bits_ptr + begin + o_entry, mask=m_entry, other=-1)
                rank = tl.load(ranks_ptr + begin + o_entry, mask=m_entry, other=0)
                is_early = _is_up_to(bits, rank, upper, upper_rank)
                m_slab = m_entry & _is_up_to(bits, rank, lower, lower_rank) & (is_early == 0)
                is_chosen = m_slab.to(tl.int32)
                to = cursor + tl.cumsum(is_chosen, 0) - is_chosen
                m_to = m_slab & (to < n_wanted) & (out + to < capacity)
                tl.store(values_ptr + out + to, o_entry.to(tl.int64), mask=m_to)
                cursor += tl.sum(is_chosen, 0)
            upper = lower
            upper_rank = lower_rank


@triton.jit
def _entries(bits_ptr, ranks_ptr, listed_ptr, o_entry, m_entry, is_selected):
    """Complement of the score bits, and rank, of a cell's entries, or of those that the selection listed."""
    if is_selected:
        o_entry = tl.load(listed_ptr + o_entry, mask=m_entry, other=0).to(tl.int32)
    inverse = tl.load(bits_ptr + o_entry, mask=m_entry, other=0) ^ _GREATEST
    rank = tl.load(ranks_ptr + o_entry, mask=m_entry, other=0).to(tl.int64)
    return inverse, rank


@triton.jit
def _extent(n_sorted, n_ranked, slab, room, is_selected, N: tl.constexpr):
    """How many entries one sort takes, and how many of them are tokens of the result.

    ``room`` is what is left of ``values``: too little of it only where indptr is no indptr, which the status tells.
    """
    n_out = tl.minimum(tl.minimum(n_ranked - slab, N).to(tl.int64), room).to(tl.int32)
    return tl.where(is_selected > 0, n_out, tl.minimum(n_sorted - slab, N)), n_out


@triton.jit
def _store_tokens(out_ptr, tokens_ptr, rank, n_out, N: tl.constexpr):
    """Tokens of ranks to their final place, which may hold the selection's list until now."""
    o_word = tl.arange(0, N)
    token = tl.load(tokens_ptr + rank, mask=o_word < n_out, other=0)
    tl.debug_barrier()
    tl.store(out_ptr + o_word, token.to(tl.int64), mask=o_word < n_out)


@triton.jit
def _has_open_pair(word, size, classes_ptr, rank_bits, is_fine, LOG_N: tl.constexpr, LOG_EACH: tl.constexpr):
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


@triton.jit(do_not_specialize=["keep", "first", "last", "rank_bits", "capacity", "i_bucket", "is_selected"])
def rank_genes_sort_kernel(
    bits_ptr, ranks_ptr, indptr_ptr, sizes_ptr, items_ptr, bounds_ptr, offsets_ptr, status_ptr, tokens_ptr,
    classes_ptr, values_ptr, keep, first, last, rank_bits, capacity, i_bucket, is_selected,
    LOG_N: tl.constexpr, LOG_EACH: tl.constexpr,
):  # fmt: skip
    """one program = cells of one bucket, one after another: scored entries -> ranked tokens, if no pair is open.

    bits i64 and ranks i32 [nnz], status and sizes i32 [B], indptr i64 [B + 1]; items i64 [B], the cells in order of
    bucket, of which this launch sorts those from bounds[i_bucket] on; offsets i64 [B], where in values a cell begins;
    tokens and classes i32 [n] by rank, classes equal where weights are; values i64 [capacity]. Sorts 2^LOG_N words at
    a time. A cell with an open pair is marked in its status, and sorted again by the next kernel.
    """
    N: tl.constexpr = 1 << LOG_N
    o_word = tl.arange(0, N)
    rank_mask = (tl.full((), 1, tl.int64) << rank_bits) - 1
    stop = tl.load(bounds_ptr + i_bucket + 1)
    for i_item in range(tl.load(bounds_ptr + i_bucket) + tl.program_id(0), stop, tl.num_programs(0)):
        i_cell = tl.load(items_ptr + i_item)
        begin = tl.load(indptr_ptr + i_cell)
        n_ranked = tl.minimum(tl.load(sizes_ptr + i_cell), keep)
        n_sorted = tl.where(is_selected > 0, n_ranked, tl.load(sizes_ptr + i_cell))
        status = tl.load(status_ptr + i_cell)
        start = tl.load(offsets_ptr + i_cell)
        out = start + (first >= 0).to(tl.int64)
        for slab in range(0, n_sorted, N):
            room = capacity - (out + slab)
            size, n_out = _extent(n_sorted, n_ranked, slab, room, is_selected, N)
            inverse, rank = _entries(
                bits_ptr + begin, ranks_ptr + begin, values_ptr + out + slab, o_word, o_word < size, is_selected
            )
            word = tl.where(o_word < size, ((inverse >> rank_bits) << rank_bits) | rank, _GREATEST)
            word = sorted_places(word, LOG_N, LOG_EACH)
            is_fine = (status & _IS_FINE) != 0
            if _has_open_pair(word, size, classes_ptr, rank_bits, is_fine, LOG_N, LOG_EACH) > 0:
                tl.store(status_ptr + i_cell, status | _IS_OPEN)
            rank = in_order((word & rank_mask).to(tl.int32), LOG_N, LOG_EACH)
            _store_tokens(values_ptr + out + slab, tokens_ptr, rank, n_out, N)
        tl.store(values_ptr + start, first.to(tl.int64), mask=(first >= 0) & (start < capacity))
        tl.store(values_ptr + out + n_ranked, last.to(tl.int64), mask=(last >= 0) & (out + n_ranked < capacity))


@triton.jit
def _exact_ranks(
    bits_ptr, ranks_ptr, listed_ptr, size, rank_bits, is_selected, LOG_N: tl.constexpr, LOG_EACH: tl.constexpr
):
    """Ranks of a cell's entries in their final order, by the two sorts that are exact for any scores."""
    o_word = tl.arange(0, 1 << LOG_N)
    m_word = o_word < size
    inverse, _ = _entries(bits_ptr, ranks_ptr, listed_ptr, o_word, m_word, is_selected)
    word = tl.where(m_word, ((inverse >> LOG_N) << LOG_N) | o_word, _GREATEST)
    # A loop, so that the network, which is thousands of instructions, is there once.
    i_sort = tl.full((), 0, tl.int32)
    n_sorts = tl.where(rank_bits > 0, 2, 1)
    while i_sort < n_sorts:
        word = sorted_places(word, LOG_N, LOG_EACH)
        if i_sort + 1 < n_sorts:
            word = in_order(word, LOG_N, LOG_EACH)
            previous = tl.gather(word, tl.maximum(o_word - 1, 0), 0)
            group = tl.cumsum((((word ^ previous) >> LOG_N) != 0).to(tl.int32), 0).to(tl.int64)
            o_entry = (word & ((1 << LOG_N) - 1)).to(tl.int32)
            exact, exact_rank = _entries(bits_ptr, ranks_ptr, listed_ptr, o_entry, m_word, is_selected)
            low = exact & ((1 << LOG_N) - 1)
            word = tl.where(m_word, (((group << LOG_N) | low) << rank_bits) | exact_rank, _GREATEST)
        i_sort += 1
    return in_order((word & ((tl.full((), 1, tl.int64) << rank_bits) - 1)).to(tl.int32), LOG_N, LOG_EACH)


@triton.jit(do_not_specialize=["keep", "first", "rank_bits", "capacity", "first_bucket", "last_bucket", "is_selected"])
def rank_genes_settle_kernel(
    bits_ptr, ranks_ptr, indptr_ptr, sizes_ptr, items_ptr, bounds_ptr, offsets_ptr, tokens_ptr, values_ptr,
    keep, first, rank_bits, capacity, first_bucket, last_bucket, is_selected,
    LOG_N: tl.constexpr, LOG_EACH: tl.constexpr,
):  # fmt: skip
    """one program = cells with an open pair, one after another: their tokens once more, in exact order.

    Arguments as for the sort, but items and bounds are of open cells only, and the launch takes several buckets.
    """
    stop = tl.load(bounds_ptr + last_bucket + 1)
    for i_item in range(tl.load(bounds_ptr + first_bucket) + tl.program_id(0), stop, tl.num_programs(0)):
        i_cell = tl.load(items_ptr + i_item)
        begin = tl.load(indptr_ptr + i_cell)
        n_ranked = tl.minimum(tl.load(sizes_ptr + i_cell), keep)
        n_sorted = tl.where(is_selected > 0, n_ranked, tl.load(sizes_ptr + i_cell))
        out = tl.load(offsets_ptr + i_cell) + (first >= 0).to(tl.int64)
        for slab in range(0, n_sorted, 1 << LOG_N):
            room = capacity - (out + slab)
            size, n_out = _extent(n_sorted, n_ranked, slab, room, is_selected, 1 << LOG_N)
            rank = _exact_ranks(
                bits_ptr + begin, ranks_ptr + begin, values_ptr + out + slab, size, rank_bits, is_selected, LOG_N,
                LOG_EACH,
            )  # fmt: skip
            _store_tokens(values_ptr + out + slab, tokens_ptr, rank, n_out, 1 << LOG_N)
