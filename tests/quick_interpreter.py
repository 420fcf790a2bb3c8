"""Triton's interpreter without what it finds out again and again: half the time or less.

Before a function runs, the interpreter searches ``triton.language`` for what it puts its own versions in the place of:
once per launch, and again at each call of another jitted function in it, where all of them are there already. And it
makes a table of dtypes for every block. Here the search is made once, and the table too.

It computes every sum and product of integers once more in 64 bits, compares it with what their dtype holds, and says so
only when it debugs, which it does not: here it does not compute that. And the type of every block, of which a kernel
has few, is put together number by number each time that a block is made: here once. Two blocks of one shape and dtype
need neither a common dtype nor a common shape, which it looks for all the same. What runs is the same.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from types import FunctionType
from typing import Any


def install() -> None:
    """Once per process; nothing happens where Triton is not loaded, or arranges its interpreter otherwise."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    names = (
        *("_patch_lang", "_patch_builtin", "_patch_attr", "_LangPatchScope", "_get_np_dtype"),
        *("interpreter_builder", "interpreter_semantic", "tl"),
    )
    is_known = all(hasattr(interpreter, name) for name in names)
    if is_known and not hasattr(interpreter._patch_lang, "__wrapped__"):
        interpreter._patch_lang = _once_per_launch(interpreter)
        interpreter._patch_builtin = _search_once(interpreter)
        interpreter._get_np_dtype = _once_per_dtype(interpreter._get_np_dtype)
        _leave_out_what_nobody_is_told(interpreter.interpreter_builder)
        if hasattr(interpreter.tl.core, "tuple"):
            _once_per_shape(interpreter.tl.core)
            _as_they_are_where_they_agree(interpreter.interpreter_semantic, interpreter.tl.core)


def _once_per_launch(interpreter: Any) -> Any:
    patch, scope_of = interpreter._patch_lang, interpreter._LangPatchScope
    restore = scope_of.restore
    languages = (interpreter.tl, interpreter.tl.core)
    launches: list[tuple[Any, set[int]]] = []  # what restores the language at a launch's end, and where it is changed

    @functools.cache
    def languages_of(function: FunctionType) -> frozenset[int]:
        return frozenset(id(value) for value in function.__globals__.values() if any(value is x for x in languages))

    @functools.wraps(patch)
    def patched(function: FunctionType) -> Any:
        wanted = languages_of(function)
        if launches and wanted and wanted <= launches[-1][1]:
            return scope_of()
        scope = patch(function)
        if launches:  # a function of the launch reads another module: nothing of it is restored before the launch ends
            launches[-1][1].update(wanted)
        else:
            launches.append((scope, set(wanted)))
        return scope

    def restored(self: Any) -> None:
        if launches and launches[-1][0] is self:
            launches.pop()
        restore(self)

    scope_of.restore = restored
    return patched


def _search_once(interpreter: Any) -> Any:
    is_builtin, semantic = interpreter.tl.core.is_builtin, interpreter.interpreter_semantic

    @functools.cache  # first asked before anything is changed
    def builtins_of(place: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(place) if is_builtin(member)]

    @functools.cache  # as the interpreter's own, which goes through the arguments
    def with_semantic(member: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            named["_semantic"] = semantic
            return member(*arguments, **named)

        return call

    @functools.wraps(interpreter._patch_builtin)
    def patched(place: Any, builder: Any, scope: Any) -> None:
        for name in builtins_of(place):
            if is_builtin(member := getattr(place, name)):
                scope.set_attr(place, name, with_semantic(member))

    return patched


def _once_per_dtype(made: Any) -> Any:
    known: dict[str, Any] = {}

    @functools.wraps(made)
    def numpy_dtype(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = made(dtype)
        return known[dtype.name]

    return numpy_dtype


def _leave_out_what_nobody_is_told(builder: Any) -> None:
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _once_per_shape(core: Any) -> None:
    """Blocks of one shape share it, and their types and tensors what follows from it; nobody changes any of that."""
    block, tensor, tuple_of_core = core.block_type, core.tensor, core.tuple
    make_block, make_tensor = block.__init__, tensor.__init__
    take, equals = tuple_of_core.__getitem__, tuple_of_core.__eq__
    blocks: dict[tuple, tuple] = {}
    shapes: dict[tuple, Any] = {}
    tensors: dict[tuple, tuple] = {}

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(size.value if type(size) is core.constexpr else size for size in shape)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = shapes.setdefault(key[1:], self.shape), self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        sizes = (*type.shape,) if type.is_block() else ()
        if sizes not in tensors:
            make_tensor(self, handle, type)
            tensors[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[sizes]

    def quick_item(self: Any, i: Any) -> Any:
        return self.values[i] if type(i) is int else take(self, i)

    def quick_equal(self: Any, other: Any) -> Any:
        if type(other) is list and all(type(value) is int for value in other):
            return core.constexpr(self.values == other)
        return equals(self, other)

    block.__init__, tensor.__init__ = block_init, tensor_init
    tuple_of_core.__getitem__, tuple_of_core.__eq__ = quick_item, quick_equal


def _as_they_are_where_they_agree(semantic: Any, core: Any) -> None:
    """Operands of one shape, which blocks of one shape share (above), and of one dtype are left as they are."""
    broadcast, agree = semantic.broadcast_impl_value, semantic.binary_op_type_checking_impl

    def quick_broadcast(lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if type(one) is type(other) is core.block_type and one.shape is other.shape:
            return lhs, rhs
        return broadcast(lhs, rhs)

    def quick_agreement(lhs: Any, rhs: Any, *options: Any, **named: Any) -> Any:
        is_same = type(lhs) is type(rhs) is core.tensor and lhs.dtype is rhs.dtype
        # Pointers are checked; the third option and the fourth are about arithmetic and quotients.
        if is_same and type(lhs.dtype) is core.dtype and len(options) < 3 and not named:
            return quick_broadcast(lhs, rhs)
        return agree(lhs, rhs, *options, **named)

    semantic.broadcast_impl_value, semantic.binary_op_type_checking_impl = quick_broadcast, quick_agreement
