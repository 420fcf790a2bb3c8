"""What JSON may say: parsed with bounds, then held against a schema, with one sentence where it does not fit.

A schema is a dataclass, or any type, of plain annotations (:func:`whole`, :func:`number`, ``str``, ``list[...]``,
``dict[...]``, ``X | None``). pydantic checks it, strictly: true is no number, and no text is one. Fields that a schema
does not name pass.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

from geneformer_fast.errors import GeneformerFastError

# The largest JSON file of ours is a vocabulary of some megabytes, or a manifest of many shards.
MOST_BYTES = 1 << 30
_ADVICE = "correct it, or restore it from a good copy"
# Whole numbers beyond this fit no 64-bit integer.
_MOST = 2**63 - 1


def whole(least: int = -_MOST, most: int = _MOST) -> Any:
    """The type of a whole number between two bounds, both included."""
    from pydantic import Field

    return Annotated[int, Field(ge=least, le=most)]


def number(least: float = -math.inf, most: float = math.inf, *, above: float | None = None) -> Any:
    """The type of a finite number between two bounds, both included; ``above`` is one that is not."""
    from pydantic import Field

    return Annotated[float, Field(ge=least, le=most, gt=above, allow_inf_nan=False)]


def parse_json(text: str | bytes, where: str | os.PathLike[str], error: type[GeneformerFastError]) -> Any:
    """Parse JSON text.

    Raises
    ------
    GeneformerFastError
        Of the class ``error``: it is no JSON, is nested too deeply, or holds what JSON does not have (NaN, Infinity).
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"it holds {constant}, which is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise error(
            f"{where} cannot be read: its JSON is nested too deeply; correct it, or restore it from a good copy"
        ) from None
    except ValueError as reason:  # UnicodeDecodeError and JSONDecodeError are such
        raise error(f"{where} cannot be read as JSON ({reason}); {_ADVICE}") from None


def read_json(path: Path, error: type[GeneformerFastError], schema: Any = None) -> dict[str, Any]:
    """Read a JSON object, and hold it against a schema.

    Returns
    -------
    dict
        What the file says, fields that the schema does not name included.

    Raises
    ------
    GeneformerFastError
        Of the class ``error``, naming the file and the field.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise error(f"{path} is larger than {MOST_BYTES >> 20} MiB, so it is not the JSON file it should be")
        content = path.read_bytes()
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}") from None
    value = parse_json(content, path, error)
    if not isinstance(value, dict):
        raise error(f"{path}: holds no JSON object")
    if schema is not None:
        check(schema, value, path, error)
    return value


def check(schema: Any, value: Any, where: str | os.PathLike[str], error: type[GeneformerFastError]) -> None:
    """Hold a value against a schema.

    Raises
    ------
    GeneformerFastError
        Of the class ``error``: the first field that does not fit, what it holds and what it should be.
    """
    build(schema, value, where, error)


def build(schema: Any, value: Any, where: str | os.PathLike[str], error: type[GeneformerFastError]) -> Any:
    """Make what a schema describes, a dataclass with all that it holds, of JSON values.

    Raises
    ------
    GeneformerFastError
        Of the class ``error``: the first field that does not fit, what it holds and what it should be.
    """
    from pydantic import ValidationError

    try:
        # As JSON, because only there a strict check takes an object for a dataclass and a list for a tuple.
        return _adapter(schema).validate_json(json.dumps(value), strict=True)
    except RecursionError:
        raise error(
            f"{where} cannot be read: its JSON is nested too deeply; correct it, or restore it from a good copy"
        ) from None
    except ValidationError as reason:
        first = reason.errors(include_url=False)[0]
        raise error(f"{where}: {_sentence(first)}") from None


def check_fields(
    record: Any, error: type[GeneformerFastError], bounds: Mapping[str, tuple[float, float]] | None = None
) -> None:
    """Hold a dataclass's values against the types it declares, for its ``__post_init__``; frozen ones too.

    Understood are ``int``, ``float``, ``bool``, ``str``, None, pairs of floats, and classes. Whole numbers serve as
    floats, true and false as no number, and numpy's numbers become Python's.

    Parameters
    ----------
    record
        An instance of a dataclass whose annotations are text (``from __future__ import annotations``).
    error
        What to raise.
    bounds
        Field name to least and largest value, both included.

    Raises
    ------
    GeneformerFastError
        Of the class ``error``: the first field that does not fit, what it holds and what it should be.
    """
    for item in dataclasses.fields(record):
        value, kinds = getattr(record, item.name), str(item.type).split(" | ")
        if any(kind in ("int", "float") for kind in kinds) and not isinstance(value, bool | int | float):
            value = _plain_number(value)
            object.__setattr__(record, item.name, value)
        if not any(_is_of(value, kind) for kind in kinds):
            wanted = " or ".join(_KINDS.get(kind, kind) for kind in kinds)
            raise error(f"{item.name} must be {wanted}, not {_short(value)}")
        least, most = (bounds or {}).get(item.name, (-math.inf, math.inf))
        if isinstance(value, int | float) and not least <= value <= most:
            raise error(f"{item.name} must be from {least:,} to {most:,}, not {value!r}")


_KINDS = {
    "int": "a whole number",
    "float": "a finite number",
    "bool": "true or false",
    "str": "text",
    "tuple[float, float]": "two finite numbers",
}


def _is_of(value: Any, kind: str) -> bool:
    if kind == "None":
        return value is None
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST
    if kind in ("bool", "str"):
        return type(value).__name__ == kind
    if kind == "tuple[float, float]":
        return isinstance(value, tuple) and len(value) == 2 and all(_is_of(part, "float") for part in value)
    return any(cls.__name__ == kind for cls in type(value).__mro__)


def _plain_number(value: Any) -> Any:
    """A number of numpy or another library as one of Python; everything else as it is."""
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


@functools.cache
def _adapter(schema: Any) -> Any:
    """The checker of a schema; made once, since schemas are few and fixed."""
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def _sentence(found: Any) -> str:
    """``shards.3.n_cells is "many"; input should be a valid integer``."""
    place = ".".join(str(part) for part in found["loc"]) or "its content"
    if found["type"] == "missing":
        return f"{place} is missing"
    message = found["msg"][:1].lower() + found["msg"][1:]
    return f"{place} is {_short(found['input'])}; {message}"


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"a {'list' if isinstance(value, list) else 'JSON object'}"
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
