"""Pictures of scores: the confusion matrix, and the ROC curve over folds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.files.writing import whole_file
from geneformer_fast.finetuning.scores import GRID

# Beyond this, numbers in the squares become unreadable.
_MOST_NUMBERS = 20


def check_pictures() -> None:
    """Refuse, before anything is computed, to draw without matplotlib."""
    from importlib.util import find_spec

    missing = [name for name in ("matplotlib", "sklearn") if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"fine-tuning needs {' and '.join(missing)}, not installed here: pip install 'geneformer-fast[train]'"
        )


def plot_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], path: Path, *, title: str = "") -> Path:
    """Write the confusion matrix as a picture: colour is the share of the true class, numbers are counts.

    Parameters
    ----------
    confusion
        [K][K] counts; rows are the truth.
    classes
        [K] names.
    path
        .png, .pdf or .svg.
    title
        What stands above.
    """
    counts = np.asarray(confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = float(np.clip(2.5 + 0.45 * len(classes), 4, 16))
    figure = _figure(size + 1, size)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    names = [f"{name} ({total:,})" for name, total in zip(classes, counts.sum(1), strict=True)]
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(classes)), names)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if len(classes) <= _MOST_NUMBERS:
        for row, column in zip(*counts.nonzero(), strict=True):
            ink = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=ink, fontsize="small")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def plot_roc(curves: Sequence[np.ndarray], areas: Sequence[float], path: Path, *, title: str = "") -> Path:
    """Write ROC curves of folds and their mean as a picture.

    Parameters
    ----------
    curves
        Per fold true positive rates at :data:`~geneformer_fast.finetuning.scores.GRID`.
    areas
        Per fold area under the curve.
    path
        .png, .pdf or .svg.
    title
        What stands above.
    """
    figure = _figure(5.5, 5)
    axes = figure.subplots()
    many = len(curves) > 1
    for number, (curve, area) in enumerate(zip(curves, areas, strict=True)):
        axes.plot(GRID, curve, lw=1, alpha=0.6, label=f"fold {number + 1}: {area:.3f}" if many else f"{area:.3f}")
    if many:
        mean, sd = np.mean(curves, axis=0), np.std(curves, axis=0, ddof=1)
        label = f"mean: {np.mean(areas):.3f} ± {np.std(areas, ddof=1):.3f}"
        axes.plot(GRID, mean, color="black", lw=2, label=label)
        axes.fill_between(GRID, np.clip(mean - sd, 0, 1), np.clip(mean + sd, 0, 1), color="black", alpha=0.12, lw=0)
    axes.plot([0, 1], [0, 1], color="grey", lw=1, ls="--")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=title, xlim=(0, 1), ylim=(0, 1.01))
    axes.set_aspect("equal")
    axes.legend(loc="lower right", frameon=False, title="area under the curve", fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
