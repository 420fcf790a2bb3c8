"""Products of int8 rows and packed int8 weights on x86, exact in int32: the innermost loops, for numba.

A tile of six rows and 16 columns (64 with avx512_vnni) stays in registers while all of K goes by. What the columns'
instruction takes is a matter of the instruction set:

* AVX2 multiplies pairs of int16 (``vpmaddwd``). Its product of unsigned and signed bytes (``vpmaddubsw``) adds two in
  16 bits, and takes the largest number where that does not hold the sum. It serves where no activation is negative,
  as behind a ReLU: 2 x 127 x 128 does fit.
* VNNI (``vpdpbusd``) adds four products of unsigned and signed bytes to int32. Activations go in as ``q + 128``, and
  128 times the sum of a column's weights is taken away again.

Everything is an address or a number (int64). Packed weights, and what rows and sums look like: ``int8_pack.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import types
from numba.extending import intrinsic

from geneformer_kernels.cpu.compiled import LOOP
from geneformer_kernels.cpu.instructions import is_compiled_for
from geneformer_kernels.cpu.llvm import FLOAT, INT8, INT16, INT32, INT64, call, constant, everywhere, load, store

#: Rows in work at a time.
ROWS = 6
#: Rows that a buffer has beyond its last one: what loops read and write there means nothing.
SLACK = 32
# Steps of K in a turn. LLVM knows that integers may be added in any order: it takes the sums of four steps apart, and
# keeps half of them in memory. Two at once, the products of AVX2 are 1.48 (int16) and 1.88 times (int8) as fast as
# those of float32, four at once 1.34 and 1.78 (a Xeon held to AVX2, 2026-11-30). It cannot look into VNNI's.
_UNROLL_AVX2, _UNROLL_VNNI = 2, 4

#: (builder, total, activations, weights) -> total; all of them vectors of int32 in memory.
Dot = Callable[[Any, Any, Any, Any], Any]


def _vector(kind: Any, vector_bytes: int) -> Any:
    return ir.VectorType(kind, vector_bytes * 8 // kind.width)


def _dot_pairs(builder: Any, total: Any, activations: Any, weights: Any) -> Any:
    pairs = _vector(INT16, 32)
    a, b = (builder.bitcast(vector, pairs) for vector in (activations, weights))
    return builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", total.type, a, b))


def _dot_unsigned(builder: Any, total: Any, activations: Any, weights: Any) -> Any:
    pairs = _vector(INT16, 32)
    a, b = (builder.bitcast(vector, _vector(INT8, 32)) for vector in (activations, weights))
    sums = call(builder, "llvm.x86.avx2.pmadd.ub.sw", pairs, a, b)
    ones = constant(pairs, 1)
    return builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", total.type, sums, ones))


def _dot_vnni(builder: Any, total: Any, activations: Any, weights: Any) -> Any:
    vector_bytes = total.type.count * 4
    if llvm_version_info[0] >= 21:  # before, four bytes at a time were an integer
        activations, weights = (
            builder.bitcast(vector, _vector(INT8, vector_bytes)) for vector in (activations, weights)
        )
    name = f"llvm.x86.avx512.vpdpbusd.{vector_bytes * 8}"
    return call(builder, name, total.type, total, activations, weights)


def _tile(name: str, dot: Dot, vector_bytes: int, n_vectors: int, *, is_across_panels: bool) -> Callable[..., None]:
    """Sums of ROWS rows and ``n_vectors`` registers of columns: those of one panel, or the same of several."""

    def tile(typing_context, rows, row_bytes, panels, panel_bytes, n_steps, sums, sum_bytes):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if is_compiled_for(name):
                _generate_tile(builder, dot, vector_bytes, n_vectors, is_across_panels, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return intrinsic(tile)


def _generate_tile(
    builder: Any, dot: Dot, vector_bytes: int, n_vectors: int, is_across_panels: bool,
    rows: Any, row_bytes: Any, panels: Any, panel_bytes: Any, n_steps: Any, sums: Any, sum_bytes: Any,
) -> None:  # fmt: skip
    apart = panel_bytes if is_across_panels else INT64(vector_bytes)
    starts = [builder.add(panels, builder.mul(apart, INT64(i))) for i in range(n_vectors)]
    between = 64 if is_across_panels else vector_bytes
    for i_row, grown in enumerate(
        _totals(builder, dot, _vector(INT32, vector_bytes), rows, row_bytes, starts, n_steps)
    ):
        row_at = builder.add(sums, builder.mul(sum_bytes, INT64(i_row)))
        for i, total in enumerate(grown):
            store(builder, total, row_at, INT64(between * i), align=vector_bytes)


def _totals(
    builder: Any, dot: Dot, kind: Any, rows: Any, row_bytes: Any, starts: list[Any], n_steps: Any
) -> list[list[Any]]:
    """The sums of ROWS rows and a register of columns for each of ``starts``."""
    n_at_once = _UNROLL_VNNI if dot is _dot_vnni else _UNROLL_AVX2
    before, body, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
    row_starts = [builder.add(rows, builder.mul(row_bytes, INT64(row))) for row in range(ROWS)]
    builder.branch(body)
    builder.position_at_end(body)
    step = builder.phi(INT64)
    step.add_incoming(INT64(0), before)
    phis = [[builder.phi(kind) for _ in starts] for _ in range(ROWS)]
    totals: list[list[Any]] = [list(row) for row in phis]
    for i in range(n_at_once):
        at = builder.add(step, INT64(i))
        weights = [load(builder, start, builder.shl(at, INT64(6)), kind, align=kind.count * 4) for start in starts]
        for i_row, start in enumerate(row_starts):
            four = everywhere(builder, load(builder, start, builder.shl(at, INT64(2)), INT32, align=4), kind)
            totals[i_row] = [
                dot(builder, total, four, weight) for total, weight in zip(totals[i_row], weights, strict=True)
            ]
    following = builder.add(step, INT64(n_at_once))
    step.add_incoming(following, body)
    for row, grown in zip(phis, totals, strict=True):
        for phi, total in zip(row, grown, strict=True):
            phi.add_incoming(ir.Constant(kind, None), before)
            phi.add_incoming(total, body)
    builder.cbranch(builder.icmp_signed("<", following, n_steps), body, end)
    builder.position_at_end(end)
    return totals


def _finished_tile(dot: Dot) -> Callable[..., None]:
    """A tile of AVX2 whose sums become floats in registers, as ``lanes.finish_floats`` makes them of shift 0.

    To write sums and read them again takes a fifth of the time of a product of 256 numbers.
    """

    def tile(typing_context, rows, row_bytes, panel, n_steps, row_scales, scales, biases, floor, out, out_row_bytes):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if is_compiled_for("avx2"):
                _generate_finished(builder, dot, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, types.float32, types.int64, types.int64), generate

    return intrinsic(tile)


def _generate_finished(
    builder: Any, dot: Dot, rows: Any, row_bytes: Any, panel: Any, n_steps: Any, row_scales: Any, scales: Any,
    biases: Any, floor: Any, out: Any, out_row_bytes: Any,
) -> None:  # fmt: skip
    floats, places = ir.VectorType(FLOAT, 8), [INT64(0), INT64(32)]
    starts = [builder.add(panel, place) for place in places]
    totals = _totals(builder, dot, _vector(INT32, 32), rows, row_bytes, starts, n_steps)
    floors = everywhere(builder, floor, floats)
    of_columns, added = ([load(builder, each, place, floats, align=4) for place in places] for each in (scales, biases))
    for i_row, of_row in enumerate(totals):
        own = everywhere(builder, load(builder, row_scales, INT64(4 * i_row), FLOAT, align=4), floats)
        row_at = builder.add(out, builder.mul(out_row_bytes, INT64(i_row)))
        for place, total, scale, bias in zip(places, of_row, of_columns, added, strict=True):
            values = builder.fmul(builder.fmul(builder.sitofp(total, floats), own), scale)
            values = builder.fadd(values, bias)
            # NaN is below nothing, and stays.
            values = builder.select(builder.fcmp_ordered("<", values, floors), floors, values)
            store(builder, values, row_at, place, align=4)


_tile_pairs, _tile_unsigned = _finished_tile(_dot_pairs), _finished_tile(_dot_unsigned)
_tile_avx_vnni = _tile("avx_vnni", _dot_vnni, 32, 2, is_across_panels=False)
_tile_vnni_4 = _tile("avx512_vnni", _dot_vnni, 64, 4, is_across_panels=True)
_tile_vnni_1 = _tile("avx512_vnni", _dot_vnni, 64, 1, is_across_panels=True)


# These two take (rows, bytes from row to row, rows, panels, panels, steps of a panel, scales of rows, scales and biases
# of columns, floor, out, bytes from row to row of it): addresses, but for numbers and the floor. Of whole tiles of rows
# max(sums * scale of the row * scale of the column + bias, floor) is written as float32. A step is 64 bytes of weights
# and 4 of a row.
@numba.njit(**LOOP)
def multiply_pairs(
    rows, row_bytes, n_rows, panels, n_panels, n_steps, row_scales, scales, biases, floor, out, out_row_bytes
):
    """Products on AVX2: rows and panels of int16, two of K a step."""
    for panel in range(n_panels):
        for row in range(0, n_rows, ROWS):
            _tile_pairs(
                rows + row * row_bytes, row_bytes, panels + panel * n_steps * 64, n_steps, row_scales + 4 * row,
                scales + 64 * panel, biases + 64 * panel, floor, out + row * out_row_bytes + 64 * panel, out_row_bytes,
            )  # fmt: skip


@numba.njit(**LOOP)
def multiply_unsigned(
    rows, row_bytes, n_rows, panels, n_panels, n_steps, row_scales, scales, biases, floor, out, out_row_bytes
):
    """Products on AVX2 where no activation is negative: rows and panels of int8, four of K a step."""
    for panel in range(n_panels):
        for row in range(0, n_rows, ROWS):
            _tile_unsigned(
                rows + row * row_bytes, row_bytes, panels + panel * n_steps * 64, n_steps, row_scales + 4 * row,
                scales + 64 * panel, biases + 64 * panel, floor, out + row * out_row_bytes + 64 * panel, out_row_bytes,
            )  # fmt: skip


# These take (rows, bytes from row to row, rows, panels, panels, steps of a panel, sums): addresses of rows of uint8, of
# panels, and of int32 sums [rows, 16 * panels], which are written.
@numba.njit(**LOOP)
def multiply_avx_vnni(rows, row_bytes, n_rows, panels, n_panels, n_steps, sums):
    """Sums of rows of uint8 with 32 bytes at a time."""
    for panel in range(n_panels):
        for row in range(0, n_rows, ROWS):
            _tile_avx_vnni(
                rows + row * row_bytes, row_bytes, panels + panel * n_steps * 64, 0, n_steps,
                sums + (row * n_panels + panel) * 64, n_panels * 64,
            )  # fmt: skip


@numba.njit(**LOOP)
def multiply_avx512_vnni(rows, row_bytes, n_rows, panels, n_panels, n_steps, sums):
    """Sums of rows of uint8 with 64 bytes at a time, of four panels at once where there are four."""
    panel_bytes = n_steps * 64
    for row in range(0, n_rows, ROWS):
        at = rows + row * row_bytes
        panel = 0
        while panel + 4 <= n_panels:
            out = sums + (row * n_panels + panel) * 64
            _tile_vnni_4(at, row_bytes, panels + panel * panel_bytes, panel_bytes, n_steps, out, n_panels * 64)
            panel += 4
        while panel < n_panels:
            out = sums + (row * n_panels + panel) * 64
            _tile_vnni_1(at, row_bytes, panels + panel * panel_bytes, panel_bytes, n_steps, out, n_panels * 64)
            panel += 1
