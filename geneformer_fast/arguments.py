"""Arguments of public functions are held against their annotations before anything is done.

Only kinds are looked at here (a number, a text, a path, a list of texts); what a value means is up to the function.
Annotations are read as text, so that nothing is imported for them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from geneformer_fast.errors import ArgumentError

P = ParamSpec("P")
R = TypeVar("R")
Check = Callable[[Any], bool]

# Kinds that annotations name and Python's own classes do not settle: True is no number here, and text is no list.
_KINDS: dict[str, Check] = {
    "Any": lambda value: True,
    "None": lambda value: value is None,
    "bool": lambda value: isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"),
    "int": lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool),
    "float": lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "PathLike": lambda value: isinstance(value, os.PathLike),
    "Sequence": lambda value: _is_list(value),
    "Iterable": lambda value: isinstance(value, Iterable) and not isinstance(value, str | bytes),
    "Mapping": lambda value: isinstance(value, Mapping),
    "Callable": callable,
}
_COLLECTIONS = ("Sequence", "Iterable", "list", "tuple")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse arguments of another kind than the function's annotations say.

    Raises
    ------
    ArgumentError
        Names the argument, what it is and what it should be; raised by the function that comes out.
    """
    signature = inspect.signature(function)
    checks = {
        name: (_check_of(ast.parse(parameter.annotation, mode="eval").body), parameter.annotation)
        for name, parameter in signature.parameters.items()
        if isinstance(parameter.annotation, str)
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }

    @functools.wraps(function)
    def refusing(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in checks and not checks[name][0](value):
                kind = _said(checks[name][1])
                raise ArgumentError(f"{function.__name__}: {name} must be {kind}, not {_shown(value)}")
        return function(*args, **kwargs)

    return refusing


def _check_of(node: ast.expr) -> Check:
    """The check of one annotation."""
    if isinstance(node, ast.BinOp):
        left, right = _check_of(node.left), _check_of(node.right)
        return lambda value: left(value) or right(value)
    if isinstance(node, ast.Constant):
        return _KINDS["None"] if node.value is None else _KINDS["Any"]
    if isinstance(node, ast.Subscript):
        return _check_of_parts(_name(node.value), node.slice)
    name = _name(node)
    return _KINDS.get(name, lambda value: any(base.__name__ == name for base in type(value).__mro__))


def _check_of_parts(name: str, parts: ast.expr) -> Check:
    """The check of a collection and what it holds; of one that can be read once only, nothing of that."""
    is_one = _KINDS.get(name, lambda value: any(base.__name__ == name for base in type(value).__mro__))
    inner = [_check_of(part) for part in parts.elts] if isinstance(parts, ast.Tuple) else [_check_of(parts)]
    if name == "Mapping" and len(inner) == 2:
        return lambda value: is_one(value) and all(inner[0](key) and inner[1](each) for key, each in value.items())
    if name == "tuple" and len(inner) > 1:
        return lambda value: is_one(value) and _is_each(inner, value)
    if name in _COLLECTIONS and len(inner) == 1:
        return lambda value: is_one(value) and (not hasattr(value, "__len__") or all(map(inner[0], value)))
    return is_one


def _is_list(value: Any) -> bool:
    """Lists and tuples, and what numpy and pandas make of them: one axis, in order."""
    if isinstance(value, str | bytes | Mapping):
        return False
    return isinstance(value, Sequence) or (hasattr(value, "__getitem__") and getattr(value, "ndim", 0) == 1)


def _is_each(checks: list[Check], values: Sequence[Any]) -> bool:
    return len(values) == len(checks) and all(check(value) for check, value in zip(checks, values, strict=True))


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else "Any"


def _said(annotation: str) -> str:
    """``str | os.PathLike[str] | None`` -> ``str, os.PathLike[str] or None``."""
    *first, last = [part.strip() for part in _split(annotation)]
    return f"{', '.join(first)} or {last}" if first else last


def _split(annotation: str) -> list[str]:
    """The members of a union, those within brackets left together."""
    node, members = ast.parse(annotation, mode="eval").body, []
    while isinstance(node, ast.BinOp):
        members.append(ast.unparse(node.right))
        node = node.left
    return [ast.unparse(node), *reversed(members)]


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | bytes | numbers.Number) or value is None else ""
    kind = type(value).__name__
    return f"{kind} {text}" if 0 < len(text) <= 60 else f"a {kind}"
