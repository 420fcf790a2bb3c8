"""What became of the cells of each source: read, written, filtered, empty; part of the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from geneformer_fast.files import schema

#: Rows of empty cells that a tally names.
NAMED_ROWS = 10


@dataclass
class Tally:
    """What a tally holds, as it is read back."""

    source: str
    read: schema.whole(0)  # type: ignore[valid-type]
    written: schema.whole(0)  # type: ignore[valid-type]
    filtered: schema.whole(0)  # type: ignore[valid-type]
    empty: schema.whole(0)  # type: ignore[valid-type]
    full: schema.whole(0)  # type: ignore[valid-type]
    stored_zeros: schema.whole(0)  # type: ignore[valid-type]
    totals_looked_at: schema.whole(0)  # type: ignore[valid-type]
    totals_above: schema.whole(0)  # type: ignore[valid-type]
    totals_below: schema.whole(0)  # type: ignore[valid-type]
    empty_rows: list[schema.whole(0)]  # type: ignore[valid-type]
    #: Cells with fewer genes than a family reads; not known of folders that versions before it wrote.
    few_genes: schema.whole(0) = 0  # type: ignore[valid-type]


def empty_tally(name: str) -> dict[str, Any]:
    """The tally of a source before its first cell."""
    zeros = {item.name: 0 for item in fields(Tally)}
    return {**zeros, "source": name, "empty_rows": []}


def add_tally(total: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add a block's tally to its source's."""
    for key, value in part.items():
        total[key] = (total[key] + value)[:NAMED_ROWS] if key == "empty_rows" else total.get(key, 0) + value


def nothing_left(cells: list[dict[str, Any]]) -> str:
    """The message where no cell is left."""
    read, filtered, empty = (sum(tally[key] for tally in cells) for key in ("read", "filtered", "empty"))
    few = sum(tally.get("few_genes", 0) for tally in cells)
    said = f", {few:,} have fewer genes than option min_genes asks for" if few else ""
    return (
        f"no cell is left: of {read:,} cells in {', '.join(tally['source'] for tally in cells[:3])}"
        f"{', ...' * (len(cells) > 3)} {filtered:,} were left out by filter_pass{said} and {empty:,} have no counts in "
        "any gene of the vocabulary"
    )
