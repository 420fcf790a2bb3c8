"""Budgets of memory: sizes, plans, what a batch takes, refusals, and a run in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from geneformer_kernels.cpu.float32_products import BLOCK_ROWS
from geneformer_kernels.cpu.int8_products import instruction_set
from geneformer_kernels.dispatch import use_impl
from geneformer_kernels.target import target_of
from torch.profiler import ProfilerActivity, profile

from geneformer_fast import Encoder, EncoderConfig, Ragged, embed, quantize, save, tokenize
from geneformer_fast.cli import main
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.extract import budget as budgets
from geneformer_fast.extract import encoding
from geneformer_fast.extract.budget import MemoryBudget, Need, Plan, plan, smallest_budget, token_bytes
from geneformer_fast.extract.memory import CardMemory, _code_as_in_files, memory_of
from geneformer_fast.extract.sizes import in_mb, size_in_bytes
from geneformer_fast.layers import QuantizedLinear

MB = 10**6
NEED = Need(fixed=300 * MB, peak=310 * MB, token=20_000, batch=8 * MB, cell=40_000, result=0, longest=4096, n_cells=900)
MARGIN = 16 << 20


@pytest.mark.parametrize(
    ("size", "n_bytes"),
    [
        ("2GB", 2 * 10**9), ("1.5GiB", 3 * 2**29), ("500MB", 500 * MB), (" 500 mb ", 500 * MB), ("64KiB", 65_536),
        ("0.1TB", 10**11), ("700000000", 700 * MB), ("700000000B", 700 * MB), (700 * MB, 700 * MB), ("0.3GB", 300 * MB),
    ],
)  # fmt: skip
def test_sizes(size: str | int, n_bytes: int) -> None:
    assert size_in_bytes(size) == n_bytes


@pytest.mark.parametrize(
    "size",
    [
        *(
            "",
            "GB",
            "2G",
            "2 GBs",
            "-2GB",
            "1.5.3GB",
            "2GB 3",
            "1e9",
            "nan",
            "inf",
            "0",
            "0MB",
            "0.1",
            "2,000MB",
            "²GB",
        ),
        *("0x10", "１GB", "2GiBB", 0, -5),
    ],
)
def test_what_is_no_size_is_refused(size: str | int) -> None:
    with pytest.raises(UnsupportedError, match=r"memory_budget .*2GB, 1.5GiB or 500MB.*not " + re.escape(repr(size))):
        size_in_bytes(size)


def test_a_size_that_is_said_can_be_given_back() -> None:
    for n_bytes in (1, MB - 1, MB, 401_234_567):
        assert n_bytes <= size_in_bytes(in_mb(n_bytes)) < n_bytes + MB


def taken(found: Plan, need: Need) -> int:
    """The most a run takes under a plan."""
    tokens = max(found.token_budget, need.longest)
    batches = found.workers * (need.batch + tokens * need.token)
    return need.fixed + need.result + min(found.window_cells, need.n_cells) * need.cell + batches


def test_plans_fit_and_the_smallest_budget_is_the_smallest() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        fixed, token, batch, cell, result, longest, n_cells = (
            int(10 ** rng.uniform(*span)) for span in ((8, 9), (2, 5), (6, 8), (1, 5), (0, 9), (1, 3.7), (0, 6))
        )
        need = Need(fixed, int(fixed * rng.uniform(1, 1.5)), token, batch, cell, result, longest, n_cells)
        least, wishes = smallest_budget(need, MARGIN), dict(tokens=8192, workers=8, window_cells=8192)
        assert plan(least - 1, need, MARGIN, **wishes) is None
        before = Plan(0, 0, 0)
        for limit in (least, least + 1, int(least * 1.1), 2 * least, 100 * least):
            found = plan(limit, need, MARGIN, **wishes)
            assert found is not None
            assert 1 <= found.token_budget <= 8192
            assert 1 <= found.workers <= 8
            assert 1 <= found.window_cells <= 8192
            assert taken(found, need) <= limit - MARGIN
            assert found.workers >= before.workers
            before = found


def test_a_large_budget_changes_nothing() -> None:
    assert plan(10**12, NEED, MARGIN, tokens=4096, workers=8, window_cells=8192) == Plan(4096, 8, 8192)
    assert plan(10**12, replace(NEED, cell=0), MARGIN, tokens=131_072, workers=1, window_cells=8192) == Plan(
        131_072, 1, 8192
    )


def peak_of_a_batch(model: Encoder, lengths: list[int]) -> int:
    """Most bytes of tensors that a batch has at once, as torch's own allocator counts them."""
    rng = np.random.default_rng(0)
    high = model.config.vocab_size
    tokens = Ragged.from_cells([torch.from_numpy(rng.integers(4, high, length)) for length in lengths])
    with torch.inference_mode():
        model(tokens)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            model(tokens)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(live.max(initial=0))


BASE = EncoderConfig(n_layers=2, width=128, n_heads=2, ff_width=256, vocab_size=500, max_len=700)
LENGTHS = [160, 90, 6]


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, "float32"),
        ({"ff_width": 512}, "float32"),
        ({"activation": "gelu", "ff_width": 512}, "float32"),
        ({"activation": "swiglu", "ff_width": 512, "norm": "pre", "final_norm": True}, "float32"),
        ({"ff_width": 512}, "bfloat16"),
        ({}, "float64"),
    ],
)
def test_tokens_take_what_the_formula_says(changes: dict, dtype: str) -> None:
    model = Encoder(replace(BASE, **changes)).eval().cast(dtype)
    found, said = peak_of_a_batch(model, LENGTHS), sum(LENGTHS) * token_bytes(model)
    laid_out = 0 if dtype != "bfloat16" else 2 * model.config.width * model.config.ff_width  # anew, by oneDNN
    by_loops = dtype == "float32" and target_of("cpu").prefers_float32_loops
    # Loops have the hidden units of a block of rows, in every thread, and none of all tokens.
    blocks = torch.get_num_threads() * BLOCK_ROWS * 4 * (model.config.ff_width * 2 + 3 * model.config.width)
    assert found <= said + laid_out + (blocks if by_loops else 0)
    assert said <= (2 if by_loops else 1.2) * found


NARROW = replace(BASE, ff_width=512, activation="gelu")
LONG = [640, 360, 24]
# Whatever the tokens: a weight laid out for a product with a block of rows and its sums, and a weight in float32.
BUFFERS, WIDENED = 300_000, 4 * 2 * 512 * BASE.width


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_that_compiled_loops_multiply_take_what_the_formula_says(activation: str, dtype: str) -> None:
    if instruction_set() is None:
        pytest.skip("this CPU has no instructions for products of int8")
    model = quantize(Encoder(replace(NARROW, activation=activation)).eval(), scheme="int8").cast(dtype)
    for layer in every_linear(model):
        layer.mode = "dynamic"
    found, said = peak_of_a_batch(model, LONG), sum(LONG) * token_bytes(model)
    assert found <= said + BUFFERS
    # Attention of float16 is torch's, whose moments are others.
    assert said <= (2 if dtype == "float16" else 1.3) * found


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("kept", ["up", "down", "qkv"])
def test_a_layer_kept_in_floats_has_its_hidden_units_counted(activation: str, kept: str) -> None:
    if instruction_set() is None:
        pytest.skip("this CPU has no instructions for products of int8")
    model = quantize(Encoder(replace(NARROW, activation=activation)).eval(), scheme="int8")
    for block in model.blocks:
        for name in ("qkv", "out", "up", "down"):
            getattr(block, name).mode = "weight_only" if name == kept else "dynamic"
    found, said = peak_of_a_batch(model, LONG), sum(LONG) * token_bytes(model)
    assert said / 2 <= found <= said + BUFFERS + WIDENED


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("scheme", ["int8", "int8-weights", "fp8"])
def test_tokens_of_a_model_multiplied_by_torch_take_no_more_than_the_formula_says(scheme: str, activation: str) -> None:
    model = quantize(Encoder(replace(NARROW, activation=activation)).eval(), scheme=scheme)
    for layer in every_linear(model):
        layer.mode = "dynamic"
    with use_impl("torch"):
        said = sum(LENGTHS) * token_bytes(model)
        assert said / 6 <= peak_of_a_batch(model, LENGTHS) <= said + WIDENED


def every_linear(model: Encoder) -> Iterator[QuantizedLinear]:
    return (layer for layer in model.blocks.modules() if isinstance(layer, QuantizedLinear))


class Counted:
    """Memory whose figures are set by a test."""

    owner, margin = "this test", MARGIN

    def __init__(self, used: int = 300 * MB, peak: int = 310 * MB) -> None:
        self.now, self.most = used, peak

    def used(self) -> int:
        return self.now

    def peak(self) -> int:
        return self.most

    def settle(self) -> None:
        self.now -= 1

    @contextlib.contextmanager
    def within(self, limit: int) -> Iterator[None]:
        yield


def budget(limit: int, memory: Counted | None = None) -> MemoryBudget:
    found = MemoryBudget(limit, memory or Counted())
    found.plan(NEED, tokens=4096, workers=2, window_cells=64)
    return found


def test_too_small_a_budget_says_which_one_is_not() -> None:
    with pytest.raises(UnsupportedError) as refused:
        budget(200 * MB)
    text = str(refused.value)
    assert "memory_budget 200 MB (--memory-budget) is too small: this test takes 300 MB" in text
    assert "a batch of 4,096 tokens" in text
    smallest = re.search(r"the smallest that works is (\d+ MB)", text)
    assert smallest is not None
    limit = size_in_bytes(smallest[1])
    budget(limit)
    with pytest.raises(UnsupportedError):
        budget(limit - MB)


def test_what_was_taken_before_counts() -> None:
    # With some room: the next run's start is not the same to the megabyte.
    with pytest.raises(UnsupportedError, match="the smallest that works is 915 MB"):
        MemoryBudget(899 * MB, Counted()).plan(replace(NEED, peak=900 * MB), tokens=1, workers=1, window_cells=64)


def test_a_batch_waits_until_there_is_room() -> None:
    held = budget(smallest_budget(NEED, MARGIN))
    order, is_in = [], threading.Event()

    def second() -> None:
        is_in.wait()
        with held.batch(4096):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with held.batch(4096):
        is_in.set()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_batches_that_fit_go_on_together() -> None:
    held = budget(10 * smallest_budget(NEED, MARGIN))
    with held.batch(4096), held.batch(4096):
        pass


def test_a_run_stops_before_it_passes_its_budget() -> None:
    memory = Counted()
    held = budget(smallest_budget(NEED, MARGIN), memory)
    memory.now += 60 * MB  # something grows that nobody counted
    with (
        pytest.raises(UnsupportedError, match=r"does not last: this test needs .* Nothing is written; begin again"),
        held.batch(4096),
    ):
        raise AssertionError("computed all the same")


def test_a_run_that_passed_its_budget_stops() -> None:
    memory = Counted()
    limit = smallest_budget(NEED, MARGIN)
    held = budget(limit, memory)
    with pytest.raises(UnsupportedError, match="does not last"), held.batch(10):
        memory.most = limit + 1
    with pytest.raises(UnsupportedError, match="does not last"), held.batch(10):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_batches_become_smaller_where_more_is_taken_than_was_thought() -> None:
    memory = Counted()
    held = budget(2 * smallest_budget(NEED, MARGIN), memory)
    room = held.room()
    with held.batch(4096):
        memory.most = NEED.fixed + NEED.batch + 4096 * NEED.token + 200 * MB
    assert held.room() <= room - (150 * MB) // NEED.token


def test_a_card_is_asked_for_what_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch.cuda: 24 GB, of which 2 GB belong to others and contexts, 5 are reserved, 3 allocated."""
    gb, fractions = 10**9, []
    answers = dict(mem_get_info=(17 * gb, 24 * gb), memory_reserved=5 * gb, memory_allocated=3 * gb,
                   max_memory_reserved=6 * gb, reset_peak_memory_stats=None, empty_cache=None)  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: fractions.append(share))
    memory = memory_of(torch.device("cuda:0"))
    assert isinstance(memory, CardMemory)
    assert (memory.used(), memory.peak()) == (5 * gb, 8 * gb)
    memory.settle()
    with memory.within(14 * gb):
        assert fractions == [0.5]
    assert fractions == [0.5, 1.0]


def test_other_devices_have_no_budget() -> None:
    with pytest.raises(UnsupportedError, match="is for cpu and cuda, not for mps; choose a token_budget"):
        memory_of(torch.device("mps"))


@pytest.mark.parametrize("pool", ["mean", "gene"])
def test_a_budget_does_not_change_results(pool: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words, adata = toys.vocabulary(), toys.cells(40)
    model, tokens = toys.encoder(words), tmp_path / "tokens"
    tokenize(adata, tokens, dictionary=words)
    expected = embed(tokens, model, pool=pool)
    memory, windows, planned = Counted(), [], []
    monkeypatch.setattr(budgets, "memory_of", lambda device: memory)
    monkeypatch.setattr(budgets, "_LEAST_WINDOW", 7)
    original = MemoryBudget.plan

    def with_little(held: MemoryBudget, need: Need, **wishes: int) -> Plan:
        held.limit = smallest_budget(need, MARGIN) + need.token * 20
        planned.append(original(held, need, **wishes))
        return planned[-1]

    monkeypatch.setattr(MemoryBudget, "plan", with_little)
    batches = encoding.token_batches
    monkeypatch.setattr(encoding, "token_batches", lambda lengths, room: windows.append(room) or batches(lengths, room))
    found = embed(tokens, model, pool=pool, memory_budget="1GB")
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)
    assert planned[0].workers == 1
    assert planned[0].token_budget < 100
    assert len(windows) >= 40 // planned[0].window_cells
    assert max(windows) <= planned[0].token_budget


def test_a_batch_of_ones_own_size_is_kept_or_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = toys.vocabulary()
    tokenize(toys.cells(9), tmp_path / "tokens", dictionary=words)
    monkeypatch.setattr(budgets, "memory_of", lambda device: Counted())
    model = toys.encoder(words)
    embed(tmp_path / "tokens", model, token_budget=300, memory_budget="400MB")
    with pytest.raises(UnsupportedError, match=r"a batch of 999,000 tokens, which .* token_budget asks for"):
        embed(tmp_path / "tokens", model, token_budget=999_000, memory_budget="400MB")


def test_what_cannot_be_held_is_refused(tmp_path: Path) -> None:
    words, adata = toys.vocabulary(), toys.cells(9)
    model = toys.encoder(words)
    with pytest.raises(UnsupportedError, match=r"memory_budget \(--memory-budget\) cannot be kept by pictures"):
        embed(adata, model, dictionary=words, memory_budget="2GB", plot=tmp_path / "p.png")
    with pytest.raises(
        UnsupportedError, match=r"memory_budget \(--memory-budget\) cannot be kept where all of an AnnD"
    ):
        embed(adata, model, dictionary=words, memory_budget="2GB", copy=True)


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


@pytest.mark.parametrize("command", ["embed", "predict"])
def test_the_command_line_refuses_what_is_no_size(command: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = toys.vocabulary()
    tokenize(toys.cells(5), tmp_path / "tokens", dictionary=words)
    save(toys.encoder(words), tmp_path / "model")
    out = tmp_path / "cells.parquet"
    places = [str(tmp_path / "tokens"), "--model", str(tmp_path / "model"), "--out", str(out)]
    assert main([command, *places, "--memory-budget", "lots"]) == 2
    assert "error: memory_budget (--memory-budget) must be a size" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tokens"]
