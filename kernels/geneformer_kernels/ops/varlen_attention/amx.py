"""Products of bfloat16 on the tiles of a CPU with amx_bf16, and a softmax beside them, for loops that numba compiles.

Everything that tiles read lies in panels: of a step, 32 numbers to be multiplied and added up, two tiles one behind the
other, for 32 rows or 32 columns. Two tiles of rows meet two of columns in four of sums, a block of 32 x 32. Scores
become weights row by row between those instructions, which leave a core's other units nothing to do: ``2**x`` of one
block while tiles multiply the next.

Everything is an address (int64), of memory that begins at a multiple of 64 bytes unless said otherwise.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once, unpack_tuple
from numba.extending import intrinsic

from geneformer_kernels.cpu import amx
from geneformer_kernels.cpu.amx import TILE_BYTES, TILE_WIDTH
from geneformer_kernels.cpu.compiled import POWER_COEFFICIENTS
from geneformer_kernels.cpu.int8_transpose import transposed
from geneformer_kernels.cpu.llvm import (
    BFLOAT16,
    BOOL,
    FLOAT,
    INT8,
    INT16,
    INT32,
    INT64,
    REGISTER_BYTES,
    VOID,
    call,
    constant,
    counting,
    everywhere,
    load,
    pointer,
    smaller,
    store,
)

#: Rows and columns of a block of sums, and what is multiplied and added up in a step.
BLOCK = 32
#: Bytes of a step's panel, and of a block of sums.
PANEL_BYTES, BLOCK_BYTES = 2 * TILE_BYTES, 4 * BLOCK * BLOCK

_LANES = 16
_FLOATS, _INTS, _SHORTS = ir.VectorType(FLOAT, _LANES), ir.VectorType(INT32, _LANES), ir.VectorType(INT16, BLOCK)
_PAIRS = ir.VectorType(BFLOAT16, BLOCK)
_ROW_BYTES = 4 * BLOCK
# Numbers of tiles: of sums for either tile of rows and either of columns.
_SUMS, _OF_ROWS, _OF_COLUMNS = ((0, 1), (2, 3)), (4, 5), (6, 7)
_FEATURES = ("amx-tile", "amx-bf16", "avx512bf16", "avx512bw", "avx512dq")


def _from_below() -> tuple[np.float32, ...]:
    """``POWER_COEFFICIENTS``, of 2**f for f in [-1/2, 1/2], for f in [0, 1]: 2**f is sqrt(2) * 2**(f - 1/2)."""
    c3, c2, c1, c0 = map(float, POWER_COEFFICIENTS)
    moved = (c3, c2 - 1.5 * c3, c1 - c2 + 0.75 * c3, c0 - c1 / 2 + c2 / 4 - c3 / 8)
    return tuple(np.float32(math.sqrt(2) * c) for c in moved)


_COEFFICIENTS = _from_below()
#: What a score of 0 becomes.
WEIGHT_OF_ZERO = _COEFFICIENTS[3]


def why_not() -> str | None:
    """Why these products cannot be computed in this process; None where they can."""
    return amx.why_not(*_FEATURES)


def _is_compilable() -> bool:
    return amx.why_not_compilable(*_FEATURES) is None


def _power_of_two(builder: Any, power: Any) -> Any:
    """2**power to 7.5e-05, at least 2**-126; infinity beyond float32, and NaN stays NaN."""
    least, zero = constant(_FLOATS, -126.0), ir.Constant(_FLOATS, None)
    all_lanes, rounding_as_set = INT16(-1), INT32(4)
    power = builder.select(builder.fcmp_ordered(">", least, power), least, power)
    # What is left of it above the next integer below; the exponent counts from there.
    down = INT32(0b1001)
    rest = call(
        builder, "llvm.x86.avx512.mask.reduce.ps.512", _FLOATS, power, down, zero, all_lanes, rounding_as_set
    )  # fmt: skip
    fraction = constant(_FLOATS, float(_COEFFICIENTS[0]))
    for coefficient in _COEFFICIENTS[1:]:
        fraction = call(
            builder, f"llvm.fma.v{_LANES}f32", _FLOATS, fraction, rest, constant(_FLOATS, float(coefficient))
        )  # fmt: skip
    return call(
        builder, "llvm.x86.avx512.mask.scalef.ps.512", _FLOATS, fraction, power, zero, all_lanes, rounding_as_set
    )  # fmt: skip


def _narrowed(builder: Any, low: Any, high: Any) -> Any:
    """Twice 16 numbers of float32 as 32 of bfloat16; subnormal ones, which products would ignore, become zero."""
    return call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _PAIRS, high, low)


def _widened(builder: Any, pairs: Any) -> tuple[Any, Any]:
    """32 numbers of bfloat16, as bits, in the two registers of float32 that :func:`_narrowed` joins."""
    low, high = (
        builder.shuffle_vector(
            pairs, pairs, ir.Constant(ir.VectorType(INT32, _LANES), [INT32(i + j) for j in range(16)])
        )
        for i in (0, _LANES)
    )
    shift = constant(_INTS, 16)
    return tuple(builder.bitcast(builder.shl(builder.zext(x, _INTS), shift), _FLOATS) for x in (low, high))  # type: ignore[return-value]


def _soften_rows(builder: Any, places: Any, first: Any, stop: Any) -> None:
    """Rows of a block of scores become weights in a panel, and are added, unrounded, to the 16 lanes of their sums."""
    scores, weights, sums = places
    with counting(builder, first, stop) as i_row:
        at = builder.mul(i_row, INT64(_ROW_BYTES))
        powers = [
            _power_of_two(builder, load(builder, scores, builder.add(at, INT64(offset)), _FLOATS))
            for offset in (0, REGISTER_BYTES)
        ]
        at = builder.mul(i_row, INT64(REGISTER_BYTES))
        total = builder.fadd(load(builder, sums, at, _FLOATS), builder.fadd(*powers))
        store(builder, total, sums, at)
        store(builder, builder.bitcast(_narrowed(builder, *powers), _INTS), weights, at)


def _tile_load(builder: Any, tile: int, address: Any, offset: int) -> None:
    at = pointer(builder, address, INT64(offset), INT8)
    call(builder, "llvm.x86.tileloadd64", VOID, INT8(tile), at, INT64(TILE_WIDTH))


def _multiply(typing_context: Any, block: Any, other: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not _is_compilable():
            return context.get_dummy_value()
        rows, columns, n_steps, sums = unpack_tuple(builder, arguments[0])
        *softened, n_rows, rows_per_step = unpack_tuple(builder, arguments[1])
        for tile in itertools.chain(*_SUMS):
            call(builder, "llvm.x86.tilezero", VOID, INT8(tile))
        with counting(builder, INT64(0), n_steps) as step:
            offset = builder.mul(step, INT64(PANEL_BYTES))
            row_panel, column_panel = builder.add(rows, offset), builder.add(columns, offset)
            for i, tile in enumerate(_OF_ROWS):
                _tile_load(builder, tile, row_panel, TILE_BYTES * i)
                for j, other in enumerate(_OF_COLUMNS):
                    if i == 0:
                        _tile_load(builder, other, column_panel, TILE_BYTES * j)
                    call(builder, "llvm.x86.tdpbf16ps", VOID, INT8(_SUMS[i][j]), INT8(tile), INT8(other))
            first = builder.mul(step, rows_per_step)
            _soften_rows(builder, softened, first, smaller(builder, builder.add(first, rows_per_step), n_rows))
        for i, j in itertools.product(range(2), range(2)):
            at = pointer(builder, sums, INT64(16 * _ROW_BYTES * i + REGISTER_BYTES * j), INT8)
            call(builder, "llvm.x86.tilestored64", VOID, INT8(_SUMS[i][j]), at, INT64(_ROW_BYTES))
        return context.get_dummy_value()

    return types.void(block, other), generate


def _soften(typing_context: Any, scores: Any, weights: Any, sums: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _is_compilable():
            _soften_rows(builder, arguments, INT64(0), INT64(BLOCK))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


def _row(builder: Any, rows: Any, row_bytes: Any, i_row: Any, n_rows: Any) -> Any:
    """32 numbers of bfloat16, as bits, that begin at any even address; zeros for a row that is not there."""
    last = builder.sub(n_rows, INT64(1))
    at = builder.mul(smaller(builder, i_row, last), row_bytes)
    is_there = everywhere(builder, builder.icmp_signed("<", i_row, n_rows), ir.VectorType(BOOL, BLOCK))
    return builder.select(is_there, load(builder, rows, at, _SHORTS, align=2), ir.Constant(_SHORTS, None))


def _lay_rows(typing_context: Any, rows: Any, row_bytes: Any, n_rows: Any, panel: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, row_bytes, n_rows, panel = arguments
        if _is_compilable():
            with counting(builder, INT64(0), INT64(BLOCK)) as i_row:
                row = _row(builder, rows, row_bytes, i_row, n_rows)
                store(builder, row, panel, builder.mul(i_row, INT64(REGISTER_BYTES)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _lay_columns(typing_context: Any, rows: Any, row_bytes: Any, n_rows: Any, panel: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, row_bytes, n_rows, panel = arguments
        if _is_compilable():
            with counting(builder, INT64(0), INT64(BLOCK // 2)) as i_pair:
                first = builder.mul(i_pair, INT64(2))
                pair = [_row(builder, rows, row_bytes, builder.add(first, INT64(i)), n_rows) for i in (0, 1)]
                for i in (0, 1):
                    lanes = [16 * i + j // 2 + BLOCK * (j % 2) for j in range(BLOCK)]
                    mask = ir.Constant(ir.VectorType(INT32, BLOCK), [INT32(lane) for lane in lanes])
                    at = builder.add(builder.mul(i_pair, INT64(TILE_WIDTH)), INT64(TILE_BYTES * i))
                    store(builder, builder.shuffle_vector(*pair, mask), panel, at)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _mean_rows(typing_context: Any, rows: Any, row_bytes: Any, n_rows: Any, mean: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, row_bytes, n_rows, mean = arguments
        if not _is_compilable():
            return context.get_dummy_value()
        # Every fourth row in registers of its own, or an addition would wait for the one before.
        totals = [[alloca_once(builder, _FLOATS) for _ in range(2)] for _ in range(4)]
        for total in itertools.chain(*totals):
            builder.store(ir.Constant(_FLOATS, None), total)
        with counting(builder, INT64(0), builder.ashr(builder.add(n_rows, INT64(3)), INT64(2))) as step:
            first = builder.mul(step, INT64(4))
            for i, total in enumerate(totals):
                row = _row(builder, rows, row_bytes, builder.add(first, INT64(i)), n_rows)
                for place, part in zip(total, _widened(builder, row), strict=True):
                    builder.store(builder.fadd(builder.load(place), part), place)
        count = everywhere(builder, builder.sitofp(n_rows, FLOAT), _FLOATS)
        for i, places in enumerate(zip(*totals, strict=True)):
            total = functools.reduce(builder.fadd, map(builder.load, places))
            store(builder, builder.fdiv(total, count), mean, INT64(REGISTER_BYTES * i))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _lay_keys(typing_context: Any, rows: Any, row_bytes: Any, n_rows: Any, mean: Any, scale: Any, tile: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, row_bytes, n_rows, mean, scale, tile = arguments
        if not _is_compilable():
            return context.get_dummy_value()
        means = [load(builder, mean, INT64(REGISTER_BYTES * i), _FLOATS) for i in (0, 1)]
        scales, taken = everywhere(builder, scale, _FLOATS), []
        # Where none is there, the first is read all the same.
        last = builder.sub(builder.select(builder.icmp_signed("<", n_rows, INT64(1)), INT64(1), n_rows), INT64(1))
        for i_row in map(INT64, range(_LANES)):
            at = builder.mul(smaller(builder, i_row, last), row_bytes)
            given = _widened(builder, load(builder, rows, at, _SHORTS, align=2))
            parts = (builder.fmul(builder.fsub(x, mean), scales) for x, mean in zip(given, means, strict=True))
            is_there = everywhere(builder, builder.icmp_signed("<", i_row, n_rows), ir.VectorType(BOOL, _LANES))
            row = builder.bitcast(_narrowed(builder, *parts), _INTS)
            taken.append(builder.select(is_there, row, ir.Constant(_INTS, None)))
        for i, value in enumerate(transposed(builder, taken)):
            store(builder, value, tile, INT64(REGISTER_BYTES * i))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, types.float32, types.int64), generate


def _total(builder: Any, lanes: Any) -> Any:
    """The sum of a register's lanes: of either half, of either quarter, and so on."""
    while lanes.type.count > 1:
        half = lanes.type.count // 2
        parts = (ir.Constant(ir.VectorType(INT32, half), [INT32(i + j) for j in range(half)]) for i in (0, half))
        lanes = builder.fadd(*(builder.shuffle_vector(lanes, lanes, part) for part in parts))
    return builder.extract_element(lanes, INT32(0))


def _finish(typing_context: Any, block: Any, out: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not _is_compilable():
            return BOOL(0)
        mixed, n_panels, sums, n_rows, excess, least, most = unpack_tuple(builder, arguments[0])
        out, out_row_bytes = unpack_tuple(builder, arguments[1])
        are_fine = alloca_once(builder, BOOL)
        builder.store(BOOL(1), are_fine)
        with counting(builder, INT64(0), n_rows) as i_row:
            total = _total(builder, load(builder, sums, builder.mul(i_row, INT64(REGISTER_BYTES)), _FLOATS))
            total = builder.fsub(total, excess)
            is_fine = builder.and_(builder.fcmp_ordered("<", least, total), builder.fcmp_ordered("<", total, most))
            builder.store(builder.and_(builder.load(are_fine), is_fine), are_fine)
            factor = everywhere(builder, builder.fdiv(FLOAT(1.0), total), _FLOATS)
            to = builder.add(out, builder.mul(i_row, out_row_bytes))
            at = builder.add(mixed, builder.mul(i_row, INT64(_ROW_BYTES)))
            with counting(builder, INT64(0), n_panels) as panel:
                offset = builder.mul(panel, INT64(BLOCK_BYTES))
                parts = [
                    builder.fmul(load(builder, at, builder.add(offset, INT64(i)), _FLOATS), factor)
                    for i in (0, REGISTER_BYTES)
                ]
                value = builder.bitcast(_narrowed(builder, *parts), _INTS)
                store(builder, value, to, builder.mul(panel, INT64(2 * BLOCK)), align=2)
        return builder.load(are_fine)

    return types.boolean(block, out), generate


#: ``multiply((rows, columns, steps, sums), (scores, weights, sums, rows, rows per step))``: a block of sums [32, 32] of
#: float32, from as many panels of both as there are steps; and meanwhile, of another block of scores so many rows (0 or
#: 32) become weights, as many per step as it takes.
multiply_block: Any = intrinsic(_multiply)
#: (scores, weights, sums): rows of 32 float32 become 2 to their power, a panel of bfloat16, and are added, before they
#: are rounded, to the sixteen lanes of their sums.
soften_block: Any = intrinsic(_soften)
#: (rows, bytes per row, how many are there, panel): up to 32 rows of 32 bfloat16, at any even address, as a panel of
#: rows; or of columns, for which pairs of rows are interleaved. What is not there is zero.
lay_rows: Any = intrinsic(_lay_rows)
lay_columns: Any = intrinsic(_lay_columns)
#: (rows, bytes per row, rows, mean): the mean of rows of 32 bfloat16, as float32.
mean_rows: Any = intrinsic(_mean_rows)
#: (rows, bytes per row, how many are there, mean, scale, tile): up to 16 rows of 32 bfloat16, less their mean and
#: scaled, as a tile of columns. What is not there is zero.
lay_keys: Any = intrinsic(_lay_keys)
#: ``finish((mixed, panels, sums, rows, excess, least, most), (out, bytes per row))``: blocks [panels, 32, 32] of sums
#: of weighted values over the total of their rows' weights, less an excess, as bfloat16 at any even address; whether
#: all totals are between least and most. Results that are subnormal become zero.
finish_rows: Any = intrinsic(_finish)
