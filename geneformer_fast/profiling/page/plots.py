"""The plots of a report, each drawn twice: as wide as a page, and for a phone. None where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geneformer_fast.profiling.figures import Setting
from geneformer_fast.profiling.page.svg import COLORS, NARROW, ON_COLOR, WIDE, Plot
from geneformer_fast.profiling.units import digits, unit_of, visible, words, written

if TYPE_CHECKING:
    from geneformer_fast.profiling.report import Report

#: Bars of batches on the wide plot; more batches than bars are joined.
MOST_BARS = 90

PART_COLORS = {
    **{"data": "orange", "copies": "yellow", "forward": "blue", "backward": "sky", "optimizer": "green"},
    **{"communication": "purple", "host_gaps": "vermillion", "other": "grey"},
}
KIND_COLORS = {
    **{"weights": "blue", "gradients": "sky", "optimizer": "green", "activations": "orange", "logits": "purple"},
    **{"workspace": "yellow", "other": "grey"},
}
# Text on pieces: all colours but these are light, whatever the page.
_INK = {"blue": COLORS["paper"], "line": COLORS["ink"]}


def number(value: Any) -> float | None:
    """A figure that can be drawn: finite, and not missing."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


@dataclass(frozen=True)
class Piece:
    """One piece of a stack."""

    name: str
    value: float
    color: str


def pieces(parts: Mapping[str, Any], colors: Mapping[str, str], total: float | None) -> list[Piece]:
    """The pieces of a stack, and what they leave of a total."""
    order = sorted(parts, key=lambda name: list(colors).index(name) if name in colors else len(colors))
    found = [(name, number(parts[name])) for name in order]
    stack = [
        Piece(words(name), value, colors.get(name, "grey")) for name, value in found if value is not None and value > 0
    ]
    rest = 0.0 if total is None else total - sum(piece.value for piece in stack)
    if total and rest > 0.005 * total:
        stack.append(Piece("not told apart", rest, "line"))
    return stack


def bars(batches: Sequence[Sequence[int]], most: int) -> list[tuple[int, int, float, float]]:
    """Batches joined into so many bars at most: first and last of each, and their mean real tokens and positions."""
    n = len(batches)
    each = max(1, -(-n // most))
    joined = []
    for first in range(0, n, each):
        some = batches[first : first + each]
        real, positions = (sum(batch[i] for batch in some) / len(some) for i in (1, 2))
        joined.append((first, first + len(some) - 1, real, positions))
    return joined


def step_stack(report: Report) -> str | None:
    """Where the time of a step went."""
    wall_s, n = number(report.time.wall_s), report.time.n_steps
    if not wall_s or n < 1 or not pieces(report.time.parts, PART_COLORS, None):
        return None
    stack = [
        Piece(piece.name, 1e3 * piece.value / n, piece.color)
        for piece in pieces(report.time.parts, PART_COLORS, wall_s)
    ]
    label = "Where the time of a step went: " + ", ".join(f"{each.name} {written(each.value, 'ms')}" for each in stack)
    return both_widths("step", label, (88, 88), lambda plot: _stacks(plot, [("", stack)], "ms per step, on average"))


def memory_stack(report: Report) -> str | None:
    """What memory held at the peak."""
    scale, unit = _byte_scale(report)
    found = pieces(report.memory.parts, KIND_COLORS, number(report.memory.peak_bytes))
    if not found:
        return None
    stack = [Piece(piece.name, piece.value / scale, piece.color) for piece in found]
    label = "What memory held at the peak: " + ", ".join(
        f"{each.name} {written(each.value, 'bytes')}" for each in found
    )
    return both_widths("memory", label, (88, 88), lambda plot: _stacks(plot, [("", stack)], f"{unit} at the peak"))


def compared_stacks(report: Report) -> str | None:
    """Time per cell through each engine, by what it went into."""
    rows = []
    for each in (report, *report.compared):
        wall_s, n = number(each.time.wall_s), each.cells.n
        if wall_s and n > 0:
            stack = pieces(each.time.parts, PART_COLORS, wall_s)
            rows.append((each.subject.engine, [Piece(part.name, 1e3 * part.value / n, part.color) for part in stack]))
    if len(rows) < 2:
        return None
    totals = [(name, sum(piece.value for piece in stack)) for name, stack in rows]
    label = "Time per cell: " + ", ".join(f"{name} {written(total, 'ms')}" for name, total in totals)
    height = 48 + 56 * len(rows)
    return both_widths(
        "compared", label, (height, height), lambda plot: _stacks(plot, rows, "ms per cell; shorter is faster")
    )


def _stacks(plot: Plot, rows: list[tuple[str, list[Piece]]], xlabel: str) -> None:
    """Horizontal stacks below each other, each under its name; pieces have theirs where there is room."""
    axes = plot.axes(left=3, top=2)[0]
    unit = xlabel.partition(" ")[0]
    longest = max(sum(piece.value for piece in stack) for _, stack in rows)
    for row, (name, stack) in enumerate(rows):
        left, total = 0.0, sum(piece.value for piece in stack)
        for piece in stack:
            (patch,) = axes.barh(
                [row], [piece.value], left=left, height=0.56 if name else 0.8, color=COLORS[piece.color],
                edgecolor=COLORS["paper"], lw=1,
            )  # fmt: skip
            title = f"{piece.name}: {digits(piece.value)} {unit}, {written(piece.value / total, 'share')}"
            plot.mark(patch, f"{name}: {title}" if name else title)
            if piece.value / longest > (0.026 if plot.is_narrow else 0.011) * (len(piece.name) + 2):
                axes.annotate(
                    piece.name, (left + piece.value / 2, row), ha="center", va="center_baseline",
                    color=_INK.get(piece.color, ON_COLOR), fontsize=11,
                )  # fmt: skip
            left += piece.value
        if name:
            axes.annotate(
                f"{_short(name, 30)}: {digits(total)} {unit}", (0, row - 0.31), (1, 2), textcoords="offset points",
                ha="left", va="bottom", fontsize=12,
            )  # fmt: skip
    has_names = any(name for name, _ in rows)
    axes.set(xlim=(0, longest), ylim=(len(rows) - 0.6, -0.8 if has_names else -0.5), xlabel=xlabel, yticks=[])
    axes.spines["left"].set_visible(False)
    _few_ticks(axes.xaxis, 4 if plot.is_narrow else 8)


def batches_of(report: Report) -> list[list[int]]:
    """Batches that say how many cells, real tokens and positions they had."""
    return [batch for batch in report.tokens.batches if len(batch) == 3]


def token_bars(report: Report) -> str | None:
    """Real tokens and padding of each batch."""
    batches = batches_of(report)
    if not batches or not any(batch[2] > 0 for batch in batches):
        return None
    label = f"Real tokens and padding of {len(batches):,} batches"

    def draw(plot: Plot) -> None:
        axes = plot.axes()[0]
        joined = bars(batches, MOST_BARS // 2 if plot.is_narrow else MOST_BARS)
        width = joined[0][1] - joined[0][0] + 1
        thin = 1.0 if len(joined) > 60 else 0.86
        for first, last, real, positions in joined:
            middle, span = (first + last) / 2 + 1, (last - first + 1) * thin
            which = f"batch {first + 1:,}" if first == last else f"batches {first + 1:,} to {last + 1:,}, on average"
            title = f"{which}: {real:,.0f} real tokens, {positions - real:,.0f} padding"
            (tokens,) = axes.bar([middle], [real], width=span, color=COLORS["blue"], lw=0)
            plot.mark(tokens, title)
            if positions > real:
                (padding,) = axes.bar(
                    [middle], [positions - real], width=span, bottom=[real], color=COLORS["orange"], lw=0
                )
                plot.mark(padding, title)
        axes.set(
            xlim=(0.5, len(batches) + 0.5),
            xlabel="batch" if width == 1 else f"batch; each bar is the mean of {width:,}",
        )
        axes.set_title("positions", color=COLORS["muted"])
        axes.grid(True, axis="y")
        _few_ticks(axes.xaxis, 4 if plot.is_narrow else 8, is_whole=True)
        _few_ticks(axes.yaxis, 4, is_whole=True)

    return both_widths("tokens", label, (210, 190), draw)


def block_bars(report: Report) -> str | None:
    """Time of each block of the encoder."""
    times = [number(each) for each in report.blocks]
    if len(times) < 2 or not any(times):
        return None
    label = f"Time of each of {len(times)} blocks: {written(min(filter(None, times)), 'ms')} at least, "
    label += f"{written(max(each or 0.0 for each in times), 'ms')} at most"

    def draw(plot: Plot) -> None:
        axes = plot.axes()[0]
        for block, time_ms in enumerate(times):
            if time_ms is not None:
                (bar,) = axes.bar([block], [time_ms], width=0.8, color=COLORS["blue"], lw=0)
                plot.mark(bar, f"block {block}: {written(time_ms, 'ms')}")
        axes.set(xlabel="block", xlim=(-0.6, len(times) - 0.4))
        axes.set_title("ms", color=COLORS["muted"])
        axes.grid(True, axis="y")
        _few_ticks(axes.xaxis, 6 if plot.is_narrow else 12, is_whole=True)
        _few_ticks(axes.yaxis, 3)

    return both_widths("blocks", label, (150, 150), draw)


def over_time(
    report: Report, name: str, *, level: tuple[str, float] | None = None, is_small: bool = False
) -> str | None:
    """One series over time, and a level to hold it against."""
    read = [
        (time, number(value))
        for time, value in zip(report.series.time_s, report.series.values.get(name, ()), strict=False)
    ]
    seen = [value for _, value in read if value is not None]
    if not seen:
        return None
    unit = unit_of(name)
    scale, shown = _byte_scale(report) if unit == "bytes" else (0.01, "%") if unit == "share" else (1.0, unit)
    label = f"{words(name).capitalize()} over {written(read[-1][0], 's')}: "
    label += f"{written(min(seen), unit)} to {written(max(seen), unit)}"

    def draw(plot: Plot) -> None:
        axes = plot.axes()[0]
        for run in _runs(read):
            times, values = [time for time, _ in run], [value / scale for _, value in run]
            marker = {"marker": "o", "markersize": 4} if len(run) == 1 else {}
            (line,) = axes.plot(times, values, color=COLORS["blue"], **marker)
            axes.fill_between(times, values, color=COLORS["blue"], alpha=0.14, lw=0)
            plot.mark(line, label)
        if level is not None:
            axes.axhline(level[1] / scale, color=COLORS["vermillion"], lw=1.2, ls=(0, (4, 3)))
            axes.annotate(
                level[0], (1, level[1] / scale), (-4, 4), xycoords=("axes fraction", "data"), ha="right",
                textcoords="offset points", fontsize=11,
            )  # fmt: skip
        highest = max([*seen, *([level[1]] if level else [])]) / scale
        lowest = min(0.0, min(seen) / scale)
        axes.set(xlabel="seconds", ylim=(lowest, highest * 1.15 if highest > 0 else 1))
        axes.margins(x=0)
        axes.set_title(f"{_short(words(name), 40)}{f', {shown}' if shown else ''}", color=COLORS["muted"])
        axes.grid(True, axis="y")
        _few_ticks(axes.xaxis, 4 if plot.is_narrow else 8)
        _few_ticks(axes.yaxis, 3 if is_small else 4)

    identifier = "time-" + "".join(each if each.isalnum() and each.isascii() else "-" for each in name)
    if is_small:
        plot = Plot(identifier, NARROW, 140)
        draw(plot)
        return plot.svg(label).replace('class="narrow"', 'class="small"', 1)
    return both_widths(identifier, label, (190, 170), draw)


def _runs(read: list[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Moments that follow each other without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for time, value in read:
        if value is None:
            runs.append([])
        else:
            runs[-1].append((time, value))
    return [run for run in runs if run]


def best_setting(sweep: Sequence[Setting]) -> Setting | None:
    """The fastest of those that ran."""
    ran = [each for each in sweep if each.token_budget > 0 and number(each.cells_per_s) is not None]
    return max(ran, key=lambda each: number(each.cells_per_s) or 0.0, default=None)


def sweep_lines(report: Report) -> str | None:
    """Cells per second, and peak memory, by token budget."""
    best = best_setting(report.sweep)
    if best is None:
        return None
    settings = sorted((each for each in report.sweep if each.token_budget > 0), key=lambda each: each.token_budget)
    scale, unit = _byte_scale(report)
    label = f"Cells per second by token budget; the best of {len(settings)} is {best.token_budget:,}"

    def draw(plot: Plot) -> None:
        rows, columns = (2, 1) if plot.is_narrow else (1, 2)
        for axes, name, title, by in zip(
            plot.axes(rows, columns), ("cells_per_s", "peak_bytes"), ("cells/s", f"peak memory, {unit}"),
            (1.0, scale), strict=True,
        ):  # fmt: skip
            ran = [(each, number(getattr(each, name))) for each in settings]
            drawn = [(each, value / by) for each, value in ran if value is not None]
            axes.plot([each.token_budget for each, _ in drawn], [value for _, value in drawn], color=COLORS["blue"])
            for each, value in drawn:
                color = COLORS["vermillion" if each is best else "blue"]
                (dot,) = axes.plot([each.token_budget], [value], "o", color=color, markersize=9 if each is best else 6)
                plot.mark(
                    dot,
                    f"{each.token_budget:,} tokens: {digits(value)} {title.rpartition(', ')[2]} {each.note}".strip(),
                )
            axes.set_xscale("log", base=2)
            axes.set(xlabel="tokens per batch", ylim=(0, max((value for _, value in drawn), default=1.0) * 1.15 or 1.0))
            axes.set_title(title, color=COLORS["muted"])
            axes.xaxis.set_major_formatter(lambda value, _: _thousands(value))
            axes.grid(True, axis="y")
            _few_ticks(axes.yaxis, 4)

    return both_widths("sweep", label, (210, 340), draw)


def _thousands(value: float) -> str:
    return digits(value) if value < 1024 else f"{digits(value / 1024)}k"


def _byte_scale(report: Report) -> tuple[float, str]:
    """What bytes are divided by on every plot of a report, and what they are then."""
    peaks = [report.memory.peak_bytes, *(each.peak_bytes for each in report.sweep)]
    largest = max((number(each) or 0.0 for each in peaks), default=0.0)
    return (1e9, "GB") if largest >= 2e9 else (1e6, "MB")


def _few_ticks(axis: Any, most: int, *, is_whole: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=is_whole))
    axis.set_major_formatter(lambda value, _: digits(round(value, 9)))


def _short(text: str, most: int) -> str:
    text = visible(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def both_widths(name: str, label: str, heights: tuple[int, int], draw: Callable[[Plot], None]) -> str:
    """One plot in both widths; the page shows the one that fits."""
    drawn = []
    for width, height, suffix in ((WIDE, heights[0], "wide"), (NARROW, heights[1], "narrow")):
        plot = Plot(f"{name}-{suffix}", width, height)
        draw(plot)
        drawn.append(plot.svg(label))
    return "".join(drawn)
