"""Products and powers of float32 on a CPU with AVX2: the innermost loops, for loops that numba compiles.

A tile is six rows times 16 columns. Its sums stay in twelve of the sixteen registers while all of K goes by, two hold
numbers of a panel (16 columns, one after the other for each of K), one a number of a row: a step of K is twelve fused
multiply-adds for eight loads, what the arithmetic units of every CPU with AVX2 can take (the shape is that of BLIS;
Van Zee and van de Geijn, doi:10.1145/2764454).

Each number of a result is a chain of fused multiply-adds over K in one order, from what was there or from zero: its
bits depend neither on the rows around it nor on how many there are. Everything is an address or a number (int64).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from geneformer_kernels.cpu.compiled import POWER_COEFFICIENTS_FLOAT32, ROUND_FLOAT32
from geneformer_kernels.cpu.llvm import FLOAT, INT32, INT64, call, constant, counting, everywhere, load, store

#: Rows in work at a time, and columns of a panel.
ROWS, COLUMNS = 6, 16
#: Bytes of a step of a panel.
STEP_BYTES = 4 * COLUMNS
_LANES = 8
_REGISTERS = COLUMNS // _LANES
_UNROLL = 4

_FLOATS, _INTS = ir.VectorType(FLOAT, _LANES), ir.VectorType(INT32, _LANES)

Tile = list[list[Any]]


def _add_step(builder: Any, totals: Tile, rows: list[Any], row_at: Any, panel: Any, panel_at: Any) -> Tile:
    """Totals with one more of K."""
    columns = [
        load(builder, panel, builder.add(panel_at, INT64(4 * _LANES * i)), _FLOATS, align=4) for i in range(_REGISTERS)
    ]
    grown = []
    for row, of_row in zip(rows, totals, strict=True):
        number = everywhere(builder, load(builder, row, row_at, FLOAT, align=4), _FLOATS)
        grown.append(
            [
                call(builder, f"llvm.fma.v{_LANES}f32", _FLOATS, number, column, total)
                for column, total in zip(columns, of_row, strict=True)
            ]
        )
    return grown


def _add_steps(builder: Any, totals: Tile, rows: list[Any], panel: Any, first: Any, last: Any, n_at_once: int) -> Tile:
    """Totals after the steps from ``first`` to below ``last``, so many at once; perhaps none."""
    before, head, body, end = builder.block, *(builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    step = builder.phi(INT64)
    phis = [[builder.phi(_FLOATS) for _ in of_row] for of_row in totals]
    builder.cbranch(builder.icmp_signed("<", step, last), body, end)
    builder.position_at_end(body)
    grown: Tile = [list(of_row) for of_row in phis]
    for i in range(n_at_once):
        at = builder.add(step, INT64(i))
        grown = _add_step(builder, grown, rows, builder.shl(at, INT64(2)), panel, builder.mul(at, INT64(STEP_BYTES)))
    following = builder.add(step, INT64(n_at_once))
    builder.branch(head)
    step.add_incoming(first, before)
    step.add_incoming(following, body)
    for of_phi, of_total, of_grown in zip(phis, totals, grown, strict=True):
        for phi, total, after in zip(of_phi, of_total, of_grown, strict=True):
            phi.add_incoming(total, before)
            phi.add_incoming(after, body)
    builder.position_at_end(end)
    return [list(of_row) for of_row in phis]


def _add_tile(
    typing_context: Any, start: Any, start_row_bytes: Any, rows: Any, row_bytes: Any, panel: Any, n_steps: Any,
    out: Any, out_row_bytes: Any,
) -> Any:  # fmt: skip
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, start_row_bytes, rows, row_bytes, panel, n_steps, out, out_row_bytes = arguments
        starts, rows, ends = (
            [builder.add(first, builder.mul(apart, INT64(row))) for row in range(ROWS)]
            for first, apart in ((start, start_row_bytes), (rows, row_bytes), (out, out_row_bytes))
        )
        places = [INT64(4 * _LANES * i) for i in range(_REGISTERS)]
        totals = [[load(builder, each, place, _FLOATS, align=4) for place in places] for each in starts]
        whole = builder.and_(n_steps, INT64(-_UNROLL))
        totals = _add_steps(builder, totals, rows, panel, INT64(0), whole, _UNROLL)
        totals = _add_steps(builder, totals, rows, panel, whole, n_steps, 1)
        for end, of_row in zip(ends, totals, strict=True):
            for place, total in zip(places, of_row, strict=True):
                store(builder, total, end, place, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


#: (start, bytes from row to row of it, rows, bytes, panel, steps, out, bytes): ``out = start + rows @ panel`` for ROWS
#: rows and the COLUMNS of a panel. Memory is read and written for whole tiles. ``start`` may be ``out``, or one row for
#: all, no bytes apart from the next.
add_tile: Any = intrinsic(_add_tile)


def _all(value: float | np.floating) -> Any:
    return constant(_FLOATS, float(np.float32(value)))


def _power_of_two(builder: Any, power: Any) -> Any:
    """As ``compiled.power_of_two_float32``, and at most 2**127; of a NaN with bits of its own anything."""
    for bound, relation in ((_all(-126), ">"), (_all(127), "<")):
        power = builder.select(builder.fcmp_ordered(relation, bound, power), bound, power)
    shifted = builder.fadd(power, _all(ROUND_FLOAT32))
    rest = builder.fsub(power, builder.fsub(shifted, _all(ROUND_FLOAT32)))
    fraction = _all(POWER_COEFFICIENTS_FLOAT32[0])
    for coefficient in POWER_COEFFICIENTS_FLOAT32[1:]:
        fraction = call(builder, f"llvm.fma.v{_LANES}f32", _FLOATS, fraction, rest, _all(coefficient))
    exponent = builder.shl(builder.bitcast(shifted, _INTS), constant(_INTS, 23))
    return builder.bitcast(builder.add(builder.bitcast(fraction, _INTS), exponent), _FLOATS)


def _raise_two(typing_context: Any, row: Any, n_columns: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, n_columns = arguments
        whole = builder.and_(n_columns, INT64(-COLUMNS))
        nothing = [ir.Constant(_FLOATS, None) for _ in range(_REGISTERS)]
        totals = _raise_blocks(builder, nothing, row, INT64(0), whole, n_columns, is_whole=True)
        totals = _raise_blocks(builder, totals, row, whole, n_columns, n_columns, is_whole=False)
        sums = builder.fadd(*totals)
        width = _LANES
        while width > 1:
            width //= 2
            order = ir.Constant(_INTS, [INT32((i + width) % _LANES) for i in range(_LANES)])
            sums = builder.fadd(sums, builder.shuffle_vector(sums, ir.Constant(_FLOATS, ir.Undefined), order))
        return builder.extract_element(sums, INT32(0))

    return types.float32(types.int64, types.int64), generate


def _raise_blocks(
    builder: Any, totals: list[Any], row: Any, first: Any, last: Any, n_columns: Any, *, is_whole: bool
) -> list[Any]:
    """Totals, a register of them for each of a block, with blocks of columns from ``first`` to below ``last``."""
    before, head, body, end = builder.block, *(builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    column = builder.phi(INT64)
    phis = [builder.phi(_FLOATS) for _ in totals]
    builder.cbranch(builder.icmp_signed("<", column, last), body, end)
    builder.position_at_end(body)
    n_there = everywhere(builder, builder.trunc(builder.sub(n_columns, column), INT32), _INTS)
    grown = []
    for i, total in enumerate(phis):
        at = builder.mul(builder.add(column, INT64(_LANES * i)), INT64(4))
        powers = _power_of_two(builder, load(builder, row, at, _FLOATS, align=4))
        if not is_whole:
            lanes = ir.Constant(_INTS, [INT32(_LANES * i + lane) for lane in range(_LANES)])
            is_there = builder.icmp_signed("<", lanes, n_there)
            powers = builder.select(is_there, powers, ir.Constant(_FLOATS, None))
        store(builder, powers, row, at, align=4)
        grown.append(builder.fadd(total, powers))
    following = builder.add(column, INT64(COLUMNS))
    builder.branch(head)
    column.add_incoming(first, before)
    column.add_incoming(following, body)
    for phi, total, after in zip(phis, totals, grown, strict=True):
        phi.add_incoming(total, before)
        phi.add_incoming(after, body)
    builder.position_at_end(end)
    return phis


#: (row, columns): ``2**x``, at most 2**127, in place of at least one number; their sum. Up to whole COLUMNS of memory
#: zeros are written behind them.
raise_two: Any = intrinsic(_raise_two)


def _copy_columns(typing_context: Any, x: Any, x_row_bytes: Any, n_rows: Any, out: Any, out_row_bytes: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, x_row_bytes, n_rows, out, out_row_bytes = arguments
        with counting(builder, INT64(0), n_rows) as row:
            to = builder.mul(row, out_row_bytes)
            for place in (INT64(4 * _LANES * i) for i in range(_REGISTERS)):
                value = load(builder, x, builder.add(builder.mul(row, x_row_bytes), place), _FLOATS, align=4)
                store(builder, value, out, builder.add(to, place), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _multiply_row(typing_context: Any, x: Any, factor: Any, n_panels: Any, out: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, factor, n_panels, out = arguments
        factors = everywhere(builder, factor, _FLOATS)
        with counting(builder, INT64(0), n_panels) as panel:
            for i in range(_REGISTERS):
                at = builder.add(builder.mul(panel, INT64(STEP_BYTES)), INT64(4 * _LANES * i))
                store(builder, builder.fmul(load(builder, x, at, _FLOATS, align=4), factors), out, at, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64, types.int64), generate


#: (x, bytes from row to row, rows, out, bytes): COLUMNS of so many rows, somewhere else.
copy_columns: Any = intrinsic(_copy_columns)
#: (x, factor, panels, out): whole COLUMNS of a row times a number.
multiply_row: Any = intrinsic(_multiply_row)
