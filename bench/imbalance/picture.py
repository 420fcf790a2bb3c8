"""One picture: F1 of the rare class against how much of it is left, a panel per model, a line per way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.imbalance.findings import TITLES


def draw(result: Mapping[str, Any], path: Path) -> Path:
    """Draw a result; colours of Okabe and Ito, and a marker for each way, so that no one hangs on colour."""
    from matplotlib.figure import Figure

    from geneformer_fast.plot import COLORS, MARKERS

    models = [name for name in ("pca", "geneformer", "scgpt", "scbert") if name in result["rows"]]
    figure = Figure(figsize=(3.0 * max(1, len(models)), 3.2), layout="constrained")
    panels = figure.subplots(1, max(1, len(models)), sharey=True, squeeze=False)[0]
    ways = list(dict.fromkeys(way for model in models for table in result["rows"][model].values() for way in table))
    for panel, model in zip(panels, models, strict=False):
        tables = result["rows"][model]
        for number, way in enumerate(ways):
            points = [
                (float(share), table[way]["rare_f1"])
                for share, table in tables.items()
                if way in table and "rare_f1" in table[way]
            ]
            if not points:
                continue
            points.sort(key=lambda point: point[0])
            panel.errorbar(
                [share * 100 for share, _ in points], [score["mean"] for _, score in points],
                yerr=[score["sd"] or 0.0 for _, score in points], color=COLORS[number % len(COLORS)],
                marker=MARKERS[number % len(MARKERS)], markersize=4, linewidth=1.2, capsize=2, label=way,
            )  # fmt: skip
        panel.set(title=TITLES[model], xscale="log", ylim=(-0.03, 1.03), xlabel="% of the class left in training")
        panel.set_xticks([1, 5, 20, 100], ["1", "5", "20", "100"])
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    if models:
        panels[0].set_ylabel(f"F1 of {result['asked']['rare']}")
        handles, labels = panels[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)), frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path
