"""What the GPU suite asks a card, and how it keeps time there, with a made-up card in its place."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import card as gpu_card
from bench.gpu import measure as gpu_measure
from bench.gpu import suite as gpu_suite
from bench.gpu.cases import H200
from bench.gpu.measure import Candidate, Place, Prepared
from bench.gpu.timer import as_graph, time_in_turns
from geneformer_fast.profiling import clock as clocks
from geneformer_fast.profiling import machine
from geneformer_fast.profiling.clock import EventClock, WallClock, clock_of

CPU = torch.device("cpu")
CARD = torch.device("cuda", 0)


class Event:
    """Tells the host's time."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda as the suite uses it, on a machine without; returns the calls."""
    calls: list[str] = []
    at = SimpleNamespace(
        name="NVIDIA Imaginary X1", major=9, minor=0, multi_processor_count=10, total_memory=80 << 30,
        L2_cache_size=1 << 20, uuid="00000000-1111-2222-3333-444444444444",
    )  # fmt: skip

    def note(name: str, value: object = None):  # type: ignore[no-untyped-def]
        return lambda *args, **options: (calls.append(name), value)[1]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: at)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (at.major, at.minor))
    for name, value in (
        ("synchronize", None), ("empty_cache", None), ("reset_peak_memory_stats", None), ("is_available", True),
        ("memory_allocated", 1000), ("max_memory_allocated", 5000), ("current_device", 0),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, note(name, value))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return calls


def test_events_are_kept_around_each_repetition_with_work_in_front(cuda: list[str]) -> None:
    clock = EventClock(CPU)
    flushes = []
    clock._buffer = SimpleNamespace(zero_=lambda: flushes.append(1))  # type: ignore[assignment]
    clock._flush_ms = 2.0
    found = clock.samples(lambda: time.sleep(0.002), 3, lead_ms=5.0)
    assert len(found) == 3
    assert all(1.9 < ms < 50 for ms in found)
    assert len(flushes) == 9
    flushes.clear()
    clock.samples(lambda: None, 2, lead_ms=1e9)
    assert len(flushes) == 2 * clocks.MOST_LEAD_MS / 2
    flushes.clear()
    assert clock.host_ms(lambda: time.sleep(0.002)) >= 2
    rows = time_in_turns({"a": lambda: None}, clock, seconds=0, has_lead=False)
    assert flushes == []
    assert rows["a"]["n"] >= 3
    time_in_turns({"a": lambda: None}, clock, seconds=0, has_lead=True)
    assert flushes
    assert isinstance(clock_of(CPU), WallClock)


def test_a_graph_is_warmed_up_captured_and_replayed(cuda: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    steps: list[str] = []
    stream = SimpleNamespace(wait_stream=lambda other: steps.append("wait"))

    @contextlib.contextmanager
    def capture(graph: object):  # type: ignore[no-untyped-def]
        steps.append("begin")
        yield
        steps.append("end")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda chosen: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: steps.append("replay")))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    as_graph(lambda: steps.append("run"), CARD)()
    assert steps == ["wait", "run", "run", "run", "wait", "begin", "run", "end", "replay"]


def test_a_card_is_named(cuda: list[str]) -> None:
    found = machine.card(CARD)
    assert found["sm"] == 90
    assert found["memory_gib"] == 80
    assert machine.slug(found["name"]) == "nvidia-imaginary-x1"
    assert gpu_card.half_dtype(CARD) == torch.bfloat16
    assert gpu_card.half_dtype(CPU) == torch.float32


def test_a_commit_can_be_told_where_git_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)  # a copy without .git
    found = gpu_card.gpu_provenance(CPU)
    assert (found["commit"], found["is_dirty"], found["gpu"]) == ("", False, {"name": "cpu"})
    monkeypatch.setenv(machine.COMMIT, "told")
    assert gpu_card.gpu_provenance(CPU)["commit"] == "told"
    digest = gpu_card.source_digest()
    assert len(digest) == 12
    assert digest == gpu_card.source_digest() != gpu_card.source_digest(("bench",))


class Telling(WallClock):
    """A wall clock."""


def on_a_card(candidate: Candidate, **options: object) -> object:
    place = Place(CARD, Telling(), H200, deadline=float("inf"), **options)  # type: ignore[arg-type]
    problem = gpu_measure.Variant("v", "v", gpu_measure.Work(1.0), list, dict, {"out": 0.1})
    return gpu_measure._prepare(candidate, problem, {"out": torch.ones(2).double()}, place)


def test_memory_is_counted_per_candidate(cuda: list[str]) -> None:
    good = Candidate("good", "good", lambda: Prepared(lambda: None, lambda: {"out": torch.ones(2)}))
    made = on_a_card(good)
    assert isinstance(made, tuple)
    assert made[1]["peak_bytes"] == 4000
    assert cuda.index("reset_peak_memory_stats") < cuda.index("max_memory_allocated")


def test_a_fault_of_the_card_ends_the_case_and_an_ordinary_error_does_not(
    cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ValueError("wrong shape")

    bad = Candidate("bad", "bad", lambda: Prepared(broken, lambda: {"out": torch.ones(2)}))
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: torch.ones(8))
    assert on_a_card(bad) == "ValueError: wrong shape"

    def dead(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    faulty = Candidate("faulty", "faulty", lambda: Prepared(dead, lambda: {"out": torch.ones(2)}))

    def allocated(*_: object) -> int:
        monkeypatch.setattr(torch.cuda, "synchronize", dead)  # from the first launch on
        return 0

    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        on_a_card(faulty)


def test_the_command_runs_tests_and_then_cases(
    cuda: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[list[str], float]] = []
    begun: list[str] = []

    def run_tests(groups, out, basis, *, seconds, about):  # type: ignore[no-untyped-def]
        asked.append((list(groups), seconds))
        assert basis["gpu"] == "NVIDIA Imaginary X1"
        assert about["parts"]
        assert about["commit"]
        return {group: {"status": "failed" if group == "embed_tokens" else "passed"} for group in groups}

    monkeypatch.setattr(gpu_suite, "run_tests", run_tests)
    monkeypatch.setattr(gpu_suite, "run_child", lambda case, *args, **options: begun.append(case.name) or True)
    monkeypatch.setattr(machine, "query", lambda device, names: {})
    assert gpu_suite.main(["--out", str(tmp_path), "--minutes", "60"]) == 1
    assert begun[:3] == ["ceilings", "attention_d64_forward", "attention_d64_backward"]
    assert not any(name.startswith("encoder") for name in begun)
    assert "embed_tokens" not in begun
    (first, seconds), (late, at_most), (last, _) = asked
    assert at_most == 300
    assert first[:2] == ["varlen_attention", "encoder"]
    assert late == ["rank_genes"]
    assert "wrapped" in first
    assert "sanitizer" not in first
    assert seconds == 300
    assert last == ["sanitizer"]
    said = capsys.readouterr().out
    assert "encoder_10m_inference: refused" in said
    assert "embed_tokens: failed" in said
    asked.clear()
    # What waited has what is left, not a time of its own.
    arguments = ["--out", str(tmp_path), "--minutes", "2", "--only", "rank_genes"]
    gpu_suite.main(arguments)
    assert asked[1][0] == ["rank_genes"]
    assert asked[1][1] <= 120
    asked.clear()
    assert gpu_suite.main(["--out", str(tmp_path), "--tests-only"]) == 1
    assert set(asked[0][0]) == set(gpu_suite.GROUPS)


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().out
