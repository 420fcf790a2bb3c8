"""Weights laid out as panels by transposes in registers: sixteen channels meet sixteen steps of K.

The loops of a compiler write each number by itself, which takes as long as the products of some hundred rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from geneformer_kernels.cpu.compiled import LOOP
from geneformer_kernels.cpu.llvm import INT8, INT16, INT32, INT64, load, store

_LANES, _STEP_BYTES = 16, 64
_INTS, _SHORTS, _BYTES = ir.VectorType(INT32, _LANES), ir.VectorType(INT16, 2 * _LANES), ir.VectorType(INT8, 2 * _LANES)


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen registers of sixteen numbers, rows for columns: squares of 8 change places, then of 4, 2 and 1."""
    size = _LANES
    while size > 1:
        size //= 2
        lanes = [(lane, lane & size) for lane in range(_LANES)]
        upper = ir.Constant(_INTS, [INT32(_LANES + lane - size if is_right else lane) for lane, is_right in lanes])
        lower = ir.Constant(_INTS, [INT32(_LANES + lane if is_right else lane + size) for lane, is_right in lanes])
        for i in (i for i in range(_LANES) if not i & size):
            a, b = rows[i], rows[i + size]
            rows[i], rows[i + size] = builder.shuffle_vector(a, b, upper), builder.shuffle_vector(a, b, lower)
    return rows


def _transposing(is_wide: bool) -> Callable[..., None]:
    """(rows, bytes from row to row, out): 16 rows of int8, 64 of each, or 32 as int16, become sixteen steps."""

    def transpose(typing_context: Any, rows: Any, row_bytes: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            rows, row_bytes, out = arguments
            taken = []
            for i in range(_LANES):
                at = builder.mul(row_bytes, INT64(i))
                if is_wide:
                    value = builder.sext(load(builder, rows, at, _BYTES, align=1), _SHORTS)
                    taken.append(builder.bitcast(value, _INTS))
                else:
                    taken.append(load(builder, rows, at, _INTS, align=1))
            for i, value in enumerate(transposed(builder, taken)):
                store(builder, value, out, INT64(_STEP_BYTES * i))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return intrinsic(transpose)


#: What is four bytes at a time may be one float32.
transpose_fours, _transpose_pairs = _transposing(False), _transposing(True)


@numba.njit(**LOOP)
def pack_panels(weight, row_bytes, n_panels, n_steps, is_wide, panels):
    """int8 [16 * n_panels, K] at an address, rows ``row_bytes`` apart, to panels [n_panels, n_steps, 16, 4 of K].

    ``is_wide``: to int16, [n_panels, n_steps, 16, 2 of K]. ``n_steps`` is a multiple of 16, and the address ``panels``
    one of 64.
    """
    taken = 2 if is_wide else 4
    for panel in range(n_panels):
        for step in range(0, n_steps, _LANES):
            at = weight + _LANES * panel * row_bytes + step * taken
            if is_wide:
                _transpose_pairs(at, row_bytes, panels)
            else:
                transpose_fours(at, row_bytes, panels)
            panels += _LANES * _STEP_BYTES
