"""The tables of perturbed cells: speed beside a plain implementation, and what fewer bits change of effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
HEADER = (
    "",
    "perturbed cells/s (p10 to p90)",
    "ours is faster",
    "largest difference",
    "rank correlation",
    "peak memory",
)
REAL_HEADER = (
    "", "effects, root mean square", "noise, at most", "rank correlation of effects", "least of a cell",
    "of genes' means", "largest difference",
)  # fmt: skip


def title(result: Result, geometry: str, threads: str) -> str:
    """What was done, in a sentence or two."""
    held = f", everything held to {result['held_to']}" if result["held_to"] else ""
    return (
        f"Genes deleted one by one, {geometry} geometry with random weights: {result['n_genes']} genes in each of "
        f"{result['n_cells']} real cells of {result['lengths']['p50']:.0f} tokens, {threads}{held}, medians of "
        f"{result['rounds']} runs in turns. All give the same {result['n_variants']:,} values."
    )


def rows(result: Result) -> list[tuple[str, ...]]:
    """One row per candidate; what ours of the same width of numbers, and of all, is faster."""
    found = []
    for name, row in result["candidates"].items():
        speed = row["perturbed_cells_per_s"]
        by = {pair.split(" / ")[0]: ratio for pair, ratio in result["ratios"].items() if pair.split(" / ")[1] == name}
        found.append(
            (
                f"**{row['what']}**" if row["is_ours"] else f"{row['what']}, batches of {row['batch_size']}",
                f"{_rate(speed['p50'])} ({_rate(speed['p10'])} to {_rate(speed['p90'])})",
                ", ".join(f"{ratio:.1f}x in {ours}" if ratio >= 3 else f"{ratio:.2f}x in {ours}"
                          for ours, ratio in by.items()),
                f"{row['largest_difference']:.0e}" if row["largest_difference"] else "",
                f"{row['rank_correlation']:.4f}" if row["largest_difference"] else "",
                f"{row['peak_bytes'] / 1e6:,.0f} MB",
            )
        )  # fmt: skip
    return found


def goals(result: Result) -> str:
    """What was to be reached, in a sentence; nothing where nothing was."""
    found = [f"{pair.replace(' / ', ' against ')} {goal:g}x" for pair, goal in result["goals"].items()]
    return f"Goals: {', '.join(found)}." if found else ""


def real_title(result: Result) -> str:
    """What was trained, and what it was asked."""
    training, asked = result["training"], result["asked"]
    steps = f"trained for {training['n_steps']:,} steps" if "n_steps" in training else training["note"]
    return (
        f"What fewer bits change of effects: every gene of {asked['cells']} real cells deleted by itself, an encoder "
        f"of Geneformer V1-10M's shape, {steps}, against itself in float32. Similarities are of the cell with itself, "
        "shifts towards another cell type. Noise is the same variants in another order and in other batches."
    )


def real_rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """A row per question and dtype or scheme."""
    found = []
    for result in results:
        for name, row in result["rows"].items():
            ranks = ("pooled", "least_of_a_cell", "of_gene_means")
            of_ranks = [f"{row['rank_correlation'][each]:.4f}" if "rank_correlation" in row else "" for each in ranks]
            apart = f"{row['largest_difference']:.1e}" if "largest_difference" in row else ""
            sizes = f"{row['effects']['root_mean_square']:.1e}", f"{row['noise']['largest']:.1e}"
            found.append((name, *sizes, *of_ranks, apart))
    return found


def _rate(per_s: float) -> str:
    return f"{per_s:.0f}" if per_s >= 100 else f"{per_s:.1f}" if per_s >= 1 else f"{per_s:.2f}"
