"""What one thread does with its rows of products of int8: compiled loops over blocks of rows.

A block's rows are rounded (or copied, where they come rounded) to the form that the instruction set multiplies, and
stay in the second-level cache while the weights go by, four panels at a time. Sums become floats while they are in the
first.

A layer is (smoothing factors, (address of panels of ``int8_pack.py``, their number, columns, scale, bias, shift), kind
of product, activation, block): its block are buffers for (rows as bytes of the form that is multiplied, scales, sums,
float32 of sums, a row of float32).
"""

from __future__ import annotations

import numba
import numpy as np

from geneformer_kernels.cpu.compiled import LOOP
from geneformer_kernels.cpu.int8_amx import multiply_rows_amx
from geneformer_kernels.cpu.int8_dot import (
    ROWS,
    multiply_avx512_vnni,
    multiply_avx_vnni,
    multiply_pairs,
    multiply_unsigned,
)
from geneformer_kernels.cpu.lanes import (
    LANES,
    SHIFTED,
    SIGNED,
    WIDE,
    copy_floats,
    copy_halves,
    finish_floats,
    finish_halves,
    lay_shifted,
    lay_signed,
    lay_wide,
    write_floats,
    write_halves,
)
from geneformer_kernels.cpu.row_arithmetic import NO_ACTIVATION, RELU, activate, address_of, round_row

#: How products are computed. UNSIGNED is AVX2 where no activation is negative, PAIRS where some are.
PAIRS, UNSIGNED, AVX_VNNI, AVX512_VNNI, AMX = range(5)
_COLUMNS, _GROUP_PANELS = 16, 4
#: Rows that tiles take at a time, whether there are so many or not.
_TILES = 32
_FLOAT32_RESULT, _BFLOAT16_RESULT = 0, 1


@numba.njit(inline="always", **LOOP)
def _multiply(kind, rows, row_bytes, n_rows, panels, n_panels, n_steps, sums):
    if kind == AVX_VNNI:
        multiply_avx_vnni(rows, row_bytes, n_rows, panels, n_panels, n_steps, sums)
    else:
        multiply_avx512_vnni(rows, row_bytes, n_rows, panels, n_panels, n_steps, sums)


@numba.njit(inline="always", **LOOP)
def _multiply_avx2(
    kind, rows, row_bytes, n_rows, panels, n_panels, n_steps, row_scales, scales, biases, floor, out, out_row_bytes
):
    if kind == PAIRS:
        multiply_pairs(
            rows, row_bytes, n_rows, panels, n_panels, n_steps, row_scales, scales, biases, floor, out, out_row_bytes
        )
    else:
        multiply_unsigned(
            rows, row_bytes, n_rows, panels, n_panels, n_steps, row_scales, scales, biases, floor, out, out_row_bytes
        )


@numba.njit(inline="always", **LOOP)
def _form_of(kind):
    """The form of rows that a kind of product takes."""
    if kind == PAIRS:
        return WIDE
    return SHIFTED if kind in (AVX_VNNI, AVX512_VNNI) else SIGNED


@numba.njit(inline="always", **LOOP)
def _copy_row(given, form, row):
    """An int8 row in the form that is multiplied, as bytes."""
    width = len(given)
    whole = width - width % LANES
    if form == WIDE:
        lay_wide(address_of(given), whole // LANES, address_of(row))
        wide = row.view(np.int16)
        for j in range(whole, width):
            wide[j] = given[j]
    elif form == SHIFTED:
        lay_shifted(address_of(given), whole // LANES, address_of(row))
        for j in range(whole, width):
            row[j] = given[j] ^ np.int8(-128)
    else:
        lay_signed(address_of(given), whole // LANES, address_of(row))
        for j in range(whole, width):
            row[j] = given[j]


@numba.njit(inline="always", **LOOP)
def _round_floats(x, is_half, width, smooth, row, form, q):
    """:func:`round_row` of any width; a row that is no whole number of LANES is copied to where zeros follow."""
    if width % LANES == 0:
        return round_row(x, is_half, smooth, width, row, form, q)
    copy = row + 4 * (width + LANES)
    if is_half:
        copy_halves(x, width, copy)
    else:
        copy_floats(x, width, copy)
    return round_row(copy, False, smooth, width + LANES - width % LANES, row, form, q)


@numba.njit(inline="always", **LOOP)
def _take_rows(x, x_row_bytes, width, is_half, given, given_scale, is_given, first, n_rows, smooth, form, block):
    """Round rows of floats from address ``x`` on, or copy given ones, to the form that is multiplied."""
    rows, row_scale, _, _, row = block
    for i in range(n_rows):
        if is_given:
            _copy_row(given[first + i], form, rows[i])
            row_scale[i] = given_scale[first + i]
        else:
            at, to = x + i * x_row_bytes, address_of(rows) + i * rows.shape[1]
            row_scale[i] = _round_floats(
                at, is_half, width, address_of(smooth) if len(smooth) else 0, address_of(row), form, to
            )


@numba.njit(inline="always", **LOOP)
def _multiply_block(
    rows, row_bytes, row_scales, block, n_rows, packed, kind, activation, out_at, out_row_bytes, is_half
):
    """The product of a block of rows, from addresses ``rows`` and ``row_scales`` on, to those from ``out_at`` on."""
    _, _, sums, values, _ = block
    panels, n_panels, n_columns, scale, bias, shift = packed
    n_steps = row_bytes // 4
    scales, biases, shifts = address_of(scale), address_of(bias), address_of(shift)
    floor = np.float32(0) if activation == RELU else np.float32(-np.inf)
    if kind == AMX and activation <= RELU:
        code = _BFLOAT16_RESULT if is_half else _FLOAT32_RESULT
        multiply_rows_amx(
            rows, row_bytes, n_rows, row_scales, panels, n_steps, n_columns, scales, biases, floor, code, out_at,
            out_row_bytes, address_of(sums),
        )  # fmt: skip
        return
    for panel in range(0, n_panels, _GROUP_PANELS):
        n = _COLUMNS * min(_GROUP_PANELS, n_panels - panel)
        at, here = 4 * _COLUMNS * panel, panels + panel * n_steps * 64
        n_there, to = min(n, n_columns - _COLUMNS * panel), out_at + _COLUMNS * panel * (2 if is_half else 4)
        done = 0
        if kind <= UNSIGNED:
            # Whole tiles go to where they belong, unless something is left to do; the rest has room in the block.
            if activation <= RELU and not is_half and n_there == n:
                done = n_rows // ROWS * ROWS
            first, rest = rows + done * row_bytes, row_scales + 4 * done
            _multiply_avx2(
                kind, rows, row_bytes, done, here, n // _COLUMNS, n_steps, row_scales, scales + at, biases + at, floor,
                to, out_row_bytes,
            )  # fmt: skip
            _multiply_avx2(
                kind, first, row_bytes, n_rows - done, here, n // _COLUMNS, n_steps, rest, scales + at, biases + at,
                floor, address_of(values), 4 * n,
            )  # fmt: skip
        elif kind == AMX:
            multiply_rows_amx(
                rows, row_bytes, n_rows, row_scales, here, n_steps, n, scales + at, biases + at, floor, _FLOAT32_RESULT,
                address_of(values), 4 * n, address_of(sums),
            )  # fmt: skip
        else:
            _multiply(kind, rows, row_bytes, n_rows, here, n // _COLUMNS, n_steps, address_of(sums))
            if activation <= RELU:
                if is_half:
                    finish_halves(
                        address_of(sums), n_rows, n_there, row_scales, scales + at, biases + at, shifts + at, floor, to,
                        out_row_bytes,
                    )  # fmt: skip
                else:
                    finish_floats(
                        address_of(sums), n_rows, n_there, row_scales, scales + at, biases + at, shifts + at, floor, to,
                        out_row_bytes,
                    )  # fmt: skip
                continue
            finish_floats(
                address_of(sums), n_rows, n, row_scales, scales + at, biases + at, shifts + at, floor,
                address_of(values), 4 * n,
            )  # fmt: skip
        n_left, to = n_rows - done, to + done * out_row_bytes
        activate(values[: n_left * n], activation)
        if is_half:
            write_halves(address_of(values), n_left, n_there, to, out_row_bytes)
        else:
            write_floats(address_of(values), n_left, n_there, to, out_row_bytes)


@numba.njit(**LOOP)
def compute_rows(source, layer, next_layer, n_layers, is_gated, hidden, out, start, stop, block_rows):
    """Rows ``start`` to ``stop`` through no layer (they are rounded, to the block), one, or two.

    source: (address of rows, bytes from row to row, width, are they bfloat16 rather than float32, int8 rows, their
    scales, are those meant instead). out: (address, bytes from row to row, is it bfloat16 rather than float32).
    ``hidden`` is float32 of a block, for the results of the first of two layers, with zeros up to a multiple of LANES.
    ``is_gated``: its activation is that of the first half of them, which is then multiplied by the second.
    """
    x, x_row_bytes, x_width, x_is_half, given, given_scale, is_given = source
    out_at, out_row_bytes, out_is_half = out
    hidden_row_bytes, hidden_width = 4 * hidden.shape[1], hidden.shape[1]
    if is_gated:
        hidden_width = layer[1][2] // 2
    for first in range(start, stop, block_rows):
        n_rows = min(block_rows, stop - first)
        for i_layer in range(max(1, n_layers)):
            is_first, is_last = i_layer == 0, i_layer == n_layers - 1
            smooth, packed, kind, activation, block = layer if is_first else next_layer
            if is_gated and not is_first:
                for i in range(n_rows):
                    _multiply_by_gate(hidden[i], hidden_width, layer[3])
            rows, row_bytes, row_scales = address_of(block[0]), block[0].shape[1], address_of(block[1])
            at = address_of(given) + first * given.shape[1]
            # Rows that come as tiles take them are left where they are; others are laid out in the block.
            is_laid = is_given and kind == AMX and given.shape[1] == row_bytes and at % 64 == 0 and n_rows % _TILES == 0
            if is_first and is_laid and n_layers:
                rows, row_scales = at, address_of(given_scale) + 4 * first
            else:
                _take_rows(
                    x + first * x_row_bytes if is_first else address_of(hidden),
                    x_row_bytes if is_first else hidden_row_bytes,
                    x_width if is_first else hidden_width,
                    x_is_half and is_first,
                    given,
                    given_scale,
                    is_given and is_first,
                    first,
                    n_rows,
                    smooth,
                    _form_of(kind),
                    block,
                )
            if n_layers == 0:
                continue
            _multiply_block(
                rows,
                row_bytes,
                row_scales,
                block,
                n_rows,
                packed,
                kind,
                NO_ACTIVATION if is_gated else activation,
                out_at + first * out_row_bytes if is_last else address_of(hidden),
                out_row_bytes if is_last else hidden_row_bytes,
                out_is_half and is_last,
            )


@numba.njit(inline="always", **LOOP)
def _multiply_by_gate(row, width, activation):
    gate, up = row[:width], row[width : 2 * width]
    activate(gate, activation)
    for j in range(width):
        gate[j] *= up[j]
