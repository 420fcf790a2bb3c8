"""Tokenization against the rival, ranking alone, and peak memory; no number without an equality check in the same run.

``pytest bench/cpu/test_bench_tokenize.py -m bench`` writes ``bench/results/<machine>/*.json``. Files are tiled from
real cells in a temporary folder, or in the one that GENEFORMER_FAST_BENCH_DATA names, which keeps them for the next.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bench.child import run_child
from bench.machine import ROOT, save_result
from bench.tile import tile_h5ad

pytestmark = pytest.mark.bench

CELLS = 100_000
# The rival's time is a fixed part plus so much per cell; it is measured at two sizes, both of whole tiles.
RIVAL_CELLS = (3_774, 18_870)
GOAL_RATIO = {"v1": 25, "v2": 200}
GOAL_TOKENS_PER_S = 60e6
MILLION = 1_000_000
GOAL_PEAK_BYTES = 10**9


@pytest.fixture(scope="module")
def data() -> Path:
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("real cells are not here (shared/ beside the checkout is absent)")
    return path


@pytest.fixture(scope="module")
def tiles(data, tmp_path_factory):
    """n_cells -> a tiled file of pbmc_facs."""
    kept = os.environ.get("GENEFORMER_FAST_BENCH_DATA")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("tiles")
    folder.mkdir(parents=True, exist_ok=True)

    def tiled(n_cells):
        return tile_h5ad(data / "pbmc_facs/pbmc_facs.h5ad", folder / f"pbmc_facs_{n_cells}.h5ad", n_cells=n_cells)

    return tiled


def _clocked(call):
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def _rival_times(tiles, vocabulary, out):
    """The rival at both sizes, and its tokens compared with ours."""
    from bench.cpu.tokenize_rival import tokenize_per_cell
    from geneformer_fast.tokenization.arrow import open_tokens
    from geneformer_fast.tokenization.run import tokenize

    rows = []
    for n_cells in RIVAL_CELLS:
        path = tiles(n_cells)
        found = _clocked(lambda path=path: tokenize_per_cell(path, out / "rival", vocabulary))
        ours = tokenize(path, out / "ours", dictionary=vocabulary)
        theirs = open_tokens(out / "rival")
        assert ours.n_cells == theirs.n_cells == n_cells
        for a, b in zip(ours.read(range(n_cells)), theirs.read(range(n_cells)), strict=True):
            np.testing.assert_array_equal(a, b)
        shutil.rmtree(out)
        rows.append({"n_cells": n_cells, **found})
    return rows


def _at(rows, n_cells, clock):
    """A line through the two sizes; it never goes through less than no fixed cost."""
    (n1, t1), (n2, t2) = ((row["n_cells"], row[clock]) for row in rows)
    per_cell = (t2 - t1) / (n2 - n1)
    return max(t2 - per_cell * n2, 0.0) + per_cell * n_cells


@pytest.mark.parametrize("preset", ["v1", "v2"])
def test_bench_tokenize(preset, benchmark, tiles, data, tmp_path):
    """Counts file to token folder, dictionaries included for us, not for the rival."""
    from geneformer_fast.tokenization.run import tokenize
    from geneformer_fast.tokenization.vocabulary import Vocabulary

    path = tiles(CELLS)
    arguments = ["tokenize", str(path), "--out", str(tmp_path / "fresh"), "--dictionary", str(data / "dicts")]
    fresh = run_child([sys.executable, "-m", "geneformer_fast", *arguments, "--preset", preset, "--quiet"])
    rival = _rival_times(tiles, Vocabulary.from_folder(data / "dicts", preset), tmp_path / "compared")
    runs = []

    def ours():
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        runs.append(_clocked(lambda: tokenize(path, tmp_path / "out", dictionary=data / "dicts", preset=preset)))

    benchmark.pedantic(ours, rounds=7, warmup_rounds=1)
    tokens = tokenize(path, tmp_path / "out", dictionary=data / "dicts", preset=preset, resume=True)
    walls = np.array([run["wall_s"] for run in runs[1:]])
    median_s = float(np.median(walls))
    expected = {clock: _at(rival, tokens.n_cells, clock) for clock in ("wall_s", "cpu_s")}
    content = {
        "what": "pbmc_facs tiled, uncompressed CSR .h5ad to a token folder, all cores; everything after imports",
        "n_cells": tokens.n_cells,
        "n_tokens": tokens.n_tokens,
        "ours": {
            "wall_s": {"min": float(walls.min()), "median": median_s, "max": float(walls.max())},
            "cpu_s": float(np.median([run["cpu_s"] for run in runs[1:]])),
            "fresh_process": {"wall_s": fresh.wall_s, "cpu_s": fresh.cpu_s, "peak_bytes": fresh.peak_bytes},
            "cells_per_s": tokens.n_cells / median_s,
        },
        "rival": {
            "what": "one cell after another as the official tool works, tokenize_rival.py; dictionaries for free",
            "measured": rival,
            "at_n_cells": expected,
            "how": "a line through the two measured sizes",
        },
        "ratio": expected["wall_s"] / median_s,
        "goal": GOAL_RATIO[preset],
    }
    save_result(f"tokenize_{preset}", content)
    assert content["ratio"] >= GOAL_RATIO[preset]


@pytest.mark.parametrize("preset", ["v1", "v2"])
@pytest.mark.parametrize("name", ["pbmc_facs", "pbmc3k", "mix_celseq2_5cl"])
def test_bench_rank(name, preset, benchmark, data):
    """Ranking alone, one thread, on cells in memory; the tokens are the official ones."""
    import pyarrow.parquet as pq
    from geneformer_kernels.ops.rank_genes.host import rank_block

    from geneformer_fast.tokenization import inputs
    from geneformer_fast.tokenization.vocabulary import Vocabulary

    vocabulary = Vocabulary.from_folder(data / "dicts", preset)
    options = inputs.ReadOptions()
    prepared = inputs.prepare([data / f"{name}/{name}.h5ad"], vocabulary, options)
    tasks = list(inputs.tasks(prepared, options, {}, rows=1024))
    specials = {"first": vocabulary.cls_id, "last": vocabulary.eos_id} if vocabulary.layout.is_framed else {}

    def rank():
        return [
            rank_block(
                task.block.indptr, task.block.indices, task.block.data, task.n_counts, task.prepared.columns,
                is_division=False, keep=vocabulary.gene_capacity, out_dtype=vocabulary.input_ids_dtype,
                is_checked=True, **specials,
            )[0]
            for task in tasks
        ]  # fmt: skip

    values = np.concatenate(benchmark.pedantic(rank, rounds=15, warmup_rounds=2))
    want = pq.read_table(data / f"reference_official/{name}__{preset.upper()}.parquet")["input_ids"].combine_chunks()
    np.testing.assert_array_equal(values, want.values.to_numpy())
    n_entries = sum(len(task.block.data) for task in tasks)
    seconds = benchmark.stats.stats.min
    content = {
        "what": f"ranking {name}, one thread, from CSR blocks in memory to packed tokens; best of 15",
        "n_tokens": len(values),
        "n_entries": n_entries,
        "wall_s": {"min": seconds, "median": benchmark.stats.stats.median, "max": benchmark.stats.stats.max},
        "tokens_per_s": len(values) / seconds,
        "entries_per_s": n_entries / seconds,
        "goal": GOAL_TOKENS_PER_S,
    }
    save_result(f"rank_genes_{name}_{preset}", content)
    assert content["tokens_per_s"] >= GOAL_TOKENS_PER_S


@pytest.mark.parametrize("command", ["tokenize", "medians"])
def test_bench_peak_memory(command, tiles, data, tmp_path):
    """A million cells in a process of their own; the operating system's figure."""
    path = tiles(MILLION)
    arguments = [command, str(path), "--out", str(tmp_path / "out"), "--quiet"]
    if command == "tokenize":
        arguments += ["--dictionary", str(data / "dicts"), "--preset", "v2", "--obs", "celltype"]
    small = [str(tiles(10_000)) if argument == str(path) else argument for argument in arguments]
    rows = {}
    for n_cells, given in ((10_000, [*small, "--overwrite"]), (MILLION, [*arguments, "--overwrite"])):
        found = run_child([sys.executable, "-m", "geneformer_fast", *given])
        rows[str(n_cells)] = found._asdict()
    content = {
        "what": f"geneformer-fast {command} on pbmc_facs tiled; whole processes, start and imports included",
        "by_n_cells": rows,
        "goal_peak_bytes": GOAL_PEAK_BYTES,
    }
    save_result(f"memory_{command}", content)
    assert rows[str(MILLION)]["peak_bytes"] < GOAL_PEAK_BYTES
