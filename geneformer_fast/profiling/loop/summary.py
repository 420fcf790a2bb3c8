"""From what was measured to a report."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from geneformer_fast.profiling.ceilings import measure_ceilings
from geneformer_fast.profiling.figures import (
    Ceilings,
    Figure,
    Flops,
    Missing,
    Spread,
    Subject,
    Timing,
    Tokens,
    divided,
)
from geneformer_fast.profiling.findings import findings
from geneformer_fast.profiling.loop.counting import Counting
from geneformer_fast.profiling.loop.hooks import Hooks
from geneformer_fast.profiling.loop.meters import Meters
from geneformer_fast.profiling.loop.phases import Options
from geneformer_fast.profiling.loop.steps import BACKWARD, DATA, FORWARD, OPTIMIZER, OTHER, StepClock
from geneformer_fast.profiling.loop.subject import Profiled, settings_with
from geneformer_fast.profiling.loop.tally import Tally
from geneformer_fast.profiling.machine import provenance
from geneformer_fast.profiling.meters.operations import with_needs
from geneformer_fast.profiling.report import Report

# What the profiler tells of a step that marks cannot: it is taken out of the parts that were marked.
_WATCHED = ("copies", "communication", "host_gaps")
# Ceilings that findings compare with, beside the one of the run.
_OTHERS = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Measured:
    """Everything that a run knows when its loop is over."""

    about: Profiled
    device: torch.device
    options: Options
    dtype: str | None
    clock: StepClock
    tally: Tally
    counting: Counting
    meters: Meters
    hooks: Hooks
    first_step_s: float


def report_of(measured: Measured) -> Report:
    """The report."""
    clock, tally, meters = measured.clock, measured.tally, measured.meters
    ceilings = _ceilings(measured)
    cells = tally.cells(clock.wall_s)
    why_padded = _why_padded(measured)
    needs = measured.counting.needs(meters.watched_passes, measured.dtype, meters.seen.operations)
    report = Report(
        subject=_subject(measured),
        machine=provenance(),
        ceilings=ceilings,
        time=_timing(measured),
        cells=cells,
        tokens=tally.tokens() if not why_padded else _unknown_positions(tally, why_padded),
        flops=_flops(measured, ceilings, why_padded),
        memory=meters.memory,
        energy=meters.energy,
        operations=with_needs(meters.seen.operations, needs, ceilings, measured.dtype),
        blocks=meters.seen.blocks,
        series=meters.series,
    )
    return replace(report, findings=findings(report))


def _subject(measured: Measured) -> Subject:
    about, options = measured.about, measured.options
    is_training = options.mode == "loop" and measured.hooks.n_updates > 0
    settings = settings_with(options.settings, about, measured.device)
    if is_training:
        settings = {"training": True, **settings}
    return Subject(
        options.mode, options.name or about.name, options.engine or about.engine, about.n_parameters, about.geometry,
        measured.dtype, str(measured.device), options.tokens or "what the loop gave the model", settings,
    )  # fmt: skip


def _ceilings(measured: Measured) -> Ceilings:
    """Of the dtype of the run, and of those that findings compare it with."""
    if not measured.options.has_ceilings:
        return Ceilings({}, Missing("not measured: ceilings is off"))
    names = dict.fromkeys([*([] if measured.dtype is None else [measured.dtype]), *_OTHERS])
    return measure_ceilings(measured.device, list(names))


def _timing(measured: Measured) -> Timing:
    clock = measured.clock
    first: Figure = measured.first_step_s
    if first != first:
        first = Missing("there was no warm-up")
    n_at_once = _steps_at_once(measured)
    step_s = clock.step_s if n_at_once == 1 else clock.pass_s
    return Timing(
        clock.n_steps,
        measured.options.n_warmup,
        clock.wall_s,
        measured.meters.cpu_s,
        first,
        Spread.of([1e3 * seconds for seconds in step_s.values]),
        _parts(measured),
        n_at_once,
    )


def _steps_at_once(measured: Measured) -> int:
    """Steps that were computed at the same time; 1 where a step consists of several forward passes, in threads or not.

    A step that was being computed when the window began, or ended, is counted on one side only.
    """
    clock, n_at_once = measured.clock, measured.hooks.n_at_once
    is_pass_a_step = clock.n_passes > 0 and abs(clock.n_passes - clock.n_steps) <= n_at_once
    return n_at_once if n_at_once > 1 and is_pass_a_step else 1


def _parts(measured: Measured) -> dict[str, Figure]:
    """Where the window's time went: by marks, and what the profiler saw within them."""
    clock, hooks = measured.clock, measured.hooks
    parts: dict[str, Figure] = dict(clock.parts)
    why = ""
    if not hooks.n_calls:
        why = "no model was given" if measured.about.model is None else "the model's forward pass was never called"
    elif hooks.n_at_once > 1:
        why = "forward passes ran in several threads at once"
    elif not clock.is_in_order:
        why = "the device came by the parts of steps in another order (several streams?)"
    if why:
        parts = {name: Missing(why) for name in (DATA, FORWARD, BACKWARD, OPTIMIZER, OTHER)}
    watched = _watched_parts(measured)
    taken = sum(value for value in watched.values() if not isinstance(value, Missing))
    marked = {name: value for name, value in parts.items() if name != DATA and not isinstance(value, Missing)}
    left = sum(marked.values())
    if left and taken:
        # Copies and gaps lie within what was marked; nobody knows in which part of it.
        share = max(0.0, 1.0 - taken / left)
        parts |= {name: value * share for name, value in marked.items()}
        if taken > left:
            watched = {n: v if isinstance(v, Missing) else v * left / taken for n, v in watched.items()}
    return {**parts, **watched}


def _watched_parts(measured: Measured) -> dict[str, Figure]:
    """Copies, communication and gaps of the window, in proportion to the steps that were watched."""
    seen, clock = measured.meters.seen, measured.clock
    found: dict[str, Figure] = {}
    for name in _WATCHED:
        value = seen.parts.get(name, Missing(measured.meters.why_unwatched))
        if not isinstance(value, Missing) and name == "host_gaps":
            # The profiler counts the wait for data as a gap.
            per_step = clock.parts[DATA] / clock.n_steps
            value = max(0.0, value - per_step)
        found[name] = value if isinstance(value, Missing) else value * clock.n_steps
    return found


def _why_padded(measured: Measured) -> str:
    """Why nobody knows how much padding was computed: an accelerated model may have run its stock forward pass."""
    operations = measured.meters.seen.operations
    is_checked = measured.about.is_accelerated and measured.counting.is_packed and operations
    if is_checked and not any(each.name.startswith("varlen_attention") for each in operations):
        return "the accelerated model ran its stock forward pass (a warning says why), padding included"
    return ""


def _unknown_positions(tally: Tally, why: str) -> Tokens:
    return replace(tally.tokens(), useful_share=Missing(why), batches=[])


def _flops(measured: Measured, ceilings: Ceilings, why_padded: str) -> Flops:
    counting, wall_s = measured.counting, measured.clock.wall_s
    (model, hardware, basis, note), dtype = counting.figures(), measured.dtype

    def used(amount: Figure, ceiling: Figure) -> Figure:
        rate = divided(amount, wall_s, "the window")
        return divided(divided(rate, 1e12), ceiling, "the ceiling")

    if why_padded:
        hardware = Missing(why_padded)
    reached, promised = ceilings.product(dtype), ceilings.promised(dtype)
    return Flops(
        model,
        hardware,
        divided(model, measured.tally.n_cells, "the number of cells"),
        used(model, reached),
        used(hardware, reached),
        used(model, promised),
        used(hardware, promised),
        dtype,
        basis,
        note,
    )
