"""Budgets of memory in processes of their own: what one takes at its peak, and what it lets go of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toys
from geneformer_kernels.target import target_of

from geneformer_fast import quantize, save, tokenize
from geneformer_fast.extract.memory import _code_as_in_files
from geneformer_fast.extract.sizes import size_in_bytes

MB = 10**6

# Asks for far too little, then for what the refusal names, in a process that has done nothing else.
CHILD = """
import json, pathlib, re, sys
import torch
torch.set_num_threads(2)
from geneformer_fast import embed
from geneformer_fast.errors import UnsupportedError
def run(budget):
    embed(sys.argv[1], sys.argv[2], sys.argv[3], dtype="float32", device="cpu", memory_budget=budget, progress=False)
try:
    run("50MB")
except UnsupportedError as error:
    said = str(error)
is_clean = not pathlib.Path(sys.argv[3]).parent.exists()
smallest = re.search(r"smallest that works is (\\d+ MB)", said)[1]
run(smallest)
status = pathlib.Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
names = ("numba", "scipy", "pandas", "anndata", "datasets", "triton", "sympy", "torch._dynamo", "matplotlib", "sklearn")
loaded = [name for name in names if name in sys.modules]
print(json.dumps({"smallest": smallest, "peak": peak, "loaded": loaded, "is_clean": is_clean}))
"""


# All loops of int8 are compiled for half a minute. What a batch of fp8 takes is tested above, and in
# kernels/test_operators.py that it is multiplied without them.
@pytest.mark.parametrize("scheme", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8", "fp8"))])
def test_the_process_stays_below_the_smallest_budget_and_loads_what_it_needs(
    scheme: str | None, tmp_path: Path
) -> None:
    words = toys.vocabulary()
    tokenize(toys.cells(60), tmp_path / "tokens", dictionary=words)
    model = toys.encoder(words, width=512, n_heads=8, ff_width=2048)
    save(model if scheme is None else quantize(model, scheme=scheme), tmp_path / "model")
    places = [str(tmp_path / name) for name in ("tokens", "model", "new/cells.npy")]
    # As on a machine that has compiled nothing yet.
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "compiled")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD.replace("\\\\d", "\\d"), *places],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    # Compiled loops, of integers or of float32 on AVX2, need numba (which loads scipy); nothing needs torch's compiler.
    by_loops = scheme == "int8" or (scheme is None and target_of("cpu").prefers_float32_loops)
    assert set(said["loaded"]) <= ({"numba", "scipy"} if by_loops else set())
    assert said["is_clean"]
    assert 200 * MB < said["peak"] <= size_in_bytes(said["smallest"])
    # What is set aside is no more than it has to be.
    assert said["peak"] > 0.85 * size_in_bytes(said["smallest"])
    assert said["peak"] < 500 * MB
    assert np.isfinite(np.load(tmp_path / "new" / "cells.npy")).all()


# A library's code is let go of, and taken back, in a process of its own: another thread computes meanwhile.
SETTLING = """
import json, pathlib, threading
import torch
from geneformer_fast.extract.memory import ProcessMemory
def of_files():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) * 1024
x, stop, sums = torch.randn(300, 300), threading.Event(), []
def compute():
    while not stop.is_set():
        sums.append(float((x @ x).sum()))
thread = threading.Thread(target=compute)
thread.start()
memory, found = ProcessMemory(), []
for _ in range(5):
    before = of_files()
    memory.settle()
    found.append((before, of_files()))
torch.linalg.svd(x)
stop.set()
thread.join()
print(json.dumps({"found": found, "sums": len(set(sums)), "last": float((x @ x).sum()) == sums[0]}))
"""


def test_code_that_was_needed_to_start_leaves_memory() -> None:
    done = subprocess.run([sys.executable, "-c", SETTLING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    before, after = said["found"][0]
    assert after < before - 30 * MB
    assert said["sums"] == 1
    assert said["last"]


MAPS = """\
400000-500000 r-xp 00000000 08:01 77                  /usr/bin/python3.12
Rss:                 900 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
500000-600000 r--p 00100000 08:01 77                  /usr/bin/python3.12
Anonymous:             0 kB
600000-700000 rw-p 00200000 08:01 77                  /usr/bin/python3.12
Anonymous:             0 kB
7f0000000000-7f0000100000 r-xp 00000000 08:01 78      /opt/my libraries: new/libone.so (deleted)
Anonymous:             0 kB
7f0000100000-7f0000200000 r-xp 00000000 08:01 79      /usr/lib/libpatched.so
Anonymous:             4 kB
7f0000200000-7f0000300000 r-xp 00000000 00:00 0
Anonymous:             0 kB
7f0000300000-7f0000400000 r-xs 00000000 08:01 80      /memfd:shared
Anonymous:             0 kB
7ffd00000000-7ffd00002000 r-xp 00000000 00:00 0       [vdso]
Anonymous:             0 kB
"""


def test_only_code_that_lies_in_files_unchanged_is_let_go_of() -> None:
    assert _code_as_in_files(MAPS) == [(0x400000, 0x500000), (0x7F0000000000, 0x7F0000100000)]
