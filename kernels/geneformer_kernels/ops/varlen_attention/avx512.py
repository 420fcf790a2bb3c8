"""Dot products of bfloat16 on a CPU with avx512_bf16, for loops that numba compiles.

numba has neither bfloat16 nor an instruction that multiplies it, so the two innermost loops of attention are built here
from LLVM's own instructions. Everything is an address (int64), of memory that begins at a multiple of 64 bytes unless
said otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features, llvm_version_info
from numba import types
from numba.extending import intrinsic

from geneformer_kernels.cpu.compiled import LOOP, POWER_COEFFICIENTS, ROUND_FLOAT32
from geneformer_kernels.cpu.llvm import (
    BFLOAT16,
    FLOAT,
    INT32,
    INT64,
    REGISTER_BYTES,
    call,
    constant,
    everywhere,
    load,
    store,
)

#: Rows of queries in work at a time: 6 x 4 accumulators, four registers of keys and one of a query fit into 32.
ROWS = 6
#: Numbers of float32 per register.
LANES = 16


def is_compilable() -> bool:
    """Whether numba's LLVM knows these instructions here; one that does not would end the process.

    From LLVM 17 on the dot product takes bfloat16, and not pairs of them as integers. numba can be told, by its
    environment, to compile for a lesser CPU than this one.
    """
    config: Any = numba.config
    is_for_this_cpu = config.CPU_NAME is None and config.CPU_FEATURES is None and config.ENABLE_AVX
    return bool(llvm_version_info[0] >= 17 and is_for_this_cpu and get_host_cpu_features().get("avx512bf16"))


_FLOATS = ir.VectorType(FLOAT, LANES)
_INTS = ir.VectorType(INT32, LANES)
#: Sixteen pairs of bfloat16.
_PAIRS = ir.VectorType(BFLOAT16, 2 * LANES)

Vectors = list[list[Any]]


def _all(value: float | np.floating) -> Any:
    return constant(_FLOATS, float(np.float32(value)))


def _add_products(builder: Any, start: Vectors, a: Any, a_row: Any, b: Any, b_step: int, n_steps: Any) -> Vectors:
    """Start, [ROWS][registers] of float32, plus the sum over steps of a pair of ``a``'s row times registers of ``b``.

    ``a`` is the address of pairs of bfloat16, with ``a_row`` bytes from row to row; ``b`` of registers of pairs, with
    ``b_step`` bytes from step to step. At least one step is taken.
    """
    before, body, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
    a_rows = [builder.add(a, builder.mul(a_row, INT64(row))) for row in range(ROWS)]
    builder.branch(body)
    builder.position_at_end(body)
    step = builder.phi(INT64)
    step.add_incoming(INT64(0), before)
    totals = [[builder.phi(_FLOATS) for _ in row] for row in start]
    b_at = builder.mul(step, INT64(b_step))
    registers = [
        builder.bitcast(load(builder, b, builder.add(b_at, INT64(REGISTER_BYTES * i)), _INTS), _PAIRS)
        for i in range(len(start[0]))
    ]
    a_at = builder.mul(step, INT64(4))
    grown = []
    for a_of_row, row in zip(a_rows, totals, strict=True):
        # A head of a fused projection begins at any even address.
        pair = load(builder, a_of_row, a_at, INT32, align=2)
        pairs = builder.bitcast(everywhere(builder, pair, _INTS), _PAIRS)
        grown.append(
            [
                call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, total, pairs, register)
                for total, register in zip(row, registers, strict=True)
            ]
        )
    following = builder.add(step, INT64(1))
    step.add_incoming(following, body)
    for old, first, new in zip(*map(itertools.chain.from_iterable, (totals, start, grown)), strict=True):
        old.add_incoming(first, before)
        old.add_incoming(new, body)
    builder.cbranch(builder.icmp_signed("<", following, n_steps), body, end)
    builder.position_at_end(end)
    return grown


def _power_of_two(builder: Any, power: Any) -> Any:
    """As ``compiled.power_of_two``, and at most 2**127; NaN stays NaN."""
    for bound, relation in ((_all(-126), ">"), (_all(127), "<")):
        power = builder.select(builder.fcmp_ordered(relation, bound, power), bound, power)
    shifted = builder.fadd(power, _all(ROUND_FLOAT32))
    rest = builder.fsub(power, builder.fsub(shifted, _all(ROUND_FLOAT32)))
    fraction = _all(POWER_COEFFICIENTS[0])
    for coefficient in POWER_COEFFICIENTS[1:]:
        fraction = call(builder, f"llvm.fma.v{LANES}f32", _FLOATS, fraction, rest, _all(coefficient))
    exponent = builder.shl(builder.bitcast(shifted, _INTS), constant(_INTS, 23))
    return builder.bitcast(builder.add(builder.bitcast(fraction, _INTS), exponent), _FLOATS)


def _weighing(n_registers: int) -> Callable[..., None]:
    """(queries, bytes per row, keys, pairs per head, weights, bytes per row, sums): addresses, all of them int64.

    ``2**(q @ k)`` of ROWS queries and so many registers of keys goes to the weights as bfloat16, and is added, before
    it is rounded, to ``sums`` [ROWS, lanes].
    """

    def weigh(typing_context, queries, query_row, keys, n_steps, weights, weight_row, sums):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            queries, query_row, keys, n_steps, weights, weight_row, sums = arguments
            zero = ir.Constant(_FLOATS, None)
            start = [[zero] * n_registers for _ in range(ROWS)]
            scores = _add_products(builder, start, queries, query_row, keys, 4 * REGISTER_BYTES, n_steps)
            for i_row, row in enumerate(scores):
                powers = [_power_of_two(builder, score) for score in row]
                sum_at = INT64(REGISTER_BYTES * i_row)
                total = load(builder, sums, sum_at, _FLOATS)
                for power in powers:
                    total = builder.fadd(total, power)
                store(builder, total, sums, sum_at)
                row_at = builder.mul(weight_row, INT64(i_row))
                for i_pair, low in enumerate(powers[::2]):
                    high = powers[2 * i_pair + 1] if 2 * i_pair + 1 < n_registers else zero
                    both = call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _PAIRS, high, low)
                    at = builder.add(row_at, INT64(REGISTER_BYTES * i_pair))
                    store(builder, builder.bitcast(both, _INTS), weights, at)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return intrinsic(weigh)


def _mixing(n_registers: int) -> Callable[..., None]:
    """(weights, bytes per row, values, pairs of keys, out): ``out`` [ROWS, 64] float32 = weights @ values."""

    def mix(typing_context, weights, weight_row, values, n_steps, out):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, weight_row, values, n_steps, out = arguments
            start = [[ir.Constant(_FLOATS, None)] * n_registers for _ in range(ROWS)]
            step = REGISTER_BYTES * n_registers
            for i_row, row in enumerate(_add_products(builder, start, weights, weight_row, values, step, n_steps)):
                for i, total in enumerate(row):
                    store(builder, total, out, INT64(REGISTER_BYTES * (4 * i_row + i)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return intrinsic(mix)


_weigh_1, _weigh_2, _weigh_3, _weigh_4 = (_weighing(n) for n in (1, 2, 3, 4))
_mix_1, _mix_2, _mix_3, _mix_4 = (_mixing(n) for n in (1, 2, 3, 4))


@numba.njit(**LOOP)
def weigh_keys(n_registers, arguments):
    """Weights of ROWS queries and 16 times as many keys as registers (1 to 4); see :func:`_weighing`."""
    if n_registers == 4:
        _weigh_4(*arguments)
    elif n_registers == 3:
        _weigh_3(*arguments)
    elif n_registers == 2:
        _weigh_2(*arguments)
    else:
        _weigh_1(*arguments)


@numba.njit(**LOOP)
def mix_values(n_registers, arguments):
    """Products of ROWS rows of weights with 16 times as many columns as registers (1 to 4); see :func:`_mixing`."""
    if n_registers == 4:
        _mix_4(*arguments)
    elif n_registers == 3:
        _mix_3(*arguments)
    elif n_registers == 2:
        _mix_2(*arguments)
    else:
        _mix_1(*arguments)
