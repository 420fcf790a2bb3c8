"""oneDNN keeps few compiled products, however many sizes of batches there are."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from geneformer_kernels.cpu import onednn
from geneformer_kernels.target import target_of

NAMES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
GROWTH = """
import pathlib
import torch
from geneformer_kernels import linear
torch.set_num_threads(1)
weight, bias = torch.randn(768, 256).bfloat16(), torch.zeros(768).bfloat16()
def resident_mb():
    return int(pathlib.Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
with torch.inference_mode():
    for n_rows in range(300, 430):
        linear(torch.randn(n_rows, 256).bfloat16(), weight, bias)
        if n_rows == 329:
            before = resident_mb()
print(resident_mb() - before)
"""


@pytest.fixture
def _fresh(monkeypatch: pytest.MonkeyPatch):
    for name in (*NAMES, "DNNL_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    onednn.keep_few_products.cache_clear()
    yield
    onednn.keep_few_products.cache_clear()


@pytest.mark.usefixtures("_fresh")
def test_caches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:  # so that they are gone again afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    onednn.keep_few_products()
    assert all(4 <= int(os.environ[name]) <= 64 for name in NAMES)


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("name", [NAMES[0], "DNNL_PRIMITIVE_CACHE_CAPACITY"])
def test_what_a_user_asks_for_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in NAMES:
        monkeypatch.setenv(other, "")
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, "700")
    onednn.keep_few_products()
    assert os.environ[name] == "700"
    assert name == NAMES[0] or NAMES[0] not in os.environ


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_sizes() -> None:
    if not target_of("cpu").has_fast_bf16:
        pytest.skip("bfloat16 is not multiplied by oneDNN here")
    malloc = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    run = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True, env={**os.environ, **malloc}
    )
    # 100 sizes: 68 MB without a bound, 35 MB with one on oneDNN's own cache alone.
    assert float(run.stdout) < 25
