"""The tests that the GPU suite runs before it measures: their groups and outcomes, and what they need installed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import own_process
import pytest

from bench.gpu import suite as gpu_suite
from bench.gpu import tests_on_card

ROOT = Path(__file__).resolve().parent.parent


JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest" errors="{errors}" failures="{failures}" skipped="2"
tests="9"></testsuite></testsuites>"""


def test_outcomes_of_tests_are_read(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    assert tests_on_card.counts_of(report) == {"passed": 0, "failed": 0, "skipped": 0}
    report.write_text(JUNIT.format(errors=1, failures=2))
    assert tests_on_card.counts_of(report) == {"passed": 4, "failed": 3, "skipped": 2}


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
    monkeypatch.setattr(tests_on_card, "GROUPS", dict.fromkeys(scripts, ()))
    monkeypatch.setattr(tests_on_card, "files_of", lambda group: ["some"])
    monkeypatch.setattr(
        tests_on_card,
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
    known = tests_on_card.run_tests(groups, tmp_path, here, seconds=60, about={"commit": "0123"})
    assert {name: found["status"] for name, found in known.items()} == {
        "green": "passed", "red": "failed", "dead": "failed", "empty": "none",
    }  # fmt: skip
    assert known["green"]["passed"] == 7
    assert tests_on_card.red_groups(["green"], known) == []
    assert len(tests_on_card.red_groups(["green", "red", "dead", "empty", "unknown"], known)) == 4
    begun = (tmp_path / "logs" / "tests_green.log").stat().st_mtime_ns
    tests_on_card.run_tests(["green", "red"], tmp_path, here, seconds=60, about={"commit": "0123"})
    assert (tmp_path / "logs" / "tests_green.log").stat().st_mtime_ns == begun
    assert tests_on_card.outcomes(tmp_path, here)["green"]["status"] == "passed"
    for name in here:
        assert tests_on_card.outcomes(tmp_path, {**here, name: "another"}) == {}
    written = json.loads((tmp_path / "tests.json").read_text())
    assert {name: written[name] for name in (*here, "commit")} == {**here, "commit": "0123"}


def test_outcomes_that_cannot_be_read_are_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_groups(monkeypatch, tmp_path)
    for text in ('{"source": "dig', "[]", '{"source": "digest"}'):
        (tmp_path / "tests.json").write_text(text)
        known = tests_on_card.run_tests(["green"], tmp_path, {"source": "digest"}, seconds=60)
        assert known["green"]["status"] == "passed"
        assert "cannot be read" in capsys.readouterr().out


def run_and_hang(folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been ignored where this was started
    pid = f"print(os.getpid(), file=open({str(folder / 'pid')!r}, 'w'), flush=True)"
    # A child may be at work before Popen has returned to whoever began it: it waits before it says who it is.
    lines = {"green": "import sys; sys.exit(5)", "hanging": f"import os, time; time.sleep(1); {pid}; time.sleep(60)"}
    tests_on_card.files_of = lambda group: ["some"]
    tests_on_card.command_of = lambda group, report, n_workers: [sys.executable, "-S", "-c", lines[group]]
    with gpu_suite.ended_like_an_interrupt():
        tests_on_card.run_tests(list(lines), folder, {"source": "digest"}, seconds=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_keeps_outcomes_and_leaves_nobody_behind(tmp_path: Path, number: int) -> None:
    process = own_process.begin(run_and_hang, tmp_path)
    end = time.monotonic() + 60
    while not ((tmp_path / "tests.json").exists() and (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(timeout=30)
    assert process.exitcode not in (0, None)
    assert json.loads((tmp_path / "tests.json").read_text())["groups"]["green"]["status"] == "none"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_hanging_tests_are_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_groups(monkeypatch, tmp_path)
    known = tests_on_card.run_tests(["hanging"], tmp_path, {"source": "digest"}, seconds=1)
    assert known["hanging"]["status"] == "timeout"
    assert tests_on_card.red_groups(["hanging"], known)


def test_every_test_for_cards_is_in_one_group() -> None:
    for group in ("encoder", "wrapped", "sanitizer"):
        assert f"tests/gpu/test_{group}_gpu.py" in tests_on_card.files_of(group)
    found = [file for group in tests_on_card.GROUPS for file in tests_on_card.files_of(group)]
    assert len(found) == len(set(found))
    brings_the_mark = re.compile(
        r"^(pytestmark = |@|GPU = )pytest\.mark\.gpu|marks=pytest\.mark\.gpu|^def test_\w+\([^)]*\bdevice: str",
        re.MULTILINE,
    )
    paths = [path for path in (ROOT / "tests").rglob("test_*.py") if brings_the_mark.search(path.read_text())]
    marked = {str(path.relative_to(ROOT)) for path in paths}
    assert "tests/kernels/test_dropout_gradients.py" in marked
    assert marked <= set(found)
    assert "gpu" in tests_on_card.command_of("encoder", Path("report.xml"))


BARE = """
import bare, sys, torch
import bench.gpu.suite, bench.gpu.tests_on_card
from bench.gpu.case import run_case
from bench.gpu.cases import case_named
for name in ("encoder_10m_inference", "rank_genes"):
    result = run_case(case_named(name), torch.device("cpu"), seconds=100, is_tiny=True)
    # On a CPU counts are ranked by numba; on a card nothing is.
    assert not result["failed"] or name == "rank_genes", result
hidden = {name.partition(".")[0] for name in sys.modules} & bare.ABSENT
assert not hidden, hidden
print("measured", flush=True)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


#: Where tests for cards are looked for -> how many there are at least. Those of kernels are nine tenths.
LOOKED_FOR = {"tests/gpu": 20, "tests": 500}


@pytest.fixture(scope="module", params=["tests/gpu", pytest.param("tests", marks=pytest.mark.slow)])
def where(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def without_the_rest(where: str) -> subprocess.CompletedProcess[str]:
    """A process that measures, and then looks at every test for cards in a folder."""
    pytest.importorskip("transformers")
    plugins = ("-p", "bare", "-p", "no:cacheprovider")
    environment = tests_on_card.environment()
    environment["PYTHONPATH"] += os.pathsep + str(ROOT / "tests" / "gpu")
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # hypothesis, zarr and others bring plugins
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BARE, where, "-m", "gpu", "-v", "--assert=plain", *plugins], cwd=ROOT,
        env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip


def test_torch_triton_numpy_and_transformers_are_enough_to_measure(
    without_the_rest: subprocess.CompletedProcess[str],
) -> None:
    done = without_the_rest
    assert "measured\n" in done.stdout, done.stdout[-3000:] + done.stderr


def test_and_with_pytest_to_test(where: str, without_the_rest: subprocess.CompletedProcess[str]) -> None:
    """Every test for cards is collected, and set up until it finds no card, with nothing else installed."""
    done = without_the_rest
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    assert all("SKIPPED" in line for line in tests), "something marked gpu runs without a card"
    files = {line.partition("::")[0] for line in tests}
    everything = {file for group in tests_on_card.GROUPS for file in tests_on_card.files_of(group)}
    assert files >= {file for file in everything if file.startswith(f"{where}/")}
    assert len(tests) >= LOOKED_FOR[where]
