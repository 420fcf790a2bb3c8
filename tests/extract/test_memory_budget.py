"""Budgets of memory: sizes, plans, refusals, and runs that are told how much is in use."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toys

from geneformer_fast import embed, save, tokenize
from geneformer_fast.cli import main
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.extract import budget as budgets
from geneformer_fast.extract import encoding
from geneformer_fast.extract.budget import MemoryBudget, Need, Plan, plan, smallest_budget
from geneformer_fast.extract.memory import CardMemory, memory_of
from geneformer_fast.extract.sizes import in_mb, size_in_bytes

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
