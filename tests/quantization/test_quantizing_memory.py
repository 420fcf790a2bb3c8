"""What converting and loading take of memory, as the operating system counts it, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from geneformer_fast import EncoderConfig, load
from geneformer_fast.checkpoints import hf
from geneformer_fast.checkpoints.skeleton import skeleton
from geneformer_fast.files.streaming import TensorWriter, pieces
from geneformer_fast.quantization.convert import quantize_folder

# Peak of the process, Python and all libraries with it, in MB.
CHILD = """
import json, pathlib, re, sys
def peak():  # of this program: getrusage would begin with the process that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 1024
import geneformer_fast
from geneformer_fast.quantization.convert import quantize_folder
what, small, folder, out = sys.argv[1:]
if what == "quantize":
    quantize_folder(small, out + "-small")
    before = peak()
    quantize_folder(folder, out)
else:
    geneformer_fast.load(small)
    before = peak()
    encoder = geneformer_fast.load(folder)
print(json.dumps([before, peak()]))
"""


def peaks(*arguments: object) -> tuple[float, float]:
    """Before, when all code was loaded and run on a small model, and in the end."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    before, after = json.loads(done.stdout.splitlines()[-1])
    return before, after


def write_model(folder: Path, config: EncoderConfig, n_shards: int = 1, *, as_pytorch: bool = False) -> Path:
    """A model of random weights in float32, of which no more than a few megabytes are in memory."""
    folder.mkdir()
    settings, described = hf.as_saved(skeleton(config, "mlm"))
    (folder / "config.json").write_text(json.dumps(settings))
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(1)) * 0.02
    places, suffix = {}, "bin" if as_pytorch else "safetensors"
    stem = "pytorch_model" if as_pytorch else "model"
    for i in range(n_shards):
        part = dict(list(described.items())[i::n_shards])
        name = f"{stem}.{suffix}" if n_shards == 1 else f"{stem}-{i + 1:05d}-of-{n_shards:05d}.{suffix}"
        places |= dict.fromkeys(part, name)
        if as_pytorch:
            torch.save({key: drawn(tensor.shape, noise) for key, tensor in part.items()}, folder / name)
            continue
        with TensorWriter(folder / name, part, {"format": "pt"}) as writer:
            for key, tensor in part.items():
                for start, stop in pieces(tensor):
                    writer.write(key, drawn((stop - start, *tensor.shape[1:]), noise), start)
    if n_shards > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def drawn(shape: tuple[int, ...], noise: torch.Tensor) -> torch.Tensor:
    n = torch.Size(shape).numel()
    return noise.repeat(-(-n // len(noise)))[:n].reshape(shape).clone()


def small_model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "small", EncoderConfig(1, 64, 1, 64, 100, 50))


def test_the_smallest_geneformer_is_written_in_less_than_a_third(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", EncoderConfig.preset("geneformer-v1-10m"))
    report = quantize_folder(folder, tmp_path / "out")
    before, after = ((place / "model.safetensors").stat().st_size for place in (folder, tmp_path / "out"))
    assert after < 0.3 * before
    encoder = [layer for layer in report.layers if not layer.name.startswith("head.")]
    assert sum(layer.bytes_after for layer in encoder) < 0.27 * sum(layer.bytes_before for layer in encoder)
    assert sum(tensor.nbytes for tensor in load(tmp_path / "out").state_dict().values()) < 1.01 * after


@pytest.mark.parametrize("as_pytorch", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_converting_and_loading_a_model_of_90_megabytes(tmp_path: Path, as_pytorch: bool) -> None:
    """Both rise by what is theirs: a piece and its copies, and the model in eight bits with its largest tensor."""
    config = EncoderConfig(n_layers=7, width=512, n_heads=8, ff_width=2048, vocab_size=4000, max_len=512)
    small = small_model(tmp_path)
    folder = write_model(tmp_path / "model", config, as_pytorch=as_pytorch)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    assert size > 90
    before, after = peaks("quantize", small, folder, tmp_path / "out")
    assert (
        after - before < 75
    )  # pieces of 8 MB, widened and in float64 for the noise of the weight; 32 MB of a mapped file
    before, after = peaks("load", small, tmp_path / "out", "")
    quantized = (tmp_path / "out" / "model.safetensors").stat().st_size / 2**20
    assert quantized < 0.27 * size
    assert after - before < quantized + 4000 * 512 / 2**20 + 12


@pytest.mark.slow
@pytest.mark.parametrize("as_pytorch", [False, True])
def test_the_largest_geneformer_converts_within_700_megabytes(tmp_path: Path, as_pytorch: bool) -> None:
    folder = write_model(
        tmp_path / "model", EncoderConfig.preset("geneformer-v2-316m"), n_shards=4, as_pytorch=as_pytorch
    )
    assert sum(path.stat().st_size for path in folder.iterdir()) > 1.2e9
    _, peak = peaks("quantize", small_model(tmp_path), folder, tmp_path / "out")
    assert peak < 700
    before, after = peaks("load", tmp_path / "small", tmp_path / "out", "")
    quantized = (tmp_path / "out" / "model.safetensors").stat().st_size / 2**20
    assert quantized < 0.27 * 1.27e9 / 2**20
    assert after - before < quantized + 20_275 * 1152 / 2**20 + 20
