"""Pictures of embeddings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from geneformer_fast.errors import OutputError, UnsupportedError
from geneformer_fast.files.writing import whole_file

# UMAP takes minutes beyond this, and more points hide each other.
MOST_CELLS = 20_000
_LEAST_CELLS = 4
MOST_CLASSES = 40


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raise, before anything is computed, what :func:`plot_umap` would raise about this path."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from umap import UMAP  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"pictures need {error.name}, which is not installed: pip install 'geneformer-fast[plot]'"
        ) from None
    path = Path(path)
    formats = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in formats:
        raise OutputError(f"{path}: pictures end in .png, .pdf or .svg (all formats: {', '.join(formats)})")


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
    seed: int = 0,
) -> Path:
    """Write a picture of the UMAP of embeddings (McInnes et al., arXiv:1802.03426).

    Parameters
    ----------
    embeddings
        [cells, C]; of more than 20,000 cells a seeded sample is drawn.
    labels
        [cells] values to colour by: numbers on a scale, anything else as classes. None colours all alike.
    path
        Picture to write; the suffix (.png, .pdf, .svg) decides the format. Missing folders are made.
    label
        What the colours mean.
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
    from umap import UMAP

    path = Path(path)
    n_cells = len(embeddings)
    sample = np.arange(n_cells)
    if n_cells > MOST_CELLS:
        sample = np.sort(np.random.default_rng(seed).choice(n_cells, MOST_CELLS, replace=False))
    check_enough(n_cells)
    neighbours = min(15, len(sample) - 1)
    init = "spectral" if len(sample) > 20 else "random"
    # n_jobs=1 is what a fixed seed means to UMAP; said here, it does not warn about it.
    with _threads_kept():
        points = UMAP(n_neighbors=neighbours, init=init, random_state=seed, n_jobs=1).fit_transform(embeddings[sample])
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = f"{len(sample):,} of {n_cells:,} cells" if len(sample) < n_cells else f"{n_cells:,} cells"
    _scatter(axes, points, None if labels is None else labels[sample], label)
    axes.set(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[], title=shown)
    axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


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


def _scatter(axes, points: np.ndarray, labels: np.ndarray | None, label: str | None) -> None:  # type: ignore[no-untyped-def]
    size = float(np.clip(40_000 / len(points), 2, 30))
    style = {"s": size, "linewidths": 0, "alpha": 0.8}
    if labels is None:
        axes.scatter(*points.T, color="tab:blue", **style)
        return
    if np.issubdtype(np.asarray(labels).dtype, np.number):
        colored = axes.scatter(*points.T, c=labels, cmap="viridis", **style)
        axes.figure.colorbar(colored, label=label)
        return
    import matplotlib

    names, codes, counts = np.unique(labels.astype(str), return_inverse=True, return_counts=True)
    colors = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20" if len(names) <= 20 else "turbo"]
    for code, name in enumerate(names):
        at = codes == code
        color = colors(code if len(names) <= 20 else code / (len(names) - 1))
        shown = f"{name} ({counts[code]:,})" if code < MOST_CLASSES else "_"
        axes.scatter(*points[at].T, color=color, label=shown, **style)
    axes.legend(
        title=label,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize="small",
        markerscale=(30 / size) ** 0.5,
    )
