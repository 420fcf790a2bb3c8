"""Pieces of loops over bfloat16 that numba turns into vector code on the CPU; bfloat16 travels as uint16.

numba has no bfloat16, and converting through an array view would cost a trip through memory for every number.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from geneformer_kernels.cpu.kept import keep_for_all_sources

#: Options every compiled loop here shares: it releases the GIL and is compiled once per machine and version.
LOOP: dict[str, Any] = {
    "nogil": True, "cache": keep_for_all_sources(), "boundscheck": False, "error_model": "numpy",
}  # fmt: skip

LOG2_E = np.float32(1.4426950408889634)
# Adding and taking away 1.5 * 2**23 rounds a float32 to the nearest integer.
ROUND_FLOAT32 = np.float32(12582912.0)
# 2**f for f in [-1/2, 1/2], minimax of degree 3: relative error 7.5e-05, a twentieth of bfloat16's rounding.
POWER_COEFFICIENTS = tuple(np.float32(c) for c in (5.517166681e-02, 2.426111351e-01, 6.932609870e-01, 9.999280728e-01))
_C3, _C2, _C1, _C0 = POWER_COEFFICIENTS
# The same of degree 5 with 1 as its constant: relative error 9.1e-08 before rounding.
POWER_COEFFICIENTS_FLOAT32 = tuple(
    np.float32(c) for c in (1.326472721e-03, 9.671512812e-03, 5.550733745e-02, 2.402224208e-01, 6.931469776e-01, 1)
)
_D5, _D4, _D3, _D2, _D1, _ = POWER_COEFFICIENTS_FLOAT32


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
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    # What is carried out of the lower half makes a number, zero even, of a NaN with many of its bits set.
    return np.uint16((rounded if value == value else bits | np.uint32(0x400000)) >> np.uint32(16))


# The callers of these two must not let the compiler reorder, which would simplify the rounding away.
@numba.njit(inline="always", **LOOP)
def power_of_two(power):
    """2**power, to 7.5e-05: for what becomes bfloat16."""
    # Written so that NaN stays NaN: it must not come out as a weight.
    power = np.float32(-126) if power < np.float32(-126) else power
    # The rounded power is now in the low bits of the sum, from where it moves into the exponent.
    shifted = power + ROUND_FLOAT32
    rest = power - (shifted - ROUND_FLOAT32)
    fraction = ((_C3 * rest + _C2) * rest + _C1) * rest + _C0
    return as_float(as_bits(fraction) + (as_bits(shifted) << np.uint32(23)))


@numba.njit(inline="always", **LOOP)
def power_of_two_float32(power):
    """2**power, to 1.7e-07, and 1 exactly for 0."""
    power = np.float32(-126) if power < np.float32(-126) else power
    shifted = power + ROUND_FLOAT32
    rest = power - (shifted - ROUND_FLOAT32)
    fraction = ((((_D5 * rest + _D4) * rest + _D3) * rest + _D2) * rest + _D1) * rest + np.float32(1)
    # The low bits of a NaN, which a bias in float32 may have, would be added to its exponent.
    return as_float(as_bits(fraction) + (as_bits(shifted) << np.uint32(23))) if power == power else power
