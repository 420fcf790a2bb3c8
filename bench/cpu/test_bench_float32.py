"""Embedding in float32 with AVX2 and nothing wider: ``pytest bench/cpu/test_bench_float32.py -m bench``.

Writes ``bench/results/<machine>/embed_*_avx2.json``, one per geometry and number of threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from bench.cpu.embed_candidates import GEOMETRIES, SHARED, Workplace
from bench.cpu.quantized_case import HELD
from bench.machine import ROOT, save_result
from geneformer_fast.profiling.clock import percentiles

pytestmark = pytest.mark.bench

#: Of what large matrix products reach in the same run, and against the best that stock parts give in float32.
LEAST_SHARE, GOALS = 0.75, {"float32 / stock-float32": 1.6}


@dataclass(frozen=True)
class Case:
    """A geometry, how many cells, rounds and threads."""

    geometry: str
    n_cells: int
    rounds: int
    threads: int

    @property
    def name(self) -> str:
        """The result's name."""
        return f"embed_{self.geometry}_{self.threads}-threads_avx2"


CASES = (Case("v1-10m", 48, 5, 2), Case("v1-10m", 48, 5, 1), Case("v2-104m", 12, 3, 2))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bench_float32(case: Case, tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("real cells are not here (shared/ beside the checkout is absent)")
    if case.threads > len(os.sched_getaffinity(0)):
        pytest.skip(f"fewer than {case.threads} cores")
    n_cells = int(os.environ.get("GENEFORMER_FAST_BENCH_CELLS", case.n_cells))
    rounds = int(os.environ.get("GENEFORMER_FAST_BENCH_ROUNDS", case.rounds))
    place = Workplace(tmp_path, GEOMETRIES[case.geometry], is_tame=True)
    place.prepare(n_cells)
    command = [sys.executable, "-m", "bench.cpu.float32_case", str(tmp_path), "--geometry", case.geometry]
    options = ["--threads", str(case.threads), "--rounds", str(rounds)]
    said = subprocess.run(
        [*command, *options], cwd=ROOT, env=os.environ | HELD, check=True, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(said.stdout.splitlines()[-1])
    lengths = np.array([len(tokens) for tokens in place.token_lists()])
    content = {
        "what": "token folder to embeddings (mean over genes, last layer), models loaded before the clock starts; "
        "random weights whose branches are divided by the square root of twice the number of layers",
        "geometry": case.geometry,
        "n_cells": n_cells,
        "n_tokens": int(lengths.sum()),
        "lengths": percentiles(lengths),
        "threads": case.threads,
        "rounds": rounds,
        "goals": GOALS if case == CASES[0] else {},
        "least_share": LEAST_SHARE if case == CASES[0] else 0,
        **found,
    }
    print(content["ratios"], {name: row["share_of_ceiling"] for name, row in content["candidates"].items()})
    if (n_cells, rounds) != (case.n_cells, case.rounds):
        return
    save_result(case.name, content)
    missed = {
        pair: content["ratios"][pair] for pair, goal in content["goals"].items() if content["ratios"][pair] < goal
    }
    if content["candidates"]["float32"]["share_of_ceiling"] < content["least_share"]:
        missed["share of the ceiling"] = content["candidates"]["float32"]["share_of_ceiling"]
    assert not missed, f"slower than the goal: {missed}"
