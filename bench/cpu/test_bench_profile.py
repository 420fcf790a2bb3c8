"""What profiling costs the steps it measures: the same embedding with and without, in turns, with a goal.

``pytest bench/cpu/test_bench_profile.py -m bench`` writes ``bench/results/<machine>/profile_overhead.json``. The
environment variable GENEFORMER_FAST_BENCH_ROUNDS makes it shorter; nothing is written then, no goal held.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from bench.machine import save_result
from geneformer_fast import Encoder, EncoderConfig, Ragged, profile
from geneformer_fast.profiling.clock import percentiles

pytestmark = pytest.mark.bench

#: Profiled over plain, outside of the steps that torch's profiler watches.
GOAL = 1.03
CASE, ROUNDS, STEPS, WARMUP = "profile_overhead", 12, 8, 2
LENGTHS = (400, 600, 900, 1300)


def test_bench_profile(benchmark) -> None:  # type: ignore[no-untyped-def]
    rounds = int(os.environ.get("GENEFORMER_FAST_BENCH_ROUNDS", ROUNDS))
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig.preset("geneformer-v1-10m")).eval()
    ids = torch.randint(2, encoder.config.vocab_size, (sum(LENGTHS),))
    tokens = Ragged.from_lengths(ids, list(LENGTHS))

    def step() -> None:
        with torch.inference_mode():
            encoder(tokens)

    found = benchmark.pedantic(lambda: side_by_side(encoder, step, rounds), rounds=1)
    if rounds == ROUNDS:
        save_result(CASE, found)
        assert found["ratio"] < GOAL, found


def side_by_side(encoder: Encoder, step: Callable[[], None], rounds: int) -> dict[str, object]:
    """Milliseconds of a step with and without profiling, and the median of the rounds' ratios."""
    times: dict[str, list[float]] = {"plain": [], "profiled": []}
    for number in range(rounds):
        for name in sorted(times, reverse=bool(number % 2)):
            times[name].append(plain_ms(step) if name == "plain" else profiled_ms(encoder, step))
    ratios = np.array(times["profiled"]) / np.array(times["plain"])
    return {
        "ratio": float(np.median(ratios)),
        "ratios": percentiles(ratios.tolist()),
        "step_ms": {name: percentiles(values) for name, values in times.items()},
        "rounds": rounds,
        "steps": STEPS,
        "goal": GOAL,
    }


def plain_ms(step: Callable[[], None]) -> float:
    """Of a step in a plain loop."""
    for _ in range(WARMUP):
        step()
    begin = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - begin) / STEPS * 1e3


def profiled_ms(encoder: Encoder, step: Callable[[], None]) -> float:
    """The same within a run that measures everything but what torch's profiler watches, by the loop's own clock."""
    with profile(encoder, n_warmup=WARMUP, n_steps=STEPS + 1, n_active=0, ceilings=False) as run:
        for _ in range(WARMUP):
            step()
            run.step()
        begin = time.perf_counter()
        for _ in range(STEPS):
            step()
            run.step()
        spent = time.perf_counter() - begin
        step()
        run.step()
    return spent / STEPS * 1e3
