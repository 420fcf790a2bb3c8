"""What a command has to say in the end: text for people, or with ``--json`` one object for programs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """A command's result.

    Attributes
    ----------
    text
        For standard output; empty says nothing.
    values
        The same for ``--json``: paths, counts, what the text says.
    code
        The exit code.
    """

    text: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    code: int = 0


def as_json(values: Mapping[str, Any]) -> str:
    """One JSON object. Paths are text; numbers that are not finite, which JSON does not have, are null."""
    return json.dumps(_plain(values), indent=1, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numbers and arrays of numpy and torch
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Sequence):
        return [_plain(each) for each in value]
    return value
