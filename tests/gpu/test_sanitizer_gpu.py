"""Forward and backward of a small encoder under compute-sanitizer: no kernel may touch memory that is not its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
MOST_S = 240
# What it says where it cannot look at this card or this kind of machine.
UNABLE = (
    "Device not supported",
    "not supported on this",
    "Unable to",
    "Failed to initialize",
    "Internal Sanitizer Error",
)

SCRIPT = """
import torch
from geneformer_fast import Encoder, EncoderConfig, Ragged
torch.manual_seed(0)
for norm in ("post", "pre"):
    config = EncoderConfig(2, 64, 2, 96, 101, 160, norm=norm, dropout=0.1, attention_dropout=0.1)
    encoder = Encoder(config, "mlm").cuda().train()
    # Odd lengths and one token: the edges of tiles.
    tokens = Ragged.from_cells([torch.randint(2, 101, (n,)) for n in (65, 1, 33)]).to("cuda")
    rows, targets = torch.tensor([0, 7, 98], device="cuda"), torch.tensor([5, 6, 7], device="cuda")
    with torch.autocast("cuda", torch.float16):
        encoder.mlm_loss(encoder(tokens), rows, targets).backward()
    with torch.inference_mode():
        encoder.eval()(tokens)
torch.cuda.synchronize()
print("every kernel ran")
"""


def _sanitizer() -> str:
    found = shutil.which("compute-sanitizer")
    for folder in ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"):
        found = found or shutil.which("compute-sanitizer", path=folder)
    if found is None:
        pytest.skip("compute-sanitizer is not installed")
    return found


@pytest.mark.gpu
def test_memcheck_finds_nothing() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    # Every tensor is an allocation of its own, so that reading past its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [_sanitizer(), "--tool", "memcheck", "--error-exitcode", "99", sys.executable, "-c", SCRIPT]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MOST_S, cwd=ROOT)
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer took longer than {MOST_S} s")
    said = done.stdout + done.stderr
    unable = next((reason for reason in UNABLE if reason in said), None)
    if unable is not None and "Invalid __" not in said:
        pytest.skip(f"compute-sanitizer cannot look at this machine: {unable}")
    assert done.returncode == 0, said[-4000:]
    assert "every kernel ran" in said
    assert "ERROR SUMMARY: 0 errors" in said, said[-4000:]
