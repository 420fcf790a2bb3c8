"""The GPU tests that measurements rest on, a process per operation, so that one fault on the card loses one group."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.machine import ROOT

#: Group -> patterns of its test files, what takes longest first.
GROUPS: dict[str, tuple[str, ...]] = {
    "encoder": ("tests/gpu/test_encoder*.py", "tests/gpu/test_training*.py", "tests/kernels/test_dropout_gradients.py"),
    **{
        op: (f"tests/kernels/test_{op}*.py",)
        for op in (
            *("rank_genes", "varlen_attention", "residual_layernorm", "embed_tokens", "feed_forward"),
            *("favor_attention", "mlm_cross_entropy", "int8_feed_forward", "fp8_linear"),
        )
    },
    "int8_linear": ("tests/kernels/test_int8_linear*.py", "tests/kernels/test_quantize_rows*.py"),
    "wrapped": ("tests/gpu/test_wrapped*.py", "tests/profiling/test_profile_on_card*.py"),
    "sanitizer": ("tests/gpu/test_sanitizer*.py",),
}
#: Groups that take minutes (every dtype of counts compiles five sorts): they run when a case that rests on them is due.
LATE = ("rank_genes",)
#: No number rests on these: the first run beside the others, the last, which takes minutes, after the measurements.
BESIDE, AFTER = "wrapped", "sanitizer"
FILE = "tests.json"
# A mark, or one of the fixtures that bring it.
_FOR_CARDS = re.compile(r"mark\.gpu\b|^def test_\w+\([^)]*\b(device|card|place)\b", re.MULTILINE)
# With this many at once the card is shared well, and compiling, which takes most of the time, is spread over cores.
MOST_AT_ONCE = 8
#: Processes of a group at least, where pytest-xdist is there; fewer groups have more each.
WORKERS = 2
#: And of those that take longest.
MORE_WORKERS = {"rank_genes": 8}


@dataclass
class Running:
    """One group's pytest."""

    group: str
    process: subprocess.Popen[bytes]
    log: Path
    report: Path
    begin: float = field(default_factory=time.monotonic)


def environment() -> dict[str, str]:
    """Of every child: both source roots of this checkout first, no network, kernels compiled and not interpreted."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    found.pop("TRITON_INTERPRET", None)
    return found


def files_of(group: str) -> list[str]:
    """Files of a group that hold tests for cards, from the checkout's root; others may import what is not here."""
    paths = [path for pattern in GROUPS[group] for path in sorted(ROOT.glob(pattern))]
    return [str(path.relative_to(ROOT)) for path in paths if _FOR_CARDS.search(path.read_text(encoding="utf-8"))]


def outcomes(out: Path, basis: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What earlier runs in ``out`` said on the same card, of the same versions and sources: group -> outcome."""
    path = out / FILE
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        return found["groups"] if all(found.get(name) == value for name, value in basis.items()) else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"{os.path.relpath(path)} cannot be read ({error}): the tests run again", flush=True)
        return {}


def run_tests(
    groups: Iterable[str],
    out: Path,
    basis: Mapping[str, Any],
    *,
    seconds: float,
    about: Mapping[str, Any] | None = None,
    is_again: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run the groups that have not passed yet; several at once, none longer than ``seconds`` from now.

    Parameters
    ----------
    groups
        Names, in the order in which they begin.
    out
        Folder of ``tests.json``, which is complete after every group that ends, and of ``logs``.
    basis
        Card, versions and sources (:func:`bench.gpu.sources.basis_of`): green groups of another one are not green here.
    seconds
        From now.
    about
        Kept beside the outcomes: the commit, the date, digests of parts of the sources.
    is_again
        Also what has passed.

    Returns
    -------
    dict
        Group -> ``status`` (``"passed"``, ``"failed"``, ``"none"`` ran, ``"timeout"``), counts, seconds, log. Written
        to ``tests.json`` as well, with the card, versions and sources it holds for.
    """
    known = {} if is_again else outcomes(out, basis)
    waiting = [group for group in groups if known.get(group, {}).get("status") != "passed"]
    running: list[Running] = []
    deadline = time.monotonic() + seconds
    n_cores = len(os.sched_getaffinity(0))
    n_at_once = max(1, min(MOST_AT_ONCE, n_cores // 2))
    n_workers = max(WORKERS, n_cores // max(1, min(n_at_once, len(waiting))))
    try:
        while waiting or running:
            while waiting and len(running) < n_at_once and time.monotonic() < deadline:
                group = waiting.pop(0)
                running.append(_start(group, out, max(n_workers, MORE_WORKERS.get(group, 0))))
            if time.monotonic() >= deadline:
                for group in waiting:
                    known[group] = {"status": "timeout", "log": "", "why": "no time was left to start it"}
                waiting = []
            for item in [item for item in running if item.process.poll() is not None or time.monotonic() >= deadline]:
                running.remove(item)
                known[item.group] = _finish(item)
                _write(out, basis, about, known)
                print(f"tests of {item.group}: {summary(known[item.group])}", flush=True)
            time.sleep(0.2)
    finally:
        # Each leads a session of its own, so that nobody else would end it.
        for item in running:
            end(item.process)
    _write(out, basis, about, known)
    return known


def _write(out: Path, basis: Mapping[str, Any], about: Mapping[str, Any] | None, known: Mapping[str, Any]) -> None:
    """``tests.json``, whole at any moment."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f".{FILE}.partial"
    partial.write_text(json.dumps({**basis, **(about or {}), "groups": known}, indent=1) + "\n")
    os.replace(partial, out / FILE)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, with all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def command_of(group: str, report: Path, n_workers: int = WORKERS) -> Sequence[str]:
    """The pytest of a group."""
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "--durations=5"]
    if find_spec("xdist") is not None:
        options += ["-n", str(n_workers)]
    return [sys.executable, "-m", "pytest", *files_of(group), *options]


def _start(group: str, out: Path, n_workers: int) -> Running:
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log, report = logs / f"tests_{group}.log", logs / f"tests_{group}.xml"
    report.unlink(missing_ok=True)
    if not files_of(group):
        command: Sequence[str] = [sys.executable, "-c", "print('there are no such tests')"]
    else:
        command = command_of(group, report, n_workers)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Running(group, process, log, report)


def _finish(item: Running) -> dict[str, Any]:
    """The outcome of a group that ended, or that is ended now because its time is over."""
    found: dict[str, Any] = {"log": item.log.name, "seconds": round(time.monotonic() - item.begin, 1)}
    if item.process.poll() is None:
        end(item.process)
        return {"status": "timeout", **found}
    counts = counts_of(item.report)
    is_red = item.process.returncode not in (0, 5) or counts["failed"] > 0
    status = "failed" if is_red else "passed" if counts["passed"] else "none"
    return {"status": status, **counts, **found}


def counts_of(report: Path) -> dict[str, int]:
    """Passed, failed (errors counted) and skipped tests of a JUnit file; zeros where there is none."""
    if not report.exists():
        return {"passed": 0, "failed": 0, "skipped": 0}
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    total, skipped = (sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "skipped"))
    failed = sum(int(suite.get(name, 0)) for suite in suites for name in ("failures", "errors"))
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def summary(outcome: Mapping[str, Any]) -> str:
    """One line."""
    counts = ", ".join(f"{outcome[name]} {name}" for name in ("passed", "failed", "skipped") if outcome.get(name))
    return f"{outcome['status']}" + (f" ({counts})" if counts else "")


def red_groups(needed: Iterable[str], known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Groups among ``needed`` without green tests, with what is known of them."""
    return [
        f"{group}: {summary(known[group]) if group in known else 'not run'}"
        for group in needed
        if known.get(group, {}).get("status") != "passed"
    ]
