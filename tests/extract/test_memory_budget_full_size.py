"""Quantized models of published sizes, with random weights, embed their longest cells within budgets of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.child import run_child
from geneformer_fast.extract.sizes import size_in_bytes

pytest.importorskip("datasets")
pytestmark = pytest.mark.slow

V2_TOKENS = 20_275
MAKE = """
import sys
import torch
from geneformer_fast import Encoder, EncoderConfig, quantize, save
torch.manual_seed(0)
save(Encoder(EncoderConfig.preset(sys.argv[1])).eval().cast("bfloat16"), sys.argv[2])
quantize(sys.argv[2], sys.argv[3])
"""


def token_folder(folder: Path, n_tokens: int, lengths: list[int]) -> Path:
    import datasets
    import pyarrow as pa

    ids = np.random.default_rng(0).integers(4, n_tokens, sum(lengths), dtype=np.int32)
    bounds = np.cumsum([0, *lengths], dtype=np.int32)
    if n_tokens == V2_TOKENS:  # cells of V2 begin with CLS and end with EOS
        ids[bounds[:-1]], ids[bounds[1:] - 1] = 2, 3
    lists = pa.ListArray.from_arrays(pa.array(bounds), pa.array(ids))
    datasets.Dataset(pa.table({"input_ids": lists, "length": np.array(lengths)})).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize(
    ("preset", "n_tokens", "longest", "budget"),
    [
        ("geneformer-v1-10m", 25_426, 2048, "500MB"),
        ("geneformer-v2-104m", V2_TOKENS, 4096, "1GB"),
        ("geneformer-v2-316m", V2_TOKENS, 4096, "2GB"),
    ],
)
def test_a_published_size_embeds_its_longest_cells(
    preset: str, n_tokens: int, longest: int, budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([sys.executable, "-c", MAKE, preset, str(tmp_path / "wide"), str(tmp_path / "model")], check=True)
    tokens = token_folder(tmp_path / "tokens", n_tokens, [longest, longest, longest - 7, 900, 31])
    out = tmp_path / "cells.npy"
    options = ["--out", str(out), "--pool", "mean", "--device", "cpu", "--overwrite"]
    command = ["-m", "geneformer_fast", "embed", str(tokens), "--model", str(tmp_path / "model"), *options]
    # The first run is that on a machine that has compiled no loop yet.
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "compiled"))
    for _ in range(2):
        run = run_child([sys.executable, *command, "--memory-budget", budget])
        assert run.peak_bytes <= size_in_bytes(budget)
        assert np.isfinite(np.load(out)).all()
