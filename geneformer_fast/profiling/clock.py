"""How work on a device is timed: events around it on a card, work of another kind in front of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

Run = Callable[[], Any]

#: More work in front of a repetition than this buys nothing: the host is ahead by then.
MOST_LEAD_MS = 20.0


class Clock(Protocol):
    """Times repetitions of something."""

    def samples(self, run: Run, n: int, *, lead_ms: float = 0.0) -> list[float]:
        """Milliseconds of ``n`` repetitions, each for itself, after work that takes the device about ``lead_ms``."""

    def host_ms(self, run: Run) -> float:
        """Milliseconds until the host has handed the work over, not waiting for the device."""

    def wait(self) -> None:
        """Wait for the device."""


class WallClock:
    """The host's clock, for devices that do what they are told at once."""

    def samples(self, run: Run, n: int, *, lead_ms: float = 0.0) -> list[float]:
        """Milliseconds of each repetition; there is nothing to lead with."""
        found = []
        for _ in range(n):
            start = time.perf_counter()
            run()
            found.append((time.perf_counter() - start) * 1e3)
        return found

    def host_ms(self, run: Run) -> float:
        """Milliseconds of one repetition."""
        return self.samples(run, 1)[0]

    def wait(self) -> None:
        """Nothing to wait for."""


class EventClock:
    """CUDA events.

    In front of a repetition the device can be given a buffer to overwrite, several times as large as its cache. That
    has two effects: inputs come from memory, as in a model, where they were not just used; and the host, which needs
    tens of microseconds per launch, has handed over the whole repetition before the device begins it, so that the gaps
    between launches of short work are not counted. Whole models are timed without, as users run them.

    Parameters
    ----------
    device
        A card.
    has_lead
        Whether there is such a buffer; without, ``lead_ms`` has no effect and no memory is taken.
    """

    def __init__(self, device: torch.device, *, has_lead: bool = True) -> None:
        self.device, self._flush_ms = device, 0.0
        if not has_lead:
            return
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self._buffer = torch.empty(max(4 * cache, 256 << 20) // 4, dtype=torch.int32, device=device)
        for _ in range(3):
            self._buffer.zero_()
        self._flush_ms = float(np.median(self.samples(self._buffer.zero_, 9)))

    def samples(self, run: Run, n: int, *, lead_ms: float = 0.0) -> list[float]:
        """Milliseconds between events around each repetition; the host waits once, at the end."""
        flushes = int(np.ceil(min(lead_ms, MOST_LEAD_MS) / self._flush_ms)) if lead_ms and self._flush_ms else 0
        pairs = []
        self.wait()
        for _ in range(n):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(flushes):
                self._buffer.zero_()
            start.record()
            run()
            stop.record()
            pairs.append((start, stop))
        self.wait()
        return [start.elapsed_time(stop) for start, stop in pairs]

    def host_ms(self, run: Run) -> float:
        """Milliseconds until ``run`` returns, with an idle device before and after."""
        self.wait()
        begin = time.perf_counter()
        run()
        found = (time.perf_counter() - begin) * 1e3
        self.wait()
        return found

    def wait(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)


def clock_of(device: torch.device, *, has_lead: bool = True) -> Clock:
    """Events on a card, the wall clock elsewhere."""
    return EventClock(device, has_lead=has_lead) if device.type == "cuda" else WallClock()


def percentiles(values: Any) -> dict[str, float]:
    """The 10th, 50th and 90th percentile."""
    return {f"p{q}": round(float(np.percentile(values, q)), 5) for q in (10, 50, 90)}
