"""Pictures of embeddings."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from geneformer_fast.errors import OutputError, UnsupportedError
from geneformer_fast.files.writing import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# UMAP takes minutes beyond this, and more points hide each other.
MOST_CELLS = 20_000
_LEAST_CELLS = 4

#: The palette of Okabe and Ito, which people with any colour vision can tell apart, with a grey in place of black.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#666666")
#: Classes beyond the colours have them again in another shape.
MARKERS = ("o", "^", "s", "D", "v")
#: Classes with a look of their own. The smallest ones beyond that share one.
MOST_CLASSES = len(COLORS) * len(MARKERS)
INK, FAINT = "#222222", "#c4c4c4"
#: What cells without a label are called; they have no colour.
NONE = "(none)"


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raise, before anything is computed, what :func:`plot_umap` would raise about this path."""
    check_format(path)
    try:
        from umap import UMAP  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(_missing(error)) from None


def check_format(path: str | os.PathLike[str]) -> None:
    """See that a picture can be drawn and its name ends as one's.

    Raises
    ------
    UnsupportedError
        matplotlib is not installed.
    OutputError
        No picture ends like that.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise UnsupportedError(_missing(error)) from None
    path = Path(path)
    formats = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in formats:
        raise OutputError(f"{path}: pictures end in .png, .pdf or .svg (all formats: {', '.join(formats)})")


def _missing(error: ImportError) -> str:
    return f"pictures need {error.name}, which is not installed: pip install 'geneformer-fast[plot]'"


def check_enough(n_cells: int) -> None:
    """Refuse to show as good as nothing."""
    if n_cells < _LEAST_CELLS:
        raise UnsupportedError(f"a UMAP of {n_cells} cells shows nothing; it needs at least {_LEAST_CELLS}")


def plot_umap(
    embeddings: np.ndarray,
    labels: np.ndarray | None,
    path: str | os.PathLike[str],
    *,
    label: str | None = None,
    title: str | None = None,
    seed: int = 0,
) -> Path:
    """Write a picture of the UMAP of embeddings (McInnes et al., arXiv:1802.03426).

    Parameters
    ----------
    embeddings
        [cells, C]; of more than 20,000 cells a seeded sample is drawn.
    labels
        [cells] values to colour by: numbers on a scale, anything else as classes, with their numbers of cells in the
        legend. None colours all alike.
    path
        Picture to write; the suffix (.png, .pdf, .svg) decides the format. Missing folders are made.
    label
        What the colours mean.
    title
        What the embeddings are, above the picture; the number of cells follows it.
    seed
        Of the sample and of UMAP.

    Raises
    ------
    UnsupportedError
        umap-learn or matplotlib is not installed.
    OutputError
        The picture cannot be written there.
    """
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    n_cells = len(embeddings)
    sample = np.arange(n_cells)
    if n_cells > MOST_CELLS:
        sample = np.sort(np.random.default_rng(seed).choice(n_cells, MOST_CELLS, replace=False))
    points = umap_points(embeddings[sample], seed=seed)
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = f"{len(sample):,} of {n_cells:,} cells" if len(sample) < n_cells else f"{n_cells:,} cells"
    _scatter(axes, points, labels, sample, label)
    axes.set(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    axes.set_title(f"{title}, {shown}" if title else shown, fontsize="medium", wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def umap_points(embeddings: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """[cells, 2] coordinates by UMAP; torch keeps its number of threads."""
    from umap import UMAP

    check_enough(len(embeddings))
    neighbours = min(15, len(embeddings) - 1)
    init = "spectral" if len(embeddings) > 20 else "random"
    # n_jobs=1 is what a fixed seed means to UMAP; said here, it does not warn about it.
    with _threads_kept():
        umap = UMAP(n_neighbors=neighbours, init=init, random_state=seed, n_jobs=1)
        return np.asarray(umap.fit_transform(embeddings))


def texts_of(labels: np.ndarray) -> np.ndarray:
    """[n] labels as texts; those that are missing are :data:`NONE`."""
    return np.array(
        [NONE if value is None or value != value or value == "" else str(value) for value in labels.tolist()]
    )


def places_of(texts: np.ndarray) -> dict[str, int]:
    """Class -> which of the looks it has, in every picture of these labels: the largest ones, in the order of names.

    Look i is colour ``i % 8`` in form ``i // 8``. Smaller classes than these, and missing labels, have none.
    """
    names, counts = np.unique(texts[texts != NONE], return_counts=True)
    large = np.sort(np.argsort(-counts, kind="stable")[:MOST_CLASSES])
    return {str(name): place for place, name in enumerate(names[large])}


def draw_classes(
    axes: Axes, points: np.ndarray, labels: np.ndarray, *, size: float, places: Mapping[str, int] | None = None
) -> list[Any]:
    """Draw points [cells, 2] in a colour and shape for each class.

    Parameters
    ----------
    axes
        Where to draw.
    points, labels
        Of the cells.
    size
        Area of a point, in square points.
    places
        The looks of classes (:func:`places_of`); None where these labels are all that there are.

    Returns
    -------
    list
        What a legend shows, ``NAME (cells)`` in the order of the names. Where there are too many classes to tell apart,
        the smallest ones are drawn in one grey and stand at the end, before cells without a label.
    """
    texts = texts_of(labels)
    places = places_of(texts) if places is None else places
    names, counts = np.unique(texts, return_counts=True)
    sizes = {str(name): int(count) for name, count in zip(names, counts, strict=True)}
    n_missing, last = sizes.pop(NONE, 0), len(places)
    drawn = {}
    style: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.85}
    if n_missing:
        of_none, shown = points[texts == NONE], f"{NONE} ({n_missing:,})"
        drawn[last + 1] = axes.scatter(*of_none.T, color=FAINT, marker="x", label=shown, **style | {"linewidths": 0.5})
    if small := sizes.keys() - places.keys():
        shown = f"{len(small):,} smaller ones ({sum(sizes[name] for name in small):,})"
        drawn[last] = axes.scatter(*points[np.isin(texts, [*small])].T, color=FAINT, marker=".", label=shown, **style)
    # Large classes first, so that rare ones are drawn on top of them.
    for name in sorted(sizes.keys() & places.keys(), key=lambda name: (-sizes[name], name)):
        place = places[name]
        color, marker = COLORS[place % len(COLORS)], MARKERS[place // len(COLORS)]
        shown = f"{name} ({sizes[name]:,})"
        drawn[place] = axes.scatter(*points[texts == name].T, color=color, marker=marker, label=shown, **style)
    return [drawn[place] for place in sorted(drawn)]


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Torch computes on as many threads after the block as before it.

    UMAP starts numba's threads, which sets the number for every OpenMP program in the process; torch's products then go
    on with another number than the rest of torch, and sums come out in another order.
    """
    n_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _scatter(axes: Axes, points: np.ndarray, labels: np.ndarray | None, sample: np.ndarray, label: str | None) -> None:
    """The points of a sample, by the labels of all cells."""
    size = float(np.clip(40_000 / len(points), 2, 30))
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], color=COLORS[0], s=size, linewidths=0, alpha=0.8)
        return
    labels = np.asarray(labels)
    if np.issubdtype(labels.dtype, np.number):
        shown = labels[sample]
        colored = axes.scatter(points[:, 0], points[:, 1], c=shown, cmap="viridis", s=size, linewidths=0, alpha=0.8)
        axes.figure.colorbar(colored, label=label)
        return
    drawn = draw_classes(axes, points, labels[sample], size=size, places=places_of(texts_of(labels)))
    axes.legend(
        handles=drawn,
        title=label,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize="small",
        markerscale=(30 / size) ** 0.5,
        ncols=1 + (len(drawn) > 25),
    )
