"""The GPU suite's procedure: which cases run, in which order, what is left alone, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import measured
from bench.gpu import suite as gpu_suite
from bench.gpu import tests_on_card
from bench.gpu.cases import QUICK, Case, case_named, floors
from bench.gpu.measure import NO_TIME
from bench.gpu.sources import TESTED, parts, source_of, tree_digest

ROOT = Path(__file__).resolve().parent.parent


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
    assert tests_on_card.LATE == ("rank_genes",)
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
    assert changed("bench/gpu/models.py") == ([*names], ["the random encoders that are compared"])
    assert changed("bench/gpu/measure.py") == ([*names], [])
    assert changed("kernels/geneformer_kernels/launch.py") == ([*names], ["what all kernels share"])
    # What comes from results, and what does not run on a card.
    assert changed("kernels/geneformer_kernels/measured.py") == ([], [])
    assert changed("bench/gpu/report.py") == ([], [])
    assert source_of(case_named(names[0])) != source_of(case_named("attention_d32_forward"))  # another problem


def test_tests_run_again_when_the_models_they_compare_change(tmp_path: Path) -> None:
    root = copied(tmp_path)
    before = tree_digest(TESTED, root=root)
    assert before == tree_digest(TESTED)
    (root / "bench" / "gpu" / "models.py").write_text("")
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


def test_the_command_is_resumable_and_survives_a_case_that_is_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cpu", "--tiny", "--out", str(tmp_path / "out"), "--only", "ceilings"]
    options += ["--archive", str(tmp_path / "all.tar.gz")]
    command = [sys.executable, "-m", "bench", "gpu", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert "1 measured" in done.stdout
    assert gpu_suite.main(options) == 0
    assert "1 were there, 0 measured" in capsys.readouterr().out
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


def test_children_find_the_checkout_and_compile_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = tests_on_card.environment()
    assert "TRITON_INTERPRET" not in found
    assert found["PYTHONPATH"].split(os.pathsep)[:2] == [str(ROOT), str(ROOT / "kernels")]


NOT_INSTALLED = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path[:] = [path for path in sys.path if not path.endswith("kernels")]
import bench.gpu.suite, geneformer_kernels
print(geneformer_kernels.__file__)
"""


def test_a_checkout_that_is_not_installed_finds_its_kernels() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", NOT_INSTALLED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert Path(done.stdout.strip()).is_relative_to(ROOT / "kernels")
