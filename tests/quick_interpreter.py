"""Triton's interpreter without what it finds out again and again: half the time of a kernel of small functions.

Before a function runs, the interpreter searches ``triton.language`` for what it puts its own versions in the place of:
once per launch, and again at each call of another jitted function in it, where all of them are there already. And it
makes a table of dtypes for every block. Here the search is made once, and the table too. What runs is the same.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import FunctionType
from typing import Any


def install() -> None:
    """Once per process; nothing happens where Triton is not loaded, or arranges its interpreter otherwise."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    names = ("_patch_lang", "_patch_builtin", "_patch_attr", "_LangPatchScope", "_get_np_dtype")
    is_known = all(hasattr(interpreter, name) for name in names)
    if is_known and not hasattr(interpreter._patch_lang, "__wrapped__"):
        interpreter._patch_lang = _once_per_launch(interpreter)
        interpreter._patch_builtin = _search_once(interpreter)
        interpreter._get_np_dtype = _once_per_dtype(interpreter._get_np_dtype)


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
    is_builtin, patch_attr = interpreter.tl.core.is_builtin, interpreter._patch_attr

    @functools.cache  # first asked before anything is changed
    def builtins_of(place: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(place) if is_builtin(member)]

    @functools.wraps(interpreter._patch_builtin)
    def patched(place: Any, builder: Any, scope: Any) -> None:
        for name in builtins_of(place):
            if is_builtin(member := getattr(place, name)):
                patch_attr(place, name, member, builder, scope)

    return patched


def _once_per_dtype(made: Any) -> Any:
    known: dict[str, Any] = {}

    @functools.wraps(made)
    def numpy_dtype(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = made(dtype)
        return known[dtype.name]

    return numpy_dtype
