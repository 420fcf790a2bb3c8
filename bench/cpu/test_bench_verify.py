"""What checksums cost: making and reading token folders, and loading models, with and without them, in turns.

``pytest bench/cpu/test_bench_verify.py -m bench`` writes ``bench/results/<machine>/verify_*.json``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.machine import ROOT, save_result
from bench.tile import tile_h5ad
from geneformer_fast.profiling.clock import WallClock

pytestmark = pytest.mark.bench

CELLS, ROUNDS = 100_000, 9


@pytest.fixture(scope="module")
def data() -> Path:
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("real cells are not here (shared/ beside the checkout is absent)")
    return path


def in_turns(candidates: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Seconds per candidate; they take turns, so that noise hits all alike. The first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(ROUNDS + 1):
        for name, run in candidates.items():
            (ms,) = WallClock().samples(run, 1)
            if number:
                seconds[name].append(ms / 1e3)
    return {
        name: {"min": min(times), "median": float(np.median(times)), "max": max(times)}
        for name, times in seconds.items()
    }


def sum_up(case: str, what: str, n_bytes: int, times: dict[str, dict[str, float]]) -> None:
    ratio = times["with"]["median"] / times["without"]["median"]
    print(f"{case}: {times['without']['median']:.3f} s without, {times['with']['median']:.3f} s with: {ratio:.2f}")
    save_result(case, {"what": what, "n_bytes": n_bytes, "wall_s": times, "ratio": ratio})


def test_bench_verify_tokenize(data, tmp_path, monkeypatch):
    """The pass with and without the SHA-256 of its shards."""
    from geneformer_fast.tokenization.run import tokenize
    from geneformer_fast.tokenization.shards import ShardWriter
    from geneformer_fast.tokenization.vocabulary import Vocabulary

    path = tile_h5ad(data / "pbmc_facs/pbmc_facs.h5ad", tmp_path / "cells.h5ad", n_cells=CELLS)
    vocabulary, hashed = Vocabulary.from_folder(data / "dicts", "v2"), ShardWriter.digest_written

    def run(digest):
        monkeypatch.setattr(ShardWriter, "digest_written", digest)
        tokenize(path, tmp_path / "out", dictionary=vocabulary, overwrite=True, progress=False, shard_bytes=2**25)

    times = in_turns({"without": lambda: run(lambda shard: None), "with": lambda: run(hashed)})
    n_bytes = sum(shard.stat().st_size for shard in (tmp_path / "out").glob("data-*.arrow"))
    sum_up("verify_tokenize", "100,000 cells of pbmc_facs, tiled, to a token folder", n_bytes, times)


def test_bench_verify_tokens(data, tmp_path):
    """A folder opened and read once, from the page cache: what is dearest, since a disk is slower than SHA-256."""
    from geneformer_fast.tokenization.arrow import open_tokens
    from geneformer_fast.tokenization.run import tokenize

    path = tile_h5ad(data / "pbmc_facs/pbmc_facs.h5ad", tmp_path / "cells.h5ad", n_cells=CELLS)
    tokens = tokenize(path, tmp_path / "out", dictionary=data / "dicts", preset="v2", progress=False)

    def read(verify):
        with open_tokens(tmp_path / "out", verify=verify) as folder:
            for values, _ in folder.batches():
                assert len(values)

    times = in_turns({"without": lambda: read(False), "with": lambda: read(True)})
    n_bytes = sum(shard.stat().st_size for shard in (tmp_path / "out").glob("data-*.arrow"))
    sum_up("verify_tokens", f"opening a folder of {tokens.n_cells:,} cells and reading all", n_bytes, times)


@pytest.mark.parametrize("preset", ["geneformer-v1-10m", "geneformer-v2-104m"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_bench_verify_model(preset, file, tmp_path):
    """Loading a model from the page cache."""
    import torch
    from safetensors.torch import load_file

    from geneformer_fast import Encoder, EncoderConfig, load, save

    folder = save(Encoder(EncoderConfig.preset(preset), "mlm"), tmp_path / "model")
    if file == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), folder / file)
        (folder / "model.safetensors").unlink()
    times = in_turns(
        {
            "without": lambda: load(folder, device="cpu", verify=False),
            "with": lambda: load(folder, device="cpu", verify=True),
        }
    )
    n_bytes = (folder / file).stat().st_size
    kind = "bin" if file.endswith("bin") else "safetensors"
    sum_up(f"verify_{preset.removeprefix('geneformer-')}_{kind}", f"loading {file} of {preset}", n_bytes, times)
    shutil.rmtree(folder)
