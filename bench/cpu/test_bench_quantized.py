"""Quantized embedding beside the same model unquantized: ``pytest bench/cpu/test_bench_quantized.py -m bench``.

Writes ``bench/results/<machine>/quantized_*.json``, one per geometry, number of threads and instruction set.
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
from geneformer_kernels.target import cpu_features

from bench.cpu.embed_candidates import GEOMETRIES, SHARED, Workplace
from bench.cpu.quantized_case import HELD
from bench.machine import ROOT, save_result
from geneformer_fast.profiling.clock import percentiles

pytestmark = pytest.mark.bench

#: Against the same model in the machine's fastest dtype. Where there is no bfloat16 that is float32.
GOALS = {
    ("v1-10m", "AVX2"): {"int8 / float32": 1.25, "int8 / quantize-dynamic": 1.2},
    ("v2-104m", "AVX2"): {"int8 / float32": 1.45, "int8 / quantize-dynamic": 1.2},
    ("v1-10m", ""): {"int8 / auto": 1.0},
    ("v2-104m", ""): {"int8 / auto": 1.0},
}


@dataclass(frozen=True)
class Case:
    """A geometry, how many cells and rounds, how many threads, and whether libraries are held to AVX2."""

    geometry: str
    n_cells: int
    rounds: int
    threads: int
    is_held: bool

    @property
    def name(self) -> str:
        """The result's name."""
        return f"quantized_{self.geometry}_{self.threads}-threads{'_avx2' if self.is_held else ''}"


CASES = tuple(
    Case(geometry, n_cells, rounds, threads, is_held)
    for geometry, n_cells, rounds in (("v1-10m", 48, 5), ("v2-104m", 12, 3))
    for is_held in (False, True)
    for threads in (2, 1)
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bench_quantized(case: Case, tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("real cells are not here (shared/ beside the checkout is absent)")
    if case.is_held and not {"avx512", "avx512_bf16", "amx_bf16", "int8_dot"} & cpu_features():
        pytest.skip("this CPU has no more than AVX2: the other cases say the same")
    if case.threads > len(os.sched_getaffinity(0)):
        pytest.skip(f"fewer than {case.threads} cores")
    n_cells = int(os.environ.get("GENEFORMER_FAST_BENCH_CELLS", case.n_cells))
    rounds = int(os.environ.get("GENEFORMER_FAST_BENCH_ROUNDS", case.rounds))
    place = Workplace(tmp_path, GEOMETRIES[case.geometry], is_tame=True)
    place.prepare(n_cells)
    command = [sys.executable, "-m", "bench.cpu.quantized_case", str(tmp_path), "--geometry", case.geometry]
    options = ["--threads", str(case.threads), "--rounds", str(rounds)]
    # Without the limits of the outer environment, which would make every case the same.
    outer = {name: value for name, value in os.environ.items() if name not in HELD}
    environment = outer | (HELD if case.is_held else {})
    said = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(said.stdout.splitlines()[-1])
    lengths = np.array([len(tokens) for tokens in place.token_lists()])
    is_avx2 = case.is_held or not {"avx512_bf16", "amx_bf16", "int8_dot"} & cpu_features()
    goals = GOALS[case.geometry, "AVX2" if is_avx2 else ""]
    content = {
        "what": "token folder to embeddings (mean over genes, last layer), models loaded before the clock starts; "
        "random weights whose branches are divided by the square root of twice the number of layers",
        "geometry": case.geometry,
        "n_cells": n_cells,
        "n_tokens": int(lengths.sum()),
        "lengths": percentiles(lengths),
        "threads": case.threads,
        "rounds": rounds,
        "goals": goals,
        **found,
    }
    print(content["ratios"])
    if (n_cells, rounds) != (case.n_cells, case.rounds):
        return
    save_result(case.name, content)
    missed = {pair: content["ratios"][pair] for pair, goal in goals.items() if content["ratios"][pair] < goal}
    assert not missed, f"slower than the goal: {missed}"
