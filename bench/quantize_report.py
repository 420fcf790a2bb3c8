"""The tables of what eight bits change on real cells, from ``quantize_real.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
#: Measure of ``quantize_real`` -> what its column is called; macro-F1 is shown beside that of float32.
_MEASURES = {
    "cosine of embeddings, least": "cosine of embeddings, least",
    "15 nearest neighbours shared": "15 nearest neighbours shared",
    "20 likeliest genes shared": "20 likeliest genes shared",
    "macro-F1": "macro-F1 (float32)",
}


def title(result: Result) -> str:
    """What was trained, and what it was compared on."""
    training, asked = result["training"], result["asked"]
    steps = f"trained for {training['n_steps']:,} steps" if "n_steps" in training else training["note"]
    return (
        f"What eight bits change on real cells: an encoder of Geneformer V1-10M's shape, {steps}, against itself in "
        f"float32, {asked['cells']:,} cells; with three columns 60 times as large, as trained models have them; and a "
        "classifier of sorted cells made of it."
    )


def header() -> tuple[str, ...]:
    """The columns."""
    return ("", *_MEASURES.values())


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """A row per model and way."""
    found_rows = []
    for result in results:
        for name, ways in result["rows"].items():
            for way in ("plain", "calibrated"):
                found = ways.get(way, {}).get("measures", ())
                cells = dict.fromkeys(_MEASURES.values(), "")
                for measure in found:
                    end = measure["name"].rpartition(": ")[2]  # "subpop: macro-F1"
                    if end in _MEASURES:
                        exact = f" ({measure['exact']:.4f})" if end == "macro-F1" else ""
                        digits = 5 if end.startswith("cosine") else 4 if exact else 3
                        cells[_MEASURES[end]] = f"{measure['quantized']:.{digits}f}{exact}"
                if found:
                    found_rows.append((f"{name}, {way}", *cells.values()))
    return found_rows
