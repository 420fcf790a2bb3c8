"""Ranges that name operations to torch's profiler: there while it records, and nothing at all otherwise.

A range costs the profiler's own bookkeeping while it is on, and a fifth of a microsecond while it is off. A compiler
sees none: what is compiled has the names of its kernels only. Backward passes open none either, for torch tells which
call of the forward pass each of their steps belongs to (``sequence_nr`` of its events).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.autograd import profiler

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def is_recorded() -> bool:
    """Whether torch's profiler is recording, and nothing is being compiled.

    The compiler is asked first: it takes that for a constant, and never looks at the profiler. Otherwise it would
    compile again whenever somebody begins to profile.
    """
    return not torch.compiler.is_compiling() and profiler._is_profiler_enabled


def ranged(name: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorator: calls of the function are a range of that name while torch's profiler records."""

    def decorated(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def called(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
            if not is_recorded():
                return function(*arguments, **named)
            with profiler.record_function(name):
                return function(*arguments, **named)

        return called

    return decorated


def within(
    name: str, function: Callable[Arguments, Result], /, *arguments: Arguments.args, **named: Arguments.kwargs
) -> Result:
    """What the function gives, called in a range of that name while torch's profiler records."""
    if not is_recorded():
        return function(*arguments, **named)
    with profiler.record_function(name):
        return function(*arguments, **named)
