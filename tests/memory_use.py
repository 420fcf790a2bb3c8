"""Memory that a call has in use at most, as the allocators of torch and numpy count it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
from torch.profiler import ProfilerActivity, profile


def most_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """(most bytes of torch's tensors at any moment, most of numpy's arrays), each above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        arrays = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    return int(live.max(initial=0)), arrays
