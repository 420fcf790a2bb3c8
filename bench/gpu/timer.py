"""How candidates on a card are timed: in turns, by the profiler's clocks, and as CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from geneformer_fast.profiling.clock import Clock, Run, percentiles

# One turn of a candidate lasts about this long, so that short work is repeated and long work is not.
TURN_MS = 10.0
MOST_PER_TURN = 20


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
        Whether the device gets something else to do before each repetition
        (:class:`geneformer_fast.profiling.clock.EventClock`).
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
