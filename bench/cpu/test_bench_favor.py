"""Linear attention of scBERT's size by length: ours, the published formula, and softmax; then the whole encoder.

``pytest bench/cpu/test_bench_favor.py -m bench`` writes ``bench/results/<machine>/favor_attention.json``. Every number
is of a process of its own. Memory is the peak beyond what there was before the first call.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

from bench.child import run_child
from bench.cpu.favor_case import WAYS
from bench.machine import save_result
from geneformer_fast.profiling.clock import percentiles

pytestmark = pytest.mark.bench

LENGTHS = (2_113, 4_227, 8_453, 16_907)
ROUNDS = 5
#: Of ours between two lengths, one twice the other: memory and time may grow by so much.
MOST_GROWTH = 2.6
#: At scBERT's length, by time and by memory.
GOALS = {"plain": (1.2, 10.0), "softmax": (3.0, 0.0)}


def test_bench_favor(tmp_path: Path) -> None:
    rows: dict[str, dict[str, object]] = {}
    for length in LENGTHS:
        for name in WAYS:
            path = tmp_path / "found.json"
            run = run_child([sys.executable, "-m", "bench.cpu.favor_case", name, str(length), str(ROUNDS), str(path)])
            found = json.loads(path.read_text())
            rows[f"{name} {length}"] = {
                "seconds": percentiles(found["seconds"]),
                "peak_bytes": run.peak_bytes - found["bytes_before"],
            }
    of = {key: (row["seconds"]["p50"], row["peak_bytes"]) for key, row in rows.items()}
    last = LENGTHS[-1]
    ratios = {
        name: {"time": of[f"{name} {last}"][0] / of[f"ours {last}"][0],
               "memory": of[f"{name} {last}"][1] / max(of[f"ours {last}"][1], 1)}
        for name in ("plain", "softmax")
    }  # fmt: skip
    save_result("favor_attention", {"rows": rows, "ratios": ratios})
    for name in ("ours", "encoder"):
        for short, long in itertools.pairwise(LENGTHS):
            slower, larger = (of[f"{name} {long}"][i] / of[f"{name} {short}"][i] for i in range(2))
            assert slower < MOST_GROWTH, (name, long, slower)
            assert larger < MOST_GROWTH, (name, long, larger)
    for name, (time_goal, memory_goal) in GOALS.items():
        assert ratios[name]["time"] >= time_goal, ratios
        assert ratios[name]["memory"] >= memory_goal, ratios
