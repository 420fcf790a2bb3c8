"""Ranking on the CPU: compiled loops over the cells of a CSR block.

A cell's entries are scored in float64 in the arithmetic the caller names, then sorted by radix on the 16 leading bits
of the cell's own range of scores, and what those bits leave open is settled on the float64 scores themselves, equal
scores by token id. The order is therefore exact; the radix only makes most of it cheap.

The functions release the GIL: one thread per block, each with its own workspace.
"""

from __future__ import annotations

import numba
import numpy as np

from geneformer_kernels.ops.rank_genes.columns import Columns, RepeatedColumnError, prepare_columns, whole
from geneformer_kernels.ops.rank_genes.plan import plan

__all__ = ["Columns", "RepeatedColumnError", "prepare_columns", "rank_block"]

_KEY_BITS = 42  # of a 64-bit word; the other 22 hold the entry's position in its cell
_POSITION_BITS = np.uint64(64 - _KEY_BITS)
_POSITION_MASK = np.uint64((1 << (64 - _KEY_BITS)) - 1)
_LOW_DIGIT = np.uint64(48)
_HIGH_DIGIT = np.uint64(56)
_BYTE = np.uint64(255)
_MOVES_PER_ENTRY = 8


@numba.njit(nogil=True, cache=True)
def _goes_before(a, b, scores, tokens):
    """Whether word ``a`` ranks before word ``b``: greater score first, then smaller token id."""
    key_a, key_b = a >> _POSITION_BITS, b >> _POSITION_BITS
    if key_a != key_b:
        return key_a < key_b
    i, j = a & _POSITION_MASK, b & _POSITION_MASK
    if scores[i] != scores[j]:
        return scores[i] > scores[j]
    return tokens[i] < tokens[j]


@numba.njit(nogil=True, cache=True)
def _heap_sort(words, start, stop, scores, tokens):
    """Sort words[start:stop]."""
    n = stop - start
    for phase_end in range(n // 2 - 1, -1, -1):
        _sift_down(words, start, phase_end, n, scores, tokens)
    for last in range(n - 1, 0, -1):
        words[start], words[start + last] = words[start + last], words[start]
        _sift_down(words, start, 0, last, scores, tokens)


@numba.njit(nogil=True, cache=True)
def _sift_down(words, start, root, n, scores, tokens):
    while True:
        child = 2 * root + 1
        if child >= n:
            return
        if child + 1 < n and _goes_before(words[start + child], words[start + child + 1], scores, tokens):
            child += 1
        if not _goes_before(words[start + root], words[start + child], scores, tokens):
            return
        words[start + root], words[start + child] = words[start + child], words[start + root]
        root = child


@numba.njit(nogil=True, cache=True)
def _settle(words, n, scores, tokens):
    """Finish words[:n], which are in order of their 16 leading bits: few are out of place, so by insertion."""
    left = _MOVES_PER_ENTRY * n
    for i in range(1, n):
        word = words[i]
        if words[i - 1] >> _POSITION_BITS < word >> _POSITION_BITS:
            continue
        j = i
        while j > 0 and _goes_before(word, words[j - 1], scores, tokens):
            words[j] = words[j - 1]
            j -= 1
        words[j] = word
        left -= i - j
        if left < 0:
            _settle_runs(words, n, scores, tokens)
            return


@numba.njit(nogil=True, cache=True)
def _settle_runs(words, n, scores, tokens):
    """The same where so many scores are alike that insertion would be quadratic."""
    start = 0
    while start < n:
        stop = start + 1
        while stop < n and words[stop] >> _LOW_DIGIT == words[start] >> _LOW_DIGIT:
            stop += 1
        _heap_sort(words, start, stop, scores, tokens)
        start = stop


@numba.njit(nogil=True, cache=True)
def _order(n, keep, scores, tokens, words, spare, histogram):
    """Put the positions of the ``keep`` best of n scored entries, best first, into words[:...]; returns how many.

    Greater scores get smaller words, so everything below sorts upwards. Positive float64 numbers are ordered like their
    bits, and the words carry the bits' distance from the cell's best score, scaled to the cell's range.
    """
    bits = scores.view(np.uint64)
    largest, smallest = bits[0], bits[0]
    for i in range(1, n):
        largest = max(largest, bits[i])
        smallest = min(smallest, bits[i])
    span = largest - smallest
    n_bits = 0
    while n_bits < 64 and span >> np.uint64(n_bits) != 0:  # all 64 only where a count was negative
        n_bits += 1
    right = np.uint64(max(n_bits - _KEY_BITS, 0))
    left = np.uint64(max(_KEY_BITS - max(n_bits, 1), 0)) + _POSITION_BITS
    histogram[:] = 0
    for i in range(n):
        word = (((largest - bits[i]) >> right) << left) | np.uint64(i)
        words[i] = word
        histogram[1, word >> _HIGH_DIGIT] += 1

    # Entries whose leading byte lies beyond the one that completes the cut can be dropped before any sorting.
    n_kept, last_digit = 0, 0
    for digit in range(256):
        count = histogram[1, digit]
        histogram[1, digit] = n_kept
        n_kept += count
        last_digit = digit
        if n_kept >= keep:
            break
    if n_kept < n:
        m = 0
        for i in range(n):
            words[m] = words[i]
            m += words[i] >> _HIGH_DIGIT <= np.uint64(last_digit)
    for i in range(n_kept):
        histogram[0, (words[i] >> _LOW_DIGIT) & _BYTE] += 1
    before = 0
    for digit in range(256):
        count = histogram[0, digit]
        histogram[0, digit] = before
        before += count
    for i in range(n_kept):
        digit = (words[i] >> _LOW_DIGIT) & _BYTE
        spare[histogram[0, digit]] = words[i]
        histogram[0, digit] += 1
    for i in range(n_kept):
        digit = spare[i] >> _HIGH_DIGIT
        words[histogram[1, digit]] = spare[i]
        histogram[1, digit] += 1
    _settle(words, n_kept, scores, tokens)
    return n_kept


@numba.njit(nogil=True, cache=True)
def _score(x, factor, weight, is_single, is_division):
    """The score of a count: ``x / n * 10000 / median`` in the arithmetic asked for.

    ``is_division``: factor is n and weight the median; otherwise they are their reciprocals. ``is_single``: the first
    two steps round to float32.
    """
    if is_single:
        if is_division:
            value = np.float64(np.float32(np.float32(x) / np.float32(factor)) * np.float32(10000.0))
        else:
            value = np.float64(np.float32(np.float32(x) * np.float32(factor)) * np.float32(10000.0))
    elif is_division:
        value = (np.float64(x) / factor) * 10000.0
    else:
        value = (np.float64(x) * factor) * 10000.0
    return value / weight if is_division else value * weight


@numba.njit(nogil=True, cache=True)
def _score_row(
    row, indices, data, factor, is_single, is_division, is_rounded, columns, slots,
    sums, errors, last_row, touched, scores, tokens,
):  # fmt: skip
    """Scores and tokens of one row's entries that have a token and are not zero; returns how many there are.

    Columns that share a gene are summed first, in twice float64's precision (Knuth's two-sum), so that the sum does not
    depend on the order of the columns, and with ``is_rounded`` rounded to float32, as the counts are.
    """
    codes, weights = columns
    slot_tokens, slot_weights = slots
    n, n_touched = 0, 0
    for p in range(indices.size):
        x = data[p]
        code = codes[indices[p]]
        if code < -1:
            slot = -2 - code
            if x != 0:
                if last_row[slot] != row:
                    last_row[slot] = row
                    touched[n_touched] = slot
                    n_touched += 1
                addend = np.float64(x)
                total = sums[slot] + addend
                part = total - sums[slot]
                errors[slot] += (sums[slot] - (total - part)) + (addend - part)
                sums[slot] = total
            continue
        scores[n] = _score(x, factor, weights[indices[p]], is_single, is_division)
        tokens[n] = code
        n += (code >= 0) & (x != 0)
    for i in range(n_touched):
        slot = touched[i]
        total = sums[slot] + errors[slot]
        if is_rounded:
            total = np.float64(np.float32(total))
        sums[slot], errors[slot] = 0.0, 0.0
        scores[n] = _score(total, factor, slot_weights[slot], is_single, is_division)
        tokens[n] = slot_tokens[slot]
        n += 1
    return n


@numba.njit(nogil=True, cache=True)
def _rank_rows(
    indptr, indices, data, factors, is_single, is_division, is_rounded, columns, slots, keep, first, last, n_widest,
    out, lengths,
):  # fmt: skip
    """Rank every row into ``out``, one after another; returns the number of tokens written."""
    n_slots = slots[0].size
    # One more than the widest row: the score of a dropped entry is written before it is known to be dropped.
    scores, tokens = np.empty(n_widest + 1), np.empty(n_widest + 1, np.int32)
    words, spare = np.empty(n_widest + 1, np.uint64), np.empty(n_widest, np.uint64)
    sums, errors = np.zeros(n_slots), np.zeros(n_slots)
    touched, last_row = np.empty(n_slots, np.int32), np.full(n_slots, -1, np.int64)
    histogram = np.empty((2, 256), np.int64)
    cursor = 0
    for row in range(indptr.size - 1):
        begin, end = indptr[row], indptr[row + 1]
        n = _score_row(
            row, indices[begin:end], data[begin:end], factors[row], is_single, is_division, is_rounded,
            columns, slots, sums, errors, last_row, touched, scores, tokens,
        )  # fmt: skip
        start = cursor
        if n > 0:
            _order(n, keep, scores, tokens, words, spare, histogram)
            if first >= 0:
                out[cursor] = first
                cursor += 1
            for i in range(min(n, keep)):
                out[cursor] = tokens[words[i] & _POSITION_MASK]
                cursor += 1
            if last >= 0:
                out[cursor] = last
                cursor += 1
        lengths[row] = cursor - start
    return cursor


@numba.njit(nogil=True, cache=True)
def _inspect(indptr, indices, n_columns):
    """(problem, row) of a CSR block: 0 none, 1 indptr does not fit, 2 a column is out of range, 3 a column repeats."""
    seen = np.full(n_columns, -1, np.int64)
    for row in range(indptr.size - 1):
        begin, end = indptr[row], indptr[row + 1]
        if begin < 0 or end < begin or end > indices.size:
            return 1, row
        previous, is_ascending = -1, True
        for p in range(begin, end):
            column = indices[p]
            if column < 0 or column >= n_columns:
                return 2, row
            is_ascending &= column > previous
            previous = column
        if not is_ascending:
            for p in range(begin, end):
                if seen[indices[p]] == row:
                    return 3, row
                seen[indices[p]] = row
    return 0, -1


def _check_block(indptr: np.ndarray, indices: np.ndarray, n_columns: int) -> None:
    problem, row = _inspect(indptr, indices, n_columns)
    if problem == 3:
        raise RepeatedColumnError(f"row {row} names a column twice")
    if problem:
        raise ValueError(f"row {row}: {'indptr does not fit' if problem == 1 else 'a column index is out of range'}")


def _check_numbers(indices: np.ndarray, data: np.ndarray) -> None:
    if indices.size and indices.dtype.kind not in "iu":
        raise ValueError(f"indices must be integers, not {indices.dtype}")
    if data.dtype.kind not in "biuf":
        raise ValueError(f"data must be real numbers, not {data.dtype}")
    # NaN is neither.
    if data.dtype.kind in "if" and data.size and not (data.min() >= 0 and data.max() < np.inf):
        raise ValueError("data must be finite and not negative")


def _out_dtype(dtype: np.dtype | type | str, columns: Columns, first: int, last: int) -> np.dtype:
    """The dtype, if every token fits into it."""
    found = np.dtype(dtype)
    if found.kind not in "iu":
        raise ValueError(f"out_dtype must be an integer dtype, not {found}")
    tokens = columns.codes, columns.sum_tokens
    largest = max(first, last, *(int(each.max(initial=0)) for each in tokens))
    if largest > np.iinfo(found).max:
        raise ValueError(f"out_dtype {found} does not hold token {largest}")
    return found


#: Dtypes the compiled loops know; every other one is widened, exactly, to one of them.
_WIDENED = {
    "bool": "int32", "int8": "int32", "uint8": "int32", "int16": "int32", "uint16": "int32", "float16": "float32",
    "uint32": "int64", "uint64": "float64",
}  # fmt: skip


def rank_block(
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    n_counts: np.ndarray,
    columns: Columns,
    *,
    is_division: bool,
    keep: int,
    first: int = -1,
    last: int = -1,
    out_dtype: np.dtype | type | str = np.int32,
    is_checked: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Ranked token ids of every row of a CSR block.

    Parameters
    ----------
    indptr, indices, data
        [B + 1] int64, [nnz] int32 and [nnz] counts: finite and not negative, of any real dtype. Columns of a row may be
        in any order. Stored zeros are no entries.
    n_counts
        [B] total counts of each cell. float32 makes the first two steps of the score float32 where numpy would
        (for float32 and for narrow integer counts), float64 and integers make them float64.
    columns
        The genes of the columns, see :func:`prepare_columns`.
    is_division
        False: the score is ``x * (1 / n) * 10000 * (1 / median)``, which is what a sparse matrix divided by a vector is
        in scipy. True: ``x / n * 10000 / median``, as for dense matrices and loom files.
    keep
        Most genes to keep per cell.
    first, last
        Token ids to put around the genes of every cell (``<cls>``, ``<eos>``); -1 puts none.
    out_dtype
        Integer dtype of the tokens.
    is_checked
        True where the caller has made sure of a valid CSR block without repeated columns, of finite counts that are not
        negative; a wrong one then reads and writes outside of the arrays. Saves 8 % of the time.

    Returns
    -------
    values, lengths
        The tokens of all rows, packed, and [B] int64 how many are each row's, specials included. A row without entries
        has none at all.

    Raises
    ------
    RepeatedColumnError
        A row names a column twice.
    ValueError
        The block is no CSR matrix over the prepared columns, a count is negative or not finite, a cell with something
        to rank has no positive finite n_counts, or ``out_dtype`` does not hold a token.
    """
    indptr = np.ascontiguousarray(whole(indptr, "indptr"))
    data, out_dtype = np.asarray(data), _out_dtype(out_dtype, columns, first, last)
    if not is_checked:
        indices = np.asarray(indices)
        _check_numbers(indices, data)
    if not is_checked and indices.dtype.itemsize > 4:  # before they lose what int32 does not hold
        is_out = (indices < 0) | (indices >= len(columns.codes))
        if is_out.any():
            row = np.searchsorted(indptr, np.flatnonzero(is_out)[0], side="right") - 1
            raise ValueError(f"row {row}: a column index is out of range")
    indices = np.ascontiguousarray(indices, dtype=np.int32)
    n_rows = len(indptr) - 1
    if len(data) != len(indices) or len(n_counts) != n_rows:
        raise ValueError(
            f"{len(indices)} indices, {len(data)} values, {n_rows} rows, {len(n_counts)} n_counts: no block"
        )
    if not is_checked:
        _check_block(indptr, indices, len(columns.codes))
    row_sizes = np.diff(indptr)
    n_counts = np.asarray(n_counts)
    for row in np.flatnonzero((row_sizes > 0) & ~((n_counts > 0) & np.isfinite(n_counts))):
        entries = slice(indptr[row], indptr[row + 1])
        if ((columns.codes[indices[entries]] != -1) & (data[entries] != 0)).any():
            raise ValueError(f"row {row} has entries but n_counts {n_counts[row]}")
    block = plan(widest_row=int(row_sizes.max(initial=0)), keep=keep)
    factors = n_counts if n_counts.dtype == np.float32 else n_counts.astype(np.float64)
    is_single = np.result_type(data.dtype, factors.dtype) == np.float32
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = (factors if is_division else np.true_divide(1.0, factors)).astype(np.float64)
        weights = (columns.medians, columns.sum_medians)
        weights = weights if is_division else tuple(np.true_divide(1.0, weight) for weight in weights)
    n_specials = int(first >= 0) + int(last >= 0)
    out = np.empty(int((np.minimum(row_sizes, keep) + n_specials).sum()), dtype=out_dtype)
    lengths = np.empty(n_rows, dtype=np.int64)
    is_rounded = data.dtype.name in ("float16", "float32")
    n_tokens = _rank_rows(
        indptr, indices, np.ascontiguousarray(data, dtype=_WIDENED.get(data.dtype.name, data.dtype)), factors,
        bool(is_single), bool(is_division), is_rounded, (columns.codes, weights[0]), (columns.sum_tokens, weights[1]),
        block.keep, first, last, block.widest_row, out, lengths,
    )  # fmt: skip
    return out[:n_tokens], lengths
