"""How work on a card is timed: events around it, work of another kind in front of it, candidates in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch

Run = Callable[[], Any]

# One turn of a candidate lasts about this long, so that short work is repeated and long work is not.
TURN_MS = 10.0
MOST_PER_TURN = 20
# More work in front of a repetition than this buys nothing: the host is ahead by then.
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
    """The host's clock, for devices that do what they are told at once. No measurement: for tests of the procedure."""

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
    """

    def __init__(self, device: torch.device) -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self.device = device
        self._buffer = torch.empty(max(4 * cache, 256 << 20) // 4, dtype=torch.int32, device=device)
        for _ in range(3):
            self._buffer.zero_()
        self._flush_ms = float(np.median(self.samples(self._buffer.zero_, 9)))

    def samples(self, run: Run, n: int, *, lead_ms: float = 0.0) -> list[float]:
        """Milliseconds between events around each repetition; the host waits once, at the end."""
        flushes = int(np.ceil(min(lead_ms, MOST_LEAD_MS) / self._flush_ms)) if lead_ms else 0
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


def clock_of(device: torch.device) -> Clock:
    """Events on a card, the wall clock elsewhere."""
    return EventClock(device) if device.type == "cuda" else WallClock()


def time_in_turns(
    runs: Mapping[str, Run],
    clock: Clock,
    *,
    seconds: float,
    has_lead: bool,
    least_rounds: int = 3,
    most_rounds: int = 40,
    most_per_turn: int = MOST_PER_TURN,
) -> dict[str, dict[str, Any]]:
    """Time candidates that are warm already, in turns, each round in another order.

    Parameters
    ----------
    runs
        What is timed, by name.
    clock
        Of the device.
    seconds
        No new round begins after that, once there were ``least_rounds``.
    has_lead
        Whether the device gets something else to do before each repetition (:class:`EventClock`).
    least_rounds, most_rounds
        How often each has its turn.
    most_per_turn
        Repetitions in one turn; fewer where one takes long.

    Returns
    -------
    dict
        Per name: ``ms`` (percentiles over all repetitions), ``host_ms`` (median), ``n`` repetitions, and ``halves_ms``,
        the medians of the even and the odd rounds: a difference between candidates below that of these is noise.
    """
    if not runs:
        return {}
    begin = time.perf_counter()
    n_first = 3 if has_lead else 1
    host = {name: float(np.median([clock.host_ms(run) for _ in range(n_first)])) for name, run in runs.items()}
    leads = {name: max(1.3 * ms, 1e-3) if has_lead else 0.0 for name, ms in host.items()}
    first = {name: min(clock.samples(run, n_first, lead_ms=leads[name])) for name, run in runs.items()}
    turns = {name: int(np.clip(TURN_MS / max(ms, 1e-6), 1, most_per_turn)) for name, ms in first.items()}
    rounds: dict[str, list[list[float]]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(most_rounds):
        if i >= least_rounds and time.perf_counter() - begin > seconds:
            break
        shift = i % len(names)
        for name in (*names[shift:], *names[:shift]):
            rounds[name].append(clock.samples(runs[name], turns[name], lead_ms=leads[name]))
    return {
        name: {
            "ms": percentiles([ms for turn in found for ms in turn]),
            "host_ms": round(host[name], 4),
            "n": sum(map(len, found)),
            "halves_ms": [round(float(np.median(np.concatenate(half))), 5) for half in (found[::2], found[1::2])],
        }
        for name, found in rounds.items()
    }


def percentiles(values: Any) -> dict[str, float]:
    """The 10th, 50th and 90th percentile."""
    return {f"p{q}": round(float(np.percentile(values, q)), 5) for q in (10, 50, 90)}


def as_graph(run: Run, device: torch.device) -> Run:
    """``run`` as one CUDA graph: what the host does happens once, its launches replay.

    Raises
    ------
    RuntimeError
        Something in it waits for the device or cannot be captured.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(_kept_alive: Run = run) -> None:
        # The graph reads its inputs where they were: they must not be freed as long as it can be replayed.
        graph.replay()

    return replay
