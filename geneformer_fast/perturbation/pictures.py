"""Pictures of perturbations: volcano, ranked effects, cells by genes, shifts on a UMAP, pairs.

Blue and orange are told apart with any colour vision, and what a colour says a shape or a place says too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_fast.errors import InputError, UnsupportedError
from geneformer_fast.files.writing import whole_file
from geneformer_fast.perturbation.statistics.columns import Run, Values

if TYPE_CHECKING:
    import pandas

#: Of the palette of Okabe and Ito: up, down, and what is neither.
UP, DOWN, NEITHER, INK = "#D55E00", "#0072B2", "#b5b5b5", "#222222"
#: Genes named in the volcano; rows of ranked effects; genes and cells of the heatmap.
NAMED, RANKED, GENES, CELLS = 12, 30, 40, 400
_PAIRED = 30


def check_pictures() -> None:
    """Refuse, before anything is computed, to draw without matplotlib."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UnsupportedError(
            "pictures need matplotlib, which is not installed: pip install 'geneformer-fast[plot]', or leave them out "
            "(pictures=False, --no-pictures)"
        )


def plot_volcano(table: pandas.DataFrame, path: str | os.PathLike[str], *, fdr: float = 0.05, title: str = "") -> Path:
    """Write a volcano: how far each gene is from genes like it, and how unusual that is among them.

    Parameters
    ----------
    table
        Effects on one state, of which genes with a p-value are shown.
    path
        .png, .pdf or .svg.
    fdr
        Genes below this false discovery rate have a colour.
    title
        What stands above.

    Raises
    ------
    InputError
        No gene has a p-value.
    """
    shown = table[table["p_value"].notna()]
    if not len(shown):
        raise InputError("a volcano shows p-values, and no gene has one: too few genes are in enough cells (min_cells)")
    x = shown["difference"].to_numpy()
    y = -np.log10(np.maximum(shown["p_value"].to_numpy(), 1e-300))
    is_sure = (shown["q_value"] < fdr).to_numpy()
    is_universal = shown["is_universal"].to_numpy()
    figure = _figure(7, 5.5)
    axes = figure.subplots()
    kinds = (
        ("not unusual", ~is_sure, NEITHER), ("above genes like it", is_sure & (x > 0), UP),
        ("below genes like it", is_sure & (x <= 0), DOWN),
    )  # fmt: skip
    for label, chosen, colour in kinds:
        for marker, among in (("o", ~is_universal), ("^", is_universal)):
            at = chosen & among
            if at.any():
                kind = f"{label}, strong in every cell" if marker == "^" else label
                axes.scatter(
                    x[at], y[at], s=16 if marker == "o" else 26, marker=marker, color=colour, linewidths=0, alpha=0.8,
                    label=f"{kind} ({at.sum():,})", rasterized=len(shown) > 5_000,
                )  # fmt: skip
    axes.axvline(0, color=INK, lw=0.6)
    if is_sure.any():
        axes.axhline(y[is_sure].min(), color=INK, lw=0.6, ls="--")
        axes.annotate(
            f"false discovery rate {fdr:g}", (0, y[is_sure].min()), xycoords=("axes fraction", "data"), ha="left",
            va="bottom", fontsize="x-small", color=INK,
        )  # fmt: skip
    _name(axes, x, y, shown["symbol"].tolist(), np.argsort(-y, kind="stable")[:NAMED])
    axes.set(xlabel="difference from genes of like rank and detection", ylabel="−log₁₀ p-value", title=title)
    axes.margins(x=0.12, y=0.1)
    axes.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return _saved(figure, path)


def plot_ranked(table: pandas.DataFrame, path: str | os.PathLike[str], *, n: int = RANKED, title: str = "") -> Path:
    """Write the largest effects with their intervals, and where genes like each lie.

    Parameters
    ----------
    table
        Effects on one state. Of shifts those furthest towards the state and away from it are shown, of cosines the
        least.
    path
        .png, .pdf or .svg.
    n
        Most rows.
    title
        What stands above.
    """
    is_shift = "state" in table
    tested = table[table["is_covered"]] if table["is_covered"].any() else table
    ordered = tested.sort_values("mean", ascending=not is_shift, kind="stable")
    if is_shift and len(ordered) > n:
        import pandas as pd

        ordered = pd.concat([ordered.head(n // 2), ordered.tail(n - n // 2)])
    ordered = ordered.head(n)
    y = np.arange(len(ordered))[::-1]
    figure = _figure(6.5, 1.3 + 0.24 * max(len(ordered), 4))
    axes = figure.subplots()
    mean = ordered["mean"].to_numpy()
    has_null = ordered["null_mean"].notna().to_numpy()
    low, high = (ordered["null_mean"] + side * ordered["null_sd"] for side in (-1, 1))
    axes.hlines(
        y[has_null], low[has_null], high[has_null], color=NEITHER, lw=7, alpha=0.6, label="genes like it, ± 1 SD"
    )
    has_end = ordered["low"].notna().to_numpy()
    axes.hlines(
        y[has_end], ordered["low"][has_end], ordered["high"][has_end], color=INK, lw=1.2, label="interval of the mean"
    )
    side = mean > 0 if is_shift else np.ones(len(mean), dtype=bool)
    for at, colour, marker, label in (
        (side, UP, "o", "towards it" if is_shift else "mean"), (~side, DOWN, "s", "away from it"),
    ):  # fmt: skip
        if at.any():
            axes.scatter(mean[at], y[at], color=colour, marker=marker, s=26, zorder=3, linewidths=0, label=label)
    if is_shift:
        axes.axvline(0, color=INK, lw=0.6)
        if len(tested) > n:
            axes.axhline(y[n // 2 - 1] - 0.5, color=INK, lw=0.6, ls=":")
    names = [f"{symbol} ({count:,})" for symbol, count in zip(ordered["symbol"], ordered["n_cells"], strict=True)]
    axes.set_yticks(y, names, fontsize="small")
    axes.set(xlabel="mean shift" if is_shift else "mean cosine", ylim=(-0.8, len(ordered) - 0.2))
    axes.set_title(f"{title}\nlargest of {len(tested):,} genes (cells)" if title else "", fontsize="medium")
    axes.legend(
        frameon=False,
        fontsize="small",
        loc="upper center",
        bbox_to_anchor=(0.5, -0.9 / figure.get_figheight()),
        ncols=2,
    )
    axes.spines[["top", "right"]].set_visible(False)
    return _saved(figure, path)


def plot_cells(
    run: Run, table: pandas.DataFrame, path: str | os.PathLike[str], *, state: str = "", n_genes: int = GENES,
    title: str = "", seed: int = 0,
) -> Path:  # fmt: skip
    """Write cells by genes: what each gene does in each cell that has it.

    Parameters
    ----------
    run
        The values.
    table
        Effects on the state: the genes with the largest are shown.
    path
        .png, .pdf or .svg.
    state
        Whose shifts; empty where there are none.
    n_genes
        Most genes. Of more than 400 cells a seeded sample is drawn.
    title
        What stands above.
    seed
        Of the sample.
    """
    values = run.values[state]
    number = {" ".join(map(str, edit)): at for at, edit in enumerate(run.edits)}
    size = table["mean"].abs() if state else 1 - table["mean"]
    size = size.where(table["is_covered"] | ~table["is_covered"].any(), -1)
    chosen = table.iloc[np.argsort(-size.to_numpy(), kind="stable")[:n_genes]]
    chosen = chosen.iloc[np.argsort(chosen["mean"].to_numpy(), kind="stable")[:: -1 if state else 1]]
    dense = dense_of(values, [number[tokens] for tokens in chosen["tokens"]], len(run.cells))
    rows = np.flatnonzero(~np.isnan(dense).all(axis=1))
    n_all = len(rows)
    if n_all > CELLS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, CELLS, replace=False))
    dense = dense[rows] if state else 1 - dense[rows]
    dense = dense[np.argsort(-_mean_of_rows(dense), kind="stable")]
    figure = _figure(2.5 + 0.19 * max(len(chosen), 12), 5.5)
    axes = figure.subplots()
    limit = float(np.nanquantile(np.abs(dense), 0.98)) or 1.0
    look: dict[str, Any] = (
        {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit} if state else {"cmap": "viridis", "vmin": 0, "vmax": limit}
    )
    axes.set_facecolor("#e8e8e8")
    image = axes.imshow(np.ma.masked_invalid(dense), aspect="auto", interpolation="nearest", **look)
    kind = "shift" if state else "1 − cosine"
    figure.colorbar(image, ax=axes, label=f"{kind} (grey: the cell lacks the gene)", extend="both" if state else "max")
    axes.set_xticks(range(len(chosen)), chosen["symbol"], rotation=90, fontsize="x-small")
    counted = f"{len(rows):,} of {n_all:,} cells" if len(rows) < n_all else f"{n_all:,} cells"
    axes.set(yticks=[], ylabel=f"{counted}, by their mean {kind}", title=title)
    return _saved(figure, path)


def plot_interactions(pairs: pandas.DataFrame, path: str | os.PathLike[str], *, title: str = "") -> Path:
    """Write the matrix of what pairs of genes do beyond the sum of what each does.

    Parameters
    ----------
    pairs
        What :func:`~geneformer_fast.perturbation.statistics.epistasis.epistasis` gives. Of many genes those of the
        largest interactions are shown.
    path
        .png, .pdf or .svg.
    title
        What stands above.

    Raises
    ------
    InputError
        There is no pair.
    """
    if not len(pairs):
        raise InputError("there are no pairs whose interaction could be shown")
    genes: dict[str, None] = {}
    for first, second in zip(pairs["first_symbol"], pairs["second_symbol"], strict=True):  # the largest first
        if len(genes | {first: None, second: None}) <= _PAIRED:
            genes |= {first: None, second: None}
    names = sorted(genes)
    place = {name: at for at, name in enumerate(names)}
    matrix = np.full((len(names), len(names)), np.nan)
    is_sure = np.zeros(matrix.shape, dtype=bool)
    for pair in pairs.itertuples():
        if pair.first_symbol in place and pair.second_symbol in place:
            for at in ((0, 1), (1, 0)):
                row, column = (place[(pair.first_symbol, pair.second_symbol)[each]] for each in at)
                matrix[row, column] = pair.interaction
                is_sure[row, column] = pair.low > 0 or pair.high < 0
    limit = float(np.nanmax(np.abs(matrix))) or 1.0
    size = float(np.clip(2.5 + 0.3 * len(names), 4, 12))
    figure = _figure(size + 1.2, size)
    axes = figure.subplots()
    axes.set_facecolor("#e8e8e8")
    image = axes.imshow(np.ma.masked_invalid(matrix), cmap="PuOr_r", vmin=-limit, vmax=limit)
    figure.colorbar(image, ax=axes, label="together, less the sum of each", shrink=0.8)
    is_dark = np.abs(np.nan_to_num(matrix)) > 0.6 * limit
    for ink, at in (("white", is_sure & is_dark), ("black", is_sure & ~is_dark)):
        axes.scatter(*np.nonzero(at)[::-1], s=16, marker="*", color=ink, linewidths=0)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_title(f"{title}\n★ interval without zero" if title else "★ interval without zero", fontsize="medium")
    return _saved(figure, path)


def plot_shifts(
    embeddings: np.ndarray,
    labels: np.ndarray | None,
    shifts: dict[str, np.ndarray],
    path: str | os.PathLike[str],
    *,
    label: str = "state",
    towards: str = "",
    seed: int = 0,
) -> Path:
    """Write the UMAP of cells: their states, and beside them how far perturbing each gene moves each cell.

    Parameters
    ----------
    embeddings
        [cells, C] before anything was perturbed.
    labels
        [cells] states; None leaves that panel out.
    shifts
        Name of a gene -> [cells] shift of each; NaN where a cell was not perturbed or lacks the gene.
    path
        .png, .pdf or .svg.
    label
        What the labels are.
    towards
        The state that shifts are towards.
    seed
        Of the UMAP, and of a sample where there are more than 20,000 cells.

    Raises
    ------
    UnsupportedError
        umap-learn is not installed.
    InputError
        There is no shift to show.
    """
    from geneformer_fast.plot import MOST_CELLS, check_picture, draw_classes, umap_points

    check_picture(path)
    if not any(np.isfinite(values).any() for values in shifts.values()):
        raise InputError("no gene has a shift in any of these cells; are these the cells that were perturbed?")
    sample = np.arange(len(embeddings))
    if len(sample) > MOST_CELLS:
        sample = np.sort(np.random.default_rng(seed).choice(sample, MOST_CELLS, replace=False))
    points = umap_points(np.asarray(embeddings)[sample], seed=seed)
    n_panels = len(shifts) + (labels is not None)
    columns = min(n_panels, 3)
    rows = -(-n_panels // columns)
    figure = _figure(4.4 * columns, 3.9 * rows)
    panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
    size = float(np.clip(12_000 / len(points), 2, 22))
    if labels is not None:
        handles = draw_classes(panels[0], points, np.asarray(labels)[sample], size=size)
        panels[0].legend(handles=handles, frameon=False, fontsize="x-small", loc="best")
        panels[0].set_title(label, fontsize="medium")
    limit = max(float(np.nanquantile(np.abs(values), 0.98)) for values in shifts.values() if np.isfinite(values).any())
    image = None
    for axes, (gene, values) in zip(panels[labels is not None :], shifts.items(), strict=False):
        here = np.asarray(values)[sample]
        has = np.isfinite(here)
        axes.scatter(*points[~has].T, color="#d9d9d9", s=size / 2, linewidths=0)
        # The largest last, so that they are not hidden.
        order = np.flatnonzero(has)[np.argsort(np.abs(here[has]), kind="stable")]
        image = axes.scatter(
            *points[order].T, c=here[order], cmap="PuOr_r", vmin=-limit or -1, vmax=limit or 1, s=size, linewidths=0.2,
            edgecolors="#666666",
        )  # fmt: skip
        axes.set_title(f"{gene} ({has.sum():,} cells)", fontsize="medium")
    for axes in panels:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes in panels[n_panels:]:
        axes.set_visible(False)
    said = f"shift towards {towards}" if towards else "shift"
    figure.colorbar(image, ax=panels.tolist(), label=said, extend="both", shrink=0.7)
    return _saved(figure, path)


def dense_of(values: Values, edits: Sequence[int], n_cells: int) -> np.ndarray:
    """[cells, edits] float64 values; NaN where a cell lacks the gene."""
    dense = np.full((n_cells, len(edits)), np.nan)
    for column, edit in enumerate(edits):
        here = slice(values.starts[edit], values.starts[edit + 1])
        dense[values.cells[here], column] = values.values[here]
    return dense


def _mean_of_rows(dense: np.ndarray) -> np.ndarray:
    counts = (~np.isnan(dense)).sum(axis=1)
    return np.nansum(dense, axis=1) / np.maximum(counts, 1)


def _name(axes: Any, x: np.ndarray, y: np.ndarray, names: Sequence[str], chosen: np.ndarray) -> None:
    """Names beside points, further up where two would lie on each other."""
    width, height = (np.ptp(x) or 1.0) / 5, (np.ptp(y) or 1.0) / 24
    taken: list[tuple[float, float]] = []
    for at in sorted(chosen.tolist(), key=lambda at: y[at]):
        place = float(y[at])
        while any(abs(x[at] - other) < width and abs(place - high) < height for other, high in taken):
            place += height / 2
        taken.append((float(x[at]), place))
        is_left = x[at] < 0
        axes.annotate(
            names[at], (x[at], y[at]), xytext=(x[at] + (-1 if is_left else 1) * width / 14, place), fontsize="x-small",
            ha="right" if is_left else "left", va="center", color=INK,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": INK} if place != y[at] else None,
        )  # fmt: skip


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: Any, path: str | os.PathLike[str]) -> Path:
    from geneformer_fast.plot import check_format

    check_format(path)
    path = Path(path)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path
