"""A picture of embeddings as they are: cells by dimensions, in the order of a label."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_fast.errors import InputError
from geneformer_fast.files.writing import whole_file
from geneformer_fast.plot import COLORS, FAINT, NONE, check_format, places_of, texts_of

#: Rows of a picture that can be told apart, about; of more cells a sample is drawn.
MOST_CELLS = 2_000
#: Classes beyond the colours have them again with another hatching, where the UMAP has another shape.
HATCHES = ("", "////", "....", "xxxx", "----")
# Standard deviations at which the colours end.
_LIMIT = 2.5


def plot_heatmap(
    embeddings: np.ndarray,
    labels: np.ndarray,
    path: str | os.PathLike[str],
    *,
    label: str,
    title: str = "",
    seed: int = 0,
) -> Path:
    """Write a picture of embeddings: one row per cell, one column per dimension, cells of one label together.

    Colours are standard deviations from a dimension's mean over the cells that are shown. Dimensions that vary alike
    stand together (average linkage of their correlations), and so do cells within a label (the order of their first
    principal component there).

    Parameters
    ----------
    embeddings
        [cells, C]; of more than 2,000 cells a seeded sample is drawn.
    labels
        [cells] numbers, along which cells are sorted, or anything else as classes. Cells without one come last.
    path
        Picture to write; the suffix (.png, .pdf, .svg) decides the format. Missing folders are made.
    label
        What the labels are.
    title
        What stands above.
    seed
        Of the sample.

    Raises
    ------
    InputError
        There is no cell.
    UnsupportedError
        matplotlib is not installed.
    OutputError
        The picture cannot be written there.
    """
    check_format(path)
    path, n_cells = Path(path), len(embeddings)
    if not n_cells:
        raise InputError("a heatmap of no cells shows nothing")
    sample = np.arange(n_cells)
    if n_cells > MOST_CELLS:
        sample = np.sort(np.random.default_rng(seed).choice(n_cells, MOST_CELLS, replace=False))
    shown, every = np.asarray(embeddings, dtype=np.float64)[sample], np.asarray(labels)
    labels, standard = every[sample], standardized(shown)
    codes, names = classes_of(labels)
    # A class looks like on the UMAP of the same cells, whichever of them are drawn.
    places = {} if codes is None else places_of(texts_of(every))
    order = row_order(standard, labels if codes is None else codes)
    columns = column_order(standard)
    counted = f"{len(sample):,} of {n_cells:,} cells" if len(sample) < n_cells else f"{n_cells:,} cells"
    figure = _figure()
    _draw(
        figure, standard[np.ix_(order, columns)], (labels if codes is None else codes)[order],
        {name: places.get(name) for name in names}, label, f"{title}\n{counted}" if title else counted,
    )  # fmt: skip
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def standardized(values: np.ndarray) -> np.ndarray:
    """[n, C] in standard deviations from the mean of each column; columns that do not vary are 0."""
    deviation = values.std(axis=0)
    return (values - values.mean(axis=0)) / np.where(deviation > 0, deviation, 1)


def classes_of(labels: np.ndarray) -> tuple[np.ndarray | None, list[str]]:
    """([n] class of each cell, names); of numbers no classes. Missing labels are the last class."""
    if np.issubdtype(labels.dtype, np.number):
        return None, []
    texts = texts_of(labels)
    names = sorted(set(texts.tolist()), key=lambda name: (name == NONE, name))
    number = {name: code for code, name in enumerate(names)}
    return np.array([number[text] for text in texts.tolist()]), names


def row_order(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """[n] cells by label, those of one label by their first principal component."""
    within = np.zeros(len(values))
    for key in np.unique(keys[keys == keys]):
        at = np.flatnonzero(keys == key)
        if len(at) > 2:
            centred = values[at] - values[at].mean(axis=0)
            within[at] = centred @ np.linalg.svd(centred, full_matrices=False)[2][0]
    return np.lexsort((within, keys))  # NaN last


def column_order(values: np.ndarray) -> np.ndarray:
    """[C] dimensions, those that vary alike beside each other."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if values.shape[1] < 3 or len(values) < 2:
        return np.arange(values.shape[1])
    correlation = values.T @ values / len(values)
    distance = np.clip(1 - correlation, 0, 2)
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(distance, checks=False), "average"))


def _figure() -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw(
    figure: Any, values: np.ndarray, keys: np.ndarray, places: Mapping[str, int | None], label: str, title: str
) -> None:
    """The strip of labels, and the heatmap beside it; of classes with the places of their looks."""
    strip, axes = figure.subplots(1, 2, width_ratios=(1, 30), sharey=True)
    image = axes.imshow(
        values, cmap="PuOr_r", vmin=-_LIMIT, vmax=_LIMIT, aspect="auto", interpolation="nearest", rasterized=True
    )
    figure.colorbar(image, ax=axes, label="standard deviations from the mean of the dimension", extend="both")
    if places:
        for line in np.flatnonzero(np.diff(keys)) + 0.5:
            axes.axhline(line, color="black", lw=0.5)
        shown = _draw_strip(strip, keys, places)
        figure.legend(
            handles=shown, title=label, loc="outside right upper", frameon=False, fontsize="small",
            ncols=1 + (len(shown) > 30),
        )  # fmt: skip
    else:
        colored = strip.imshow(keys[:, None], cmap="viridis", aspect="auto", interpolation="nearest")
        figure.colorbar(colored, ax=axes, label=label)
    strip.set(xticks=[], yticks=[], ylabel=f"cells by {label}")
    axes.set(xticks=[], xlabel=f"{values.shape[1]:,} dimensions, clustered", title=title)
    axes.tick_params(left=False, labelleft=False)


def _draw_strip(strip: Any, keys: np.ndarray, places: Mapping[str, int | None]) -> list[Any]:
    """A block for the cells of each class, which stand together; returns what a legend shows."""
    from matplotlib.patches import Patch

    shown, small = [], []
    for code, (name, place) in enumerate(places.items()):
        rows = np.flatnonzero(keys == code)
        strip.axhspan(rows[0] - 0.5, rows[-1] + 0.5, lw=0, **look_of(place))
        if place is None and name != NONE:
            small.append(len(rows))
        else:
            shown.append(Patch(label=f"{name} ({len(rows):,})", lw=0, **look_of(place)))
    if small:
        at = len(shown) - (NONE in places)
        shown.insert(at, Patch(label=f"{len(small):,} smaller ones ({sum(small):,})", lw=0, **look_of(None)))
    return shown


def look_of(place: int | None) -> dict[str, Any]:
    """How matplotlib fills a class: in the colour that it has on the UMAP, or in grey where it has none."""
    if place is None:
        return {"facecolor": FAINT}
    return {"facecolor": COLORS[place % len(COLORS)], "hatch": HATCHES[place // len(COLORS)], "edgecolor": "white"}
