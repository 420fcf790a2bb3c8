"""One picture of the tour: embedded cells by type, and time, memory and losses beside stock transformers."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from geneformer_fast.files.writing import whole_file
from geneformer_fast.plot import COLORS, INK, draw_classes, umap_points
from geneformer_fast.quickstart.side_by_side import NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from geneformer_fast.quickstart.finetune import Trained
    from geneformer_fast.quickstart.side_by_side import Comparison

_OURS, _STOCK = COLORS[0], COLORS[1]


@dataclass(frozen=True)
class Panels:
    """What to draw.

    Attributes
    ----------
    embeddings, labels
        [cells, C], and [cells] types.
    model, pool
        What the model is, and what the embeddings are of it.
    comparison, trained
        What was measured.
    machine
        Where.
    """

    embeddings: np.ndarray
    labels: np.ndarray
    model: str
    pool: str
    comparison: Comparison
    trained: Trained
    machine: str


def draw(panels: Panels, path: Path) -> None:
    """Write the picture as PNG, without a display.

    Ratios above the bars are of ours in float32 to both ways of transformers, which compute in float32, in their order.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = cast("np.ndarray", figure.subfigures(1, 2, width_ratios=[1.15, 1]))
    _draw_cells(left.subplots(), panels)
    speed, memory, loss = right.subplots(3, 1, height_ratios=[1.1, 1.1, 1.4])
    comparison = panels.comparison
    rates = [each.cells_per_s for each in comparison.measured.values()]
    peaks = [each.peak_bytes / 1e6 for each in comparison.measured.values()]
    faster = " and ".join(f"{comparison.times_faster(name):.1f}x" for name in ("extractor", "stock"))
    smaller = " and ".join(f"{comparison.share_of_memory(name):.0%}" for name in ("extractor", "stock"))
    _draw_bars(speed, comparison, rates, f"Cells per second ({faster}, float32)")
    _draw_bars(memory, comparison, peaks, f"Peak memory, MB ({smaller}, float32)")
    _draw_loss(loss, panels.trained)
    told = f"embedding: {comparison.n_cells} cells, float32 where nothing else is said; {panels.machine}"
    figure.supxlabel(told, fontsize=9, color="#666666", x=0.995, ha="right")
    with whole_file(path) as temporary:
        figure.savefig(temporary)


def _draw_cells(axes: Axes, panels: Panels) -> None:
    drawn = draw_classes(axes, umap_points(panels.embeddings), panels.labels, size=22)
    axes.set_title(
        f"{len(panels.labels):,} sorted blood cells: UMAP of {panels.pool}\n" + textwrap.fill(panels.model, 68),
        fontsize=11,
        color=INK,
        loc="left",
    )
    axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    axes.legend(
        handles=drawn, title="cell type, by sort gate (cells)", loc="upper center", bbox_to_anchor=(0.5, -0.05),
        ncols=2, fontsize=10, frameon=False, markerscale=1.5, handletextpad=0.2,
    )  # fmt: skip
    _plain(axes)


def _draw_bars(axes: Axes, comparison: Comparison, values: list[float], title: str) -> None:
    names = list(comparison.measured)
    places = np.arange(len(names))[::-1]
    axes.barh(places, values, 0.68, color=[_OURS if name.startswith("ours") else _STOCK for name in names])
    for place, value in zip(places, values, strict=True):
        shown = f" {value:,.1f}" if value < 100 else f" {value:,.0f}"
        axes.text(value, place, shown, va="center", fontsize=10, color=INK)
    axes.set_yticks(places, [textwrap.fill(_named(name, comparison), 24) for name in names])
    axes.set_xlim(0, max(values) * 1.2)
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.xaxis.set_visible(False)
    _plain(axes, hidden=("top", "right", "bottom"))


def _named(name: str, comparison: Comparison) -> str:
    dtype = comparison.measured[name].dtype
    return NAMES[name] + ("" if dtype == "float32" else f" ({dtype})")


def _draw_loss(axes: Axes, trained: Trained) -> None:
    steps = np.arange(1, len(trained.losses) + 1)
    axes.plot(
        steps, trained.stock_losses, color=_STOCK, linewidth=4, alpha=0.6,
        label=f"transformers: {trained.stock_seconds:.1f} s",
    )  # fmt: skip
    axes.plot(
        steps, trained.losses, color=_OURS, linewidth=1.4, marker=".", markersize=4,
        label=f"after accelerate(): {trained.seconds:.1f} s",
    )  # fmt: skip
    axes.set_title("Fine-tuning: the same losses, step by step", fontsize=11, color=INK, loc="left")
    axes.set_xlabel(f"step (losses differ by at most {trained.largest_difference:.1g})", fontsize=10)
    axes.set_ylabel("cross entropy (nats)", fontsize=10)
    axes.set_ylim(0, None)
    axes.legend(fontsize=10, frameon=False, loc="upper right")
    _plain(axes)


def _plain(axes: Axes, hidden: tuple[str, ...] = ("top", "right")) -> None:
    for side in hidden:
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=10, colors=INK)
