"""Runs one GPU case in this process and writes its JSON: ``python -m bench.gpu_case NAME --out DIR``.

``python -m bench gpu`` starts it, once per case, so that a crash loses one case only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu_card import ceilings, gpu_provenance, state
from bench.gpu_cases import Case, case_named
from bench.gpu_measure import Place, measure, release
from bench.gpu_timer import clock_of
from bench.machine import RESULTS


def run_case(
    case: Case,
    device: torch.device,
    *,
    seconds: float,
    at_most_s: float = float("inf"),
    is_tiny: bool = False,
    is_quick: bool = False,
    backend: str | None = None,
) -> dict[str, Any]:
    """Measure one case, in about ``seconds``; after ``at_most_s`` no further variant is begun.

    ``backend`` is torch.compile's; None is its usual one, or no compiling at all with ``is_tiny``.

    Returns
    -------
    dict
        What the JSON file holds, without the outcome of the tests; ``failed`` names variants without any of ours,
        ``skipped`` those that no time was left for.
    """
    begin = time.monotonic()
    clock = clock_of(device)
    before = state(device)
    at_most = ceilings(device, clock, is_tiny=is_tiny, is_thorough=case.problems is None)
    backend = ("" if is_tiny else "inductor") if backend is None else backend
    place = Place(device, clock, at_most, begin + seconds, is_tiny, is_quick, backend)
    found: dict[str, Any] = {}
    failed, skipped = [], []
    variants = case.problems.variants(place) if case.problems is not None else []
    while variants:
        # What is left, shared among what is left; half of it for making and compiling.
        share = max(place.seconds_left, 0) / len(variants) / 2
        variant = variants.pop(0)
        if time.monotonic() - begin > at_most_s:
            skipped.append(variant.name)
            continue
        found[variant.name] = measure(variant, place, seconds=min(share, 20.0))
        if not any(row["is_ours"] for row in found[variant.name]["rows"].values()):
            failed.append(variant.name)
        print(_line(variant.name, found[variant.name]), flush=True)
        del variant  # and its inputs
        release(place)
    goals = []
    for goal in case.goals:
        if goal.variant in found:
            reached = goal.reached(found[goal.variant]["rows"])
            goals.append({**vars(goal), "reached": None if reached is None else float(f"{reached:.4g}")})
    return {
        "case": case.name,
        "suite": "gpu",
        "title": case.title,
        "is_measurement": device.type == "cuda" and not is_tiny,
        "is_quick": is_quick,
        "provenance": gpu_provenance(device),
        "state": {"before": before, "after": state(device)},
        "ceilings": at_most,
        "variants": found,
        "goals": goals,
        "failed": failed,
        "skipped": skipped,
        "wall_s": round(time.monotonic() - begin, 1),
    }


def _line(name: str, found: dict[str, Any]) -> str:
    rows = sorted(found["rows"].items(), key=lambda item: item[1]["ms"]["p50"])
    times = ", ".join(f"{row} {value['ms']['p50']:.3f}" for row, value in rows)
    return f"  {name}: {times or 'nothing'} ms (floor {found['work']['floor_ms']:.3f})"


def main() -> int:
    """Measure and write; 1 if ours is missing somewhere."""
    parser = argparse.ArgumentParser(description="run one GPU case")
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--at-most", type=float, default=float("inf"), help="seconds after which no variant is begun")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tests", default="{}", help="outcome of the tests it rests on, as JSON")
    args = parser.parse_args()
    if (args.tiny or args.device == "cpu") and RESULTS in [args.out.resolve(), *args.out.resolve().parents]:
        parser.error("what is no measurement stays out of bench/results")
    case = case_named(args.name)
    device = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device(args.device)
    content = run_case(
        case, device, seconds=args.seconds, at_most_s=args.at_most, is_tiny=args.tiny, is_quick=args.quick
    )
    content["tests"] = json.loads(args.tests)
    if content["failed"]:
        print(f"{case.name}: ours is missing in {', '.join(content['failed'])}", flush=True)
    if case.problems is not None and len(content["failed"]) == len(content["variants"]):
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    partial = args.out / f".{case.name}.partial"
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, args.out / f"{case.name}.json")
    return 1 if content["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
