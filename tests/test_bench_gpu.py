"""The GPU suite's procedure, on a CPU: nothing is measured, but everything that needs no card runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import gpu_case, gpu_report, gpu_suite, gpu_tests, measured
from bench.gpu_case import run_case
from bench.gpu_cases import CASES, H200, QUICK, Case, Goal, case_named, floors
from bench.gpu_impls import CUDNN, Question, uses_cudnn, with_impls
from bench.gpu_measure import (
    NO_TIME,
    NOT_QUICK,
    Candidate,
    Compiling,
    Place,
    Prepared,
    Unavailable,
    Variant,
    Work,
    measure,
    relative_error,
)
from bench.gpu_sources import TESTED, parts, source_of, tree_digest
from bench.gpu_timer import WallClock, percentiles, time_in_turns
from bench.lengths import BLOOD, DEEP, real_lengths, uniform_lengths

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
# One of each kind; the others differ in numbers only.
DRY = (
    *("ceilings", "attention_d64_forward", "attention_d64_backward", "attention_d64_dropout"),
    *("encoder_10m_inference", "encoder_106m_inference", "encoder_10m_training", "encoder_106m_training"),
    *("encoder_aido-100m_inference", "mlm_cross_entropy", "residual_layernorm", "feed_forward", "int8_linear"),
    *("embed_tokens", "rank_genes"),
)
# Why candidates may be absent on a CPU.
LEFT_OUT = (
    *("needs CUDA", "installed", "ours runs it already", "CUDA graphs", "no dropout", "compiled for minutes"),
    *("takes no mask", "no stock encoder"),
)
PLACE = Place(CPU, WallClock(), H200, deadline=float("inf"), is_tiny=True, backend="")


@pytest.mark.parametrize("name", DRY)
def test_every_kind_of_case_runs_small_on_a_cpu(name: str) -> None:
    pytest.importorskip("transformers")
    result = run_case(case_named(name), CPU, seconds=5, is_tiny=True)
    assert not result["is_measurement"]
    for found in result["variants"].values():
        if "this version has no" in found["left_out"].get("ours", ""):
            pytest.skip(found["left_out"]["ours"])
    assert result["failed"] == []
    assert result["skipped"] == []
    for found in result["variants"].values():
        assert any(row["is_ours"] for row in found["rows"].values())
        assert any(not row["is_ours"] for row in found["rows"].values())
        for row in found["rows"].values():
            assert 0 < row["ms"]["p10"] <= row["ms"]["p50"] <= row["ms"]["p90"]
            assert row["relative_error"] or not row["is_same"]
        for reason in found["left_out"].values():
            assert any(known in reason for known in LEFT_OUT), reason
    json.dumps(result)


def candidate(name: str, value: float, *, is_ours: bool = False, ms: float = 0.0, **options: bool) -> Candidate:
    def make() -> Prepared:
        if value != value:
            raise Unavailable("is not there")
        if value < 0:
            raise torch.OutOfMemoryError
        return Prepared(lambda: time.sleep(ms / 1e3), lambda: {"out": torch.full((3,), value)})

    return Candidate(name, name, make, is_ours=is_ours, **options)


def variant(*candidates: Candidate) -> Variant:
    work = Work(flops=1e9, counts={"cells": 10})
    return Variant("v", "v", work, lambda: candidates, lambda: {"out": torch.ones(3)}, {"out": 0.01})


def test_only_what_computes_the_same_is_timed() -> None:
    found = measure(
        variant(
            candidate("ours", 1.001, is_ours=True, ms=2),
            candidate("rival", 1.0, ms=6),
            candidate("wrong", 1.1),
            candidate("infinite", float("inf")),
            candidate("absent", float("nan")),
            candidate("large", -1.0),
            candidate("other", 7.0, is_same=False),
        ),
        PLACE,
        seconds=0.1,
    )
    assert set(found["rows"]) == {"ours", "rival", "other"}
    assert "something else" in found["left_out"]["wrong"]
    assert "something else" in found["left_out"]["infinite"]
    assert found["left_out"]["absent"] == "is not there"
    assert found["left_out"]["large"] == "out of memory"
    ours, rival = found["rows"]["ours"], found["rows"]["rival"]
    assert ours["relative_error"] == {"out": 0.001}
    assert 2 <= ours["ms"]["p50"] < 6 <= rival["ms"]["p50"]
    assert ours["cells_per_s"] == pytest.approx(10 / ours["ms"]["p50"] * 1e3, rel=1e-3)
    assert ours["share_of_floor"] == pytest.approx(1e9 / 788e12 * 1e3 / ours["ms"]["p50"], rel=1e-3)


def test_a_result_of_nothing_or_of_another_shape_is_wrong() -> None:
    truth = torch.ones(3, dtype=torch.float64)
    assert relative_error(torch.ones(2), truth) == float("inf")
    assert relative_error(torch.tensor([1.0, 1.0, float("nan")]), truth) == float("inf")
    assert relative_error(torch.zeros(3), truth) == 1.0
    nothing = Candidate("n", "n", lambda: Prepared(lambda: None, dict), is_ours=True)
    assert "of nothing" in measure(variant(nothing, candidate("rival", 1.0)), PLACE, seconds=0)["left_out"]["n"]


def test_an_encoder_whose_cells_see_each_other_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from geneformer_fast import encoder

    # One cell where there were several.
    names = [name for name in vars(encoder) if name.startswith("varlen_attention")]
    for name in names:
        plain = getattr(encoder, name)
        monkeypatch.setattr(
            encoder,
            name,
            lambda *args, plain=plain, **options: plain(
                *args, **{**options, "cu_seqlens": options["cu_seqlens"][[0, -1]]}
            ),
        )
    result = run_case(case_named("encoder_10m_inference"), CPU, seconds=5, is_tiny=True)
    assert result["failed"] == ["full", "uniform"]
    assert "something else" in result["variants"]["full"]["left_out"]["ours"]


def test_quick_runs_and_short_times_leave_out_what_takes_long() -> None:
    candidates = (candidate("ours", 1.0, is_ours=True), candidate("slow", 1.0, is_slow=True))
    quick = Place(CPU, WallClock(), H200, deadline=float("inf"), is_quick=True)
    assert set(measure(variant(*candidates), quick, seconds=0)["rows"]) == {"ours"}
    compiled = Candidate("compiled", "compiled", candidate("x", 1.0).make, compile_s=30.0)
    assert measure(variant(candidates[0], compiled), quick, seconds=0)["left_out"] == {"compiled": NOT_QUICK}
    late = Compiling(until=time.monotonic() + 10)
    place = Place(CPU, WallClock(), H200, deadline=float("inf"), compiling=late)
    assert measure(variant(candidates[0], compiled), place, seconds=0)["left_out"] == {"compiled": NO_TIME}


def test_what_is_compiled_has_time_of_its_own() -> None:
    """It comes last, when the others have used up theirs, and it takes nothing from variants to come."""

    def slowly() -> Prepared:
        time.sleep(0.2)
        return candidate("x", 1.0).make()

    first, second = (Candidate(name, name, slowly, compile_s=0.2) for name in ("first", "second"))
    place = Place(CPU, WallClock(), H200, deadline=time.monotonic() - 1, compiling=Compiling(seconds=0.1))
    found = measure(variant(candidate("ours", 1.0, is_ours=True), first, second), place, seconds=0)
    assert set(found["rows"]) == {"ours", "first"}
    assert found["left_out"] == {"second": NO_TIME}
    assert place.compiling.spent >= 0.2
    assert place.seconds_left - (place.deadline - time.monotonic()) == pytest.approx(place.compiling.spent, abs=0.02)


class Some:
    """Three variants: of the second the inputs cannot be made, and at the third the process dies."""

    def __repr__(self) -> str:
        return "Some()"

    def variants(self, place: Place) -> list[Variant]:
        def broken() -> list[Candidate]:
            raise ValueError("no inputs")

        def dead() -> list[Candidate]:
            raise KeyboardInterrupt

        first = variant(candidate("ours", 1.0, is_ours=True))
        return [first, replace(first, name="w", build=broken), replace(first, name="x", build=dead)]


def test_a_variant_that_fails_loses_itself_only(tmp_path: Path) -> None:
    case, known = Case("some", "", Some(), (), 10), []

    def keep(content: dict) -> None:
        known.append(json.loads(json.dumps(content)))
        gpu_case.write(content, tmp_path)

    with pytest.raises(KeyboardInterrupt):
        run_case(case, CPU, seconds=1, is_tiny=True, keep=keep)
    assert [(content["failed"], content["skipped"]) for content in known] == [([], ["w", "x"]), (["w"], ["x"])]
    written = json.loads((tmp_path / "some.json").read_text())
    assert written["variants"]["v"]["rows"]["ours"]["ms"]
    assert written["variants"]["w"]["error"] == "ValueError: no inputs"
    (tmp_path / "some.json").unlink()
    gpu_case.write({**written, "variants": {"w": written["variants"]["w"]}}, tmp_path)
    assert not (tmp_path / "some.json").exists()


def test_candidates_take_turns_in_changing_order() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    found = time_in_turns(runs, WallClock(), seconds=0, has_lead=False, least_rounds=3, most_per_turn=1)
    assert "".join(order[-9:]) == "abcbcacab"
    assert all(row["n"] == 3 for row in found.values())
    assert percentiles([1, 2, 3]) == {"p10": 1.2, "p50": 2.0, "p90": 2.8}


def test_lengths_are_reproducible_and_have_the_mean_asked_for() -> None:
    lengths = real_lengths(128, mean=1442)
    assert lengths == real_lengths(128, mean=1442)
    assert lengths != sorted(lengths)
    assert np.mean(lengths) == pytest.approx(1442, rel=0.02)
    assert set(lengths) <= set(BLOOD) | set(DEEP)
    assert max(real_lengths(50, mean=900, max_len=2048)) == 2048
    assert sorted(uniform_lengths(3, 300, 2048)) == [300, 1174, 2048]
    with pytest.raises(ValueError, match="not between"):
        real_lengths(10, mean=5000)


@pytest.mark.parametrize(
    ("preset", "length", "gigaflops"),
    [
        ("geneformer-v1-10m", 2048, 38.7),
        ("bionemo-106m", 2048, 502),
        ("geneformer-v2-104m", 4096, 1314),
        ("geneformer-v2-316m", 4096, 3740),
        ("aido-cell-100m", 19_266, 20_456),
    ],
)
def test_operations_are_counted_as_in_the_goals(preset: str, length: int, gigaflops: float) -> None:
    from bench.gpu_models import encoder_flops
    from geneformer_fast import EncoderConfig

    assert encoder_flops(EncoderConfig.preset(preset), [length]) / 1e9 == pytest.approx(gigaflops, rel=2e-3)


def test_cases_are_consistent() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert names[0] == "ceilings"
    assert {group for case in CASES for group in case.tests} <= set(gpu_tests.GROUPS)
    rows = floors()
    for case in CASES:
        for goal in case.goals:
            assert any(row.startswith(f"| {case.name} {goal.variant} |") for row in rows), (case.name, goal.variant)
            assert (goal.impossible < goal.goal) == goal.is_less_better
        assert case.seconds <= 120


def test_goals_read_the_best_of_ours() -> None:
    rows = {
        "ours": {"is_ours": True, "ms": {"p50": 2.0}, "cells_per_s": 50.0, "peak_bytes": 3e9},
        "ours-graph": {"is_ours": True, "ms": {"p50": 1.0}, "cells_per_s": 100.0, "peak_bytes": 4e9},
        "eager": {"is_ours": False, "ms": {"p50": 3.0}, "cells_per_s": 33.0, "peak_bytes": 1},
    }
    assert Goal("v", "cells_per_s", 1, 2).reached(rows) == 100
    assert Goal("v", "peak_gb", 2, 1).reached(rows) == 3
    assert Goal("v", "faster_than:eager", 1, 2).reached(rows) == 3
    assert Goal("v", "time_against:eager", 1, 2).reached(rows) == pytest.approx(1 / 3)
    assert Goal("v", "time_against:absent", 1, 2).reached(rows) is None
    assert Goal("v", "cells_per_s", 1, 2).reached({"eager": rows["eager"]}) is None


JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest" errors="{errors}" failures="{failures}" skipped="2"
tests="9"></testsuite></testsuites>"""


def test_outcomes_of_tests_are_read(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    assert gpu_tests.counts_of(report) == {"passed": 0, "failed": 0, "skipped": 0}
    report.write_text(JUNIT.format(errors=1, failures=2))
    assert gpu_tests.counts_of(report) == {"passed": 4, "failed": 3, "skipped": 2}


def fake_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: float = 30) -> None:
    """Groups whose pytest is a line of Python: green, red, hanging, and all skipped."""
    xml = JUNIT.replace("\n", " ")
    scripts = {
        "green": f"open(sys.argv[1], 'w').write({xml.format(errors=0, failures=0)!r})",
        "red": f"open(sys.argv[1], 'w').write({xml.format(errors=0, failures=1)!r}); sys.exit(1)",
        "dead": "os.kill(os.getpid(), 11)",
        "hanging": "time.sleep(600)",
        "empty": "sys.exit(5)",
    }
    monkeypatch.setattr(gpu_tests, "GROUPS", dict.fromkeys(scripts, ()))
    monkeypatch.setattr(gpu_tests, "files_of", lambda group: ["some"])
    monkeypatch.setattr(
        gpu_tests,
        "command_of",
        lambda group, report, n_workers: [
            sys.executable,
            "-S",
            "-c",
            f"import os, sys, time; {scripts[group]}",
            str(report),
        ],
    )


def test_groups_of_tests_fail_by_themselves_and_are_not_repeated_when_green(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_groups(monkeypatch, tmp_path)
    here = {"gpu": "X1", "torch": "2.11.0", "triton": "3.6.0", "source": "digest"}
    groups = ["green", "red", "dead", "empty"]
    known = gpu_tests.run_tests(groups, tmp_path, here, seconds=60, about={"commit": "0123"})
    assert {name: found["status"] for name, found in known.items()} == {
        "green": "passed", "red": "failed", "dead": "failed", "empty": "none",
    }  # fmt: skip
    assert known["green"]["passed"] == 7
    assert gpu_tests.red_groups(["green"], known) == []
    assert len(gpu_tests.red_groups(["green", "red", "dead", "empty", "unknown"], known)) == 4
    begun = (tmp_path / "logs" / "tests_green.log").stat().st_mtime_ns
    gpu_tests.run_tests(["green", "red"], tmp_path, here, seconds=60, about={"commit": "0123"})
    assert (tmp_path / "logs" / "tests_green.log").stat().st_mtime_ns == begun
    assert gpu_tests.outcomes(tmp_path, here)["green"]["status"] == "passed"
    for name in here:
        assert gpu_tests.outcomes(tmp_path, {**here, name: "another"}) == {}
    written = json.loads((tmp_path / "tests.json").read_text())
    assert {name: written[name] for name in (*here, "commit")} == {**here, "commit": "0123"}


def test_outcomes_that_cannot_be_read_are_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_groups(monkeypatch, tmp_path)
    for text in ('{"source": "dig', "[]", '{"source": "digest"}'):
        (tmp_path / "tests.json").write_text(text)
        known = gpu_tests.run_tests(["green"], tmp_path, {"source": "digest"}, seconds=60)
        assert known["green"]["status"] == "passed"
        assert "cannot be read" in capsys.readouterr().out


INTERRUPTED = """
import pathlib, signal, sys
from bench import gpu_suite, gpu_tests
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been ignored where this was started
lines = {"green": "import sys; sys.exit(5)", "hanging": f"import os, time; print(os.getpid(), file=open({sys.argv[1]!r} + '/pid', 'w'), flush=True); time.sleep(60)"}
gpu_tests.files_of = lambda group: ["some"]
gpu_tests.command_of = lambda group, report, n_workers: [sys.executable, "-S", "-c", lines[group]]
with gpu_suite.ended_like_an_interrupt():
    gpu_tests.run_tests(list(lines), pathlib.Path(sys.argv[1]), {"source": "digest"}, seconds=60)
"""  # noqa: E501


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_keeps_outcomes_and_leaves_nobody_behind(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=gpu_tests.environment(), stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not ((tmp_path / "tests.json").exists() and (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=30) != 0
    assert json.loads((tmp_path / "tests.json").read_text())["groups"]["green"]["status"] == "none"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_hanging_tests_are_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_groups(monkeypatch, tmp_path)
    known = gpu_tests.run_tests(["hanging"], tmp_path, {"source": "digest"}, seconds=1)
    assert known["hanging"]["status"] == "timeout"
    assert gpu_tests.red_groups(["hanging"], known)


def test_every_test_for_cards_is_in_one_group() -> None:
    for group in ("encoder", "wrapped", "sanitizer"):
        assert f"tests/gpu/test_{group}_gpu.py" in gpu_tests.files_of(group)
    found = [file for group in gpu_tests.GROUPS for file in gpu_tests.files_of(group)]
    assert len(found) == len(set(found))
    brings_the_mark = re.compile(
        r"^(pytestmark = |@|GPU = )pytest\.mark\.gpu|marks=pytest\.mark\.gpu|^def test_\w+\([^)]*\bdevice: str",
        re.MULTILINE,
    )
    paths = [path for path in (ROOT / "tests").rglob("test_*.py") if brings_the_mark.search(path.read_text())]
    marked = {str(path.relative_to(ROOT)) for path in paths}
    assert "tests/kernels/test_dropout_gradients.py" in marked
    assert marked <= set(found)
    assert "gpu" in gpu_tests.command_of("encoder", Path("report.xml"))


BARE = """
import bare, sys, torch
import bench.gpu_suite, bench.gpu_tests
from bench.gpu_case import run_case
from bench.gpu_cases import case_named
for name in ("encoder_10m_inference", "rank_genes"):
    result = run_case(case_named(name), torch.device("cpu"), seconds=1, is_tiny=True)
    # On a CPU counts are ranked by numba; on a card nothing is.
    assert not result["failed"] or name == "rank_genes", result
hidden = {name.partition(".")[0] for name in sys.modules} & bare.ABSENT
assert not hidden, hidden
"""


def run_bare(*command: str) -> subprocess.CompletedProcess[str]:
    environment = gpu_tests.environment()
    environment["PYTHONPATH"] += os.pathsep + str(ROOT / "tests" / "gpu")
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # hypothesis, zarr and others bring plugins
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip


def test_torch_triton_numpy_and_transformers_are_enough_to_measure() -> None:
    pytest.importorskip("transformers")
    done = run_bare("-c", BARE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_and_with_pytest_to_test() -> None:
    """Every test for cards is collected, and set up until it finds no card, with nothing else installed."""
    plugins = ("-p", "bare", "-p", "no:cacheprovider")
    done = run_bare("-m", "pytest", "-m", "gpu", "-v", *plugins)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(tests) > 500
    assert all("SKIPPED" in line for line in tests), "something marked gpu runs without a card"
    files = {line.partition("::")[0] for line in tests}
    assert files >= {file for group in gpu_tests.GROUPS for file in gpu_tests.files_of(group)}


def arguments(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(
        **{"quick": False, "tiny": True, "device": "cpu", "again": False, "only": "", "archive": None, **changes}
    )


def test_cases_are_refused_left_and_run_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun = []

    def run_child(case: Case, out: Path, tests: dict, *, seconds: float, args: SimpleNamespace) -> bool:
        begun.append(case.name)
        return case.name != "breaks"

    monkeypatch.setattr(gpu_suite, "run_child", run_child)
    cases = [
        Case("first", "", None, ("a",), 10),
        Case("refused", "", None, ("a", "b"), 10),
        Case("breaks", "", None, (), 10),
        Case("long", "", None, (), 500),
        Case("short", "", None, (), 5),
    ]
    known = {"a": {"status": "passed"}, "b": {"status": "failed", "failed": 2}}
    deadline = time.monotonic() + 60
    done = gpu_suite.run_cases(cases, tmp_path, known, deadline, arguments(), is_dry=False)  # type: ignore[arg-type]
    assert begun == ["first", "breaks", "short"]
    assert done == {
        "measured": ["first", "short"], "failed": ["breaks"], "refused": ["refused"], "left for the next run": ["long"],
    }  # fmt: skip


def test_tests_that_take_minutes_wait_until_a_case_needs_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order: list[object] = []
    monkeypatch.setattr(gpu_suite, "run_child", lambda case, *args, **options: order.append(case.name) or True)
    assert gpu_tests.LATE == ("rank_genes",)
    cases = [Case("first", "", None, ("a",), 10), Case("ranking", "", None, ("rank_genes",), 10)]
    assert gpu_suite.needed_groups([*cases, Case("last", "", None, ("b", "a"), 10)]) == ["a", "b", "wrapped"]
    known = {"a": {"status": "passed"}}

    def test(groups: list[str]) -> dict:
        order.append(list(groups))
        return {group: {"status": "passed"} for group in groups}

    deadline = time.monotonic() + 60
    done = gpu_suite.run_cases(cases, tmp_path, known, deadline, arguments(), is_dry=False, test=test)  # type: ignore[arg-type]
    assert order == ["first", ["rank_genes"], "ranking"]
    assert done["measured"] == ["first", "ranking"]
    order.clear()
    # Without time for the case, its tests are not begun either, and it is left, not refused.
    done = gpu_suite.run_cases(cases, tmp_path, known, time.monotonic(), arguments(), is_dry=False, test=test)  # type: ignore[arg-type]
    assert order == []
    assert done["left for the next run"] == ["first", "ranking"]


def test_only_a_whole_result_of_the_same_card_versions_and_source_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, here = Case("some", "", None, (), 10), {"gpu": "X1", "torch": "2.11.0", "triton": "3.6.0", "source": "ab"}
    whole = {
        "basis": here, "skipped": [], "failed": [], "is_quick": False,
        "variants": {"v": {"left_out": {"flash-attn": "flash-attn is not installed"}}},
    }  # fmt: skip

    def is_there(content: dict | str, *, is_quick: bool = False) -> bool:
        (tmp_path / "some.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return gpu_suite.is_there(case, tmp_path, here, is_quick=is_quick)

    assert not gpu_suite.is_there(case, tmp_path, here, is_quick=False)
    assert is_there(whole)
    assert not is_there({**whole, "skipped": ["4096"]})
    assert not is_there({**whole, "failed": ["4096"]})
    assert not is_there({**whole, "is_quick": True})
    assert is_there({**whole, "is_quick": True}, is_quick=True)
    assert is_there(whole, is_quick=True)
    assert not is_there({**whole, "variants": {"v": {"left_out": {"flex": NO_TIME}}}})
    for name in here:
        assert not is_there({**whole, "basis": {**here, name: "another"}})
    assert not is_there({name: value for name, value in whole.items() if name != "basis"})
    assert not is_there('{"skipped": [')
    assert "cannot be read" in capsys.readouterr().out


def copied(tmp_path: Path) -> Path:
    for folder in ("kernels", "geneformer_fast", "bench", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    return tmp_path


def test_the_source_of_a_case_is_what_it_runs(tmp_path: Path) -> None:
    root, names = copied(tmp_path), ("attention_d64_forward", "encoder_10m_inference", "residual_layernorm")
    ops = "kernels/geneformer_kernels/ops"

    def changed(file: str) -> tuple[list[str], list[str]]:
        """Cases and parts that a changed file makes others."""
        sources, before = {name: source_of(case_named(name), root) for name in names}, parts(root)
        (root / file).write_text((root / file).read_text() + "# changed\n")
        after = parts(root)
        return (
            [name for name in names if source_of(case_named(name), root) != sources[name]],
            [name for name in before if before[name] != after[name]],
        )

    assert changed(f"{ops}/varlen_attention/kernel.py") == ([*names[:2]], ["varlen_attention: kernels"])
    assert changed(f"{ops}/rank_genes/launches.py") == ([], ["rank_genes: launches"])
    assert changed("geneformer_fast/encoder.py") == ([names[1]], ["the encoder"])
    assert changed("bench/gpu_models.py") == ([*names], ["the random encoders that are compared"])
    assert changed("bench/gpu_measure.py") == ([*names], [])
    assert changed("kernels/geneformer_kernels/launch.py") == ([*names], ["what all kernels share"])
    # What comes from results, and what does not run on a card.
    assert changed("kernels/geneformer_kernels/measured.py") == ([], [])
    assert changed("bench/gpu_report.py") == ([], [])
    assert source_of(case_named(names[0])) != source_of(case_named("attention_d32_forward"))  # another problem


def test_tests_run_again_when_the_models_they_compare_change(tmp_path: Path) -> None:
    root = copied(tmp_path)
    before = tree_digest(TESTED, root=root)
    assert before == tree_digest(TESTED)
    (root / "bench" / "gpu_models.py").write_text("")
    assert tree_digest(TESTED, root=root) != before


def test_estimates_are_what_results_took() -> None:
    for result in measured.committed():
        if result.get("suite") != "gpu" or not result["variants"]:
            continue
        case = case_named(result["case"])
        assert 0.95 <= QUICK ** result["is_quick"] * case.seconds / result["wall_s"] <= 1.6, case.name


def test_dry_runs_never_reach_the_results(tmp_path: Path) -> None:
    results = ROOT / "bench" / "results"
    for bad in (
        ["--device", "cpu", "--out", str(tmp_path)],
        ["--device", "cpu", "--tiny"],
        ["--device", "cpu", "--tiny", "--out", str(results / "some-card")],
        ["--tiny", "--out", str(results)],
    ):
        with pytest.raises(SystemExit):
            gpu_suite.parse(bad)
    assert gpu_suite.parse(["--device", "cpu", "--tiny", "--out", str(tmp_path)]).minutes < 10


def test_the_command_is_resumable_and_survives_a_case_that_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path / "out")]
    command += ["--archive", str(tmp_path / "all.tar.gz")]
    for said in ("1 measured", "1 were there, 0 measured"):
        done = subprocess.run(
            [*command, "--only", "ceilings"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
        )
        assert said in done.stdout
    with tarfile.open(tmp_path / "all.tar.gz") as tar:
        assert {"out/ceilings.json", "out/logs/ceilings.log"} <= set(tar.getnames())
    result = json.loads((tmp_path / "out" / "ceilings.json").read_text())
    assert result["is_measurement"] is False
    assert result["ceilings"]["product_tflops"] > 0
    assert result["provenance"]["source"]
    case = case_named("encoder_10m_inference")
    is_good = gpu_suite.run_child(case, tmp_path, {}, seconds=0.2, args=arguments())  # type: ignore[arg-type]
    assert not is_good
    assert not (tmp_path / f"{case.name}.json").exists()


def test_floors_are_printed_without_a_card() -> None:
    rows = floors()
    (row,) = (row for row in rows if row.startswith("| attention_d64_forward 2048 "))
    assert "| 412 | 0 | 0.523 | tflops 400, 460 |" in row


def row_of(ms: float, *, is_ours: bool = False, what: str = "this project", **rates: float) -> dict:
    return {
        "what": what, "is_ours": is_ours, "is_same": True, "ms": {"p10": ms * 0.9, "p50": ms, "p90": ms * 1.1},
        "peak_bytes": 2.5e9, "share_of_floor": 0.5, "relative_error": {}, **rates,
    }  # fmt: skip


def gpu_result(case: str, title: str, rows: dict, goals: list[dict], **work: float) -> dict:
    at = {"gpu": {"name": "Imaginary X1", "memory_gib": 80.0, "driver": "999.1", "cuda": "13.0"}}
    packages = {"torch": "2.11.0", "triton": "3.6.0"}
    return {
        "case": case, "suite": "gpu", "title": title, "is_measurement": True, "is_quick": False, "goals": goals,
        "failed": [],
        "skipped": ["768"] if case == "residual_layernorm" else [],
        "provenance": {**at, "commit": "0123456789ab", "source": "ff", "date": "2030-01-02", "packages": packages},
        "ceilings": {"product_tflops": 700.0, "copy_gbps": 4000.0},
        "variants": {"full": {"what": "inference, 64 cells", "work": work, "rows": rows, "left_out": {}}},
    }  # fmt: skip


def test_the_readme_gets_a_table_per_card() -> None:
    goal = {"variant": "full", "metric": "cells_per_s", "goal": 900, "impossible": 1200, "reached": 1000.0}
    rows = {
        "ours": row_of(80.0, is_ours=True, tflops=300.0, cells_per_s=800.0),
        "ours-graph": row_of(64.0, is_ours=True, tflops=400.0, cells_per_s=1000.0),
        "ours-torch": row_of(65.0, what="this project on torch operations", tflops=1.0, cells_per_s=1.0),
        "rival": row_of(160.0, what="a rival", tflops=160.0, cells_per_s=400.0),
    }
    norm = {"ours": row_of(0.25, is_ours=True, gbps=3000.0), "eager": row_of(0.5, what="torch, eager", gbps=1500.0)}
    results = [
        gpu_result("encoder_x", "some preset, inference", rows, [goal], cells=64),
        gpu_result("residual_layernorm", "residual_layernorm", norm, []),
    ]
    text = gpu_report.render([results, [{"case": "tokenize_v1"}]])
    assert "### Imaginary X1, 80 GiB" in text
    assert "700 TFLOP/s" in text
    row = "| some preset, inference | 64 cells | 1,000 (909 to 1,111) | 400 | 2.5 (without its graph) | 50% | a rival |"
    assert f"{row} 400 | 2.50x |" in text
    assert "**900**, 1,200 |" in text
    missing = text.partition("Not measured on this card yet: ")[2].partition(".\n")[0].split(", ")
    assert "ceilings" in missing
    assert "residual_layernorm (768)" in missing
    assert "residual_layernorm" not in missing
    assert "0.250 (0.225 to 0.275) | 3,000 GB/s | 50% | torch, eager | 0.500 | 2.00x |" in text
    for block in text.split("\n\n"):
        widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1
    assert gpu_report.render([[{**results[0], "is_measurement": False}]]) == gpu_report.NOTHING
    assert "Tests on this card" not in text


def test_the_readme_says_which_tests_ran_on_a_card() -> None:
    results = [gpu_result("encoder_x", "some preset, inference", {"ours": row_of(80.0, is_ours=True)}, [], cells=64)]
    del results[0]["variants"]["full"]["rows"]["ours"]
    green = {group: {"status": "passed", "passed": 10} for group in gpu_tests.GROUPS}
    n_groups = len(green)
    text = gpu_report.render([[], results], [{}, {"groups": green}])
    assert f"Tests on this card: {10 * n_groups} passed, in {n_groups} of {n_groups} groups." in text
    assert "Which sources have changed since was not kept." in text
    assert "no tests of encoder_x." in text
    some = {**green, "encoder": {"status": "timeout"}, "wrapped": {"status": "failed", "passed": 9, "failed": 1}}
    del some["sanitizer"]
    about = {"commit": "0123456789ab", "torch": "2.11.0", "triton": "3.6.0", "parts": parts()}
    text = gpu_report.render([results], [{**about, "groups": some}])
    assert "Tests on this card (commit `0123456789ab`, torch 2.11.0, triton 3.6.0): " in text
    assert f"{10 * (n_groups - 3)} passed, in {n_groups - 3} of {n_groups} groups; " in text
    assert "encoder (ended by its limit of time), wrapped (red), sanitizer (not run)." in text
    assert "Nothing that runs on a card has changed since." in text


def test_the_readme_says_what_has_changed_since_the_tests() -> None:
    results = [gpu_result("encoder_x", "some preset", {"ours": row_of(80.0, is_ours=True, tflops=1.0)}, [], cells=64)]
    green = {group: {"status": "passed", "passed": 10, "seconds": 1.0} for group in gpu_tests.GROUPS}
    old = {**parts(), "rank_genes: launches": "another", "the encoder": "another"}
    del old["rank_genes: the fused pass and its other kernels"]
    found = {"commit": "ba9876543210", "parts": old, "groups": green}
    results[0]["tests"] = {"encoder": green["encoder"]}
    text = gpu_report.render([results], [found])
    assert (
        "**not run on a card** as it is now: rank_genes (the fused pass and its other kernels, launches); the encoder."
        in text
    )
    assert "were green; those of numbers at `0123456789ab` had run at `ba9876543210`." in text
    text = gpu_report.render([results], [{**found, "commit": "0123456789ab"}])
    assert "the tests that each number rests on were green.</sub>" in text
    results[0]["tests"] = {"encoder": {"status": "failed"}}
    text = gpu_report.render([results], [found])
    assert "red tests of encoder_x." in text
    assert "were green" not in text


def test_the_readme_says_what_is_missing_and_why() -> None:
    goals = [
        {"variant": "full", "metric": "tflops", "goal": 400, "impossible": 460, "reached": None, "impl": "triton"},
        {"variant": "full", "metric": "time_against:ours-no-dropout", "goal": 1.25, "impossible": 1.1, "reached": 1.51},
    ]
    rows = {"ours": {**row_of(0.8, is_ours=True, tflops=477.0), "impl": "cudnn", "relative_error": {"out": 0.002}}}
    attention = gpu_result("attention_x", "attention", rows, goals)
    off = "computes something else: relative errors {'hidden': 0.391}"
    attention["variants"]["full"]["left_out"] = {"flex": NO_TIME}
    ours = row_of(80.0, is_ours=True, tflops=1.0, cells_per_s=8.0)
    model = gpu_result(
        "encoder_x", "some preset", {"ours": {**ours, "relative_error": {"hidden": 0.243}}}, [], cells=64
    )
    model["variants"]["full"]["left_out"] = {"transformers-sdpa": off, "ours-compile": NOT_QUICK}
    model["corrections"] = ["some label"]
    text = gpu_report.render([[attention, model]])
    assert "inference, 64 cells, **run by cuDNN** | 0.800" in text
    assert (
        "| goals of the Triton kernel, not timed here: 400 TFLOP/s, 460 TFLOP/s; 1.51x the time of ours-no-dropout; "
        in text
    )
    assert "to cuDNN. So it was in attention_x (full)." in text
    assert "| transformers-sdpa: refused, off by 39% |  |  |" in text
    assert "Ours is off from float32 in: encoder_x (full), hidden states by 24%." in text
    assert "allowed: transformers-sdpa in encoder_x (full), by 39%." in text
    assert "No time was left to compile: flex in attention_x." in text
    assert "left out: ours-compile in encoder_x." in text
    assert "Labels corrected after the run, as the files say: encoder_x." in text
    rows["ours-triton"] = {**row_of(0.9, tflops=410.0), "impl": "triton", "relative_error": {}}
    goals[0]["reached"] = 410.0
    text = gpu_report.render([[attention]])
    assert "| goals of the Triton kernel, 410 TFLOP/s: **400 TFLOP/s**, 460 TFLOP/s;" in text


def test_the_report_knows_what_the_suite_says() -> None:
    assert (gpu_report.NO_TIME, gpu_report.NOT_QUICK, gpu_report.CUDNN) == (NO_TIME, NOT_QUICK, CUDNN)


def test_children_find_the_checkout_and_compile_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = gpu_tests.environment()
    assert "TRITON_INTERPRET" not in found
    assert found["PYTHONPATH"].split(os.pathsep)[:2] == [str(ROOT), str(ROOT / "kernels")]


NOT_INSTALLED = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path[:] = [path for path in sys.path if not path.endswith("kernels")]
import bench.gpu_suite, geneformer_kernels
print(geneformer_kernels.__file__)
"""


def test_a_checkout_that_is_not_installed_finds_its_kernels() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", NOT_INSTALLED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert Path(done.stdout.strip()).is_relative_to(ROOT / "kernels")


def test_implementations_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen, and what is not, each with its name; a card would run both."""
    from geneformer_kernels import feed_forward
    from geneformer_kernels.dispatch import choose
    from geneformer_kernels.target import target_of

    generator = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(*shape, generator=generator) for shape in ((5, 8), (16, 8), (8, 16)))
    seen = []

    def run() -> torch.Tensor:
        seen.append(choose("feed_forward", "float32", target_of("cpu")).impl)
        return feed_forward(x, up, None, down, None, activation="relu")

    ours = Candidate("ours", "this project", lambda: Prepared(run, lambda: {"out": run()}), is_ours=True)
    question = Question("feed_forward", "float32", {"width": 8, "ff_width": 16, "needs_grad": False})
    first, triton, torch_ = with_impls(ours, question, CPU)
    assert (first.name, triton.name, torch_.name) == ("ours", "ours-triton", "ours-torch")
    assert first.make().notes == {"impl": "torch"}
    for other, reason in ((triton, "needs CUDA"), (torch_, "ours runs it already")):
        with pytest.raises(Unavailable, match=reason):
            other.make()
    # As on a card, with the interpreter in its place.
    monkeypatch.setattr("bench.gpu_impls.target_of", lambda device: target_of("cpu"))
    _, triton, _ = with_impls(ours, question, SimpleNamespace(type="cuda"))  # type: ignore[arg-type]
    seen.clear()
    prepared = triton.make()
    torch.testing.assert_close(prepared.result()["out"], first.make().result()["out"])
    prepared.run()
    assert prepared.notes == {"impl": "triton"}
    assert seen.count("triton") == 3
    assert not triton.is_ours


def test_what_ran_is_noted_and_not_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of cells of one length is left to cuDNN on Hopper, whatever is chosen; the kernel stands beside it."""
    from geneformer_kernels import dispatch
    from geneformer_kernels.ops.varlen_attention import op, sdpa
    from geneformer_kernels.target import target_of

    monkeypatch.setattr("bench.gpu_impls.target_of", lambda device: target_of("cpu"))
    monkeypatch.setattr(sdpa, "attend_equal", lambda q, k, v, length, scale: q)
    q = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(0))

    def attend() -> torch.Tensor:
        return op.varlen_attention(q, q, q, cu_seqlens=torch.tensor([0, 4, 8]))

    assert not uses_cudnn(attend)
    ours = Candidate("ours", "this project", lambda: Prepared(attend, lambda: {"out": attend()}), is_ours=True)
    question = Question("varlen_attention", "float32", {"head_dim": 4, "length": 4, "needs_grad": False})
    card = SimpleNamespace(type="cuda")
    first, triton, torch_ = with_impls(ours, question, card, is_cudnn=uses_cudnn)  # type: ignore[arg-type]
    assert first.make().notes == {"impl": "torch"}
    with pytest.raises(Unavailable, match="ours runs it already"):
        torch_.make()
    monkeypatch.setattr(
        op, "_length_for_cudnn", lambda q, impl, *args: 0 if dispatch.is_forced("varlen_attention") else 4
    )
    assert uses_cudnn(attend)
    first, triton, torch_ = with_impls(ours, question, card, is_cudnn=uses_cudnn)  # type: ignore[arg-type]
    assert first.make().notes == {"impl": "cudnn"}
    assert torch_.make().notes == {"impl": "torch"}
    # Asked for by name: what cuDNN did not compute.
    assert not torch.equal(torch_.make().result()["out"], q)
    assert torch_.is_slow
    assert not triton.is_slow
    assert with_impls(ours, question, card)[1].is_slow  # type: ignore[arg-type]


def test_times_of_cudnn_are_no_times_of_a_kernel() -> None:
    rows = {
        "ours": {**row_of(1.0, is_ours=True), "impl": "cudnn", "tflops": 500.0},
        "ours-torch": {**row_of(2.0), "impl": "torch"},
    }
    result = gpu_result("attention_d64_forward", "attention", rows, [])
    result["variants"]["full"]["question"] = Question("varlen_attention", "bfloat16", {"head_dim": 64}).as_json()
    assert "varlen_attention" not in measured.render([result])
    goal = Goal("full", "tflops", 400, 460, impl="triton")
    assert goal.reached(rows) is None
    rows["ours-triton"] = {**row_of(1.5), "impl": "triton", "tflops": 410.0}
    assert "{'torch': 2.0, 'triton': 1.5}" in measured.render([result])
    assert goal.reached(rows) == 410
    for row in rows.values():
        row.pop("impl")
    assert Goal("full", "tflops", 400, 460).reached(rows) == 500
    # The committed rows of equal lengths, forward, ran on cuDNN, and are no goal's.
    (forward,) = (found for found in measured.committed() if found["case"] == "attention_d64_forward")
    for name in ("2048", "4096"):
        ours, cudnn = (forward["variants"][name]["rows"][row] for row in ("ours", "sdpa-cudnn"))
        assert ours["impl"] == "cudnn" or "ours-triton" in forward["variants"][name]["rows"]
        assert ours["ms"]["p50"] == pytest.approx(cudnn["ms"]["p50"], rel=0.01)


def test_rows_of_a_card_become_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a result to the generated module, and from there to what runs."""
    from geneformer_kernels import dispatch
    from geneformer_kernels.target import Target

    question = Question("feed_forward", "bfloat16", {"width": 768, "ff_width": 3072, "needs_grad": True})
    rows = {
        "ours": {**row_of(2.0, is_ours=True), "impl": "triton"},
        "ours-torch": {**row_of(1.0), "impl": "torch"},
        "eager": row_of(0.1),
    }
    result = gpu_result("feed_forward", "feed_forward", rows, [])
    result["variants"]["full"]["question"] = question.as_json()
    text = measured.render([result, {**result, "is_measurement": False}, {"case": "tokenize_v1"}])
    namespace: dict = {}
    exec(text, namespace)
    (key,) = namespace["MEASURED"]
    assert key == ("feed_forward", "Imaginary X1", "bfloat16")
    assert len(namespace["MEASURED"][key]) == 1
    monkeypatch.setattr(dispatch, "MEASURED", namespace["MEASURED"])
    card = Target.cuda(90, name="Imaginary X1")
    choice = dispatch.choose("feed_forward", "bfloat16", card, shape=question.shape)
    assert choice.impl == "torch"
    assert "2.00 times as fast as triton on Imaginary X1, measured 2030-01-02 at 0123456789ab" in choice.reason


def test_committed_rows_are_those_of_the_committed_results() -> None:
    assert measured.render(measured.committed()) == measured.TARGET.read_text(), "run python -m bench.measured"
