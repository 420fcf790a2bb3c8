"""The first call: what is cold and what is warm, and what becomes of a program that fails."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from bench import first_call, report
from bench.compare import readings
from bench.first_call import PROGRAMS, Subject, measure, run_once, table
from bench.machine import save_result

# Keeps something for the next process, as a compiler does, and takes longer where there is nothing.
_KEEPING = """
import os, pathlib
kept = pathlib.Path(os.environ["NUMBA_CACHE_DIR"]) / "kept"
stages["found what was kept"] = float(kept.exists())
kept.parent.mkdir(parents=True, exist_ok=True)
kept.touch()
"""
_HEAD = """
import json, sys, time
stages = {"python": time.monotonic() - float(sys.argv[1])}
"""


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that begin in milliseconds."""
    monkeypatch.setattr(first_call, "_HEAD", _HEAD)
    some = {"keeping": _KEEPING, "failing": "raise SystemExit('no compiler here')", "silent": "sys.exit(0)"}
    monkeypatch.setattr(first_call, "PROGRAMS", some)


@pytest.mark.usefixtures("programs")
def test_cold_finds_nothing_and_warm_what_cold_left(tmp_path: Path) -> None:
    content = measure([Subject("keeping", ()), Subject("failing", ())], tmp_path, rounds=3)
    stages = content["programs"]["keeping"]["stages"]
    assert stages["found what was kept"]["cold"]["seconds"] == {"min": 0.0, "median": 0.0, "max": 0.0}
    assert stages["found what was kept"]["warm"]["seconds"] == {"min": 1.0, "median": 1.0, "max": 1.0}
    # The first stage begins when the process was asked for.
    assert 0 < stages["python"]["cold"]["seconds"]["min"] < 5
    whole = content["programs"]["keeping"]["whole"]["warm"]["seconds"]["median"]
    assert whole == pytest.approx(1 + stages["python"]["warm"]["seconds"]["median"], abs=0.2)
    assert content["programs"]["failing"] == {"not_available": "no compiler here"}
    assert not [*tmp_path.iterdir()], "caches are left behind"
    said = table(content)
    assert "failing: not available (no compiler here)" in said
    assert any(line.split()[:2] == ["all", "together"] for line in said.splitlines())
    assert "programs.keeping.whole.cold.seconds" in readings(content)
    result = {"case": "first_call_x_cpu", "geometry": "v1-10m", "device": "cpu", **content}
    save_result(result["case"], result, folder=tmp_path / "results" / "some-machine")
    rows = report.render(tmp_path / "results").splitlines()
    assert "| Geneformer V1-10M, cpu: failing | not available (no compiler here) |  |" in rows
    assert "| &nbsp;&nbsp;found what was kept | 0.00 | 1.00 |" in rows


@pytest.mark.usefixtures("programs")
def test_a_process_that_says_nothing_is_a_reason(tmp_path: Path) -> None:
    assert run_once(Subject("silent", ()), tmp_path) == "the process ended with 0"


def test_programs_load_nothing_of_this_folder() -> None:
    """What they import counts."""
    for program in PROGRAMS.values():
        tree = ast.parse(first_call._HEAD + program + first_call._TAIL)
        imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name.partition(".")[0] for node in imported for alias in node.names}
        names |= {(getattr(node, "module", None) or "").partition(".")[0] for node in imported}
        assert "bench" not in names


@pytest.mark.slow
def test_the_command_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert first_call.main(["--out", str(tmp_path), "--rounds", "1"]) == 0
    result = json.loads((tmp_path / "first_call_v1-10m_cpu.json").read_text())
    stages = result["programs"]["embed"]["stages"]
    first, second = (stages[f"{call} embed"]["cold"]["seconds"]["median"] for call in ("first", "second"))
    assert first > second > 0
    assert stages["first embed"]["warm"]["seconds"]["median"] < first
    assert "embed" in capsys.readouterr().out


def test_wrong_options_are_refused() -> None:
    with pytest.raises(SystemExit):
        first_call.main(["--rounds", "0"])
