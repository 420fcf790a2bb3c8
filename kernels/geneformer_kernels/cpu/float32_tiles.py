"""Products and powers of float32 on a CPU with AVX2: the innermost loops, for loops that numba compiles.

A tile is six rows times 16 columns. Its sums stay in twelve of the sixteen registers while all of K goes by, two hold
numbers of a panel (16 columns, one after the other for each of K), one a number of a row: a step of K is twelve fused
multiply-adds for eight loads, what the arithmetic units of every CPU with AVX2 can take (the shape is that of BLIS;
Van Zee and van de Geijn, doi:10.1145/2764454). With AVX-512 a register holds the 16 columns, and a tile is twelve rows
(:data:`WIDE`).

Each number of a result is a chain of fused multiply-adds over K in one order, from what was there or from zero: its
bits depend neither on the rows around it nor on how many there are. Everything is an address or a number (int64).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.extending import intrinsic

from geneformer_kernels.cpu.compiled import POWER_COEFFICIENTS_FLOAT32, ROUND_FLOAT32
from geneformer_kernels.cpu.llvm import FLOAT, INT32, INT64, call, constant, counting, everywhere, load, store

#: Rows in work at a time, and columns of a panel.
ROWS, COLUMNS = 6, 16
#: Bytes of a step of a panel.
STEP_BYTES = 4 * COLUMNS
_UNROLL = 4


@dataclass(frozen=True)
class Shape:
    """Rows of a tile, and numbers of a register."""

    rows: int
    lanes: int

    @property
    def registers(self) -> int:
        """Of a panel's columns."""
        return COLUMNS // self.lanes

    @property
    def floats(self) -> Any:
        """A register of numbers."""
        return ir.VectorType(FLOAT, self.lanes)

    @property
    def ints(self) -> Any:
        """A register of integers."""
        return ir.VectorType(INT32, self.lanes)

    @property
    def nothing(self) -> Any:
        """A register of zeros."""
        return ir.Constant(self.floats, None)

    def all(self, value: float | np.floating) -> Any:
        """A register of one number."""
        return constant(self.floats, float(np.float32(value)))


#: For AVX2 and for AVX-512.
NARROW, WIDE = Shape(ROWS, 8), Shape(2 * ROWS, 16)


def shape_here() -> Shape:
    """:data:`WIDE` where numba compiles for a CPU with AVX-512: it can be told to compile for a lesser one."""
    config: Any = numba.config
    is_for_this_cpu = config.CPU_NAME is None and config.CPU_FEATURES is None and config.ENABLE_AVX
    return WIDE if is_for_this_cpu and get_host_cpu_features().get("avx512f") else NARROW


Tile = list[list[Any]]


def _add_step(
    shape: Shape, builder: Any, totals: Tile, rows: list[Any], row_at: Any, panel: Any, panel_at: Any
) -> Tile:
    """Totals with one more of K."""
    columns = [
        load(builder, panel, builder.add(panel_at, INT64(4 * shape.lanes * i)), shape.floats, align=4)
        for i in range(shape.registers)
    ]
    grown = []
    for row, of_row in zip(rows, totals, strict=True):
        number = everywhere(builder, load(builder, row, row_at, FLOAT, align=4), shape.floats)
        grown.append(
            [
                call(builder, f"llvm.fma.v{shape.lanes}f32", shape.floats, number, column, total)
                for column, total in zip(columns, of_row, strict=True)
            ]
        )
    return grown


def _add_steps(
    shape: Shape, builder: Any, totals: Tile, rows: list[Any], panel: Any, first: Any, last: Any, n_at_once: int
) -> Tile:
    """Totals after the steps from ``first`` to below ``last``, so many at once; perhaps none."""
    before, head, body, end = builder.block, *(builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    step = builder.phi(INT64)
    phis = [[builder.phi(shape.floats) for _ in of_row] for of_row in totals]
    builder.cbranch(builder.icmp_signed("<", step, last), body, end)
    builder.position_at_end(body)
    grown: Tile = [list(of_row) for of_row in phis]
    for i in range(n_at_once):
        at = builder.add(step, INT64(i))
        row_at, panel_at = builder.shl(at, INT64(2)), builder.mul(at, INT64(STEP_BYTES))
        grown = _add_step(shape, builder, grown, rows, row_at, panel, panel_at)
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


def _adding(shape: Shape) -> Callable[..., Any]:
    def add(
        typing_context: Any, start: Any, start_row_bytes: Any, rows: Any, row_bytes: Any, panel: Any, n_steps: Any,
        out: Any, out_row_bytes: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            start, start_row_bytes, rows, row_bytes, panel, n_steps, out, out_row_bytes = arguments
            starts, rows, ends = (
                [builder.add(first, builder.mul(apart, INT64(row))) for row in range(shape.rows)]
                for first, apart in ((start, start_row_bytes), (rows, row_bytes), (out, out_row_bytes))
            )
            places = [INT64(4 * shape.lanes * i) for i in range(shape.registers)]
            totals = [[load(builder, each, place, shape.floats, align=4) for place in places] for each in starts]
            whole = builder.and_(n_steps, INT64(-_UNROLL))
            totals = _add_steps(shape, builder, totals, rows, panel, INT64(0), whole, _UNROLL)
            totals = _add_steps(shape, builder, totals, rows, panel, whole, n_steps, 1)
            for end, of_row in zip(ends, totals, strict=True):
                for place, total in zip(places, of_row, strict=True):
                    store(builder, total, end, place, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return intrinsic(add)


def _power_of_two(shape: Shape, builder: Any, power: Any) -> Any:
    """As ``compiled.power_of_two_float32``, and at most 2**127; of a NaN with bits of its own anything."""
    for bound, relation in ((shape.all(-126), ">"), (shape.all(127), "<")):
        power = builder.select(builder.fcmp_ordered(relation, bound, power), bound, power)
    shifted = builder.fadd(power, shape.all(ROUND_FLOAT32))
    rest = builder.fsub(power, builder.fsub(shifted, shape.all(ROUND_FLOAT32)))
    fraction = shape.all(POWER_COEFFICIENTS_FLOAT32[0])
    for coefficient in POWER_COEFFICIENTS_FLOAT32[1:]:
        fused = f"llvm.fma.v{shape.lanes}f32"
        fraction = call(builder, fused, shape.floats, fraction, rest, shape.all(coefficient))
    exponent = builder.shl(builder.bitcast(shifted, shape.ints), constant(shape.ints, 23))
    return builder.bitcast(builder.add(builder.bitcast(fraction, shape.ints), exponent), shape.floats)


def _raising(shape: Shape) -> Callable[..., Any]:
    def raise_two(typing_context: Any, row: Any, n_columns: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            row, n_columns = arguments
            whole = builder.and_(n_columns, INT64(-COLUMNS))
            totals = [shape.nothing] * shape.registers
            totals = _raise_blocks(shape, builder, totals, row, INT64(0), whole, n_columns, is_whole=True)
            totals = _raise_blocks(shape, builder, totals, row, whole, n_columns, n_columns, is_whole=False)
            sums = functools.reduce(builder.fadd, totals)
            width = shape.lanes
            while width > 1:
                width //= 2
                order = ir.Constant(shape.ints, [INT32((i + width) % shape.lanes) for i in range(shape.lanes)])
                moved = builder.shuffle_vector(sums, ir.Constant(shape.floats, ir.Undefined), order)
                sums = builder.fadd(sums, moved)
            return builder.extract_element(sums, INT32(0))

        return types.float32(types.int64, types.int64), generate

    return intrinsic(raise_two)


def _raise_blocks(
    shape: Shape, builder: Any, totals: list[Any], row: Any, first: Any, last: Any, n_columns: Any, *, is_whole: bool
) -> list[Any]:
    """Totals, a register of them for each of a block, with blocks of columns from ``first`` to below ``last``."""
    before, head, body, end = builder.block, *(builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    column = builder.phi(INT64)
    phis = [builder.phi(shape.floats) for _ in totals]
    builder.cbranch(builder.icmp_signed("<", column, last), body, end)
    builder.position_at_end(body)
    n_there = everywhere(builder, builder.trunc(builder.sub(n_columns, column), INT32), shape.ints)
    grown = []
    for i, total in enumerate(phis):
        at = builder.mul(builder.add(column, INT64(shape.lanes * i)), INT64(4))
        powers = _power_of_two(shape, builder, load(builder, row, at, shape.floats, align=4))
        if not is_whole:
            lanes = ir.Constant(shape.ints, [INT32(shape.lanes * i + lane) for lane in range(shape.lanes)])
            is_there = builder.icmp_signed("<", lanes, n_there)
            powers = builder.select(is_there, powers, shape.nothing)
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


def _copy_columns(typing_context: Any, x: Any, x_row_bytes: Any, n_rows: Any, out: Any, out_row_bytes: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, x_row_bytes, n_rows, out, out_row_bytes = arguments
        with counting(builder, INT64(0), n_rows) as row:
            to = builder.mul(row, out_row_bytes)
            for place in (INT64(4 * NARROW.lanes * i) for i in range(NARROW.registers)):
                value = load(builder, x, builder.add(builder.mul(row, x_row_bytes), place), NARROW.floats, align=4)
                store(builder, value, out, builder.add(to, place), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _multiply_row(typing_context: Any, x: Any, factor: Any, n_panels: Any, out: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, factor, n_panels, out = arguments
        factors = everywhere(builder, factor, NARROW.floats)
        with counting(builder, INT64(0), n_panels) as panel:
            for i in range(NARROW.registers):
                at = builder.add(builder.mul(panel, INT64(STEP_BYTES)), INT64(4 * NARROW.lanes * i))
                store(builder, builder.fmul(load(builder, x, at, NARROW.floats, align=4), factors), out, at, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64, types.int64), generate


#: (start, bytes from row to row of it, rows, bytes, panel, steps, out, bytes): ``out = start + rows @ panel`` for the
#: rows of a tile and the COLUMNS of a panel. Memory is read and written for whole tiles. ``start`` may be ``out``, or
#: one row for all, no bytes apart from the next.
add_tile: Any = _adding(NARROW)
add_wide_tile: Any = _adding(WIDE)
#: (row, columns): ``2**x``, at most 2**127, in place of at least one number; their sum. Up to whole COLUMNS of memory
#: zeros are written behind them.
raise_two: Any = _raising(NARROW)
raise_two_widely: Any = _raising(WIDE)
#: (x, bytes from row to row, rows, out, bytes): COLUMNS of so many rows, somewhere else.
copy_columns: Any = intrinsic(_copy_columns)
#: (x, factor, panels, out): whole COLUMNS of a row times a number.
multiply_row: Any = intrinsic(_multiply_row)
