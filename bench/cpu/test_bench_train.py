"""Pretraining: ours and transformers' Trainer side by side, with a goal, and their loss curves.

``pytest bench/cpu/test_bench_train.py -m bench`` writes ``bench/results/<machine>/train_*.json``. The environment
variables GENEFORMER_FAST_BENCH_CELLS and GENEFORMER_FAST_BENCH_ROUNDS make it smaller; nothing is written then, no goal
held.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.cpu.embed_candidates import SHARED
from bench.cpu.embed_case import default_attention
from bench.cpu.train_candidates import CANDIDATES, DROPOUT, Workplace
from bench.cpu.train_case import SideBySide, curves, ratios, tuned_micro_batches
from bench.cpu.train_rival import Schedule
from bench.machine import save_result
from geneformer_fast.profiling.clock import percentiles

pytestmark = pytest.mark.bench

GOALS = {"ours / trainer": 4}
N_CELLS, ROUNDS, CURVE_STEPS = 48, 3, 16
CASE = "train_v1-10m_all-threads"


@pytest.fixture
def _all_threads() -> Iterator[None]:
    """As many threads as cores, in torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_all_threads")
@pytest.mark.parametrize("case", [CASE])
def test_bench_train(case: str, benchmark, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    if not SHARED.is_dir():
        pytest.skip("real cells are not here (shared/ beside the checkout is absent)")
    n_cells = int(os.environ.get("GENEFORMER_FAST_BENCH_CELLS", N_CELLS))
    rounds = int(os.environ.get("GENEFORMER_FAST_BENCH_ROUNDS", ROUNDS))
    schedule = Schedule(n_steps=n_cells // Schedule.cells_per_step)
    place = Workplace(tmp_path)
    place.prepare(schedule.n_steps * schedule.cells_per_step, schedule.cells_per_step)
    names = (*CANDIDATES,)
    micro_batches, tried = tuned_micro_batches(place, names, schedule)
    is_whole = (n_cells, rounds) == (N_CELLS, ROUNDS)
    curve = curves(
        place, names, replace(schedule, n_steps=CURVE_STEPS if is_whole else schedule.n_steps), micro_batches
    )
    too_far = {
        name: found
        for name, found in curve["largest_difference_from_trainer"].items()
        if not found <= curve["bands"][name]
    }
    assert not too_far, f"loss curves differ: {too_far}"
    side = SideBySide(place, names, schedule, micro_batches)
    benchmark.pedantic(side.first_once, setup=side.others_once, rounds=rounds)
    rows = side.rows()
    content = {
        "what": "masked gene training from the same weights, models loaded before the clock starts; random weights",
        "geometry": "v1-10m",
        "n_cells": len(side.lengths),
        "n_tokens": int(side.lengths.sum()),
        "lengths": percentiles(side.lengths),
        "padded_share": round(1 - side.lengths.sum() / padded_tokens(side.lengths, schedule.cells_per_step), 4),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "n_steps": schedule.n_steps,
        "cells_per_step": schedule.cells_per_step,
        "dropout": DROPOUT,
        "default_attention": default_attention("v1-10m"),
        "cells_at_once_tried_cells_per_s": tried,
        "candidates": rows,
        "ratios": ratios(rows),
        "goals": GOALS,
        "curve": curve,
    }
    benchmark.extra_info.update(content["ratios"])
    print(content["ratios"], curve["largest_difference_from_trainer"])  # pytest -s shows it
    if not is_whole:
        return
    save_result(case, content)
    missed = {pair: content["ratios"][pair] for pair, goal in GOALS.items() if content["ratios"][pair] < goal}
    assert not missed, f"slower than the goal: {missed}"


def padded_tokens(lengths, cells_per_step: int) -> int:  # type: ignore[no-untyped-def]
    """Tokens and padding of whole batches."""
    return int((lengths.reshape(-1, cells_per_step).max(1) * cells_per_step).sum())
