"""Embedding cells: ours and the rivals side by side, with goals; the first case that ``python -m bench cpu`` runs.

``pytest bench/cpu/test_bench_embed.py -m bench`` writes ``bench/results/<machine>/embed_*.json``. The environment
variables GENEFORMER_FAST_BENCH_CELLS and GENEFORMER_FAST_BENCH_ROUNDS make it smaller; nothing is written then, no goal
held.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.cpu.embed_candidates import CANDIDATES, GEOMETRIES, SHARED, Workplace
from bench.cpu.embed_case import SideBySide, default_attention, ratios, tuned_batch_sizes
from bench.machine import save_result
from geneformer_fast import EncoderConfig
from geneformer_fast.profiling.clock import percentiles
from geneformer_fast.profiling.flops.work import encoder_flops

pytestmark = pytest.mark.bench

GOALS = {"ours / extractor": 10, "ours / stock-bfloat16": 2.5}


@dataclass(frozen=True)
class Case:
    """A geometry, how many cells and rounds, and how many threads (None: all cores)."""

    geometry: str
    n_cells: int
    rounds: int
    threads: int | None
    names: tuple[str, ...] = (*CANDIDATES,)

    @property
    def name(self) -> str:
        """The result's name."""
        return f"embed_{self.geometry}_{self.threads or 'all'}-threads"


CASES = (
    Case("v1-10m", 160, 3, None),
    Case("v1-10m", 80, 3, 1, ("ours", "ours-last", "extractor-tuned", "stock-bfloat16")),
    Case("v2-104m", 32, 3, None, ("ours", "ours-last", "extractor-tuned", "stock-bfloat16")),
)


@pytest.fixture
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """As many threads as the case says, in torch and numba."""
    import numba

    before = torch.get_num_threads(), numba.get_num_threads()
    case = request.getfixturevalue("case")
    count = case.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bench_embed(case: Case, benchmark, ceilings, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    if not SHARED.is_dir():
        pytest.skip("real cells are not here (shared/ beside the checkout is absent)")
    n_cells = int(os.environ.get("GENEFORMER_FAST_BENCH_CELLS", case.n_cells))
    rounds = int(os.environ.get("GENEFORMER_FAST_BENCH_ROUNDS", case.rounds))
    place = Workplace(tmp_path, GEOMETRIES[case.geometry])
    place.prepare(n_cells)
    batch_sizes, tried = tuned_batch_sizes(place, case.names)
    side = SideBySide(place, case.names, batch_sizes)
    benchmark.pedantic(side.first_once, setup=side.others_once, rounds=rounds)
    side.seconds[case.names[0]] = list(benchmark.stats.stats.data)
    rows = side.rows()
    lengths = np.array([len(tokens) for tokens in side.cells])
    config = EncoderConfig.preset(f"geneformer-{case.geometry}")
    for row in rows.values():
        n_layers = config.n_layers - (row["layer"] == "penultimate")
        flops = encoder_flops(config, lengths.sum(), (lengths**2).sum(), n_layers)
        row["tflops"] = float(f"{flops / row['seconds']['p50'] / 1e12:.4g}")
    content = {
        "what": "token folder to embeddings (mean over genes), models loaded before the clock starts; random weights",
        "geometry": case.geometry,
        "n_cells": n_cells,
        "n_tokens": int(lengths.sum()),
        "lengths": percentiles(lengths),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "default_attention": default_attention(case.geometry),
        "batch_sizes_tried_cells_per_s": tried,
        "ceilings": ceilings,
        "candidates": rows,
        "ratios": ratios(rows),
        "goals": GOALS if case.geometry == "v1-10m" and case.threads is None else {},
    }
    benchmark.extra_info.update(content["ratios"])
    print(content["ratios"])  # pytest -s shows it, also where nothing is written
    if (n_cells, rounds) != (case.n_cells, case.rounds):
        return
    save_result(case.name, content)
    missed = {
        pair: content["ratios"][pair] for pair, goal in content["goals"].items() if content["ratios"][pair] < goal
    }
    assert not missed, f"slower than the goal: {missed}"
