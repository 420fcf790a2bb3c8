"""Which columns of tokens may be labels, and what is said where one is not there."""

from __future__ import annotations

import os
from collections.abc import Iterable

# Of the tokens themselves, and where cells come from.
_OWN = ("input_ids", "length", "source_file", "source_row", "obs_names")


def why_not_carried(place: str | os.PathLike[str], column: str, columns: Iterable[str], *, role: str) -> str | None:
    """What is wrong with a column for a role, such as ``"label"``; None where tokens carry it."""
    carried = [name for name in columns if name not in _OWN]
    if column in carried:
        return None
    there = f"it carries {', '.join(carried)}" if carried else "it carries none"
    return (
        f"{os.fspath(place)} has no column {column!r} for the {role}; {there}. Carry it along with "
        f"tokenize --obs {column}"
    )
