"""One picture of the tour: the embedded cells, the falling loss, and the scores beside their baselines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from geneformer_fast.files.writing import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from geneformer_fast.quickstart.evaluate import Score
    from geneformer_fast.quickstart.run import Losses

# Okabe and Ito's palette, which people with any colour vision can tell apart, with a grey more.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#666666")
INK, FAINT = "#222222", "#9a9a9a"


@dataclass(frozen=True)
class Panels:
    """What to draw: embeddings [n, C] and labels [n] of held-out cells, losses, scores by name."""

    embeddings: np.ndarray
    labels: np.ndarray
    step_losses: list[float]
    losses: Losses
    scores: dict[str, Score]


def draw(panels: Panels, path: Path) -> None:
    """Write the picture as PNG, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    cells, loss, bars = figure.subplots(1, 3, width_ratios=(1.35, 1.1, 1))
    _draw_cells(cells, panels)
    _draw_loss(loss, panels)
    _draw_scores(bars, panels)
    with whole_file(path) as temporary:
        figure.savefig(temporary)


def _draw_cells(axes: Axes, panels: Panels) -> None:
    points = _flatten(panels.embeddings)
    names, counts = np.unique(panels.labels, return_counts=True)
    # Large types first, so that rare ones are drawn on top of them.
    for i, name in sorted(enumerate(names), key=lambda pair: -counts[pair[0]]):
        chosen = panels.labels == name
        x, y = points[chosen].T
        axes.scatter(x, y, s=7, alpha=0.8, linewidths=0, color=COLORS[i % len(COLORS)], label=str(name))
    axes.set_title(f"{len(points):,} cells of unseen donors, t-SNE of their embeddings", fontsize=10, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(
        markerscale=2.2, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=4,
        columnspacing=1.0, handletextpad=0.2,
    )  # fmt: skip
    _plain(axes, hidden=("top", "right", "bottom", "left"))


def _flatten(embeddings: np.ndarray) -> np.ndarray:
    """Two coordinates per cell, by t-SNE (van der Maaten and Hinton, JMLR 2008): unlike UMAP it compiles nothing."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import StandardScaler

    scaled = StandardScaler().fit_transform(embeddings)
    components = PCA(min(30, *scaled.shape), random_state=0).fit_transform(scaled)
    perplexity = min(30.0, (len(components) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(components)


def _draw_loss(axes: Axes, panels: Panels) -> None:
    steps = np.arange(1, len(panels.step_losses) + 1)
    axes.plot(steps, panels.step_losses, color=COLORS[0], alpha=0.25, linewidth=0.8)
    window = max(1, len(steps) // 25)
    smooth = np.convolve(panels.step_losses, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], smooth, color=COLORS[0], linewidth=1.8, label="training cells")
    axes.axhline(
        panels.losses.by_frequency, color=FAINT, linestyle="--", linewidth=1.2, label="guess by gene frequency"
    )
    axes.plot(
        steps[-1:], [panels.losses.trained], "o", color=COLORS[3], markersize=6, label="unseen donors, at the end"
    )
    axes.set_title("Loss at masked genes", fontsize=10, color=INK)
    axes.set_xlabel("training step", fontsize=9)
    axes.set_ylabel("cross entropy (nats)", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)


def _draw_scores(axes: Axes, panels: Panels) -> None:
    places = np.arange(len(panels.scores), dtype=float)
    for offset, kind, color in ((-0.19, "accuracy", COLORS[0]), (0.19, "macro_f1", COLORS[4])):
        heights = [getattr(score, kind) for score in panels.scores.values()]
        axes.bar(places + offset, heights, 0.36, color=color, label=kind.replace("macro_f1", "macro-F1"))
        for place, height in zip(places + offset, heights, strict=True):
            axes.text(place, height + 0.015, f"{height:.2f}", ha="center", fontsize=8, color=INK)
    axes.set_xticks(places, [name.replace(" ", "\n", 1) for name in panels.scores])
    axes.set_ylim(0, 1.12)
    axes.set_title("Cell types of unseen donors", fontsize=10, color=INK)
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
    _plain(axes)


def _plain(axes: Axes, hidden: tuple[str, ...] = ("top", "right")) -> None:
    for side in hidden:
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8.5, colors=INK)
