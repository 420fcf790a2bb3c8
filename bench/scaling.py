"""How a cost grows with size: a fixed part, a factor and an exponent, from measured sizes, and the drawing of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

#: An exponent this near to what it should be counts as that: fixed costs are never wholly told from the rest.
NEAR = 0.05
#: Between these an exponent is looked for.
LOWEST, HIGHEST = 0.0, 3.0
#: Fewer sizes than this say nothing of three unknowns.
FEWEST = 4


@dataclass(frozen=True)
class Growth:
    """``seconds = fixed_s + factor * size ** exponent``.

    Attributes
    ----------
    fixed_s, factor, exponent
        By least squares of relative errors; the fixed part is no less than 0.
    exponent_low, exponent_high
        The least and the most that come out when one size is left out.
    largest_error
        Of the measured sizes, relative.
    """

    fixed_s: float
    factor: float
    exponent: float
    exponent_low: float
    exponent_high: float
    largest_error: float

    def seconds(self, size: float) -> float:
        """By the curve."""
        return float(self.fixed_s + self.factor * size**self.exponent)

    def is_near(self, expected: float) -> bool:
        """Whether the exponent is what it should be, as far as it is known."""
        return self.exponent_low - NEAR <= expected <= self.exponent_high + NEAR

    def as_json(self) -> dict[str, float]:
        """For a result."""
        return {name: float(f"{value:.5g}") for name, value in asdict(self).items()}


def fitted(sizes: Sequence[float], seconds: Sequence[float], *, has_fixed: bool = True) -> Growth | None:
    """The growth that measured sizes show; None for fewer than :data:`FEWEST`.

    Without a fixed part it is the line through logarithms, which may fall, too.
    """
    x, t = np.asarray(sizes, dtype=float), np.asarray(seconds, dtype=float)
    if len(x) < FEWEST:
        return None
    best = _best if has_fixed else _power
    fixed, factor, exponent = best(x, t)
    others = [best(*(np.delete(each, i) for each in (x, t)))[2] for i in range(len(x))]
    errors = np.abs((fixed + factor * x**exponent) / t - 1)
    return Growth(fixed, factor, exponent, min(*others, exponent), max(*others, exponent), float(errors.max()))


def _power(x: np.ndarray, t: np.ndarray) -> tuple[float, float, float]:
    exponent, offset = np.polyfit(np.log(x), np.log(t), 1)
    return 0.0, float(np.exp(offset)), float(exponent)


def _best(x: np.ndarray, t: np.ndarray) -> tuple[float, float, float]:
    from scipy.optimize import minimize_scalar, nnls

    scale = x.max()  # so that neither column is tiny beside the other

    def parts(exponent: float) -> tuple[np.ndarray, float]:
        columns = np.stack([np.ones_like(x), (x / scale) ** exponent], axis=1) / t[:, None]
        return nnls(columns, np.ones_like(t))

    # Several starts: at the borders, where one part explains all, the error is flat.
    grid = np.linspace(LOWEST, HIGHEST, 61)
    start = min(grid, key=lambda exponent: parts(exponent)[1])
    step = grid[1] - grid[0]
    bounds = (max(LOWEST, start - step), min(HIGHEST, start + step))
    exponent = minimize_scalar(lambda k: parts(k)[1] ** 2, bounds=bounds, method="bounded", options={"xatol": 1e-9}).x
    (fixed, factor), _ = parts(exponent)
    return float(fixed), float(factor / scale**exponent), float(exponent)


def draw(curves: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """All curves of a result, a panel for each kind of size, both axes logarithmic; predicted sizes are hollow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "cost"}
    ):  # text is text, ids are the same again
        figure = _figure(curves, pyplot)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
    return path


def _figure(curves: Sequence[Mapping[str, Any]], pyplot: Any) -> Any:
    kinds = list(dict.fromkeys(curve["size"] for curve in curves))
    figure, panels = pyplot.subplots(1, len(kinds), figsize=(5 * len(kinds), 4), squeeze=False, layout="constrained")
    for panel, kind in zip(panels[0], kinds, strict=True):
        for curve in (curve for curve in curves if curve["size"] == kind):
            points = [(point["at"], point["seconds"]["median"]) for point in curve["points"]]
            growth = curve["growth"]
            label = curve["name"] + (f", exponent {growth['exponent']:.2f}" if growth else "")
            line = panel.plot(*zip(*points, strict=True), "o", label=label)[0]
            if growth:
                ends = [at for at, _ in points] + [point["at"] for point in curve["predicted"]]
                x = np.geomspace(min(ends), max(ends), 100)
                y = growth["fixed_s"] + growth["factor"] * x ** growth["exponent"]
                panel.plot(x, y, "-", color=line.get_color(), linewidth=1)
            if curve["predicted"]:
                at, s = zip(*((point["at"], point["seconds"]) for point in curve["predicted"]), strict=True)
                panel.plot(at, s, "o", color=line.get_color(), fillstyle="none")
        panel.set(xscale="log", yscale="log", xlabel=kind, ylabel=curve_unit(kind))
        panel.legend(fontsize="small")
        panel.grid(which="major", alpha=0.3)
    return figure


def curve_unit(size: str) -> str:
    """What the seconds of a curve are for."""
    if size in ("tokens per cell", "tokens per perturbed cell"):
        return f"seconds per {size.removeprefix('tokens per ')}"
    return "seconds"
