"""When the parts of every step began, by the host's clock or by events on a card, and what they come to.

A mark costs a look at a clock, or an event in the stream; nobody waits for a device but at the ends of the window.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any, Generic, Protocol, TypeVar

import torch

from geneformer_fast.errors import ProfileError

T = TypeVar("T")
#: What a mark says begins: waiting for a batch, and then the parts of the step.
DATA, FORWARD, BACKWARD, OPTIMIZER, OTHER = "data", "forward", "backward", "optimizer", "other"
#: Most values that are kept of very many.
MOST_KEPT = 2000


class Stamps(Protocol):
    """Moments, as a device reaches them."""

    def now(self) -> Any:
        """This moment."""

    def between(self, first: Any, last: Any) -> float:
        """Seconds from one to another."""

    def is_past(self, stamp: Any) -> bool:
        """Whether the device has come that far."""

    def wait(self) -> None:
        """Wait for the device."""


class HostStamps:
    """The host's clock, for devices that do what they are told at once."""

    def now(self) -> float:
        """Seconds of the clock."""
        return time.perf_counter()

    def between(self, first: float, last: float) -> float:
        """Their difference."""
        return last - first

    def is_past(self, stamp: float) -> bool:
        """Always."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""


class EventStamps:
    """CUDA events in the device's current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> torch.cuda.Event:
        """An event behind everything that was handed to the device."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        """Seconds on the device's clock."""
        return first.elapsed_time(last) / 1e3

    def is_past(self, stamp: torch.cuda.Event) -> bool:
        """Asked without waiting."""
        return bool(stamp.query())

    def wait(self) -> None:
        """For everything that was handed to the device."""
        torch.cuda.synchronize(self.device)


def stamps_of(device: torch.device) -> Stamps:
    """Events on a card, the host's clock elsewhere."""
    return EventStamps(device) if device.type == "cuda" else HostStamps()


class Selection(Generic[T]):
    """Of arbitrarily many values a regular selection: all of few, every second, every fourth ... of more.

    Parameters
    ----------
    most
        Most values that are kept.
    """

    def __init__(self, most: int = MOST_KEPT) -> None:
        self.most, self.values = most, list[T]()
        self._stride, self._n_seen = 1, 0

    def add(self, value: T) -> None:
        """The next one."""
        if self._n_seen % self._stride == 0:
            self.values.append(value)
            if len(self.values) > self.most:
                self.values = self.values[::2]
                self._stride *= 2
        self._n_seen += 1


class StepClock:
    """Seconds of the measured steps, whole and by part.

    Between :meth:`begin` and :meth:`close` lies a stretch of steps without a break; there may be several.

    Parameters
    ----------
    stamps
        How moments are taken.

    Attributes
    ----------
    wall_s
        Of all stretches, each from an idle device to the end of its last step: ``parts`` added up.
    parts
        Seconds by the mark that began them, as the device came by.
    step_s
        Of the steps; of very many, a regular selection.
    n_steps
        Steps measured.
    pass_s, n_passes
        Seconds of forward passes by the host's clock (a regular selection of very many), and how many there were.
    is_running
        Whether a stretch has begun.
    """

    def __init__(self, stamps: Stamps) -> None:
        self._stamps = stamps
        self.wall_s, self.n_steps, self.n_passes = 0.0, 0, 0
        self.parts = dict.fromkeys((DATA, FORWARD, BACKWARD, OPTIMIZER, OTHER), 0.0)
        self.step_s: Selection[float] = Selection()
        self.pass_s: Selection[float] = Selection()
        self.is_running = False
        self._marks: list[tuple[str, Any]] = []
        self._waiting: deque[tuple[list[tuple[str, Any]], Any]] = deque()

    def wait(self) -> None:
        """Wait for the device."""
        self._stamps.wait()

    def begin(self) -> None:
        """A stretch begins; the first batch is waited for."""
        self._stamps.wait()
        self.is_running = True
        self._marks = [(DATA, self._stamps.now())]

    def mark(self, part: str) -> None:
        """From here on it is this part."""
        if self.is_running:
            self._marks.append((part, self._stamps.now()))

    def end_pass(self, seconds: float) -> None:
        """A forward pass is over that took so long in its thread."""
        if self.is_running:
            self.pass_s.add(seconds)
            self.n_passes += 1

    def end_step(self) -> None:
        """A step is over, and the next batch is waited for."""
        if not self.is_running:
            return
        now = self._stamps.now()
        self._waiting.append((self._marks, now))
        self._marks = [(DATA, now)]
        self.n_steps += 1
        while self._waiting and self._stamps.is_past(self._waiting[0][1]):
            self._settle(*self._waiting.popleft())

    def close(self) -> None:
        """The stretch ends with the last step that did; what came after it is not measured."""
        if not self.is_running:
            return
        self._stamps.wait()
        self.is_running = False
        while self._waiting:
            self._settle(*self._waiting.popleft())

    def check(self) -> None:
        """Refuse times that no clock can have given.

        Raises
        ------
        ProfileError
            Something is negative or no number.
        """
        if not _is_time(self.wall_s):
            raise ProfileError(
                f"the clock gave {self.wall_s} s for all steps, so that no rate can be told; measure again, on a "
                "machine whose clock is not set meanwhile"
            )

    @property
    def is_in_order(self) -> bool:
        """Whether the device came by the marks as they were made: those in several streams it need not."""
        return all(map(_is_time, self.parts.values()))

    def _settle(self, marks: list[tuple[str, Any]], end: Any) -> None:
        """Add up one step that the device is through with."""
        for (part, begin), (_, until) in zip(marks, [*marks[1:], (OTHER, end)], strict=True):
            self.parts[part] += self._stamps.between(begin, until)
        seconds = self._stamps.between(marks[0][1], end)
        self.wall_s += seconds
        self.step_s.add(seconds)


def _is_time(seconds: float) -> bool:
    return math.isfinite(seconds) and seconds >= 0
