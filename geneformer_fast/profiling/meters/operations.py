"""Time per operation, per block and per part of a step, from torch's profiler over a few steps."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.autograd import profiler as autograd_profiler

from geneformer_fast.files.writing import whole_file
from geneformer_fast.profiling.figures import Ceilings, Figure, Missing, Operation
from geneformer_fast.profiling.flops.needs import Need
from geneformer_fast.profiling.meters.events import (
    Sorted,
    parts_of_device,
    parts_of_host,
    read_events,
    sorted_out,
    totals,
)
from geneformer_fast.profiling.meters.silence import start_quietly

#: Events of which a trace is written: 4 million take about 100 MB when compressed.
MOST_EVENTS = 2_000_000
MOST_TRACE_BYTES = 100_000_000
# Rows that together take less than this share of the time of all are one row.
_LEAST_SHARE = 0.001
_REST = "everything else"
_UNCOUNTED = Missing("nothing is counted for it")


@dataclass(frozen=True)
class Watched:
    """What torch's profiler saw.

    Attributes
    ----------
    operations
        Largest first; without flops, bytes and place under the roofline (:func:`with_needs`).
    blocks
        Milliseconds of each block of the encoder, forward and backward together, over all watched steps.
    parts
        Seconds per watched step by :data:`~geneformer_fast.profiling.figures.PARTS`. Of a card what it did; ``data`` is
        among its ``host_gaps``.
    n_steps, wall_s
        Steps that were watched, and seconds they took together; longer than others, for the profiler is on.
    trace
        The file, where one was written.
    notes
        What could not be seen, and why.
    """

    operations: list[Operation] = field(default_factory=list)
    blocks: list[float] = field(default_factory=list)
    parts: dict[str, Figure] = field(default_factory=dict)
    n_steps: int = 0
    wall_s: float = 0.0
    trace: Path | None = None
    notes: list[str] = field(default_factory=list)


class OperationWatch:
    """Has torch's profiler record a few steps of a loop.

    Nothing is recorded, and nothing costs anything, until ``n_wait`` steps are done; then come ``n_warmup`` steps in
    which the profiler gets ready, and ``n_active`` that it records. All threads of the process are seen where torch can
    do that (2.8 and newer).

    Parameters
    ----------
    device
        Where the model computes.
    n_wait, n_warmup, n_active
        Steps, the last two at least 1.
    trace
        Where to write a trace for Chrome and Perfetto, ``.json`` or ``.json.gz``; None writes none.
    modules
        The blocks of a model that opens no ranges itself, first to last: while they are watched they do, by hooks.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        n_wait: int = 0,
        n_warmup: int = 1,
        n_active: int = 2,
        trace: Path | None = None,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        if n_wait < 0 or n_warmup < 1 or n_active < 1:
            raise ValueError(
                f"n_wait must be at least 0, n_warmup and n_active at least 1, not {n_wait}, {n_warmup} and {n_active}"
            )
        self.device, self.trace = torch.device(device), trace
        self.n_wait, self.n_warmup, self.n_active = n_wait, n_warmup, n_active
        self.n_steps = 0
        self._modules, self._hooks = modules, _Hooks()
        self._profiler: Any = None
        self._notes: list[str] = []
        self._is_over = False

    @property
    def is_complete(self) -> bool:
        """Whether all steps that were to be watched are done."""
        return self._is_over or self.n_steps >= self.n_wait + self.n_warmup + self.n_active

    @property
    def is_recording(self) -> bool:
        """Whether the step that goes on is one of those that are recorded."""
        return self._profiler is not None and not self.is_complete and self.n_steps >= self.n_wait + self.n_warmup

    def __enter__(self) -> OperationWatch:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def start(self) -> OperationWatch:
        """Before the first step."""
        if self.n_wait == 0:
            self._prepare()
        return self

    def step(self) -> None:
        """A step is done."""
        if self._is_over:
            return
        self.n_steps += 1
        if self.n_steps == self.n_wait:
            self._prepare()
        elif self._profiler is not None:
            done = self.n_steps - self.n_wait
            # A card still works on what it was given; it is waited for where recording begins, and ends.
            if done in (self.n_warmup, self.n_warmup + self.n_active):
                self._synchronize()
            if done == self.n_warmup:
                self._hooks.put_on(self._modules)
            self._profiler.step()
            if done == self.n_warmup + self.n_active:
                self._stop()

    def finish(self) -> Watched:
        """What was seen; of fewer steps where the loop ended early."""
        self._stop()
        if self._profiler is None:
            return Watched(notes=self._notes or ["the loop ended before torch's profiler was started"])
        n_recorded = min(self.n_active, self.n_steps - self.n_wait - self.n_warmup)
        if n_recorded < 1:
            return Watched(notes=[*self._notes, "the loop ended before torch's profiler recorded a step"])
        events = read_events(self._profiler.profiler.kineto_results.events())
        found = sorted_out(events)
        found.steps[n_recorded:] = []  # the loop's last range may hold no step
        trace = self._write_trace(len(events))
        return replace(summary(found, self.device), trace=trace, notes=self._notes)

    def _prepare(self) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule

        if autograd_profiler._is_profiler_enabled:
            self._notes.append("another profiler of torch is on, and there can be one at a time")
            self._is_over = True
            return
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=self.n_warmup, active=self.n_active, repeat=1),
            on_trace_ready=lambda _: None,  # read in the end, not within a step
            experimental_config=self._all_threads(),
        )
        start_quietly(self._profiler)

    def _all_threads(self) -> Any:
        from torch._C._profiler import _ExperimentalConfig

        try:
            return _ExperimentalConfig(profile_all_threads=True)
        except TypeError:
            self._notes.append("this torch records the thread that counts the steps, and what torch starts from it")
            return None

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _stop(self) -> None:
        self._hooks.take_off()
        if self._profiler is not None and not self._is_over:
            if not self.is_complete:
                self._synchronize()
            self._profiler.stop()
        self._is_over = True

    def _write_trace(self, n_events: int) -> Path | None:
        if self.trace is None:
            return None
        if n_events > MOST_EVENTS:
            self._notes.append(f"no trace was written: of {n_events:,} events it would be too large; watch fewer steps")
            return None
        with whole_file(self.trace) as temporary:
            plain = temporary.with_name("plain.json")
            self._profiler.export_chrome_trace(str(plain))
            if self.trace.suffix == ".gz":
                with plain.open("rb") as source, gzip.open(temporary, "wb", compresslevel=6) as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            else:
                plain.rename(temporary)
            n_bytes = temporary.stat().st_size
        if n_bytes > MOST_TRACE_BYTES:
            self.trace.unlink()
            self._notes.append(f"no trace was kept: it had {n_bytes / 1e6:.0f} MB; watch fewer steps")
            return None
        return self.trace


class _Hooks:
    """Ranges around modules that open none themselves."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._open: dict[int, list[Any]] = {}

    def put_on(self, modules: Sequence[nn.Module]) -> None:
        """Open a range ``block i`` around every call of the i-th."""
        for index, module in enumerate(modules):
            self._handles += [
                module.register_forward_pre_hook(lambda module, _, name=f"block {index}": self._enter(module, name)),
                module.register_forward_hook(lambda module, *_: self._leave(module), always_call=True),
            ]

    def take_off(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def _enter(self, module: nn.Module, name: str) -> None:
        opened = autograd_profiler.record_function(name)
        opened.__enter__()
        self._open.setdefault(id(module), []).append(opened)

    def _leave(self, module: nn.Module) -> None:
        if self._open.get(id(module)):
            self._open[id(module)].pop().__exit__(None, None, None)


def summary(found: Sorted, device: torch.device) -> Watched:
    """The table, the blocks and the parts of the watched steps."""
    is_card = device.type != "cpu"
    timed = [(p, e.end - e.start) for e, p in found.device] if is_card else [(p, own) for _, p, own in found.host]
    wall = sum(end - start for start, end in found.steps)
    blocks: dict[int, int] = {}
    for place, n_ns in timed:
        if place.block is not None:
            blocks[place.block] = blocks.get(place.block, 0) + n_ns
    return Watched(
        operations=_table(totals(timed), wall),
        blocks=[blocks.get(index, 0) / 1e6 for index in range(max(blocks, default=-1) + 1)],
        parts=_parts(found, wall, is_card=is_card),
        n_steps=len(found.steps),
        wall_s=wall / 1e9,
    )


def _table(found: Mapping[str, tuple[int, int]], wall: int) -> list[Operation]:
    """A row for each label, largest first."""
    # Several threads may compute at once: shares are then of the time of all of them.
    whole = max(wall, sum(n_ns for _, n_ns in found.values()))
    rows: list[Operation] = []
    n_others = others = 0
    for label, (calls, n_ns) in sorted(found.items(), key=lambda each: (-each[1][1], each[0])):
        if n_ns < _LEAST_SHARE * whole:
            n_others += calls
            others += n_ns
        else:
            rows.append(_row(label, calls, n_ns, whole))
    return [*rows, _row(_REST, n_others, others, whole)] if others else rows


def _row(label: str, calls: int, n_ns: int, whole: int) -> Operation:
    return Operation(label, calls, n_ns / 1e6, n_ns / whole, _UNCOUNTED, _UNCOUNTED, _UNCOUNTED)


def _parts(found: Sorted, wall: int, *, is_card: bool) -> dict[str, Figure]:
    """Seconds per watched step; they add up to the time of a step."""
    if not found.steps:
        return {}
    ns = parts_of_device(found) if is_card else parts_of_host(found)
    names = ("copies", "forward", "backward", "optimizer", "communication", "other")
    parts: dict[str, Figure] = {name: ns.get(name, 0) / 1e9 / len(found.steps) for name in names}
    left = max(wall - sum(ns.values()), 0) / 1e9 / len(found.steps)
    if is_card:
        return {**parts, "host_gaps": left}
    parts["copies"] = Missing("a CPU copies nothing to a device")
    return {
        **parts,
        "data": ns.get("data", 0) / 1e9 / len(found.steps),
        "host_gaps": Missing("a CPU has none"),
        "other": ns.get("other", 0) / 1e9 / len(found.steps) + left,
    }


def with_needs(
    operations: Sequence[Operation], needs: Mapping[str, Need], ceilings: Ceilings, dtype: str | None = None
) -> list[Operation]:
    """The same rows with what each operation needs, and its place under its roofline.

    Parameters
    ----------
    operations
        Of some watched steps.
    needs
        By name, for these very steps: ``count(...).operations``.
    ceilings
        Of this machine.
    dtype
        Of products, for needs that do not say it.
    """
    return [_with_need(row, needs.get(row.name), ceilings, dtype) for row in operations]


def _with_need(row: Operation, need: Need | None, ceilings: Ceilings, dtype: str | None) -> Operation:
    if need is None:
        return row
    least = _least_ms(need, ceilings, need.dtype or dtype)
    if not isinstance(least, Missing):
        least = least / row.time_ms if row.time_ms else Missing("it took no time that could be measured")
    return replace(row, flops=need.flops, n_bytes=need.n_bytes, roof_share=least)


def _least_ms(need: Need, ceilings: Ceilings, dtype: str | None) -> Figure:
    """The time that the ceilings allow. What multiplies nothing, or moves nothing, is not held against that one."""
    longest = 0.0
    for amount, ceiling in ((need.flops / 1e12, ceilings.product(dtype)), (need.n_bytes / 1e9, ceilings.copy_gbps)):
        if not amount:
            continue
        if isinstance(ceiling, Missing):
            return ceiling
        if not ceiling > 0:
            return Missing(f"a ceiling of {ceiling:g} was measured")
        longest = max(longest, amount / ceiling)
    return longest * 1e3
