"""Ranking on a GPU, the hard cells: those of more entries than one sort takes, and those that it leaves open.

They are scored to memory, where their CSR entries stand and without gaps: the bits of the float64 score, and the rank
of the gene. Wide cells are cut to what one sort takes; cells with an open pair are sorted twice more. ``kernel.py``,
whose pass over all cells comes first, says what is sorted and why the result is exact. No arithmetic may be contracted
here either.
"""

import triton
import triton.language as tl

from geneformer_kernels.ops.rank_genes.kernel import (
    GREATEST,
    IS_FINE,
    IS_OPEN,
    NOT_ASCENDING,
    REPEATED_COLUMN,
    factor_of,
    has_open_pair,
    loaded,
    scored,
    status_of,
    store_specials,
    summed_genes,
    word_of,
)
from geneformer_kernels.tiles import in_order, sorted_places


@triton.jit(do_not_specialize=["n_columns", "last_bucket"])
def rank_genes_score_kernel(
    indptr_ptr, indices_ptr, data_ptr, n_counts_ptr, codes_ptr, weights_ptr, items_ptr, bounds_ptr, bits_ptr, ranks_ptr,
    shared_x_ptr, shared_ranks_ptr, sizes_ptr, n_shared_ptr, status_ptr, n_columns, last_bucket,
    IS_SINGLE: tl.constexpr, IS_DIVISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """one program = hard cells, one after another: CSR entries -> scored entries without gaps, and how many there are.

    indptr [B + 1] i64, indices and data [nnz], n_counts [B], codes [G] i32, weights [n] f64 and the list of hard cells
    as above -> bits i64 and ranks i32 [nnz], shared_x f64 and shared_ranks i32 [nnz] (entries of shared genes as they
    are, for the next kernel), sizes, n_shared and status i32 [B].
    """
    stop = tl.load(bounds_ptr + last_bucket + 1)
    for i_item in range(tl.program_id(0), stop, tl.num_programs(0)):
        i_cell = tl.load(items_ptr + i_item).to(tl.int64)
        begin = tl.load(indptr_ptr + i_cell)
        length = tl.load(indptr_ptr + i_cell + 1) - begin
        n = tl.load(n_counts_ptr + i_cell)
        factor = factor_of(n, IS_DIVISION)
        n_kept = 0
        n_shared = 0
        found = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, length, BLOCK):
            o_entry = start + tl.arange(0, BLOCK)
            code, x, found_here = loaded(indices_ptr + begin, data_ptr + begin, codes_ptr, o_entry, length, n_columns)
            bits = scored(x, code, factor, weights_ptr, IS_SINGLE, IS_DIVISION)
            found |= found_here
            m_kept, m_shared = code >= 0, code < -1
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
        tl.store(sizes_ptr + i_cell, n_kept)
        tl.store(n_shared_ptr + i_cell, n_shared)
        # What is known already, that a pair is open, stays known.
        tl.store(status_ptr + i_cell, tl.load(status_ptr + i_cell) | status_of(found, n))


@triton.jit(do_not_specialize=["last_bucket"])
def rank_genes_sum_kernel(
    indptr_ptr, n_counts_ptr, weights_ptr, items_ptr, bounds_ptr, shared_x_ptr, shared_ranks_ptr, n_shared_ptr,
    bits_ptr, ranks_ptr, sizes_ptr, status_ptr, last_bucket,
    IS_SINGLE: tl.constexpr, IS_DIVISION: tl.constexpr, IS_ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """one program = hard cells, one after another: entries of shared genes -> one scored entry per gene."""
    stop = tl.load(bounds_ptr + last_bucket + 1)
    for i_item in range(tl.program_id(0), stop, tl.num_programs(0)):
        i_cell = tl.load(items_ptr + i_item).to(tl.int64)
        begin = tl.load(indptr_ptr + i_cell)
        n_shared = tl.load(n_shared_ptr + i_cell)
        size = tl.load(sizes_ptr + i_cell)
        factor = factor_of(tl.load(n_counts_ptr + i_cell), IS_DIVISION)
        is_fine = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, n_shared, BLOCK):
            o_entry = start + tl.arange(0, BLOCK)
            x, rank, m_first = summed_genes(
                shared_x_ptr + begin, shared_ranks_ptr + begin, o_entry, n_shared, IS_ROUNDED
            )
            bits = scored(x, tl.where(m_first, rank, -1), factor, weights_ptr, IS_SINGLE, IS_DIVISION)
            is_fine |= (m_first & (x.to(tl.float32).to(tl.float64) != x)).to(tl.int32)
            is_first = m_first.to(tl.int32)
            to = begin + size + tl.cumsum(is_first, 0) - is_first
            tl.store(bits_ptr + to, bits, mask=m_first)
            tl.store(ranks_ptr + to, rank, mask=m_first)
            size += tl.sum(is_first, 0)
        status = tl.load(status_ptr + i_cell)
        tl.store(status_ptr + i_cell, status | (tl.max(is_fine, 0) * IS_FINE))
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
    if (status & NOT_ASCENDING) != 0:
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
        tl.store(status_ptr + i_cell, status | (is_repeated * REPEATED_COLUMN))


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
    high = tl.full((), GREATEST, tl.int64)
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


@triton.jit(do_not_specialize=["keep", "first", "rank_bits", "capacity", "i_bucket", "needed"])
def rank_genes_select_kernel(
    bits_ptr, ranks_ptr, indptr_ptr, sizes_ptr, status_ptr, items_ptr, bounds_ptr, offsets_ptr, values_ptr,
    keep, first, rank_bits, capacity, i_bucket, needed, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """one program = cells of more entries than one sort takes, one after another: which entries each sort gets.

    The cell's best ``keep`` entries are cut, exactly, into slabs of WIDTH in their final order. Where the slab's tokens
    will stand in ``values`` the indices of its entries are written, in any order; the sort reads them there.
    """
    stop = tl.load(bounds_ptr + i_bucket + 1)
    for i_item in range(tl.load(bounds_ptr + i_bucket) + tl.program_id(0), stop, tl.num_programs(0)):
        i_cell = tl.load(items_ptr + i_item).to(tl.int64)
        begin = tl.load(indptr_ptr + i_cell)
        size = tl.load(sizes_ptr + i_cell)
        is_wanted = (tl.load(status_ptr + i_cell) & needed) == needed
        n_ranked = tl.where(is_wanted, tl.minimum(size, keep), 0)
        out = tl.load(offsets_ptr + i_cell) + (first >= 0).to(tl.int64)
        # The last entry of the slab before; at first there is none, and nothing stands up to it.
        upper = tl.full((), GREATEST, tl.int64)
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
    """Score bits and rank of a cell's scored entries, or of those that the selection listed."""
    if is_selected:
        o_entry = tl.load(listed_ptr + o_entry, mask=m_entry, other=0).to(tl.int32)
    return tl.load(bits_ptr + o_entry, mask=m_entry, other=0), tl.load(ranks_ptr + o_entry, mask=m_entry, other=0)


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


@triton.jit(do_not_specialize=["keep", "first", "last", "rank_bits", "capacity", "i_bucket"])
def rank_genes_sort_kernel(
    bits_ptr, ranks_ptr, indptr_ptr, sizes_ptr, items_ptr, bounds_ptr, offsets_ptr, status_ptr, tokens_ptr,
    classes_ptr, values_ptr, keep, first, last, rank_bits, capacity, i_bucket,
    LOG_N: tl.constexpr, LOG_EACH: tl.constexpr,
):  # fmt: skip
    """one program = wide cells, one after another: entries that the selection listed -> tokens, if no pair is open.

    Arguments as for the selection; status i32 [B]; tokens and classes i32 [n] by rank, classes equal where weights are.
    Sorts 2^LOG_N words at a time. A cell with an open pair is marked in its status, and sorted again.
    """
    N: tl.constexpr = 1 << LOG_N
    o_word = tl.arange(0, N)
    rank_mask = (tl.full((), 1, tl.int64) << rank_bits) - 1
    stop = tl.load(bounds_ptr + i_bucket + 1)
    for i_item in range(tl.load(bounds_ptr + i_bucket) + tl.program_id(0), stop, tl.num_programs(0)):
        i_cell = tl.load(items_ptr + i_item).to(tl.int64)
        begin = tl.load(indptr_ptr + i_cell)
        n_ranked = tl.minimum(tl.load(sizes_ptr + i_cell), keep)
        status = tl.load(status_ptr + i_cell)
        start = tl.load(offsets_ptr + i_cell)
        out = start + (first >= 0).to(tl.int64)
        for slab in range(0, n_ranked, N):
            _, n_out = _extent(n_ranked, n_ranked, slab, capacity - (out + slab), 1, N)
            bits, rank = _entries(
                bits_ptr + begin, ranks_ptr + begin, values_ptr + out + slab, o_word, o_word < n_out, True
            )
            word = tl.where(o_word < n_out, word_of(bits, rank, rank_bits), GREATEST)
            word = sorted_places(word, LOG_N, LOG_EACH)
            is_fine = (status & IS_FINE) != 0
            if has_open_pair(word, n_out, classes_ptr, rank_bits, is_fine, LOG_N, LOG_EACH) > 0:
                tl.store(status_ptr + i_cell, status | IS_OPEN)
            rank = in_order((word & rank_mask).to(tl.int32), LOG_N, LOG_EACH)
            _store_tokens(values_ptr + out + slab, tokens_ptr, rank, n_out, N)
        store_specials(values_ptr, start, n_ranked, first, last, capacity)


@triton.jit
def _exact_ranks(
    bits_ptr, ranks_ptr, listed_ptr, size, rank_bits, is_selected, LOG_N: tl.constexpr, LOG_EACH: tl.constexpr
):
    """Ranks of a cell's entries in their final order, by the two sorts that are exact for any scores."""
    o_word = tl.arange(0, 1 << LOG_N)
    m_word = o_word < size
    bits, _ = _entries(bits_ptr, ranks_ptr, listed_ptr, o_word, m_word, is_selected)
    word = tl.where(m_word, (((bits ^ GREATEST) >> LOG_N) << LOG_N) | o_word, GREATEST)
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
            bits, rank = _entries(bits_ptr, ranks_ptr, listed_ptr, o_entry, m_word, is_selected)
            low = (bits ^ GREATEST) & ((1 << LOG_N) - 1)
            word = tl.where(m_word, (((group << LOG_N) | low) << rank_bits) | rank.to(tl.int64), GREATEST)
        i_sort += 1
    return in_order((word & ((tl.full((), 1, tl.int64) << rank_bits) - 1)).to(tl.int32), LOG_N, LOG_EACH)


@triton.jit(do_not_specialize=["keep", "first", "rank_bits", "capacity", "first_bucket", "last_bucket", "is_selected"])
def rank_genes_settle_kernel(
    bits_ptr, ranks_ptr, indptr_ptr, sizes_ptr, status_ptr, items_ptr, bounds_ptr, offsets_ptr, tokens_ptr, values_ptr,
    keep, first, rank_bits, capacity, first_bucket, last_bucket, is_selected,
    LOG_N: tl.constexpr, LOG_EACH: tl.constexpr,
):  # fmt: skip
    """one program = cells with an open pair, one after another: their tokens once more, in exact order.

    Arguments as for the sort, but items and bounds are of open cells only, and the launch takes several buckets.
    """
    stop = tl.load(bounds_ptr + last_bucket + 1)
    for i_item in range(tl.load(bounds_ptr + first_bucket) + tl.program_id(0), stop, tl.num_programs(0)):
        i_cell = tl.load(items_ptr + i_item).to(tl.int64)
        begin = tl.load(indptr_ptr + i_cell)
        n_ranked = tl.minimum(tl.load(sizes_ptr + i_cell), keep)
        n_sorted = tl.where(is_selected > 0, n_ranked, tl.load(sizes_ptr + i_cell))
        n_sorted = tl.where((tl.load(status_ptr + i_cell) & IS_OPEN) != 0, n_sorted, 0)
        out = tl.load(offsets_ptr + i_cell) + (first >= 0).to(tl.int64)
        for slab in range(0, n_sorted, 1 << LOG_N):
            room = capacity - (out + slab)
            size, n_out = _extent(n_sorted, n_ranked, slab, room, is_selected, 1 << LOG_N)
            rank = _exact_ranks(
                bits_ptr + begin, ranks_ptr + begin, values_ptr + out + slab, size, rank_bits, is_selected, LOG_N,
                LOG_EACH,
            )  # fmt: skip
            _store_tokens(values_ptr + out + slab, tokens_ptr, rank, n_out, 1 << LOG_N)
