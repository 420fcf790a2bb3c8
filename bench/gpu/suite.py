"""``python -m bench gpu``: the tests on the card, then every case that they allow, within a time, resumable."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.cases import CASES, QUICK, Case, floors
from bench.gpu.measure import NO_TIME
from bench.gpu.sources import TESTED, basis_of, parts, source_of, tree_digest
from bench.gpu.tests_on_card import AFTER, BESIDE, GROUPS, LATE, end, environment, red_groups, run_tests
from bench.machine import RESULTS, ROOT

# Starting Python, torch and the card.
START_S = 8.0
# How long past its estimate a case may run before it is ended; estimates are guesses.
PATIENCE = 3.0
# Share of its estimate that a case aims at; making, comparing and warming up go past it.
AIM = 0.6
ENOUGH_TO_SANITIZE_S = 90.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; 0 if nothing failed and nothing was refused."""
    args = parse(argv)
    if args.floors:
        print("\n".join(floors()))
        return 0
    import torch

    from bench.gpu.card import gpu_provenance
    from geneformer_fast.profiling.machine import COMMIT, slug

    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was measured (--device cpu --tiny tries the procedure)")
        return 1
    if args.commit:
        os.environ[COMMIT] = args.commit
    about = gpu_provenance(device)
    out = (args.out or RESULTS / slug(about["gpu"]["name"])).resolve()
    with ended_like_an_interrupt():
        return _run(args, out, about, is_dry=device.type == "cpu")


def _run(args: argparse.Namespace, out: Path, here: Mapping[str, Any], *, is_dry: bool) -> int:
    """Tests and cases, on the card and of the commit that ``here`` names."""
    deadline = time.monotonic() + args.minutes * 60
    card = here["gpu"]["name"]
    about = {"commit": here["commit"], "is_dirty": here["is_dirty"], "date": here["date"], "parts": parts()}

    def test(groups: Iterable[str], seconds: float) -> dict[str, dict[str, Any]]:
        found = run_tests(groups, out, basis_of(card, tree_digest(TESTED)), seconds=seconds, about=about)
        archive(out, args.archive)
        return found

    if args.tests_only:
        return 1 if red_groups(GROUPS, test(GROUPS, args.minutes * 60)) else 0
    chosen = [case for case in CASES if args.only in case.name]
    missing = [
        case
        for case in chosen
        if args.again or not is_there(case, out, basis_of(card, source_of(case)), is_quick=args.quick)
    ]
    known: dict[str, dict[str, Any]] = {}
    test_s = min(args.test_minutes, args.minutes) * 60
    if missing and not is_dry:
        known = test(needed_groups(missing), test_s)

    def test_late(groups: Iterable[str]) -> dict[str, dict[str, Any]]:
        return test(groups, min(test_s, deadline - time.monotonic()))

    done = run_cases(missing, out, known, deadline, args, is_dry=is_dry, test=test_late)
    if not is_dry and deadline - time.monotonic() > ENOUGH_TO_SANITIZE_S:
        test([AFTER], deadline - time.monotonic())
    print(f"\n{len(chosen) - len(missing)} were there, " + ", ".join(f"{len(v)} {k}" for k, v in done.items()))
    for kind in ("failed", "refused", "left for the next run"):
        if done[kind]:
            print(f"{kind}: {', '.join(done[kind])}")
    print(
        f"results in {os.path.relpath(out)}"
        + ("" if is_dry else "; python -m bench.report puts them into docs/results.md")
    )
    return 1 if done["failed"] or done["refused"] else 0


@contextlib.contextmanager
def ended_like_an_interrupt() -> Iterator[None]:
    """SIGTERM within is an exception, as an interrupt is: children are ended, and what is known is written."""

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def needed_groups(cases: Iterable[Case]) -> list[str]:
    """Groups of tests before the first case, in the order of the cases they guard, without those that wait."""
    return [*dict.fromkeys(group for case in cases for group in case.tests if group not in LATE), BESIDE]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of this card (default: bench/results/<card>)")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no case that would end later (default: 9)")
    parser.add_argument("--test-minutes", type=float, default=5.0, help="of these, at most for tests (default: 5)")
    parser.add_argument("--tests-only", action="store_true", help="run all groups of tests, measure nothing")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no rivals that are slow or compiled first")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="keep a .tar.gz of --out up to date there")
    parser.add_argument("--commit", default="", help="name of the commit, where git does not know it")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="sizes that try the procedure; no measurement")
    parser.add_argument("--floors", action="store_true", help="measure nothing, print what an H200 needs at least")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.tiny:
        parser.error("on a CPU only --tiny makes sense: nothing is measured there")
    inside = args.out is None or RESULTS in [args.out.resolve(), *args.out.resolve().parents]
    if args.tiny and inside:
        parser.error("--tiny needs an --out outside bench/results: it makes no measurements")
    return args


def is_there(case: Case, out: Path, basis: Mapping[str, Any], *, is_quick: bool) -> bool:
    """Whether a whole result is there: of this card, these versions and sources, with nothing failed or left out.

    What a longer run would have had, and what no time was left for, is missing; so it is where the file cannot be read.
    """
    path = out / f"{case.name}.json"
    if not path.exists():
        return False
    try:
        found = json.loads(path.read_text())
        is_whole = not found["skipped"] and not found["failed"] and (is_quick or not found["is_quick"])
        reasons = [reason for variant in found["variants"].values() for reason in variant["left_out"].values()]
        return is_whole and found.get("basis") == basis and NO_TIME not in reasons
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"{os.path.relpath(path)} cannot be read ({error}): {case.name} is measured again", flush=True)
        return False


def run_cases(
    cases: Sequence[Case],
    out: Path,
    known: Mapping[str, Mapping[str, Any]],
    deadline: float,
    args: argparse.Namespace,
    *,
    is_dry: bool,
    test: Callable[[Sequence[str]], Mapping[str, Mapping[str, Any]]] = lambda groups: {},
) -> dict[str, list[str]]:
    """Each case in a process of its own, in order; what would end too late is left, shorter ones after it are not.

    ``test`` runs groups of tests that waited until a case needs them (:data:`bench.gpu.tests_on_card.LATE`).

    Returns
    -------
    dict
        Names of cases: ``measured``, ``failed``, ``refused`` (tests not green), ``left for the next run``.
    """
    done: dict[str, list[str]] = {"measured": [], "failed": [], "refused": [], "left for the next run": []}
    for case in cases:
        expected = START_S + case.expected(is_quick=args.quick)
        late = [group for group in case.tests if group in LATE and known.get(group, {}).get("status") != "passed"]
        if late and not is_dry and deadline - time.monotonic() >= expected:
            known = {**known, **test(late)}
        red = [] if is_dry else red_groups(case.tests, known)
        left = deadline - time.monotonic()
        if red and not (late and left < expected):
            print(f"{case.name}: refused, because its tests are not green ({'; '.join(red)})", flush=True)
            done["refused"].append(case.name)
        elif left < expected:
            done["left for the next run"].append(case.name)
        else:
            print(f"{case.name} ...", flush=True)
            tests = {} if is_dry else {group: known[group] for group in case.tests}
            is_good = run_child(case, out, tests, seconds=min(expected * PATIENCE, left), args=args)
            done["measured" if is_good else "failed"].append(case.name)
            archive(out, args.archive)
    return done


def archive(out: Path, target: Path | None) -> None:
    """Results and logs as one file, complete at any moment, to be carried off the machine."""
    if target is None:
        return
    partial = target.with_name(f".{target.name}.partial")
    with tarfile.open(partial, "w:gz") as tar:
        tar.add(out, arcname=out.name)
    os.replace(partial, target)


def run_child(case: Case, out: Path, tests: Mapping[str, Any], *, seconds: float, args: argparse.Namespace) -> bool:
    """One case; its output goes on to ours and into a log. It aims at its estimate and is ended after ``seconds``."""
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    ended_after = max(seconds - START_S, 1.0)
    aim = min(AIM * case.seconds * (QUICK if args.quick else 1.0), ended_after)
    command = [
        *(sys.executable, "-m", "bench.gpu.case", case.name, "--out", str(out), "--device", args.device),
        *("--seconds", f"{aim:.1f}", "--compile-seconds", str(case.compile_s), "--at-most", f"{seconds * 0.6:.1f}"),
        *("--ended-after", f"{ended_after:.1f}", "--tests", json.dumps(tests)),
        *(["--tiny"] if args.tiny else []),
        *(["--quick"] if args.quick else []),
    ]
    log = logs / f"{case.name}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    print("".join(_last_lines(log)), end="", flush=True)
    if code is None:
        print(f"  ended after {seconds:.0f} s", flush=True)
    elif code:
        print(f"  failed with {code}; {os.path.relpath(log)} says more", flush=True)
    return code == 0


def _last_lines(log: Path, n: int = 30) -> list[str]:
    """What the case said, without what libraries said: its own lines are indented by two."""
    lines = log.read_text(errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.startswith("  ") and not line.startswith("   ")][-n:]


if __name__ == "__main__":
    sys.exit(main())
