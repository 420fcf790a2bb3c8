"""The table of embedding with scGPT, beside its published way in plain torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Result = Mapping[str, Any]
HEADER = ("", "cells/s (p10 to p90)", "ours is faster", "least cosine", "peak memory")


def table(result: Result, threads: str) -> tuple[str, tuple[str, ...], list[tuple[str, ...]], list[Result], str]:
    """Title, header, rows, results and goals."""
    return _title(result, threads), HEADER, _rows(result), [result], _goals(result)


def _title(result: Result, threads: str) -> str:
    lengths = result["lengths"]
    return (
        "Cell embeddings (CLS, last layer), scGPT's whole-human shape with random weights, "
        f"{result['n_cells']} real cells of {lengths['p10']:.0f} / {lengths['p50']:.0f} / "
        f"{lengths['p90']:.0f} genes (10th, 50th, 90th percentile), "
        f"{threads}, medians of {result['rounds']} runs in turns. Cosines are centred, with the published way."
    )


def _rows(result: Result) -> list[tuple[str, ...]]:
    """One row per candidate; what ours of the same width of numbers is faster."""
    found = []
    for name, row in result["candidates"].items():
        speed = row["cells_per_s"]
        by = {pair.split(" / ")[0]: ratio for pair, ratio in result["ratios"].items() if pair.split(" / ")[1] == name}
        batch = "" if row["is_ours"] else f", batches of {row['batch_size']}"
        found.append(
            (
                f"**{row['what']}**" if row["is_ours"] else f"{row['what']}{batch}",
                f"{speed['p50']:.2f} ({speed['p10']:.2f} to {speed['p90']:.2f})",
                ", ".join(f"{ratio:.2f}x ({ours})" for ours, ratio in by.items()),
                f"{row['least_centred_cosine']:.4f}",
                f"{row['peak_bytes'] / 1e6:,.0f} MB",
            )
        )
    return found


def _goals(result: Result) -> str:
    found = [f"{pair.replace(' / ', ' against ')} {goal:g}x" for pair, goal in result["goals"].items()]
    return f"Goals: {', '.join(found)}." if found else ""
