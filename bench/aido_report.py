"""The table of AIDO.Cell at full length on a CPU, from ``aido_embed.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADER = ("", "seconds a cell (p10 to p90)", "ours is faster", "TFLOP/s", "peak memory")


def title(result: Mapping[str, Any]) -> str:
    """What was done, in a sentence."""
    return (
        f"Embedding of cells of 19,266 values, {result['preset']} with random weights, {result['n_cells']} made-up "
        f"cells of {result['n_genes_not_zero']:,} genes, one at a time, {result['threads']} threads, medians of "
        f"{result['rounds']} runs in turns; memory of one cell, the whole process with Python and libraries."
    )


def rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per candidate."""
    found = []
    for name, row in result["candidates"].items():
        seconds, ratio = row["seconds_per_cell"], result["ratios"].get(f"{name} / published")
        found.append(
            (
                f"**{row['what']}**" if row["is_ours"] else row["what"],
                f"{seconds['p50']:.1f} ({seconds['p10']:.1f} to {seconds['p90']:.1f})",
                "" if ratio is None else f"{ratio:.2f}x",
                f"{row['tflops']:.2f}",
                f"{row['peak_bytes'] / 1e6:.0f} MB",
            )
        )
    return found
