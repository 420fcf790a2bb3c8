"""``python -m bench gpu``: the tests on the card, then every case that they allow, within a time, resumable."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_cases import CASES, Case, floors
from bench.gpu_tests import AFTER, BESIDE, GROUPS, environment, red_groups, run_tests
from bench.machine import RESULTS, ROOT

# Starting Python, torch and the card.
START_S = 8.0
# How long past its estimate a case may run before it is ended; estimates are guesses.
PATIENCE = 3.0
ENOUGH_TO_SANITIZE_S = 90.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; 0 if nothing failed and nothing was refused."""
    args = parse(argv)
    if args.floors:
        print("\n".join(floors()))
        return 0
    import torch

    from bench.gpu_card import card, card_slug, source_digest

    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was measured (--device cpu --tiny tries the procedure)")
        return 1
    if args.commit:
        from bench.gpu_card import COMMIT

        os.environ[COMMIT] = args.commit
    is_dry = device.type == "cpu"
    out = (args.out or RESULTS / card_slug(card(device))).resolve()
    deadline = time.monotonic() + args.minutes * 60
    digest = source_digest(("kernels", "geneformer_fast", "tests"))
    if args.tests_only:
        return 1 if red_groups(GROUPS, run_tests(GROUPS, out, digest, seconds=args.minutes * 60)) else 0
    chosen = [case for case in CASES if args.only in case.name]
    missing = [case for case in chosen if args.again or not is_there(case, out)]
    known: dict[str, dict[str, Any]] = {}
    if missing and not is_dry:
        needed = [group for group in GROUPS if group == BESIDE or any(group in case.tests for case in missing)]
        known = run_tests(needed, out, digest, seconds=min(args.test_minutes, args.minutes) * 60)
        archive(out, args.archive)
    done = run_cases(missing, out, known, deadline, args, is_dry=is_dry)
    if not is_dry and deadline - time.monotonic() > ENOUGH_TO_SANITIZE_S:
        run_tests([AFTER], out, digest, seconds=deadline - time.monotonic())
        archive(out, args.archive)
    print(f"\n{len(chosen) - len(missing)} were there, " + ", ".join(f"{len(v)} {k}" for k, v in done.items()))
    for kind in ("failed", "refused", "left for the next run"):
        if done[kind]:
            print(f"{kind}: {', '.join(done[kind])}")
    print(
        f"results in {os.path.relpath(out)}" + ("" if is_dry else "; python -m bench.report puts them into the README")
    )
    return 1 if done["failed"] or done["refused"] else 0


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


def is_there(case: Case, out: Path) -> bool:
    """Whether a result is there that no time was missing for."""
    path = out / f"{case.name}.json"
    return path.exists() and not json.loads(path.read_text())["skipped"]


def run_cases(
    cases: Sequence[Case],
    out: Path,
    known: Mapping[str, Mapping[str, Any]],
    deadline: float,
    args: argparse.Namespace,
    *,
    is_dry: bool,
) -> dict[str, list[str]]:
    """Each case in a process of its own, in order; what would end too late is left, shorter ones after it are not.

    Returns
    -------
    dict
        Names of cases: ``measured``, ``failed``, ``refused`` (tests not green), ``left for the next run``.
    """
    done: dict[str, list[str]] = {"measured": [], "failed": [], "refused": [], "left for the next run": []}
    for case in cases:
        red = [] if is_dry else red_groups(case.tests, known)
        expected = START_S + case.seconds * (0.4 if args.quick else 1.0)
        left = deadline - time.monotonic()
        if red:
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
    aim = min(case.seconds * (0.4 if args.quick else 1.0), max(seconds - START_S, 1.0))
    command = [
        *(sys.executable, "-m", "bench.gpu_case", case.name, "--out", str(out), "--device", args.device),
        *("--seconds", f"{aim:.1f}", "--at-most", f"{seconds * 0.6:.1f}", "--tests", json.dumps(tests)),
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
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
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
