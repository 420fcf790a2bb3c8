"""The roofline: what each operation reached, under what this machine reaches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geneformer_fast.profiling.figures import Operation
from geneformer_fast.profiling.page.plots import both_widths, number
from geneformer_fast.profiling.page.svg import COLORS, ON_COLOR, Plot
from geneformer_fast.profiling.units import digits, visible, written

if TYPE_CHECKING:
    from geneformer_fast.profiling.report import Report

#: Operations with a number on the roofline, the longest first.
MOST_POINTS = 12


@dataclass(frozen=True)
class Point:
    """One operation under the roofline; ``number`` stands in its marker, and is None where it has none.

    Attributes
    ----------
    intensity
        Operations per byte.
    tflops
        10**12 operations per second.
    """

    number: int | None
    operation: Operation
    intensity: float | None
    tflops: float | None


def points(report: Report) -> list[Point]:
    """Operations, those that took longest first, with their place under the roofline."""
    found, n_numbered = [], 0
    for operation in sorted(report.operations, key=lambda each: -(number(each.time_ms) or 0.0)):
        flops, n_bytes, time_ms = map(number, (operation.flops, operation.n_bytes, operation.time_ms))
        intensity = flops / n_bytes if flops and n_bytes and flops > 0 and n_bytes > 0 else None
        tflops = flops / time_ms / 1e9 if flops and time_ms and flops > 0 and time_ms > 0 else None
        is_shown = intensity is not None and tflops is not None and n_numbered < MOST_POINTS
        n_numbered += is_shown
        found.append(Point(n_numbered if is_shown else None, operation, intensity, tflops))
    return found


def roofline(report: Report) -> str | None:
    """Operations per second over operations per byte, under what products and copies of this machine reach."""
    shown = [point for point in points(report) if point.number is not None]
    if not shown:
        return None
    dtype = report.flops.ceiling_dtype or report.subject.dtype
    products, copies = number(report.ceilings.product(dtype)), number(report.ceilings.copy_gbps)
    promised = number(report.ceilings.promised(dtype))
    label = f"Roofline: {len(shown)} operations by operations per byte and operations per second"
    if products:
        label += f", under {written(products, 'T op/s')} of products in {dtype}"
    if copies:
        label += f" and copies of {written(copies, 'GB/s')}"

    def draw(plot: Plot) -> None:
        axes = plot.axes()[0]
        x = [point.intensity or 1.0 for point in shown]
        y = [point.tflops or 1.0 for point in shown]
        if products and copies:
            x.append(1e3 * products / copies)
        tops = [each for each in (products, promised) if each]
        axes.set(xscale="log", yscale="log", xlim=_decades(x), ylim=_decades(y + tops), xlabel="operations per byte")
        axes.set_title("T operations per second", color=COLORS["muted"])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: digits(value) if 1e-4 <= value < 1e6 else f"{value:.0e}")
            axis.set_minor_formatter("")
        axes.grid(True)
        _roofs(plot, axes, products, copies, visible(str(dtype)))
        _datasheet(plot, axes, promised)
        _points(plot, axes, shown)

    return both_widths("roofline", label, (380, 330), draw)


def _decades(values: list[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis, with room at both ends and two decades at least."""
    low, high = min(values) / 2.5, max(values) * 2.5
    stretch = max(1.0, math.sqrt(100 * low / high))
    return low / stretch, high * stretch


def _roofs(plot: Plot, axes: Any, products: float | None, copies: float | None, dtype: str) -> None:
    """What products and copies reached here, and words above it, where no operation can be."""
    left, right = axes.get_xlim()
    ridge = 1e3 * products / copies if products and copies else left if products else right
    ridge = min(max(ridge, left), right)
    sight = axes.transData.transform([(ridge, products or axes.get_ylim()[1])])[0][0] - axes.bbox.x0
    if products:
        axes.plot([ridge, right], [products, products], color=COLORS["ink"], lw=1.4)
        text = f"{written(products, 'T op/s')}" if plot.is_narrow else f"{dtype} products {written(products, 'T op/s')}"
        is_far = sight > (90 if plot.is_narrow else 200)
        where: dict[str, Any] = {"ha": "right", "va": "center"} if is_far else {"ha": "left", "va": "bottom"}
        _words(plot, axes, text, (ridge, products), (-8, 0) if is_far else (2, 4), **where)
    if copies:
        axes.plot([left, ridge], [left * copies / 1e3, ridge * copies / 1e3], color=COLORS["ink"], lw=1.4)
        x = max(left, 1e3 * axes.get_ylim()[0] / copies) * 1.4
        (x0, y0), (x1, y1) = axes.transData.transform([(x, x * copies / 1e3), (2 * x, 2 * x * copies / 1e3)])
        where = {"rotation": math.degrees(math.atan2(y1 - y0, x1 - x0)), "rotation_mode": "anchor"}
        if axes.bbox.x0 + sight - x0 > 110:
            at = (x, x * copies / 1e3)
            _words(plot, axes, f"copies {written(copies, 'GB/s')}", at, (-4, 4), ha="left", va="bottom", **where)


def _datasheet(plot: Plot, axes: Any, promised: float | None) -> None:
    if promised:
        axes.axhline(promised, color=COLORS["muted"], lw=1, ls=(0, (2, 3)))
        at = (axes.get_xlim()[1], promised)
        _words(plot, axes, f"datasheet {written(promised, 'T op/s')}", at, (-2, 4), ha="right", va="bottom")


def _words(plot: Plot, axes: Any, text: str, at: tuple[float, float], offset: tuple[int, int], **where: Any) -> None:
    size = 10 if plot.is_narrow else 11
    axes.annotate(text, at, offset, textcoords="offset points", fontsize=size, color=COLORS["muted"], **where)


def _points(plot: Plot, axes: Any, shown: list[Point]) -> None:
    """A disc for each operation, as large as its time, and its number on it, or beside it where others are near."""
    at = [tuple(each) for each in axes.transData.transform([(point.intensity, point.tflops) for point in shown])]
    for point, offset in zip(shown, offsets(at, axes.bbox.extents), strict=True):
        operation = point.operation
        color = "orange" if operation.name.endswith(" backward") else "blue"
        share = min(1.0, max(0.0, number(operation.share) or 0.0))
        (disc,) = axes.plot(
            [point.intensity], [point.tflops], "o", markersize=8 + 36 * math.sqrt(share), clip_on=False,
            markerfacecolor=(COLORS[color], 0.3), markeredgecolor=COLORS[color], markeredgewidth=1,
        )  # fmt: skip
        pad = 0.3 if (point.number or 0) < 10 else 0.12
        badge = axes.annotate(
            str(point.number), (point.intensity, point.tflops), offset, textcoords="offset points", ha="center",
            va="center_baseline", color=ON_COLOR if color == "orange" else COLORS["paper"], fontsize=10,
            fontweight="bold", zorder=5,
            bbox={"boxstyle": f"circle,pad={pad}", "fc": COLORS[color], "ec": COLORS["paper"]},
            arrowprops={"arrowstyle": "-", "color": COLORS["muted"], "lw": 0.8, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
        title = (
            f"{operation.name}: {written(operation.share, 'share')} of the time, {digits(point.tflops or 0.0)} T op/s"
        )
        if number(operation.roof_share) is not None:
            title += f", {written(operation.roof_share, 'share')} of its roof"
        plot.mark(disc, title)
        plot.mark(badge, title)


def offsets(at: list[tuple[float, float]], box: tuple[float, float, float, float]) -> list[tuple[float, float]]:
    """Where numbers stand, from their points in pixels: on them, or as near as other numbers and points allow.

    Parameters
    ----------
    at
        Points; the first are served first.
    box
        Left, bottom, right and top of where a number may be.
    """
    left, bottom, right, top = box
    placed: list[tuple[float, float]] = []
    found = []
    for i, (x, y) in enumerate(at):
        others = [*placed, *(each for j, each in enumerate(at) if j != i)]
        best, best_room = (0.0, 0.0), -1.0
        for distance, turn in ((0, 0), *((d, t) for d in (20, 30, 42, 56) for t in (7, 0, 6, 1, 5, 4, 3, 2))):
            dx, dy = distance * math.cos(turn * math.pi / 4), distance * math.sin(turn * math.pi / 4)
            if distance and not (left + 8 <= x + dx <= right - 8 and bottom + 8 <= y + dy <= top - 8):
                continue
            room = min((math.hypot(x + dx - a, y + dy - b) for a, b in others), default=math.inf)
            if room > best_room:
                best, best_room = (dx, dy), room
            if room >= 18:
                best = (dx, dy)
                break
        found.append(best)
        placed.append((x + best[0], y + best[1]))
    return found
