"""What stands in each section of the page of a report, in words and tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from geneformer_fast.profiling.figures import Finding, Missing
from geneformer_fast.profiling.page import plots, roofline
from geneformer_fast.profiling.page.plots import number
from geneformer_fast.profiling.units import digits, unit_of, words, written

if TYPE_CHECKING:
    from geneformer_fast.profiling.report import Report

#: Rows of a table of batches or moments; more are joined, or every so manieth is shown.
MOST_ROWS = 40
#: Rows of the table of operations.
MOST_OPERATIONS = 40
#: The series that have a plot of their own.
_MEMORY, _POWER = "memory_bytes", "power_watts"


@dataclass(frozen=True)
class Table:
    """Names of columns, and text for each cell; ``is_text`` where columns are words rather than numbers."""

    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=list)
    is_text: bool = False


@dataclass(frozen=True)
class Tile:
    """One of the figures that stand above all others."""

    label: str
    value: str
    unit: str
    note: str
    is_missing: bool = False


def _plot(svgs: str | None) -> Any:
    from markupsafe import Markup

    return None if svgs is None else Markup(svgs)  # the writer of XML has escaped what it holds


def device_name(report: Report) -> str:
    """The card, or the processor."""
    if report.subject.device.startswith("cuda"):
        card, sheet = report.machine.get("gpu"), report.ceilings.datasheet
        name = card.get("name") if isinstance(card, Mapping) else card
        return str(name or (sheet.name if sheet else report.subject.device))
    return str(report.machine.get("machine") or report.subject.device)


_DOING = {"embed": "Embedding", "train": "Training", "tokenize": "Tokenization", "loop": "A loop"}


def lead_of(report: Report) -> list[str]:
    """What was done, in two lines."""
    subject, date = report.subject, report.machine.get("date")
    doing = f"{_DOING.get(subject.mode, subject.mode)} with {subject.engine}"
    doing += f" in {subject.dtype} on {device_name(report)}" if subject.dtype else f" on {device_name(report)}"
    return [doing, " · ".join(filter(None, (subject.cells, str(date) if date else "")))]


def finding_of(finding: Finding) -> dict[str, Any]:
    gain = number(finding.gain)
    numbers = (f"{words(name)} {written(value, unit_of(name))}" for name, value in finding.numbers.items())
    return {
        "text": finding.text,
        "numbers": ", ".join(numbers),
        "gain": f"expected {digits(round(gain, 2))}×" if gain is not None and gain > 1 else "",
    }


def tiles_of(report: Report) -> Iterator[Tile]:
    cells, tokens, flops, memory, energy = report.cells, report.tokens, report.flops, report.memory, report.energy
    note = f"{written(cells.tokens_per_s, 'tokens/s')}" if number(cells.tokens_per_s) is not None else ""
    yield _tile("Throughput", cells.per_s, "cells/s", note)
    n_padding = tokens.n_positions - tokens.n_real
    note = f"{n_padding:,} of {tokens.n_positions:,} positions were padding" if n_padding else "nothing was padding"
    yield _tile("Useful tokens", tokens.useful_share, "share", note)
    dtype = flops.ceiling_dtype
    note = (
        f"of {written(report.ceilings.product(dtype), 'T op/s')} measured in {dtype}; HFU {written(flops.hfu, 'share')}"
    )
    yield _tile("MFU", flops.mfu, "share", note)
    held = sorted(((number(value) or 0.0, name) for name, value in memory.parts.items()), reverse=True)[:2]
    note = ", ".join(f"{words(name)} {written(value, 'bytes')}" for value, name in held if value > 0)
    yield _tile("Peak memory", memory.peak_bytes, "bytes", note)
    note = f"{written(energy.watts, 'W')}; {written(energy.kwh_per_million_cells, 'kWh')} per million cells"
    yield _tile("Energy per cell", energy.joules_per_cell, "J", note)


def _tile(label: str, value: Any, unit: str, note: str) -> Tile:
    if isinstance(value, Missing):
        return Tile(label, "–", "", str(value), is_missing=True)
    text, _, after = written(value, unit).rpartition(" ")
    return Tile(label, text or after, after if text else "", note)


def _stack_rows(parts: Mapping[str, Any], colors: Mapping[str, str], total: float | None, unit: str) -> dict[str, Any]:
    """The pieces of a stack in words, and the others with the reason why they are not drawn."""
    drawn = plots.pieces(parts, colors, total)
    whole = sum(piece.value for piece in drawn) or 1.0
    rows = [
        {"name": each.name, "color": each.color, "value": written(each.value, unit),
         "share": written(each.value / whole, "share")}
        for each in drawn
    ]  # fmt: skip
    reasons = [f"{words(name)}: {value}" for name, value in parts.items() if isinstance(value, Missing)]
    return {"rows": rows if parts else [], "reasons": "; ".join(reasons)}


def time_section(report: Report) -> dict[str, Any]:
    time = report.time
    steps = "1 step" if time.n_steps == 1 else f"{time.n_steps:,} steps"
    text = f"{steps} took {written(time.wall_s, 's')} after {time.n_warmup:,} of warm-up."
    if time.n_steps > 1:
        text += f" Half of them took less than {written(time.step_ms.p50, 'ms')}, "
        text += f"one in ten more than {written(time.step_ms.p90, 'ms')}."
    plot = plots.step_stack(report)
    if plot is None:
        text += " Into what it divides is not known."
    blocks = [(str(block), written(each, "ms")) for block, each in enumerate(report.blocks)]
    return {
        "text": text,
        "plot": _plot(plot),
        **_stack_rows(time.parts, plots.PART_COLORS, number(time.wall_s), "s"),
        "blocks": _plot(plots.block_bars(report)),
        "block_table": Table(("Block", "Time"), blocks),
    }


def operations_section(report: Report) -> dict[str, Any]:
    found = roofline.points(report)
    shown = found[:MOST_OPERATIONS]
    longest = max((number(point.operation.share) or 0.0 for point in shown), default=0.0) or 1.0
    rows = []
    for point in shown:
        operation = point.operation
        share = number(operation.share) or 0.0
        rows.append(
            {
                "number": point.number,
                "name": operation.name,
                "is_backward": operation.name.endswith(" backward"),
                "share": written(operation.share, "share"),
                "width": f"{min(100.0, max(0.0, 100 * share / longest)):.1f}",
                "calls": f"{operation.calls:,}",
                "intensity": "–" if point.intensity is None else digits(point.intensity),
                "tflops": "–" if point.tflops is None else digits(point.tflops),
                "roof": "–" if isinstance(operation.roof_share, Missing) else written(operation.roof_share, "share"),
            }
        )
    reason = (
        "No operation was watched." if not found else "Of no operation both its operations and its bytes are known."
    )
    text = "Over the steps that torch’s profiler watched. A dash: not known."
    if len(found) > len(shown):
        text += f" {len(found) - len(shown):,} operations that took less are in report.json."
    plot = _plot(roofline.roofline(report))
    has_backward = any(row["is_backward"] and row["number"] for row in rows)
    return {"plot": plot, "reason": reason, "rows": rows, "text": text, "has_backward": has_backward}


def tokens_section(report: Report) -> dict[str, Any]:
    tokens = report.tokens
    batches = plots.batches_of(report)
    text = f"{tokens.n_real:,} of {tokens.n_positions:,} computed positions were real tokens"
    if isinstance(tokens.useful_share, Missing):
        text = f"The share of useful tokens is {tokens.useful_share}"
    else:
        rest = "the rest was padding" if tokens.n_positions > tokens.n_real else "there was no padding"
        text += f" ({written(tokens.useful_share, 'share')}); {rest}"
    rows = []
    for first, last, real, positions in plots.bars(batches, MOST_ROWS):
        which = f"{first + 1:,}" if first == last else f"{first + 1:,} to {last + 1:,}"
        share = written(real / positions, "share") if positions else "–"
        rows.append((which, digits(round(real)), digits(round(positions - real)), share))
    is_joined = len(rows) < len(batches)
    columns: tuple[str, ...] = ("Batches" if is_joined else "Batch", "Real tokens", "Padding", "Useful")
    if is_joined:
        columns = (columns[0], *(f"{name}, mean" for name in columns[1:3]), columns[3])
    return {"text": f"{text}.", "plot": _plot(plots.token_bars(report)), "table": Table(columns, rows)}


def memory_section(report: Report) -> dict[str, Any]:
    memory = report.memory
    text = f"Peak: {written(memory.peak_bytes, 'bytes')}. "
    text += f"Reserved by the allocator: {written(memory.reserved_bytes, 'bytes')}"
    if number(memory.fragmentation) is not None:
        text += f", of which {written(memory.fragmentation, 'share')} was not in use"
    alive = [(each.name, written(each.n_bytes, "bytes")) for each in memory.at_peak]
    return {
        "text": f"{text}. Resident memory of the process: {written(memory.process_bytes, 'bytes')} at most.",
        "plot": _plot(plots.memory_stack(report)),
        **_stack_rows(memory.parts, plots.KIND_COLORS, number(memory.peak_bytes), "bytes"),
        "over_time": _plot(plots.over_time(report, _MEMORY)),
        "table": _moments(report, [_MEMORY]),
        "alive": Table(("What", "Bytes"), alive),
    }


def energy_section(report: Report) -> dict[str, Any]:
    energy = report.energy
    idle = number(energy.idle_watts)
    if isinstance(energy.joules, Missing):
        text = f"Energy is {energy.joules}."
    else:
        counter = energy.counter or "an unnamed counter"
        text = f"{written(energy.joules, 'J')} in {written(energy.window_s, 's')} by {counter}: "
        text += f"{written(energy.watts, 'W')} on average, {written(energy.idle_watts, 'W')} of it when idle. "
        text += f"That is {written(energy.joules_per_cell, 'J')} per cell, "
        text += f"{written(energy.cells_per_kwh, 'cells')} per kWh."
    level = None if idle is None else (f"idle {written(idle, 'W')}", idle)
    return {
        "text": text,
        "is_missing": isinstance(energy.joules, Missing),
        "plot": _plot(plots.over_time(report, _POWER, level=level)),
        "table": _moments(report, [_POWER]),
        "state": [(words(name), written(value, unit_of(name))) for name, value in energy.state.items()],
    }


def compared_section(report: Report) -> dict[str, Any]:
    both = [report, *report.compared]
    names = ("Engine", "Cells/s", "Step", "Useful tokens", "MFU", "Peak memory", "J per cell")
    rows = [
        (each.subject.engine, written(each.cells.per_s), written(each.time.step_ms.p50, "ms"),
         *(_or_dash(value, "share") for value in (each.tokens.useful_share, each.flops.mfu)),
         _or_dash(each.memory.peak_bytes, "bytes"), _or_dash(each.energy.joules_per_cell, ""))
        for each in both
    ]  # fmt: skip
    said = []
    for each in report.compared:
        ours, theirs = number(report.cells.per_s), number(each.cells.per_s)
        if ours and theirs:
            said.append(f"{digits(ours / theirs)} times as many cells per second as {each.subject.engine}")
    return {
        "others": " and ".join(each.subject.engine for each in report.compared),
        "text": f"On the same cells {report.subject.engine} computed {', and '.join(said)}." if said else "",
        "plot": _plot(plots.compared_stacks(report)),
        "table": Table(names, rows if report.compared else []),
    }


def _or_dash(value: Any, unit: str) -> str:
    return "–" if isinstance(value, Missing) else written(value, unit)


def sweep_section(report: Report) -> dict[str, Any]:
    best = plots.best_setting(report.sweep)
    text = "None of the token budgets ran."
    if best is not None:
        text = f"{best.token_budget:,} tokens per batch were fastest: {written(best.cells_per_s, 'cells/s')}, "
        text += f"a peak of {written(best.peak_bytes, 'bytes')}, {written(best.free_bytes, 'bytes')} left free."
    rows = [
        (f"{each.token_budget:,}", written(each.cells_per_s), _or_dash(each.peak_bytes, "bytes"),
         _or_dash(each.free_bytes, "bytes"), each.note or "–")
        for each in report.sweep
    ]  # fmt: skip
    columns = ("Tokens per batch", "Cells/s", "Peak memory", "Left free", "Note")
    return {"text": text, "plot": _plot(plots.sweep_lines(report)), "table": Table(columns, rows)}


def readings_section(report: Report) -> dict[str, Any]:
    """Series beside memory and power."""
    names = [name for name in report.series.values if name not in (_MEMORY, _POWER)]
    drawn = [(name, plots.over_time(report, name, is_small=True)) for name in names]
    shown = [name for name, svg in drawn if svg is not None]
    return {
        "readings": [_plot(svg) for _, svg in drawn if svg is not None],
        "readings_table": _moments(report, shown),
    }


def _moments(report: Report, names: list[str]) -> Table:
    """Values of series at regular moments."""
    times = report.series.time_s
    step = max(1, -(-len(times) // MOST_ROWS))
    rows = []
    for moment in range(0, len(times), step):
        values = [
            column[moment] if moment < len(column) else None
            for column in map(report.series.values.get, names)
            if column
        ]
        rows.append(
            (
                written(times[moment], "s"),
                *(
                    "–" if each is None else written(each, unit_of(name))
                    for each, name in zip(values, names, strict=False)
                ),
            )
        )
    return Table(("Time", *(words(name) for name in names)), rows if names else [])


def settings_of(report: Report) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """What was profiled, where, and with which versions, in groups of names and values."""
    subject = report.subject
    rows = [(name, getattr(subject, name)) for name in ("model", "mode", "engine", "dtype", "device", "cells")]
    rows.append(("parameters", subject.n_parameters))
    yield "What was profiled", [(name, written(value)) for name, value in rows if value not in (None, "")]
    groups = {name: value for name, value in report.machine.items() if isinstance(value, Mapping)}
    plain = {name: value for name, value in report.machine.items() if name not in groups}
    titles = {"packages": "Versions", "gpu": "Card"}
    for title, group in (
        ("Settings", subject.settings), ("Shape of the model", subject.geometry or {}), ("Machine", plain),
        *((titles.get(name, words(name).capitalize()), group) for name, group in groups.items()),
    ):  # fmt: skip
        if group:
            names = [str(name) if title == "Versions" else words(str(name)) for name in group]
            yield (
                title,
                [(name, written(group[key], unit_of(str(key)))) for name, key in zip(names, group, strict=True)],
            )
