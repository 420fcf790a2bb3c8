"""Products of int8 on the tiles of a CPU with amx_int8, for loops that numba compiles.

A tile holds 16 rows of 64 bytes. Two tiles of rows meet two of weights in four of sums: 32 rows x 32 columns, 64 of K
at a time. What becomes of the sums (scales, bias, ReLU, narrowing) is done for one block while tiles multiply the next,
row by row between their instructions: of 256 -> 256 columns, 512 rows take 18 us so, 25 one after the other, and the
products alone 16 (one core of a Xeon, 2026-11-30).

The sums are exact, and the rest rounds as torch would, operation by operation: none is fused with another. Everything
is an address (int64).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once, unpack_tuple
from numba.extending import intrinsic

from geneformer_kernels.cpu import amx
from geneformer_kernels.cpu.amx import TILE_BYTES, TILE_ROWS, TILE_WIDTH, configure_tiles, release_tiles
from geneformer_kernels.cpu.compiled import LOOP
from geneformer_kernels.cpu.llvm import (
    BFLOAT16,
    BOOL,
    FLOAT,
    HALF,
    INT8,
    INT16,
    INT32,
    INT64,
    VOID,
    call,
    constant,
    counting,
    everywhere,
    load,
    pointer,
    smaller,
)

#: Bytes of scratch memory, from a multiple of 64: the sums of two blocks.
SCRATCH_BYTES = 2 * 32 * 32 * 4
#: Kinds of results.
FLOAT32_RESULT, BFLOAT16_RESULT, FLOAT16_RESULT = range(3)

# Rows and columns of a block; a tile of weights is sixteen steps of four of K, 16 columns each.
_ROWS, _COLUMNS, _STEPS = 32, 32, 16
_SUMS_ROW_BYTES, _SUMS_BYTES = 4 * _COLUMNS, 4 * _COLUMNS * _ROWS
# Numbers of tiles: of sums for either tile of rows and either of weights.
_SUMS, _OF_ROWS, _OF_WEIGHTS = ((0, 1), (2, 3)), (4, 5), (6, 7)

_FLOATS, _INTS, _SHORTS, _BITS = (ir.VectorType(kind, _COLUMNS) for kind in (FLOAT, INT32, INT16, BOOL))
_HALF_OF_BITS = ir.VectorType(BOOL, 16)

_FEATURES = ("amx-tile", "amx-int8", "avx512bf16", "avx512bw")


def why_not() -> str | None:
    """Why these products cannot be computed in this process; None where they can."""
    return amx.why_not(*_FEATURES)


def _is_compilable() -> bool:
    return amx.why_not_compilable(*_FEATURES) is None


def _add_products(builder: Any, rows: Any, row_bytes: Any, panels: Any, next_panel: Any, step: Any) -> None:
    """The tiles of sums grow by the products of a tile's width."""
    for i, tile in enumerate(_OF_WEIGHTS):
        offset = builder.mul(step, INT64(TILE_BYTES))
        at = pointer(builder, panels, builder.add(offset, next_panel) if i else offset, INT8)
        call(builder, "llvm.x86.tileloadd64", VOID, INT8(tile), at, INT64(TILE_WIDTH))
    for i, tile in enumerate(_OF_ROWS):
        offset = builder.add(builder.mul(row_bytes, INT64(TILE_ROWS * i)), builder.mul(step, INT64(TILE_WIDTH)))
        at = pointer(builder, rows, offset, INT8)
        call(builder, "llvm.x86.tileloadd64", VOID, INT8(tile), at, row_bytes)
        for sums, weights in zip(_SUMS[i], _OF_WEIGHTS, strict=True):
            call(builder, "llvm.x86.tdpbssd", VOID, INT8(sums), INT8(tile), INT8(weights))


# 32 numbers of float32 as those of a result, and which of the latter (None: none) are not what they should be.
Narrowing = Callable[[Any, Any], tuple[Any, Any]]


def _to_float32(builder: Any, values: Any) -> tuple[Any, Any]:
    return values, None


def _to_float16(builder: Any, values: Any) -> tuple[Any, Any]:
    return builder.bitcast(builder.fptrunc(values, ir.VectorType(HALF, _COLUMNS)), _SHORTS), None


def _to_bfloat16(builder: Any, values: Any) -> tuple[Any, Any]:
    """As ``compiled.to_bfloat16``, but for subnormal numbers, of which the instruction makes zero."""
    low, high = (
        builder.shuffle_vector(values, values, ir.Constant(ir.VectorType(INT32, 16), [INT32(i + j) for j in range(16)]))
        for i in (0, 16)
    )
    narrow = call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", ir.VectorType(BFLOAT16, _COLUMNS), high, low)
    subnormal = INT32(0x20)  # of the classes of numbers
    are_wrong = (call(builder, "llvm.x86.avx512.fpclass.ps.512", _HALF_OF_BITS, x, subnormal) for x in (low, high))
    return builder.bitcast(narrow, _SHORTS), builder.or_(*are_wrong)


def _to_any_bfloat16(builder: Any, values: Any) -> tuple[Any, Any]:
    """As ``compiled.to_bfloat16``, in four times as many instructions as the one."""
    bits = builder.bitcast(values, _INTS)
    last = builder.and_(builder.lshr(bits, constant(_INTS, 16)), constant(_INTS, 1))
    rounded = builder.add(builder.add(bits, constant(_INTS, 0x7FFF)), last)
    is_nan = builder.fcmp_unordered("uno", values, values)
    rounded = builder.select(is_nan, builder.or_(bits, constant(_INTS, 0x400000)), rounded)
    return builder.trunc(builder.lshr(rounded, constant(_INTS, 16)), _SHORTS), None


class _Results:
    """Code that makes results of the sums of a block, row by row.

    ``block``: (sums, rows, row_scale, column_scale, bias, floor, out, bytes per row of it, columns).
    """

    def __init__(self, builder: Any, narrow: Narrowing, block: Any) -> None:
        self.builder, self.narrow = builder, narrow
        self.sums, self.n_rows, self.row_scale, column_scale, bias, floor, self.out, self.out_row_bytes, n_columns = (
            unpack_tuple(builder, block)
        )
        bits = builder.lshr(INT64(-1), builder.sub(INT64(64), n_columns))
        self.is_there = builder.bitcast(builder.trunc(bits, INT32), _BITS)
        self.column_scale = self._of_columns(column_scale, self.is_there, 0.0)
        # -0.0 is what adding changes nothing, not even the sign of a zero.
        has_bias = builder.icmp_signed("!=", bias, INT64(0))
        has_bias = builder.and_(everywhere(builder, has_bias, _BITS), self.is_there)
        self.bias = self._of_columns(bias, has_bias, -0.0)
        self.floor = everywhere(builder, floor, _FLOATS)
        self.are_wrong = alloca_once(builder, INT16)
        builder.store(INT16(0), self.are_wrong)

    def _of_columns(self, address: Any, is_there: Any, otherwise: float) -> Any:
        at = pointer(self.builder, address, INT64(0), _FLOATS)
        rest = constant(_FLOATS, otherwise)
        return call(self.builder, f"llvm.masked.load.v{_COLUMNS}f32.p0", _FLOATS, at, INT32(4), is_there, rest)

    def make(self, i_row: Any) -> None:
        """A row of results."""
        builder = self.builder
        sums = load(builder, self.sums, builder.mul(i_row, INT64(_SUMS_ROW_BYTES)), _INTS)
        scale = load(builder, self.row_scale, builder.mul(i_row, INT64(4)), FLOAT, align=4)
        values = builder.fmul(builder.sitofp(sums, _FLOATS), everywhere(builder, scale, _FLOATS))
        values = builder.fadd(builder.fmul(values, self.column_scale), self.bias)
        # NaN is below nothing, and stays.
        values = builder.select(builder.fcmp_ordered("<", values, self.floor), self.floor, values)
        narrow, are_wrong = self.narrow(builder, values)
        at = pointer(builder, self.out, builder.mul(i_row, self.out_row_bytes), narrow.type)
        kind, align = ("f32", INT32(4)) if narrow.type == _FLOATS else ("i16", INT32(2))
        call(builder, f"llvm.masked.store.v{_COLUMNS}{kind}.p0", VOID, narrow, at, align, self.is_there)
        if are_wrong is not None:
            are_wrong = builder.bitcast(are_wrong, INT16)
            builder.store(builder.or_(builder.load(self.are_wrong), are_wrong), self.are_wrong)


def _multiplying(narrow: Narrowing) -> Callable[..., Any]:
    """``multiply(block, other)``: the sums of one block, and meanwhile the results of another, as of :class:`_Results`.

    ``block``: (rows, bytes per row, panels, bytes to the next one, steps, sums). Returns whether some of the results
    must be made again.
    """

    def multiply(typing_context: Any, block: Any, other: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if not _is_compilable():
                return INT64(0)
            rows, row_bytes, panels, next_panel, n_steps, sums = unpack_tuple(builder, arguments[0])
            results = _Results(builder, narrow, arguments[1])
            n_steps = builder.sdiv(n_steps, INT64(_STEPS))
            results_per_step = builder.sdiv(builder.add(n_steps, INT64(_ROWS - 1)), n_steps)
            for tile in itertools.chain(*_SUMS):
                call(builder, "llvm.x86.tilezero", VOID, INT8(tile))
            with counting(builder, INT64(0), n_steps) as step:
                _add_products(builder, rows, row_bytes, panels, next_panel, step)
                first = builder.mul(step, results_per_step)
                stop = smaller(builder, builder.add(first, results_per_step), results.n_rows)
                with counting(builder, first, stop) as i_row:
                    results.make(i_row)
            for i, j in itertools.product(range(2), range(2)):
                offset = INT64(TILE_ROWS * i * _SUMS_ROW_BYTES + TILE_WIDTH * j)
                at = pointer(builder, sums, offset, INT8)
                call(builder, "llvm.x86.tilestored64", VOID, INT8(_SUMS[i][j]), at, INT64(_SUMS_ROW_BYTES))
            return builder.zext(builder.load(results.are_wrong), INT64)

        return types.int64(block, other), generate

    return intrinsic(multiply)


def _finishing(narrow: Narrowing) -> Callable[..., Any]:
    """``finish(block)``: the results of one block, as of :class:`_Results`, while no tile is at work."""

    def finish(typing_context: Any, block: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if _is_compilable():
                results = _Results(builder, narrow, arguments[0])
                with counting(builder, INT64(0), results.n_rows) as i_row:
                    results.make(i_row)
            return context.get_dummy_value()

        return types.void(block), generate

    return intrinsic(finish)


_multiply_float32, _multiply_bfloat16, _multiply_float16 = map(_multiplying, (_to_float32, _to_bfloat16, _to_float16))
_finish_float32, _finish_bfloat16, _finish_float16 = map(_finishing, (_to_float32, _to_any_bfloat16, _to_float16))


@numba.njit(**LOOP)
def multiply_rows_amx(
    rows, row_bytes, n_rows, row_scale, panels, n_steps, n_columns, column_scale, bias, floor, kind, out, out_row_bytes,
    scratch,
):  # fmt: skip
    """``out = max(rows @ weights.T * row_scale * column_scale + bias, floor)``, on this thread.

    Parameters
    ----------
    rows, row_bytes, n_rows
        int8, ``row_bytes`` apart, of which ``4 * n_steps`` are read; of rows, up to the next multiple of 32.
    row_scale, column_scale, bias
        float32 [n_rows], [n_columns], [n_columns]; the address of ``bias`` may be 0, for none.
    panels, n_steps
        int8 [n_columns / 16, n_steps, 16, 4], columns rounded up: channels by sixteens, K by fours; ``n_steps`` is a
        multiple of 16. What K and the rows end with there is zero.
    floor
        float32: 0 for ReLU, minus infinity otherwise. NaN stays NaN.
    kind, out, out_row_bytes
        One of the kinds of results, and where [n_rows, n_columns] of them go.
    scratch
        ``SCRATCH_BYTES`` at a multiple of 64, not shared with other threads.
    """
    if n_rows <= 0 or n_columns <= 0:
        return
    panel_bytes = n_steps * TILE_WIDTH
    result_bytes = 4 if kind == FLOAT32_RESULT else 2
    sums, other_sums = scratch, scratch + _SUMS_BYTES
    # To begin with, a block without rows.
    other = (other_sums, 0, row_scale, column_scale, bias, floor, out, out_row_bytes, min(_COLUMNS, n_columns))
    configure_tiles()
    for column in range(0, n_columns, _COLUMNS):
        panel = panels + column // TILE_ROWS * panel_bytes
        # The last one of an odd number counts twice.
        next_panel = panel_bytes if n_columns - column > TILE_ROWS else 0
        for row in range(0, n_rows, _ROWS):
            block = (rows + row * row_bytes, row_bytes, panel, next_panel, n_steps, sums)
            if kind == FLOAT32_RESULT:
                _multiply_float32(block, other)
            elif kind == FLOAT16_RESULT:
                _multiply_float16(block, other)
            elif _multiply_bfloat16(block, other):
                _finish_bfloat16(other)
            other = (
                sums,
                min(_ROWS, n_rows - row),
                row_scale + 4 * row,
                column_scale + 4 * column,
                bias + 4 * column if bias else 0,
                floor,
                out + row * out_row_bytes + column * result_bytes,
                out_row_bytes,
                min(_COLUMNS, n_columns - column),
            )
            sums, other_sums = other_sums, sums
    release_tiles()
    if kind == FLOAT32_RESULT:
        _finish_float32(other)
    elif kind == FLOAT16_RESULT:
        _finish_float16(other)
    else:
        _finish_bfloat16(other)
