"""The roofline: what each operation reached, under what this machine reaches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from geneformer_fast.profiling.figures import Operation
from geneformer_fast.profiling.plots import both_widths, number
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.svg import COLORS, Plot
from geneformer_fast.profiling.units import digits, written

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
        axes = plot.figure.subplots()
        x = [point.intensity or 1.0 for point in shown]
        y = [point.tflops or 1.0 for point in shown]
        if products and copies:
            x.append(1e3 * products / copies)
        tops = [each for each in (products, promised) if each]
        left, right = _decades(x)
        bottom, top = _decades(y + tops)
        axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
        _roofs(plot, axes, products, copies, promised, str(dtype))
        for point in shown:
            _point(plot, axes, point)
        axes.set(xlabel="operations per byte")
        axes.set_title("T operations per second", color=COLORS["muted"])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: digits(value))
            axis.set_minor_formatter("")
        axes.grid(True)

    return both_widths("roofline", label, (380, 330), draw)


def _decades(values: list[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis, with room at both ends and two decades at least."""
    low, high = min(values) / 2.5, max(values) * 2.5
    stretch = max(1.0, math.sqrt(100 * low / high))
    return low / stretch, high * stretch


def _roofs(
    plot: Plot, axes: Any, products: float | None, copies: float | None, promised: float | None, dtype: str
) -> None:
    left, right = axes.get_xlim()
    small = {"fontsize": 10 if plot.is_narrow else 11, "in_layout": False, "clip_on": True}
    ridge = 1e3 * products / copies if products and copies else left
    if products:
        axes.plot([max(ridge, left), right], [products, products], color=COLORS["ink"], lw=1.4)
        is_close = promised is not None and products < promised < 1.8 * products
        text = f"{dtype} products {written(products, 'T op/s')}" if not plot.is_narrow else written(products, "T op/s")
        axes.annotate(
            text, (right, products), (-2, -5 if is_close else 5), textcoords="offset points", ha="right",
            va="top" if is_close else "bottom", **small,
        )  # fmt: skip
    if promised:
        axes.plot([left, right], [promised, promised], color=COLORS["muted"], lw=1, ls=(0, (2, 3)))
        text = f"datasheet {written(promised, 'T op/s')}"
        axes.annotate(
            text, (right, promised), (-2, 4), textcoords="offset points", ha="right", va="bottom",
            color=COLORS["muted"], **small,
        )  # fmt: skip
    if copies:
        end = min(ridge, right) if products else right
        axes.plot([left, end], [left * copies / 1e3, end * copies / 1e3], color=COLORS["ink"], lw=1.4)
        _slope(plot, axes, copies, f"copies {written(copies, 'GB/s')}", small)


def _slope(plot: Plot, axes: Any, copies: float, text: str, small: dict[str, Any]) -> None:
    """Words along the roof of copies, from where it comes into sight."""
    left, _ = axes.get_xlim()
    bottom, _ = axes.get_ylim()
    x = max(left, 1e3 * bottom / copies) * 1.3
    plot.figure.draw_without_rendering()
    (x0, y0), (x1, y1) = axes.transData.transform([(x, x * copies / 1e3), (10 * x, 10 * x * copies / 1e3)])
    angle = math.degrees(math.atan2(y1 - y0, x1 - x0))
    axes.annotate(
        text, (x, x * copies / 1e3), (-4, 5), textcoords="offset points", rotation=angle, rotation_mode="anchor",
        ha="left", va="bottom", **small,
    )  # fmt: skip


def _point(plot: Plot, axes: Any, point: Point) -> None:
    operation = point.operation
    is_backward = operation.name.endswith(" backward")
    share = min(1.0, max(0.0, number(operation.share) or 0.0))
    size = 15 + 22 * math.sqrt(share)
    (marker,) = axes.plot(
        [point.intensity], [point.tflops], "o", color=COLORS["orange" if is_backward else "blue"], markersize=size,
        markeredgecolor=COLORS["paper"], markeredgewidth=1.2, clip_on=False,
    )  # fmt: skip
    ink = "#111417" if is_backward else COLORS["paper"]
    axes.annotate(
        str(point.number), (point.intensity, point.tflops), ha="center", va="center_baseline", color=ink, fontsize=10,
        fontweight="bold", in_layout=False,
    )  # fmt: skip
    title = f"{operation.name}: {written(operation.share, 'share')} of the time, {digits(point.tflops or 0.0)} T op/s"
    if number(operation.roof_share) is not None:
        title += f", {written(operation.roof_share, 'share')} of its roof"
    plot.mark(marker, title)
