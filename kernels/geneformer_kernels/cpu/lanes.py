"""Vectors of sixteen numbers in compiled loops, with the same bits on every CPU.

LLVM makes them of the registers there are. Sums go block on block, then the upper half of the lanes onto the lower: an
order that does not depend on registers. Nothing is fused, and nothing is reordered. Everything is an address (int64) of
memory that begins anywhere, unless it is a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from geneformer_kernels.cpu.llvm import (
    FLOAT,
    INT8,
    INT16,
    INT32,
    INT64,
    call,
    constant,
    counting,
    everywhere,
    load,
    store,
)

LANES = 16
#: Forms of rounded rows: int8, the same as uint8 with 128 added, int16.
SIGNED, SHIFTED, WIDE = range(3)

_FLOATS, _INTS, _SHORTS, _BYTES = (ir.VectorType(kind, LANES) for kind in (FLOAT, INT32, INT16, INT8))
_FLOAT_BYTES, _HALF_BYTES = 4, 2


def _read(builder: Any, address: Any, block: Any, is_half: bool) -> Any:
    """Sixteen numbers of float32 or bfloat16, as float32."""
    if not is_half:
        return load(builder, address, builder.mul(block, INT64(_FLOAT_BYTES * LANES)), _FLOATS, align=4)
    bits = load(builder, address, builder.mul(block, INT64(_HALF_BYTES * LANES)), _SHORTS, align=2)
    return builder.bitcast(builder.shl(builder.zext(bits, _INTS), constant(_INTS, 16)), _FLOATS)


def _fold(builder: Any, n_blocks: Any, kind: Any, read: Callable[[Any], Any], add: Callable[[Any, Any], Any]) -> Any:
    """``add`` of what is read for each of at least one block, from zeros, then over lanes."""
    before, body, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(body)
    builder.position_at_end(body)
    block, total = builder.phi(INT64), builder.phi(kind)
    grown = add(total, read(block))
    following = builder.add(block, INT64(1))
    block.add_incoming(INT64(0), before)
    block.add_incoming(following, body)
    total.add_incoming(ir.Constant(kind, None), before)
    total.add_incoming(grown, body)
    builder.cbranch(builder.icmp_signed("<", following, n_blocks), body, end)
    builder.position_at_end(end)
    width = LANES
    while width > 1:
        width //= 2
        order = ir.Constant(_INTS, [INT32((i + width) % LANES) for i in range(LANES)])
        grown = add(grown, builder.shuffle_vector(grown, ir.Constant(kind, ir.Undefined), order))
    return builder.extract_element(grown, INT32(0))


def _adding(is_half: bool) -> Any:
    def add(typing_context: Any, x: Any, other: Any, n_blocks: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, other, n_blocks, out = arguments

            def both(block: Any) -> Any:
                value = builder.fadd(_read(builder, x, block, is_half), _read(builder, other, block, False))
                store(builder, value, out, builder.mul(block, INT64(_FLOAT_BYTES * LANES)), align=4)
                return value

            return _fold(builder, n_blocks, _FLOATS, both, builder.fadd)

        return types.float32(*[types.int64] * 4), generate

    return intrinsic(add)


def _add_widened(
    typing_context: Any, q: Any, scale: Any, between: Any, other_q: Any, other_scale: Any, n_blocks: Any, out: Any
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        q, scale, between, other_q, other_scale, n_blocks, out = arguments
        scale, other_scale = (everywhere(builder, number, _FLOATS) for number in (scale, other_scale))

        def all_three(block: Any) -> Any:
            at = builder.mul(block, INT64(LANES))
            numbers, others = (
                builder.fmul(builder.sitofp(load(builder, address, at, _BYTES, align=1), _FLOATS), factors)
                for address, factors in ((q, scale), (other_q, other_scale))
            )
            value = builder.fadd(builder.fadd(numbers, _read(builder, between, block, False)), others)
            store(builder, value, out, builder.mul(block, INT64(_FLOAT_BYTES * LANES)), align=4)
            return value

        return _fold(builder, n_blocks, _FLOATS, all_three, builder.fadd)

    address, number = types.int64, types.float32
    return number(address, number, address, address, number, address, address), generate


def _normalise(
    typing_context: Any, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any, n_blocks: Any, out: Any
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, mean, rstd, weight, bias, n_blocks, out = arguments
        mean, rstd = (everywhere(builder, number, _FLOATS) for number in (mean, rstd))
        with counting(builder, INT64(0), n_blocks) as block:
            value = builder.fmul(builder.fsub(_read(builder, x, block, False), mean), rstd)
            value = builder.fmul(value, _read(builder, weight, block, False))
            value = builder.fadd(value, _read(builder, bias, block, False))
            store(builder, value, out, builder.mul(block, INT64(_FLOAT_BYTES * LANES)), align=4)
        return context.get_dummy_value()

    address, number = types.int64, types.float32
    return types.void(address, number, number, *[address] * 4), generate


def _sum_of_squares(typing_context: Any, x: Any, mean: Any, n_blocks: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, mean, n_blocks = arguments
        means = everywhere(builder, mean, _FLOATS)

        def square(block: Any) -> Any:
            apart = builder.fsub(_read(builder, x, block, False), means)
            return builder.fmul(apart, apart)

        return _fold(builder, n_blocks, _FLOATS, square, builder.fadd)

    return types.float32(types.int64, types.float32, types.int64), generate


def _larger(builder: Any) -> Callable[[Any, Any], Any]:
    return lambda a, b: builder.select(builder.icmp_unsigned(">", a, b), a, b)


def _taking(is_half: bool) -> Any:
    def take(typing_context: Any, x: Any, smooth: Any, n_blocks: Any, row: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, smooth, n_blocks, row = arguments

            def magnitudes(block: Any) -> Any:
                value = builder.fmul(_read(builder, x, block, is_half), _read(builder, smooth, block, False))
                store(builder, value, row, builder.mul(block, INT64(_FLOAT_BYTES * LANES)), align=4)
                return builder.and_(builder.bitcast(value, _INTS), constant(_INTS, 0x7FFFFFFF))

            return _fold(builder, n_blocks, _INTS, magnitudes, _larger(builder))

        return types.uint32(*[types.int64] * 4), generate

    return intrinsic(take)


def _copying(is_half: bool) -> Any:
    def copy(typing_context: Any, x: Any, n_columns: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, n_columns, out = arguments
            kind, size = (INT16, _HALF_BYTES) if is_half else (FLOAT, _FLOAT_BYTES)
            with counting(builder, INT64(0), n_columns) as column:
                value = load(builder, x, builder.mul(column, INT64(size)), kind, align=size)
                if is_half:
                    value = builder.bitcast(builder.shl(builder.zext(value, INT32), INT32(16)), FLOAT)
                store(builder, value, out, builder.mul(column, INT64(_FLOAT_BYTES)), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return intrinsic(copy)


def _finding_largest(is_half: bool) -> Any:
    def find_largest(typing_context: Any, x: Any, n_blocks: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, n_blocks = arguments
            return _fold(builder, n_blocks, _INTS, lambda block: _magnitudes(builder, x, block), _larger(builder))

        def _magnitudes(builder: Any, x: Any, block: Any) -> Any:
            bits = builder.bitcast(_read(builder, x, block, is_half), _INTS)
            return builder.and_(bits, constant(_INTS, 0x7FFFFFFF))

        return types.uint32(types.int64, types.int64), generate

    return intrinsic(find_largest)


def _rounding(form: int, is_half: bool) -> Any:
    def round_blocks(typing_context: Any, row: Any, factor: Any, n_blocks: Any, q: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            row, factor, n_blocks, q = arguments
            factors = everywhere(builder, factor, _FLOATS)
            kind = _SHORTS if form == WIDE else _BYTES
            size = LANES * kind.element.width // 8
            with counting(builder, INT64(0), n_blocks) as block:
                value = builder.fmul(_read(builder, row, block, is_half), factors)
                value = builder.fptosi(call(builder, f"llvm.rint.v{LANES}f32", _FLOATS, value), _INTS)
                if form == SHIFTED:
                    value = builder.add(value, constant(_INTS, 128))
                store(builder, builder.trunc(value, kind), q, builder.mul(block, INT64(size)), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.float32, types.int64, types.int64), generate

    return intrinsic(round_blocks)


def _laying(form: int) -> Any:
    def lay(typing_context: Any, q: Any, n_blocks: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            q, n_blocks, out = arguments
            with counting(builder, INT64(0), n_blocks) as block:
                at = builder.mul(block, INT64(LANES))
                value = load(builder, q, at, _BYTES, align=1)
                if form == WIDE:
                    value, at = builder.sext(value, _SHORTS), builder.mul(at, INT64(2))
                elif form == SHIFTED:
                    value = builder.xor(value, constant(_BYTES, -128))
                store(builder, value, out, at, align=1)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return intrinsic(lay)


def _fill_zeros(typing_context: Any, row: Any, n_blocks: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, n_blocks = arguments
        with counting(builder, INT64(0), n_blocks) as block:
            zeros = ir.Constant(_FLOATS, None)
            store(builder, zeros, row, builder.mul(block, INT64(_FLOAT_BYTES * LANES)), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _narrowed(builder: Any, values: Any, is_half: bool) -> Any:
    """float32, or bfloat16 as ``compiled.to_bfloat16`` rounds to it."""
    if not is_half:
        return values
    bits = builder.bitcast(values, _INTS)
    last = builder.and_(builder.lshr(bits, constant(_INTS, 16)), constant(_INTS, 1))
    rounded = builder.add(builder.add(bits, constant(_INTS, 0x7FFF)), last)
    is_nan = builder.fcmp_unordered("uno", values, values)
    rounded = builder.select(is_nan, builder.or_(bits, constant(_INTS, 0x400000)), rounded)
    return builder.trunc(builder.lshr(rounded, constant(_INTS, 16)), _SHORTS)


def _write(builder: Any, values: Any, out: Any, column: Any, n_columns: Any, is_half: bool) -> None:
    """Sixteen numbers to columns from ``column`` on of the row at ``out``, as far as there are ``n_columns``."""
    values = _narrowed(builder, values, is_half)
    size, kind = (_HALF_BYTES, "i16") if is_half else (_FLOAT_BYTES, "f32")
    at = builder.mul(column, INT64(size))
    is_whole = builder.icmp_signed("<=", builder.add(column, INT64(LANES)), n_columns)
    with builder.if_else(is_whole) as (whole, rest):
        with whole:
            store(builder, values, out, at, align=size)
        with rest:
            n_there = builder.trunc(builder.sub(n_columns, column), INT32)
            lanes = ir.Constant(_INTS, [INT32(i) for i in range(LANES)])
            is_there = builder.icmp_signed("<", lanes, everywhere(builder, n_there, _INTS))
            address = builder.inttoptr(builder.add(out, at), ir.PointerType(values.type))
            name = f"llvm.masked.store.v{LANES}{kind}.p0"
            call(builder, name, ir.VoidType(), values, address, INT32(size), is_there)


def _finishing(is_half: bool) -> Any:
    def finish(
        typing_context: Any, sums: Any, n_rows: Any, n_columns: Any, row_scale: Any, scale: Any, bias: Any, shift: Any,
        floor: Any, out: Any, out_row_bytes: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            sums, n_rows, n_columns, row_scale, scale, bias, shift, floor, out, out_row_bytes = arguments
            n_panels = builder.sdiv(builder.add(n_columns, INT64(LANES - 1)), INT64(LANES))
            floors = everywhere(builder, floor, _FLOATS)
            row_bytes = builder.mul(n_panels, INT64(4 * LANES))
            with counting(builder, INT64(0), n_panels) as panel:
                column = builder.mul(panel, INT64(LANES))
                at = builder.mul(column, INT64(4))
                scales, biases = (load(builder, address, at, _FLOATS, align=4) for address in (scale, bias))
                shifts = load(builder, shift, at, _INTS, align=4)
                with counting(builder, INT64(0), n_rows) as i_row:
                    own = load(builder, row_scale, builder.mul(i_row, INT64(4)), FLOAT, align=4)
                    values = load(builder, sums, builder.add(builder.mul(i_row, row_bytes), at), _INTS, align=4)
                    values = builder.sitofp(builder.sub(values, shifts), _FLOATS)
                    values = builder.fmul(builder.fmul(values, everywhere(builder, own, _FLOATS)), scales)
                    values = builder.fadd(values, biases)
                    # NaN is below nothing, and stays.
                    values = builder.select(builder.fcmp_ordered("<", values, floors), floors, values)
                    here = builder.add(out, builder.mul(i_row, out_row_bytes))
                    _write(builder, values, here, column, n_columns, is_half)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, types.float32, types.int64, types.int64), generate

    return intrinsic(finish)


def _writing(is_half: bool) -> Any:
    def write(typing_context: Any, values: Any, n_rows: Any, n_columns: Any, out: Any, out_row_bytes: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            values, n_rows, n_columns, out, out_row_bytes = arguments
            n_panels = builder.sdiv(builder.add(n_columns, INT64(LANES - 1)), INT64(LANES))
            row_bytes = builder.mul(n_panels, INT64(_FLOAT_BYTES * LANES))
            with counting(builder, INT64(0), n_rows) as i_row:
                row, here = (builder.mul(i_row, step) for step in (row_bytes, out_row_bytes))
                row, here = builder.add(values, row), builder.add(out, here)
                with counting(builder, INT64(0), n_panels) as panel:
                    column = builder.mul(panel, INT64(LANES))
                    _write(builder, _read(builder, row, panel, False), here, column, n_columns, is_half)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return intrinsic(write)


#: (x, other, blocks, out): x + other as float32 to ``out``; their sum. ``x`` is float32, or bfloat16.
add_floats, add_halves = map(_adding, (False, True))
#: (q, scale, between, other_q, other_scale, blocks, out): q * scale + between + other_q * other_scale, of rows of int8
#: and one of float32, as float32 to ``out``; their sum.
add_widened: Any = intrinsic(_add_widened)
#: (x, mean, blocks): the sum of squares of what is above or below the mean.
sum_of_squares: Any = intrinsic(_sum_of_squares)
#: (x, mean, rstd, weight, bias, blocks, out): (x - mean) * rstd * weight + bias to ``out``.
normalise: Any = intrinsic(_normalise)
#: (x, smooth, blocks, row): x * smooth as float32 to ``row``; the bits of its largest magnitude, which come in the
#: order of magnitudes. NaN is the largest of all. ``x`` is float32, or bfloat16.
take_floats, take_halves = _taking(False), _taking(True)
#: (x, columns, out): float32 or bfloat16 as float32.
copy_floats, copy_halves = map(_copying, (False, True))
#: (q, blocks, out): int8 in a form of rounded rows.
lay_signed, lay_shifted, lay_wide = map(_laying, (SIGNED, SHIFTED, WIDE))
#: (row, blocks): zeros of float32.
fill_zeros: Any = intrinsic(_fill_zeros)
#: (x, blocks): the bits of the largest magnitude of float32 or bfloat16, as above.
largest_floats, largest_halves = _finding_largest(False), _finding_largest(True)
#: (row, factor, blocks, q): row * factor, rounded to the nearest integer, in a form of rounded rows; of float32 ...
round_signed, round_shifted, round_wide = (_rounding(form, False) for form in (SIGNED, SHIFTED, WIDE))
#: ... or bfloat16.
round_halves_signed, round_halves_shifted, round_halves_wide = (
    _rounding(form, True) for form in (SIGNED, SHIFTED, WIDE)
)
#: (sums, rows, columns, row_scale, scale, bias, shift, floor, out, bytes per row of it): max((sums - shift) * row_scale
#: * scale + bias, floor) as float32 or bfloat16. Sums are int32, of whole sixteens of columns, and so are scale, bias
#: and shift.
finish_floats, finish_halves = map(_finishing, (False, True))
#: (values, rows, columns, out, bytes per row of it): float32 of whole sixteens of columns as float32 or bfloat16.
write_floats, write_halves = map(_writing, (False, True))
