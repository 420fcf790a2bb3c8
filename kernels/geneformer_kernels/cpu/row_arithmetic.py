"""Rows of int8 in compiled loops: rounding to them, what follows a product of them, and sums whose order is fixed.

Every number has the same bits whatever the CPU, the vectors a compiler makes, and the rows around it: nothing here may
be compiled with relaxed floating point, and no multiplication is fused with an addition.
"""

from __future__ import annotations

import numba
import numpy as np

from geneformer_kernels.cpu.compiled import LOG2_E, LOOP, as_float, power_of_two_float32
from geneformer_kernels.cpu.lanes import (
    LANES,
    SHIFTED,
    SIGNED,
    fill_zeros,
    largest_floats,
    largest_halves,
    round_halves_shifted,
    round_halves_signed,
    round_halves_wide,
    round_shifted,
    round_signed,
    round_wide,
    take_floats,
    take_halves,
)

NO_ACTIVATION, RELU, GELU, GELU_TANH, SILU = range(5)
#: Activations by name; of ``swiglu`` its gate's.
ACTIVATION_CODES = {None: NO_ACTIVATION, "relu": RELU, "gelu": GELU, "gelu_tanh": GELU_TANH, "swiglu": SILU}
#: As ``ops/int8_linear/reference.py``: a row whose largest magnitude is below this is zero.
_TINY = np.float32(1e-35)
_ONE, _HALF, _MOST = np.float32(1), np.float32(0.5), np.float32(127)
_INFINITE = np.uint32(0x7F800000)
# erf on [-4, 4] as x * P(x**2) / Q(x**2), as Eigen and XLA have it; 4.3e-07 of relative error at most.
_P = tuple(
    np.float32(c)
    for c in (
        *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05),
        *(-7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
    )
)
_Q = tuple(
    np.float32(c)
    for c in (
        *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03),
        *(-7.37332916720468e-03, -1.42647390514189e-02),
    )
)
_P0, _P1, _P2, _P3, _P4, _P5, _P6 = _P
_Q0, _Q1, _Q2, _Q3, _Q4 = _Q
_ROOT_HALF = np.float32(0.7071067811865476)
# -2 * sqrt(2 / pi) * log2(e), and the same times 0.044715: tanh-GELU is x / (1 + 2**(x * (these two)(x**2))).
_TANH_1 = np.float32(-2 * 0.7978845608028654 * 1.4426950408889634)
_TANH_3 = np.float32(-2 * 0.7978845608028654 * 1.4426950408889634 * 0.044715)


@numba.njit(inline="always", **LOOP)
def address_of(x):
    """Where an array's memory begins, as the integer that intrinsics take."""
    return np.int64(x.ctypes.data)


@numba.njit(inline="always", **LOOP)
def round_row(x, is_half, smooth, width, row, form, q):
    """A row of ``width`` numbers, whole LANES, times 127 over its largest magnitude, to ``q``; returns its scale.

    ``x`` is the address of float32 or of bfloat16, ``smooth`` of what they are multiplied by before, or 0, ``row`` of
    as many float32 to work on, which may be ``x``. The scale is NaN where a number is NaN or infinite, 1 where all are
    zero, and numbers are zeros then.
    """
    n_blocks = width // LANES
    if smooth:
        bits = take_halves(x, smooth, n_blocks, row) if is_half else take_floats(x, smooth, n_blocks, row)
        x, is_half = row, False
    else:
        bits = largest_halves(x, n_blocks) if is_half else largest_floats(x, n_blocks)
    largest, factor = as_float(np.uint64(bits)), np.float32(0)
    if bits >= _INFINITE:
        scale = np.float32(np.nan)
        fill_zeros(row, n_blocks)
        x, is_half = row, False
    elif largest < _TINY:
        scale = _ONE
    else:
        factor, scale = _MOST / largest, largest / _MOST
    if is_half:
        if form == SIGNED:
            round_halves_signed(x, factor, n_blocks, q)
        elif form == SHIFTED:
            round_halves_shifted(x, factor, n_blocks, q)
        else:
            round_halves_wide(x, factor, n_blocks, q)
    elif form == SIGNED:
        round_signed(x, factor, n_blocks, q)
    elif form == SHIFTED:
        round_shifted(x, factor, n_blocks, q)
    else:
        round_wide(x, factor, n_blocks, q)
    return scale


@numba.njit(inline="always", **LOOP)
def erf(x):
    """The error function, to 4.3e-07; NaN stays NaN."""
    x = np.float32(4) if x > np.float32(4) else x
    x = np.float32(-4) if x < np.float32(-4) else x
    y = x * x
    p = (((((_P0 * y + _P1) * y + _P2) * y + _P3) * y + _P4) * y + _P5) * y + _P6
    return x * p / ((((_Q0 * y + _Q1) * y + _Q2) * y + _Q3) * y + _Q4)


@numba.njit(**LOOP)
def activate(line, activation):
    """Replace numbers by their activation; NaN stays NaN."""
    if activation == RELU:
        for j in range(len(line)):
            line[j] = np.float32(0) if line[j] < np.float32(0) else line[j]
    elif activation == GELU:
        for j in range(len(line)):
            line[j] = _HALF * line[j] * (_ONE + erf(line[j] * _ROOT_HALF))
    elif activation == GELU_TANH:
        for j in range(len(line)):
            x = line[j]
            line[j] = x / (_ONE + _bounded_power(x * (_TANH_1 + _TANH_3 * (x * x))))
    elif activation == SILU:
        for j in range(len(line)):
            line[j] = line[j] / (_ONE + _bounded_power(line[j] * -LOG2_E))


@numba.njit(inline="always", **LOOP)
def _bounded_power(power):
    # Beyond, the result would not be a number's bits. What is divided by 2**127 is a denormal number, or zero.
    return power_of_two_float32(np.float32(127) if power > np.float32(127) else power)
