"""Pieces of LLVM code for intrinsics of loops that numba compiles; addresses are int64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from llvmlite import ir

BOOL, INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
FLOAT, HALF = ir.FloatType(), ir.HalfType()
VOID = ir.VoidType()
#: Bytes of the widest register: where addresses begin, unless said otherwise.
REGISTER_BYTES = 64


class _BFloat16(ir.types._BaseFloatType):  # type: ignore[misc]
    """LLVM's bfloat16, which llvmlite does not name."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat16._create_instance()
BFLOAT16 = _BFloat16()


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """One of LLVM's intrinsic functions."""
    known = builder.module.globals
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(known[name] if name in known else ir.Function(builder.module, kind, name), arguments)


def pointer(builder: Any, address: Any, offset: Any, kind: Any) -> Any:
    return builder.inttoptr(builder.add(address, offset), ir.PointerType(kind))


def load(builder: Any, address: Any, offset: Any, kind: Any, align: int = REGISTER_BYTES) -> Any:
    value = builder.load(pointer(builder, address, offset, kind))
    value.align = align
    return value


def store(builder: Any, value: Any, address: Any, offset: Any, align: int = REGISTER_BYTES) -> None:
    builder.store(value, pointer(builder, address, offset, value.type)).align = align


def constant(kind: Any, value: float) -> Any:
    """A vector of one number."""
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)


def everywhere(builder: Any, number: Any, kind: Any) -> Any:
    """A vector of a number that is known when the code runs."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, number, INT32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(INT32, kind.count), None))


def smaller(builder: Any, a: Any, b: Any) -> Any:
    """The smaller of two integers."""
    return builder.select(builder.icmp_signed("<", a, b), a, b)


@contextlib.contextmanager
def counting(builder: Any, start: Any, stop: Any) -> Iterator[Any]:
    """What is built within runs for every int64 from ``start`` to below ``stop``, perhaps never."""
    before, head, body, end = builder.block, *(builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(INT64)
    index.add_incoming(start, before)
    builder.cbranch(builder.icmp_signed("<", index, stop), body, end)
    builder.position_at_end(body)
    yield index
    index.add_incoming(builder.add(index, INT64(1)), builder.block)
    builder.branch(head)
    builder.position_at_end(end)
