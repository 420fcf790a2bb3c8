"""The README's tables of embedding in float32 on AVX2, from ``embed_*_avx2.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADER = ("", "cells/s (p10 to p90)", "float32 is faster", "of the products' ceiling", "peak memory")


def title(result: Mapping[str, Any], geometry: str, threads: str) -> str:
    """What was done, in a sentence or two."""
    held = f", everything held to {result['held_to']}" if result["held_to"] else ""
    lengths = result["lengths"]
    return (
        f"Float32 on AVX2, {geometry} geometry with random weights, {result['n_cells']} real cells of "
        f"{lengths['p10']:.0f} / {lengths['p50']:.0f} / {lengths['p90']:.0f} tokens, {threads}{held}, last layer, "
        f"medians of {result['rounds']} runs in turns. Large matrix products reach "
        f"{1000 * result['ceiling_tflops']:.0f} GFLOP/s here."
    )


def rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per candidate."""
    found = []
    for name, row in result["candidates"].items():
        speed, ratio = row["cells_per_s"], result["ratios"].get(f"float32 / {name}")
        found.append(
            (
                f"**{row['what']}**" if row["is_ours"] else f"{row['what']}, batches of {row['batch_size']}",
                f"{speed['p50']:.1f} ({speed['p10']:.1f} to {speed['p90']:.1f})",
                "" if ratio is None else f"{ratio:.2f}x",
                f"{row['share_of_ceiling']:.0%}",
                f"{row['peak_bytes'] / 1e6:.0f} MB",
            )
        )
    return found


def goals(result: Mapping[str, Any]) -> str:
    """What was to be reached, in a sentence; nothing where nothing was."""
    found = [f"{pair.replace(' / ', ' against ')} {goal:g}x" for pair, goal in result["goals"].items()]
    if result["least_share"]:
        found.append(f"{result['least_share']:.0%} of what large products reach")
    return f"Goals: {', '.join(found)}." if found else ""
