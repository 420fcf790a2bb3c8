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
from geneformer_kernels.cpu.llvm import INT8, INT16, INT32, INT64, call, constant, everywhere, load, store

#: Rows in work at a time.
ROWS = 6
#: Rows that a buffer has beyond its last one: what loops read and write there means nothing.
SLACK = 32
_UNROLL = 4

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
    kind = _vector(INT32, vector_bytes)
    before, body, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
    row_starts = [builder.add(rows, builder.mul(row_bytes, INT64(row))) for row in range(ROWS)]
    apart = panel_bytes if is_across_panels else INT64(vector_bytes)
    starts = [builder.add(panels, builder.mul(apart, INT64(i))) for i in range(n_vectors)]
    builder.branch(body)
    builder.position_at_end(body)
    step = builder.phi(INT64)
    step.add_incoming(INT64(0), before)
    phis = [[builder.phi(kind) for _ in range(n_vectors)] for _ in range(ROWS)]
    totals: list[list[Any]] = [list(row) for row in phis]
    for i in range(_UNROLL):
        at = builder.add(step, INT64(i))
        weights = [load(builder, start, builder.shl(at, INT64(6)), kind, align=vector_bytes) for start in starts]
        for i_row, start in enumerate(row_starts):
            four = everywhere(builder, load(builder, start, builder.shl(at, INT64(2)), INT32, align=4), kind)
            totals[i_row] = [
                dot(builder, total, four, weight) for total, weight in zip(totals[i_row], weights, strict=True)
            ]
    following = builder.add(step, INT64(_UNROLL))
    step.add_incoming(following, body)
    for row, grown in zip(phis, totals, strict=True):
        for phi, total in zip(row, grown, strict=True):
            phi.add_incoming(ir.Constant(kind, None), before)
            phi.add_incoming(total, body)
    builder.cbranch(builder.icmp_signed("<", following, n_steps), body, end)
    builder.position_at_end(end)
    between = 64 if is_across_panels else vector_bytes
    for i_row, grown in enumerate(totals):
        row_at = builder.add(sums, builder.mul(sum_bytes, INT64(i_row)))
        for i, total in enumerate(grown):
            store(builder, total, row_at, INT64(between * i), align=vector_bytes)


_tile_pairs = _tile("avx2", _dot_pairs, 32, 2, is_across_panels=False)
_tile_unsigned = _tile("avx2", _dot_unsigned, 32, 2, is_across_panels=False)
_tile_avx_vnni = _tile("avx_vnni", _dot_vnni, 32, 2, is_across_panels=False)
_tile_vnni_4 = _tile("avx512_vnni", _dot_vnni, 64, 4, is_across_panels=True)
_tile_vnni_1 = _tile("avx512_vnni", _dot_vnni, 64, 1, is_across_panels=True)


# All take (rows, bytes from row to row, rows, panels, panels, steps of a panel, sums): addresses of int8 (int16) rows,
# of panels, and of int32 sums [rows, 16 * panels], which are written. A step is 64 bytes of weights and 4 of a row.
@numba.njit(**LOOP)
def multiply_pairs(rows, row_bytes, n_rows, panels, n_panels, n_steps, sums):
    """Sums on AVX2: rows and panels of int16, two of K a step."""
    for panel in range(n_panels):
        for row in range(0, n_rows, ROWS):
            _tile_pairs(
                rows + row * row_bytes, row_bytes, panels + panel * n_steps * 64, 0, n_steps,
                sums + (row * n_panels + panel) * 64, n_panels * 64,
            )  # fmt: skip


@numba.njit(**LOOP)
def multiply_unsigned(rows, row_bytes, n_rows, panels, n_panels, n_steps, sums):
    """Sums on AVX2 where no activation is negative: rows and panels of int8, four of K a step."""
    for panel in range(n_panels):
        for row in range(0, n_rows, ROWS):
            _tile_unsigned(
                rows + row * row_bytes, row_bytes, panels + panel * n_steps * 64, 0, n_steps,
                sums + (row * n_panels + panel) * 64, n_panels * 64,
            )  # fmt: skip


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
