"""What torch's profiler saw, event by event, and where each event belongs: operation, call, block, part of a step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from geneformer_kernels.dispatch import OPERATIONS

#: Ranges that are rows of the table: operations, what runs by itself or as one loop, and what around them is none.
RANGES = frozenset((*OPERATIONS, "attention_cells", "attention_scores", "after_attention", "embeddings", "head"))
#: Ranges that say which part of a step goes on, for whatever is in them.
PHASES = ("data", "forward", "backward", "optimizer", "communication")
_WRAPPED = "DistributedDataParallel.forward"
_BLOCK = re.compile(r"block (\d+)")
_STEP = "ProfilerStep"
_NODE = "autograd::engine::evaluate_function: "
# Torch's own ranges around optimizers and loaders: "Optimizer.step#AdamW.step".
_OPTIMIZER, _LOADER = re.compile(r"Optimizer\.(?:step|zero_grad)#(.+)"), "enumerate(DataLoader)"
_COLLECTIVE = re.compile(r"c10d::|nccl:|gloo:|record_param_comms")
_KERNEL_OF_COLLECTIVE = re.compile(r"nccl", re.IGNORECASE)
_OURS = "geneformer_kernels::"
# Calls of the driver, as they come beside torch's events.
_DRIVER = re.compile(r"(?:cuda|cu|hip)[A-Z]")
_COPY = re.compile(r"Memcpy (?:HtoD|DtoH)")
#: What torch calls a change of memory; it lies in other events and is none itself.
MEMORY, _OUT_OF_MEMORY = "[memory]", "[OutOfMemory]"
#: Which part of a step a moment belongs to where several go on at once: work hides what waits.
_FIRST = ("backward", "optimizer", "forward", "copies", "communication", "data", "other")


@dataclass(slots=True)
class Event:
    """Something that took time, on a thread of the host or on a device.

    Attributes
    ----------
    start, end
        Nanoseconds.
    thread
        Of the host; of a device event the stream.
    is_range
        Somebody named it (``torch.profiler.record_function``).
    sequence, forward_thread
        Number, within its thread, of the step of the backward pass that it makes, or is; -1 where it has none.
    number, launched_by
        Its own number, and that of torch's event which launched it; 0 where it has none.
    """

    name: str
    start: int
    end: int
    thread: int
    is_range: bool = False
    sequence: int = -1
    forward_thread: int = 0
    number: int = 0
    launched_by: int = 0
    is_on_device: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """What an event belongs to: a row of the table and a call counted there, a block, a part of a step."""

    label: str | None = None
    call: int = 0
    block: int | None = None
    phase: str | None = None


_NOWHERE = Place()


def read_events(recorded: Iterable[Any]) -> list[Event]:
    """The events of ``torch.profiler`` (those of ``kineto_results``)."""
    from torch.autograd import DeviceType

    found = []
    for each in recorded:
        if each.name() in (MEMORY, _OUT_OF_MEMORY):
            continue
        start = each.start_ns()
        is_on_device = each.device_type() != DeviceType.CPU
        found.append(
            Event(
                name=each.name(),
                start=start,
                end=start + each.duration_ns(),
                thread=each.device_resource_id() if is_on_device else each.start_thread_id(),
                is_range=each.is_user_annotation(),
                sequence=each.sequence_nr(),
                forward_thread=each.fwd_thread_id(),
                number=each.correlation_id(),
                launched_by=each.linked_correlation_id(),
                is_on_device=is_on_device,
            )
        )
    return found


@dataclass(frozen=True)
class Sorted:
    """Events with their places.

    Attributes
    ----------
    steps
        Start and end of each watched step.
    host
        (event, place, nanoseconds that no event within it took), in the order of their starts.
    device
        (event, place of what launched it).
    """

    steps: list[tuple[int, int]]
    host: list[tuple[Event, Place, int]]
    device: list[tuple[Event, Place]]


def sorted_out(events: Iterable[Event]) -> Sorted:
    """Give every event its place.

    An event belongs to the innermost operation it lies in, else to the outermost operator of torch; a step of a
    backward pass to the call that made it, with `` backward`` behind the name.
    """
    on_host: list[Event] = []
    on_device: list[Event] = []
    for event in events:
        (on_device if event.is_on_device else on_host).append(event)
    _give_threads(on_host)
    on_host.sort(key=lambda event: (event.start, -event.end))
    walk = _Walk()
    host = walk.through(on_host)
    places = {event.number: place for event, place, _ in host if event.number and not _is_driver(event)}
    calls = {event.number: place for event, place, _ in host if _is_driver(event)}
    device = [
        (event, places.get(event.launched_by) or calls.get(event.number) or _NOWHERE)
        for event in on_device
        if not event.is_range
    ]
    steps = [(event.start, event.end) for event in on_host if event.is_range and event.name.startswith(_STEP)]
    return Sorted(steps, host, device)


def _is_driver(event: Event) -> bool:
    return event.launched_by > 0 or _DRIVER.match(event.name) is not None


def _give_threads(events: Sequence[Event]) -> None:
    """Calls of the driver come with the system's number of their thread: give them that of torch's events in it."""
    threads = {event.number: event.thread for event in events if event.number and not _is_driver(event)}
    same = {
        event.thread: threads[event.launched_by]
        for event in events
        if event.launched_by > 0 and event.launched_by in threads
    }
    for event in events:
        if _is_driver(event):
            event.thread = same.get(event.thread, event.thread)


class _Walk:
    """Goes through the events of the host in the order of their starts."""

    def __init__(self) -> None:
        self.n_calls = 0
        # What made a step of a backward pass: the last operator that began before there was the next number.
        self.makers: dict[tuple[int, int], Place] = {}

    def through(self, events: Sequence[Event]) -> list[tuple[Event, Place, int]]:
        """(event, place, nanoseconds of its own) of each."""
        places: list[Place] = []
        own = [event.end - event.start for event in events]
        open_events: dict[int, list[int]] = {}
        for i, event in enumerate(events):
            around = open_events.setdefault(event.thread, [])
            while around and events[around[-1]].end <= event.start:
                around.pop()
            parent = places[around[-1]] if around else _NOWHERE
            if around:
                own[around[-1]] -= min(event.end, events[around[-1]].end) - event.start
            places.append(self.place(event, parent))
            around.append(i)
        return list(zip(events, places, own, strict=True))

    def place(self, event: Event, parent: Place) -> Place:
        """Where an event belongs that lies in another one."""
        if event.name.startswith(_NODE):
            return self._backward(event, parent)
        found = self._range(event.name, parent) if event.is_range else self._operator(event.name, parent)
        if event.sequence >= 0:
            self.makers[event.thread, event.sequence] = found
        return found

    def _backward(self, event: Event, parent: Place) -> Place:
        maker = self.makers.get((event.forward_thread, event.sequence))
        if maker is None or maker.label is None:
            name = event.name.removeprefix(_NODE).removeprefix("torch::autograd::")
            return Place(name, self._next(), parent.block if maker is None else maker.block, "backward")
        label = maker.label if maker.label.endswith(" backward") else f"{maker.label} backward"
        return Place(label, maker.call, maker.block, "backward")

    def _range(self, name: str, parent: Place) -> Place:
        if name in RANGES:
            if parent.label == name:  # one public function calls another one of the same operation
                return parent
            return replace(parent, label=name, call=self._next(), phase=parent.phase or "forward")
        if block := _BLOCK.fullmatch(name):
            return replace(parent, block=int(block[1]), phase=parent.phase or "forward")
        if name == _WRAPPED:
            return replace(parent, phase=parent.phase or "forward")
        if optimizer := _OPTIMIZER.fullmatch(name):
            return Place(optimizer[1], self._next(), None, "optimizer")
        if name.startswith(_LOADER):
            return Place("DataLoader", self._next(), None, "data")
        if _COLLECTIVE.match(name):
            return replace(parent, label=name, call=self._next(), phase="communication")
        return replace(parent, phase=name) if name in PHASES else parent

    def _operator(self, name: str, parent: Place) -> Place:
        if _COLLECTIVE.match(name):
            if parent.phase == "communication":
                return parent
            return replace(parent, label=name, call=self._next(), phase="communication")
        if parent.label is not None or name == MEMORY:
            return parent
        label = _operation_of(name) if name.startswith(_OURS) else name
        return replace(parent, label=label, call=self._next(), phase=parent.phase or "forward")

    def _next(self) -> int:
        self.n_calls += 1
        return self.n_calls


def _operation_of(name: str) -> str:
    """The operation that an operator of ours belongs to, where no range says so: in what torch has compiled."""
    name = name.removeprefix(_OURS)
    operation = max((each for each in OPERATIONS if name.startswith(each)), key=len, default=name)
    return f"{operation} backward" if name.endswith("_bwd") else operation


def parts_of_host(found: Sorted) -> dict[str, int]:
    """Nanoseconds of the watched steps by what went on in them, on any thread."""
    by_thread: dict[int, list[tuple[int, int, str]]] = {}
    for event, place, _ in found.host:
        if place.phase is not None and not _is_driver(event):
            by_thread.setdefault(event.thread, []).append((event.start, event.end, place.phase))
    segments = [each for nested in by_thread.values() for each in _without_gaps(_flat(nested))]
    return _by_first(segments, found.steps)


def parts_of_device(found: Sorted) -> dict[str, int]:
    """Nanoseconds of the watched steps by what a device did."""
    segments = [(event.start, event.end, _phase_on_device(event, place)) for event, place in found.device]
    return _by_first(segments, found.steps)


def _phase_on_device(event: Event, place: Place) -> str:
    if _KERNEL_OF_COLLECTIVE.match(event.name):
        return "communication"
    return "copies" if _COPY.match(event.name) else place.phase or "other"


def _flat(nested: Iterable[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
    """Intervals of one thread, sorted and one within another, as pieces of which the innermost says what they are."""
    around: list[tuple[int, str]] = []
    now = 0
    for start, end, phase in nested:
        while around and around[-1][0] <= start:
            until, outer = around.pop()
            yield now, until, outer
            now = until
        if around:
            yield now, start, around[-1][1]
            end = min(end, around[-1][0])
        now = start
        around.append((end, phase))
    while around:
        until, outer = around.pop()
        yield now, until, outer
        now = until


def _without_gaps(pieces: Iterable[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Pieces joined to those before them; what torch does between two steps of a backward pass is part of it."""
    joined: list[tuple[int, int, str]] = []
    for start, end, phase in pieces:
        if start == end:
            continue
        if joined and joined[-1][2] == phase and (phase == "backward" or joined[-1][1] == start):
            joined[-1] = (joined[-1][0], end, phase)
        else:
            joined.append((start, end, phase))
    return joined


def _by_first(segments: Sequence[tuple[int, int, str]], steps: Sequence[tuple[int, int]]) -> dict[str, int]:
    """Nanoseconds within the steps for which each phase is the first of those that go on."""
    if not steps:
        return {}
    begin, stop = min(start for start, _ in steps), max(end for _, end in steps)
    changes = []
    for start, end, phase in segments:
        start, end = max(start, begin), min(end, stop)
        if start < end:
            changes += [(start, 1, phase), (end, -1, phase)]
    changes.sort(key=lambda change: change[0])
    going, now, total = dict.fromkeys(_FIRST, 0), begin, dict.fromkeys(_FIRST, 0)
    for time, change, phase in changes:
        if time > now:
            first = next((each for each in _FIRST if going[each]), None)
            if first is not None:
                total[first] += time - now
            now = time
        going[phase] += change
    return {phase: total[phase] for phase in _FIRST if total[phase]}


def totals(timed: Iterable[tuple[Place, int]]) -> Mapping[str, tuple[int, int]]:
    """Calls and nanoseconds of each label."""
    calls: dict[str, set[int]] = {}
    times: dict[str, int] = {}
    for place, n_ns in timed:
        if place.label is not None:
            calls.setdefault(place.label, set()).add(place.call)
            times[place.label] = times.get(place.label, 0) + n_ns
    return {label: (len(calls[label]), n_ns) for label, n_ns in times.items()}
