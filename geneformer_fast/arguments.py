"""Arguments of public functions are held against their annotations before anything is done, and known by old names.

Only kinds are looked at here (a number, a text, a path, a list of texts); what a value means is up to the function.
Annotations are read as text, so that nothing is imported for them. A keyword that has another name now is still taken,
with a warning: by functions through :func:`renamed`, by records through :func:`renamed_fields`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import numbers
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from geneformer_fast.errors import ArgumentError, UnsupportedError

P = ParamSpec("P")
R = TypeVar("R")
Record = TypeVar("Record", bound=type)
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


def check_seed(seed: int | None) -> None:
    """Refuse a seed that NumPy or torch cannot draw by.

    Raises
    ------
    UnsupportedError
        It is negative, or has more than 64 bits.
    """
    if seed is not None and seed < 0:
        raise UnsupportedError(f"seed must not be negative, but is {seed}")
    if seed is not None and seed >= 2**64:
        raise UnsupportedError(f"seed must be below 2**64, but is {seed}")


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


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Take keywords by their old names: ``@renamed(old="new")``, above :func:`checked`.

    Raises
    ------
    ArgumentError
        A call gives an argument by both names; raised by the function that comes out.
    """

    def of(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def taking(*args: P.args, **kwargs: P.kwargs) -> R:
            if not names.keys().isdisjoint(kwargs):
                kwargs = with_new_names(function.__name__, names, kwargs)  # type: ignore[assignment]
            return function(*args, **kwargs)

        return taking

    return of


def renamed_fields(**names: str) -> Callable[[Record], Record]:
    """Take fields of a dataclass by their old names, and let them be read by these: ``@renamed_fields(old="new")``.

    Raises
    ------
    ArgumentError
        A record is made with a field by both names; raised by the class that comes out.
    """

    def of(record: Record) -> Record:
        made = record.__init__  # type: ignore[misc]
        fields = {field.name for field in dataclasses.fields(record) if field.init}

        @functools.wraps(made)
        def taking(self: Any, *args: Any, **given: Any) -> None:
            if not names.keys().isdisjoint(given):
                if fields <= given.keys():  # dataclasses.replace gives all fields beside those that change
                    for old in names.keys() & given.keys():
                        del given[names[old]]
                given = with_new_names(record.__name__, names, given)
            made(self, *args, **given)

        record.__init__ = taking  # type: ignore[misc]
        for old, new in names.items():
            setattr(record, old, _read_by_old_name(record.__name__, old, new))
        return record

    return of


def with_new_names(
    what: str, names: Mapping[str, str], given: Mapping[str, Any], *, stacklevel: int = 2
) -> dict[str, Any]:
    """Values by the names that their keys have now, in their order; every old name is a warning.

    Parameters
    ----------
    what
        The function, record or file that they are given to, for what is said.
    names
        Old name -> new name.
    given
        The values.
    stacklevel
        Of the warning: 1 is what calls this function, 2 what calls that.

    Raises
    ------
    ArgumentError
        A value is given by both names.
    """
    for old in names.keys() & given.keys():
        new = names[old]
        if new in given:
            raise ArgumentError(f"{what}: {old} is the old name of {new}, and both are given; leave {old} out")
        warnings.warn(f"{what}: {old} is called {new} now", FutureWarning, stacklevel=stacklevel + 1)
    return {names.get(name, name): value for name, value in given.items()}


def _read_by_old_name(record: str, old: str, new: str) -> property:
    def read(self: Any) -> Any:
        warnings.warn(f"{record}: {old} is called {new} now", FutureWarning, stacklevel=2)
        return getattr(self, new)

    return property(read, doc=f"The old name of ``{new}``.")


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
