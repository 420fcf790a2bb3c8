"""What the ranges cost that name operations to torch's profiler, while it is off: a share of a forward pass.

``pytest bench/cpu/test_bench_ranges.py -m bench`` writes ``bench/results/<machine>/profile_ranges.json``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from bench.machine import save_result

pytestmark = pytest.mark.bench

CALLS, ROUNDS, TOKENS = 20_000, 31, 256
GOAL = 0.01


def nothing(x: object, *, impl: object = None) -> object:
    """What is called with a range around it, and without."""
    return x


def nanoseconds(function: Callable[..., object]) -> float:
    """Of one call, the median of many rounds."""
    rounds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter_ns()
        for _ in range(CALLS):
            function(None, impl=None)
        rounds.append((time.perf_counter_ns() - begin) / CALLS)
    return float(np.median(rounds))


def test_bench_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """V1-10M on one short cell, where a range weighs most; larger batches have as many ranges and take longer."""
    import torch
    from geneformer_kernels import ranges

    from geneformer_fast import Encoder, EncoderConfig, Ragged

    cost = nanoseconds(ranges.ranged("linear")(nothing)) - nanoseconds(nothing)
    model = Encoder(EncoderConfig.preset("geneformer-v1-10m")).eval()
    cell = Ragged.from_cells([torch.randint(2, model.config.vocab_size, (TOKENS,))])
    asked = []
    with torch.inference_mode():
        model(cell)
        with monkeypatch.context() as counting:
            counting.setattr(ranges, "is_recorded", lambda: bool(asked.append(1)))
            model(cell)
        seconds = []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            model(cell)
            seconds.append(time.perf_counter() - begin)
    share = len(asked) * cost / 1e9 / float(np.median(seconds))
    print(f"{len(asked)} ranges of {cost:.0f} ns in {np.median(seconds) * 1e3:.1f} ms: {share:.4%}")
    save_result(
        "profile_ranges",
        {
            "what": f"ranges that are off, geneformer-v1-10m, one cell of {TOKENS} tokens",
            "cost_ns": cost,
            "n_ranges": len(asked),
            "forward_ms": float(np.median(seconds)) * 1e3,
            "share": share,
        },
    )
    assert share < GOAL
