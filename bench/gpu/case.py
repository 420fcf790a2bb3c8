"""Runs one GPU case in this process and writes its JSON: ``python -m bench.gpu.case NAME --out DIR``.

``python -m bench gpu`` starts it, once per case, so that a crash loses one case only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.gpu.card import ceilings, gpu_provenance
from bench.gpu.cases import Case, case_named
from bench.gpu.measure import Compiling, Place, measure_or_say_why, release
from bench.gpu.sources import basis_of, source_of
from bench.machine import RESULTS
from geneformer_fast.profiling.clock import clock_of
from geneformer_fast.profiling.machine import state


def run_case(
    case: Case,
    device: torch.device,
    *,
    seconds: float,
    compile_s: float = float("inf"),
    at_most_s: float = float("inf"),
    ended_after_s: float = float("inf"),
    is_tiny: bool = False,
    is_quick: bool = False,
    backend: str | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda content: None,
) -> dict[str, Any]:
    """Measure one case.

    Parameters
    ----------
    case, device
        What and where.
    seconds
        About that long, compiling apart.
    compile_s
        For torch.compile, of all variants together.
    at_most_s
        After that no further variant is begun.
    ended_after_s
        After that somebody ends this process: nothing is compiled that would take longer.
    is_tiny, is_quick
        As in :class:`bench.gpu.measure.Place`.
    backend
        Of torch.compile; None is its usual one, or no compiling at all with ``is_tiny``.
    keep
        Gets what is known after every variant, with those to come among ``skipped``: what comes later may fail.

    Returns
    -------
    dict
        What the JSON file holds, without the outcome of the tests; ``failed`` names variants without any of ours,
        ``skipped`` those that no time was left for.
    """
    begin = time.monotonic()
    clock = clock_of(device)
    before = state(device)
    at_most = ceilings(device, is_tiny=is_tiny, is_thorough=case.problems is None)
    backend = ("" if is_tiny else "inductor") if backend is None else backend
    compiling = Compiling(compile_s, begin + ended_after_s)
    place = Place(device, clock, at_most, begin + seconds, is_tiny, is_quick, backend, compiling)
    found: dict[str, Any] = {}
    skipped: list[str] = []
    variants = case.problems.variants(place) if case.problems is not None else []
    about = gpu_provenance(device)

    def content() -> dict[str, Any]:
        return {
            "case": case.name,
            "suite": "gpu",
            "title": case.title,
            "is_measurement": device.type == "cuda" and not is_tiny,
            "is_quick": is_quick,
            "basis": basis_of(about["gpu"]["name"], source_of(case)),
            "provenance": about,
            "state": {"before": before, "after": state(device)},
            "ceilings": at_most,
            "variants": found,
            "goals": [goal.as_json(found[goal.variant]["rows"]) for goal in case.goals if goal.variant in found],
            "failed": [name for name, one in found.items() if not has_ours(one)],
            "skipped": [*skipped, *(variant.name for variant in variants)],
            "wall_s": round(time.monotonic() - begin, 1),
        }

    while variants:
        # What is left, shared among what is left; half of it for making.
        share = max(place.seconds_left, 0) / len(variants) / 2
        variant = variants.pop(0)
        if time.monotonic() - begin > at_most_s:
            skipped.append(variant.name)
            continue
        found[variant.name] = measure_or_say_why(variant, place, seconds=min(share, 20.0))
        print(_line(variant.name, found[variant.name]), flush=True)
        del variant  # and its inputs
        keep(content())
        release(place)
    return content()


def has_ours(found: Mapping[str, Any]) -> bool:
    """Whether anything of ours was measured in a variant."""
    return any(row["is_ours"] for row in found["rows"].values())


def write(content: Mapping[str, Any], out: Path) -> None:
    """The case's file, whole at any moment; none while nothing of ours is in it."""
    variants = content["variants"]
    if variants and not any(map(has_ours, variants.values())):
        return
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f".{content['case']}.partial"
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, out / f"{content['case']}.json")


def _line(name: str, found: dict[str, Any]) -> str:
    rows = sorted(found["rows"].items(), key=lambda item: item[1]["ms"]["p50"])
    times = ", ".join(f"{row} {value['ms']['p50']:.3f}" for row, value in rows)
    if not times:
        return f"  {name}: nothing ({found.get('error', 'see above')})"
    return f"  {name}: {times} ms (floor {found['work']['floor_ms']:.3f})"


def main() -> int:
    """Measure and write; 1 if ours is missing somewhere."""
    parser = argparse.ArgumentParser(description="run one GPU case")
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--compile-seconds", type=float, default=float("inf"), help="for torch.compile, besides")
    parser.add_argument("--at-most", type=float, default=float("inf"), help="seconds after which no variant is begun")
    parser.add_argument("--ended-after", type=float, default=float("inf"), help="seconds until somebody ends this")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tests", default="{}", help="outcome of the tests it rests on, as JSON")
    args = parser.parse_args()
    if (args.tiny or args.device == "cpu") and RESULTS in [args.out.resolve(), *args.out.resolve().parents]:
        parser.error("what is no measurement stays out of bench/results")
    case = case_named(args.name)
    device = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device(args.device)
    tests = json.loads(args.tests)
    content = run_case(
        case,
        device,
        seconds=args.seconds,
        compile_s=args.compile_seconds,
        at_most_s=args.at_most,
        ended_after_s=args.ended_after,
        is_tiny=args.tiny,
        is_quick=args.quick,
        keep=lambda known: write({**known, "tests": tests}, args.out),
    )
    write({**content, "tests": tests}, args.out)
    if content["failed"]:
        print(f"{case.name}: ours is missing in {', '.join(content['failed'])}", flush=True)
    return 1 if content["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
