"""All figures of a report in order, each with its name, unit and definition: what tables and the page are made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geneformer_fast.profiling.figures import KINDS, PARTS, Missing, Spread
from geneformer_fast.profiling.units import unit_of, words, written

if TYPE_CHECKING:
    from geneformer_fast.profiling.report import Report


@dataclass(frozen=True)
class Entry:
    """One figure.

    Attributes
    ----------
    section
        Of the report: ``"Cells"``, ``"Time"``, ``"Tokens"``, ``"Operations"``, ``"Ceilings"``, ``"Memory"``,
        ``"Energy"``.
    name
        Where it stands in ``report.json``: ``"flops.mfu"``.
    label
        For people.
    value
        Number, :class:`Spread`, text or :class:`Missing`.
    unit
        As :func:`geneformer_fast.profiling.units.written` takes it.
    definition
        What it means.
    """

    section: str
    name: str
    label: str
    value: float | str | Spread | Missing
    unit: str
    definition: str

    @property
    def written(self) -> str:
        """Value and unit."""
        return written(self.value, self.unit)


# Name (an attribute of the report), label, unit, definition.
_FIGURES = (
    ("cells.n", "Cells", "",
     "Cells of the measured window; warm-up and watched steps are left out."),
    ("cells.per_s", "Cells per second", "cells/s",
     "Cells of the window over its wall time."),
    ("cells.tokens_per_s", "Tokens per second", "tokens/s",
     "Real tokens of the window over its wall time; padding is not counted."),
    ("cells.lengths", "Length of cells", "tokens",
     "Real tokens per cell: median, and 10th to 90th percentile."),
    ("cells.read_gbps", "Read from files", "GB/s",
     "Bytes of the files of counts, as they lie on the disk, over the wall time of the window."),
    ("time.n_steps", "Steps", "",
     "Measured steps: batches where cells are embedded, steps of the optimizer in training."),
    ("time.n_warmup", "Warm-up steps", "",
     "Steps before the window; no figure but that of the first step rests on them."),
    ("time.wall_s", "Wall time", "s",
     "Of all measured steps; the device is waited for at both ends only."),
    ("time.cpu_s", "Processor time", "s",
     "Of this process and its workers within the window, over all cores."),
    ("time.first_step_s", "First step", "s",
     "With what is compiled, loaded and allocated in it."),
    ("time.step_ms", "Step", "ms",
     "Time of one step: median, and 10th to 90th percentile; of steps computed at once the forward pass of each."),
    ("time.n_at_once", "Steps at once", "",
     "Steps that were computed at the same time: batches, each in a thread of its own."),
    ("tokens.n_real", "Real tokens", "tokens",
     "Tokens that belong to cells."),
    ("tokens.n_positions", "Computed positions", "positions",
     "Real tokens and padding; a padded batch is a rectangle as wide as its longest cell."),
    ("tokens.useful_share", "Useful tokens", "share",
     "Real tokens over computed positions; the rest was padding."),
    ("flops.model", "Model operations", "op",
     "What the result needs, a multiplication and an addition being two: real tokens, attention by the square of each "
     "cell's own length, the head for the rows that were asked for; training is three forward passes."),
    ("flops.hardware", "Hardware operations", "op",
     "What was computed: padding and recomputation counted."),
    ("flops.per_cell", "Model operations per cell", "op",
     "Model operations over cells."),
    ("flops.mfu", "MFU", "share",
     "Model FLOPs utilisation: model operations per second over the ceiling of products measured in this run."),
    ("flops.hfu", "HFU", "share",
     "Hardware FLOPs utilisation: hardware operations per second over the same ceiling."),
    ("flops.mfu_of_datasheet", "MFU by the datasheet", "share",
     "Model operations per second over what the maker promises."),
    ("flops.hfu_of_datasheet", "HFU by the datasheet", "share",
     "Hardware operations per second over what the maker promises."),
    ("flops.ceiling_dtype", "Ceiling of", "",
     "The dtype of products whose ceiling MFU and HFU are shares of."),
    ("flops.basis", "Basis", "",
     "A formula, counted (by torch's FlopCounterMode), or unknown."),
    ("flops.note", "How", "",
     "How operations were counted, or why they were not."),
    ("ceilings.copy_gbps", "Copies", "GB/s",
     "Bytes per second, read and written, of a large copy, measured in this run."),
    ("memory.peak_bytes", "Peak", "bytes",
     "The most in use: the allocator's figure on a card, the operating system's (VmHWM) on a CPU."),
    ("memory.reserved_bytes", "Reserved", "bytes",
     "What the allocator held at the peak."),
    ("memory.fragmentation", "Fragmentation", "share",
     "Share of the reserved memory that was not in use then."),
    ("memory.process_bytes", "Process", "bytes",
     "The most resident memory of this process."),
    ("energy.counter", "Counter", "",
     "Where energy was read."),
    ("energy.window_s", "Window", "s",
     "Seconds it was read over; counters need two."),
    ("energy.joules", "Energy", "J",
     "Within the window, idle power included."),
    ("energy.watts", "Power", "W",
     "Mean of the window, idle power included."),
    ("energy.idle_watts", "Idle power", "W",
     "Before the work began."),
    ("energy.joules_per_cell", "Energy per cell", "J/cell",
     "Energy of the window over its cells, idle power included."),
    ("energy.cells_per_kwh", "Cells per kWh", "cells/kWh",
     "3.6 million joules over the energy per cell."),
    ("energy.kwh_per_million_cells", "Energy per million cells", "kWh",
     "Energy per cell, in kWh, for a million of them."),
)  # fmt: skip
_SECTION_OF = {
    **{"cells": "Cells", "time": "Time", "tokens": "Tokens", "flops": "Operations", "ceilings": "Ceilings"},
    **{"memory": "Memory", "energy": "Energy"},
}
SECTIONS = tuple(_SECTION_OF.values())

PART_MEANS = {
    "data": "Waiting for the next batch.",
    "copies": "Between host and device.",
    "forward": "Forward pass.",
    "backward": "Backward pass.",
    "optimizer": "Step of the optimizer.",
    "communication": "Between processes.",
    "host_gaps": "The device had nothing to do while a step went on.",
    "other": "The rest of the window.",
}
KIND_MEANS = {
    "weights": "Parameters and buffers of the model.",
    "gradients": "Of the parameters.",
    "optimizer": "State of the optimizer.",
    "activations": "Hidden units, and what the backward pass needs of the forward pass.",
    "logits": "Output of the head.",
    "workspace": "What operations held for themselves.",
    "other": "The rest; on a CPU Python, libraries, and what they map.",
}


def entries(report: Report) -> list[Entry]:
    """Every figure of a report, in the order of :data:`SECTIONS`; operations, batches and series are tables apart."""
    found = [
        Entry(_SECTION_OF[name.partition(".")[0]], name, label, _value(report, name), unit, definition)
        for name, label, unit, definition in _FIGURES
    ]
    found += [*_parts(report), *_kinds(report), *_products(report), *_state(report)]
    return sorted(found, key=lambda entry: SECTIONS.index(entry.section))


def _value(report: Report, name: str) -> Any:
    record, _, attribute = name.partition(".")
    value = getattr(getattr(report, record), attribute)
    return Missing("nothing was counted") if value is None else Missing("there is none") if value == "" else value


def _parts(report: Report) -> Iterator[Entry]:
    for name in _in_order(report.time.parts, PARTS):
        text = PART_MEANS.get(name, "A part of the window.")
        yield Entry("Time", f"time.parts.{name}", words(name).capitalize(), report.time.parts[name], "s", text)


def _kinds(report: Report) -> Iterator[Entry]:
    for name in _in_order(report.memory.parts, KINDS):
        text = f"{KIND_MEANS.get(name, 'A part of the memory.')} At the peak."
        yield Entry(
            "Memory", f"memory.parts.{name}", words(name).capitalize(), report.memory.parts[name], "bytes", text
        )


def _products(report: Report) -> Iterator[Entry]:
    for dtype, value in report.ceilings.products.items():
        text = f"Large matrix products in {dtype}, measured in this run."
        yield Entry("Ceilings", f"ceilings.products.{dtype}", f"Products in {dtype}", value, "T op/s", text)
    sheet = report.ceilings.datasheet
    if sheet is not None:
        for dtype, value in sheet.products.items():
            text = f"What the datasheet of {sheet.name} promises for dense products."
            name = f"ceilings.datasheet.products.{dtype}"
            yield Entry("Ceilings", name, f"Products in {dtype}, datasheet", value, "T op/s", text)
        text = f"What the datasheet of {sheet.name} promises."
        yield Entry("Ceilings", "ceilings.datasheet.memory_gbps", "Memory, datasheet", sheet.memory_gbps, "GB/s", text)


def _state(report: Report) -> Iterator[Entry]:
    for name, value in report.energy.state.items():
        text = "State of the device, as read at the end of the window or averaged over it."
        yield Entry("Energy", f"energy.state.{name}", words(name), value, unit_of(name), text)


def _in_order(found: dict[str, Any], order: tuple[str, ...]) -> list[str]:
    """Names of a dict, those with a place in an order first."""
    return [*(name for name in order if name in found), *(name for name in found if name not in order)]
