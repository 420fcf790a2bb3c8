"""What became of the cells of each source: read, written, filtered, empty; part of the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Rows of empty cells that a tally names.
NAMED_ROWS = 10


def empty_tally(name: str) -> dict[str, Any]:
    """The tally of a source before its first cell."""
    keys = ["read", "written", "filtered", "empty", "full", "stored_zeros"]
    keys += ["totals_looked_at", "totals_above", "totals_below"]
    return {"source": name, **dict.fromkeys(keys, 0), "empty_rows": []}


def add_tally(total: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add a block's tally to its source's."""
    for key, value in part.items():
        total[key] = (total[key] + value)[:NAMED_ROWS] if key == "empty_rows" else total[key] + value


def nothing_left(cells: list[dict[str, Any]]) -> str:
    """The message where no cell is left."""
    read, filtered, empty = (sum(tally[key] for tally in cells) for key in ("read", "filtered", "empty"))
    return (
        f"no cell is left: of {read:,} cells in {', '.join(tally['source'] for tally in cells[:3])}"
        f"{', ...' * (len(cells) > 3)} {filtered:,} were left out by filter_pass and {empty:,} have no counts in any "
        "gene of the vocabulary"
    )
