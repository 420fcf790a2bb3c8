"""Peak memory of ``embed``: one model in float32, bfloat16 and int8, without a budget and within the smallest.

``pytest bench/cpu/test_bench_peak.py -m bench`` writes ``bench/results/<machine>/peak_*.json``. Random weights and
tokens: memory depends on neither. Cells are as long as the model takes.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.child import run_child
from bench.machine import ROOT, save_result
from bench.token_folders import token_folder

pytestmark = pytest.mark.bench

LENGTHS = (1.0, 1.0, 0.9, 0.4)  # of the longest that the model takes
#: How far apart float32 and what is compared with it may be, by the cosine of each cell's embedding.
LEAST_COSINE = 0.99
GOAL_BYTES = {"v1-10m": {"int8": 500 * 10**6}, "v2-104m": {"int8": 10**9}}

_MAKE = """
import sys
import torch
from geneformer_fast import Encoder, EncoderConfig, quantize, save
torch.manual_seed(0)
encoder = Encoder(EncoderConfig.preset(sys.argv[1])).eval()
save(encoder, sys.argv[2] + "/float32")
save(encoder.cast("bfloat16"), sys.argv[2] + "/bfloat16")
del encoder
quantize(sys.argv[2] + "/float32", sys.argv[2] + "/int8")
"""


def smallest_budget(command: list[str]) -> str:
    """What a refusal names."""
    done = subprocess.run([*command, "--memory-budget", "10MB"], capture_output=True, text=True, cwd=ROOT)
    found = re.search(r"smallest that works is (\d+ MB)", done.stderr)
    assert found is not None, done.stderr
    return found[1]


@pytest.mark.parametrize("preset", ["v1-10m", "v2-104m"])
def test_bench_peak(preset: str, tmp_path: Path) -> None:
    from geneformer_fast import EncoderConfig

    config = EncoderConfig.preset(f"geneformer-{preset}")
    subprocess.run([sys.executable, "-c", _MAKE, f"geneformer-{preset}", str(tmp_path)], check=True, cwd=ROOT)
    lengths = [int(share * config.max_len) for share in LENGTHS]
    tokens = token_folder(tmp_path / "tokens", lengths, config)
    rows: dict[str, dict[str, object]] = {}
    expected = None
    for name in ("float32", "bfloat16", "int8"):
        out = tmp_path / "cells.npy"
        options = ["--out", str(out), "--pool", "mean", "--device", "cpu", "--overwrite"]
        dtype = [] if name == "int8" else ["--dtype", name]
        model = ["--model", str(tmp_path / name), *dtype]
        command = [sys.executable, "-m", "geneformer_fast", "embed", str(tokens), *model, *options]
        free = run_child(command)
        budget = smallest_budget(command)
        within = run_child([*command, "--memory-budget", budget])
        found = np.load(out)
        expected = found if expected is None else expected
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        cosine = float(np.min((found * expected).sum(1) / norms))
        assert cosine >= LEAST_COSINE
        rows[name] = {
            "peak_bytes": free.peak_bytes,
            "smallest_budget_bytes": int(budget.split()[0]) * 10**6,
            "peak_bytes_within": within.peak_bytes,
            "weight_bytes": sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")),
            "goal_bytes": GOAL_BYTES[preset].get(name),
            "least_cosine": cosine,
        }
        assert within.peak_bytes <= int(budget.split()[0]) * 10**6
    content = {
        "what": "geneformer-fast embed, whole processes, Python and libraries included; random weights and tokens",
        "geometry": preset,
        "lengths": lengths,
        "rows": rows,
    }
    save_result(f"peak_{preset}", content)
    for row in rows.values():
        assert row["goal_bytes"] is None or row["smallest_budget_bytes"] <= row["goal_bytes"]
