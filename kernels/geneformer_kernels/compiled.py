"""Pieces of loops over bfloat16 that numba turns into vector code on the CPU; bfloat16 travels as uint16.

numba has no bfloat16, and converting through an array view would cost a trip through memory for every number.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

#: Options every compiled loop here shares: it releases the GIL and is compiled once per machine.
LOOP: dict[str, Any] = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy"}


def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low = builder.trunc(arguments[0], context.get_value_type(types.uint32))
        return builder.bitcast(low, context.get_value_type(types.float32))

    return types.float32(types.uint64), generate


def _bits_of_float(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


def _addition_in_any_order(typing_context: Any, a: Any, b: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments, flags=("reassoc", "nsz"))

    return types.float32(types.float32, types.float32), generate


#: The float32 whose bits are the low 32 of an integer.
as_float: Any = intrinsic(_float_of_bits)
#: The bits of a float32, as uint32.
as_bits: Any = intrinsic(_bits_of_float)
#: ``a + b`` that may be reordered with others of its kind: a sum over a loop becomes vector code, while the rest of the
#: loop keeps its rounding.
add_in_any_order: Any = intrinsic(_addition_in_any_order)


@numba.njit(inline="always", **LOOP)
def from_bfloat16(bits):
    """The float32 of a bfloat16."""
    return as_float(np.uint32(bits) << np.uint32(16))


@numba.njit(inline="always", **LOOP)
def to_bfloat16(value):
    """A float32 rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = as_bits(value)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
