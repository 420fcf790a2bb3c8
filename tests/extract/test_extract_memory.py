"""Streaming: four times the cells, the same memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("datasets")

TOKENS_PER_CELL = 12
WIDTH = 128
# Peak resident memory, as the operating system counts it, of each of two runs in a process of their own. Not ru_maxrss,
# which cannot begin anew: a 5 in clear_refs makes the present the peak.
SCRIPT = """
import json, pathlib, sys
import torch
from geneformer_fast import Encoder, EncoderConfig, embed
torch.set_num_threads(1)
torch.manual_seed(0)
model = Encoder(EncoderConfig(1, {width}, 4, 16, 20_275, 64, vocabulary="geneformer-v2")).eval()
peaks = []
for tokens, out in zip(sys.argv[1::2], sys.argv[2::2]):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    embed(tokens, model, out, pool="mean", layer="embeddings", token_budget=16_384, progress=False)
    status = pathlib.Path("/proc/self/status").read_text()
    peaks.append(int(status.split("VmHWM:")[1].split()[0]) / 1024)
print(json.dumps(peaks))
"""


# Otherwise glibc keeps freed memory for later, which adds noise of the size of what is measured.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def token_folder(folder: Path, n_cells: int) -> Path:
    import datasets

    rng = np.random.default_rng(0)
    ids = rng.integers(4, 20_275, (n_cells, TOKENS_PER_CELL), dtype=np.int32)
    ids[:, 0], ids[:, -1] = 2, 3
    offsets = np.arange(n_cells + 1, dtype=np.int32) * TOKENS_PER_CELL
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids.reshape(-1)))
    table = pa.table({"input_ids": lists, "length": np.full(n_cells, TOKENS_PER_CELL)})
    datasets.Dataset(table).save_to_disk(str(folder))
    return folder


def peaks_mb(*places: Path) -> list[float]:
    """The peak of each run, given where its tokens lie and its result goes."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(width=WIDTH), *map(str, places)],
        capture_output=True, text=True, check=True, env={**os.environ, **MALLOC},
    )  # fmt: skip
    return json.loads(run.stdout)


@pytest.mark.parametrize("suffix", ["npy", pytest.param("arrow", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_cells(suffix: str, tmp_path: Path) -> None:
    few, many = 25_000, 100_000  # both are several windows
    # Few once more at first, so that what is loaded and kept then is in both peaks.
    runs = [(token_folder(tmp_path / f"{n}", n), n) for n in (few, many)]
    places = [place for tokens, n in (runs[0], *runs) for place in (tokens, tmp_path / f"{n}.{suffix}")]
    places[1] = tmp_path / f"first.{suffix}"
    peaks = peaks_mb(*places)[1:]
    result_mb = (many - few) * WIDTH * 4 / 2**20
    tokens_mb = (many - few) * TOKENS_PER_CELL * 4 / 2**20
    # Held in memory, the results alone would add 37 MB and the tokens 3 MB; 20 bytes per cell are expected: 1.5 MB.
    assert peaks[1] - peaks[0] < 0.35 * (result_mb + tokens_mb), f"{peaks} MB for {few} and {many} cells"
