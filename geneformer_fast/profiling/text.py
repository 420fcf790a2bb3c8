"""A report as a table for the terminal; engines that were compared stand side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from geneformer_fast.profiling.figures import KINDS, PARTS, Figure, Finding, Missing, Operation, divided
from geneformer_fast.profiling.units import visible, words, written

if TYPE_CHECKING:
    from geneformer_fast.profiling.report import Report

WIDTH = 100
#: Rows of the table of operations.
MOST_OPERATIONS = 12
_LABEL = 22
Row = tuple[str, list[str]]


def table(report: Report, width: int = WIDTH) -> str:
    """The report for people: figures, operations, settings that were tried, and what to change.

    Parameters
    ----------
    report
        Of one run, with those it is compared with.
    width
        Columns of the terminal; longer text is wrapped.
    """
    width = max(60, width)
    reports = [report, *report.compared]
    parts = [_headline(report, width), _figures(reports, width)]
    if report.operations:
        parts.append(_operations(report.operations, width))
    if report.sweep:
        parts.append(_sweep(report))
    parts.append(_findings(report.findings, width))
    return "\n\n".join(parts) + "\n"


def _headline(report: Report, width: int) -> str:
    subject, machine = report.subject, report.machine
    gpu = machine.get("gpu")
    place = gpu.get("name") if isinstance(gpu, dict) else machine.get("machine")
    dtype = subject.dtype or "unknown dtype"
    lines = [
        f"{subject.model}: {subject.mode}, {dtype}, {subject.device}{f' ({place})' if place else ''}",
        f"cells: {subject.cells}",
    ]
    if subject.settings:
        lines.append("settings: " + ", ".join(f"{words(k)} {written(v)}" for k, v in subject.settings.items()))
    return "\n".join(part for line in lines for part in _folded(line, width, others="  "))


def _figures(reports: Sequence[Report], width: int) -> str:
    columns = [list(_rows(report)) for report in reports]
    labels = [label for label, _ in columns[0]]
    rows: list[Row] = [(label, [dict(column).get(label, "") for column in columns]) for label in labels]
    if len(reports) > 1:
        rows.insert(0, ("", [report.subject.engine for report in reports]))
        turns = next((each.numbers.get("ratio") for each in reports[0].findings if each.name == "stock"), None)
        rows.append(("times as fast", ["", *(_ratio(reports[0], other, turns) for other in reports[1:])]))
    room = max(20, (width - _LABEL) // len(reports))
    return "\n".join(line for label, values in rows for line in _wrapped(label, values, room))


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    """(label, value) of what everybody asks first."""
    cells, tokens, time, flops = report.cells, report.tokens, report.time, report.flops
    yield "cells/s", written(cells.per_s)
    yield "tokens/s", written(cells.tokens_per_s)
    yield "cells", f"{cells.n:,} of {'unknown lengths' if cells.lengths is None else written(cells.lengths, 'tokens')}"
    if not isinstance(cells.read_gbps, Missing):  # of tokenizing alone
        yield "read from files", written(cells.read_gbps, "GB/s")
    at_once = f" of forward pass, {time.n_at_once} at once" if time.n_at_once > 1 else ""
    yield "step", f"{written(time.step_ms, 'ms')}{at_once}, {time.n_steps:,} steps in {written(time.wall_s, 's')}"
    yield "first step", written(time.first_step_s, "s")
    useful = written(tokens.useful_share, "share")
    known = not isinstance(tokens.useful_share, Missing)
    yield "useful tokens", f"{useful} of {tokens.n_positions:,} computed positions" if known else useful
    yield "MFU, HFU", _both(flops.mfu, flops.hfu)
    ceiling = report.ceilings.product(flops.ceiling_dtype)
    known = not isinstance(ceiling, Missing)
    yield "  of", written(ceiling, "T op/s") + (f" in {flops.ceiling_dtype}, measured here" if known else "")
    yield "  of the datasheet", _both(flops.mfu_of_datasheet, flops.hfu_of_datasheet)
    known = not isinstance(flops.per_cell, Missing)
    yield "operations", written(flops.per_cell, "op") + (f" per cell, {flops.basis}: {flops.note}" if known else "")
    yield "time", _shares(time.parts, PARTS, time.wall_s)
    yield "processor time", written(time.cpu_s, "s")
    yield "memory at the peak", written(report.memory.peak_bytes, "bytes")
    yield "  of it", _sizes(report.memory.parts)
    yield "  reserved", written(report.memory.reserved_bytes, "bytes")
    yield "energy", _energy(report)


def _both(mfu: Figure, hfu: Figure) -> str:
    return written(mfu, "share") if mfu == hfu else f"{written(mfu, 'share')}, {written(hfu, 'share')}"


def _energy(report: Report) -> str:
    energy = report.energy
    if isinstance(energy.joules_per_cell, Missing):
        return str(energy.joules_per_cell)
    power = f"{written(energy.watts, 'W')}, {written(energy.idle_watts, 'W')} idle"
    return (
        f"{written(energy.joules_per_cell, 'J')} per cell, {written(energy.kwh_per_million_cells, 'kWh')} per million "
        f"cells; {power} ({energy.counter})"
    )


def _shares(parts: dict[str, Figure], order: Sequence[str], whole: Figure) -> str:
    known = {name: divided(parts[name], whole) for name in order if name in parts}
    shown = [f"{words(name)} {written(share, 'share')}" for name, share in known.items() if _shows(share)]
    if shown:
        return ", ".join(shown)
    return str(next(iter(known.values()), Missing("nothing was measured")))


def _shows(share: Figure) -> bool:
    return isinstance(share, float) and share >= 0.0005


def _sizes(parts: dict[str, Figure]) -> str:
    known = {name: value for name in KINDS if not isinstance(value := parts.get(name, Missing("")), Missing)}
    if not known:
        return str(next(iter(parts.values()), Missing("nothing was measured")))
    return ", ".join(f"{words(name)} {written(value, 'bytes')}" for name, value in known.items() if value)


def _ratio(first: Report, other: Report, turns: float | None) -> str:
    """In turns where both ran in turns: rates of two windows differ by what else the machine did, too."""
    if turns is not None and other.subject.engine == "transformers":
        return f"{first.subject.engine} {turns:.2f}x, in turns"
    ratio = divided(first.cells.per_s, other.cells.per_s, "the other's rate")
    return "" if isinstance(ratio, Missing) else f"{first.subject.engine} {ratio:.2f}x"


def _operations(operations: Sequence[Operation], width: int) -> str:
    """The largest, with the rest in one row."""
    longest = max(15, width - 46)
    head = f"{'operation':<{longest}} {'calls':>7} {'ms':>10} {'share':>7} {'T op/s':>8} {'of roof':>8}"
    lines = [head]
    for each in operations[:MOST_OPERATIONS]:
        rate = each.flops if isinstance(each.flops, Missing) else each.flops / max(each.time_ms, 1e-9) / 1e9
        columns = [
            f"{each.calls:,}", f"{each.time_ms:,.2f}", written(each.share, "share"),
            "" if isinstance(rate, Missing) or not rate else written(rate),
            "" if isinstance(each.roof_share, Missing) else written(each.roof_share, "share"),
        ]  # fmt: skip
        name = textwrap.shorten(visible(each.name), longest, placeholder="...") or each.name[:longest]
        widths = (7, 10, 7, 8, 8)
        lines.append(f"{name:<{longest}} " + " ".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True)))
    rest = operations[MOST_OPERATIONS:]
    if rest:
        time_ms, share = sum(each.time_ms for each in rest), sum(each.share for each in rest)
        name = f"{len(rest)} others"
        lines.append(f"{name:<{longest}} {'':>7} {time_ms:>10,.2f} {written(share, 'share'):>7}")
    return "\n".join(line.rstrip() for line in lines)


def _sweep(report: Report) -> str:
    lines = [f"{'token budget':>12} {'cells/s':>10} {'peak':>10} {'free':>10}"]
    for each in report.sweep:
        missing = [v for v in (each.cells_per_s, each.peak_bytes) if isinstance(v, Missing)]
        values = (written(each.cells_per_s), written(each.peak_bytes, "bytes"), written(each.free_bytes, "bytes"))
        shown = " ".join(f"{'' if v.startswith('not available') else v:>10}" for v in values)
        note = each.note or (str(missing[0]) if missing else "")
        lines.append(f"{each.token_budget:>12,} {shown}  {note}".rstrip())
    return "\n".join(lines)


def _findings(found: Sequence[Finding], width: int) -> str:
    lines = ["what to change"]
    for number, each in enumerate(found, 1):
        gain = "" if each.gain is None else f" (expected {each.gain:.2g}x)"
        mark = f"{number}. " if each.name != "nothing" else "- "
        text = each.text[:1].upper() + each.text[1:] + gain
        lines += _folded(text, width, first=mark, others=" " * len(mark))
    return "\n".join(lines)


def _folded(text: str, room: int, *, first: str = "", others: str = "") -> list[str]:
    """Lines of a text; a number and its percent sign stay together."""
    lines = textwrap.wrap(
        visible(text).replace(" %", "\N{NO-BREAK SPACE}%"), room, initial_indent=first, subsequent_indent=others
    )
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _wrapped(label: str, values: Sequence[str], room: int) -> Iterator[str]:
    """A row of as many lines as its longest value needs."""
    cells = [_folded(value, room - 2) or [""] for value in values]
    for line in range(max(map(len, cells))):
        shown = "".join(f"{cell[line] if line < len(cell) else '':<{room}}" for cell in cells)
        yield f"{label if line == 0 else '':<{_LABEL}}{shown}".rstrip()
