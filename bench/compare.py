"""``python -m bench compare A B``: two folders of results side by side, and whether B is slower beyond noise.

Times, rates and memory are compared, ours and the rivals', of cases that measured the same problem. A difference counts
when it is larger than ``--least`` and each median lies outside of the other's range: that of the halves of the rounds
where they were kept, else from the 10th to the 90th percentile, or from the least to the most. A number that stands
alone has no range; it has to differ by 10 %, memory by 5 %. Exit code 1: something of ours is slower, larger or gone;
2: nothing can be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

#: A change below this share is none, whatever the ranges say: another start of the same process may bring as much.
LEAST = 0.03
#: What a number without a range has to differ by.
ALONE, ALONE_BYTES = 0.10, 0.05
#: What must be equal for a case to be the same problem, as far as a result has it; of a variant on a card the second.
_PROBLEM = (
    *("geometry", "n_cells", "n_tokens", "n_rows", "n_bytes", "lengths", "threads", "n_threads", "held_to"),
    *("dropout", "n_steps", "cells_per_step", "n_variants"),
)
_VARIANT = ("work", "question")
# Where no measurements are: what was asked for, what was tried on the way, and what the machine was like.
_NO_READINGS = (
    *("provenance", "goals", "ratios", "ratio", "ceilings", "state", "tests", "curve", "work", "question", "basis"),
    *(
        "batch_sizes_tried_cells_per_s",
        "cells_at_once_tried_cells_per_s",
        "lengths",
        "at_n_cells",
        "pretraining",
        "predicted",
    ),
)
_TIMES = ("ms", "seconds", "wall_s", "int8_ms", "float_ms", "seconds_per_cell")
_BYTES = ("peak_bytes", "peak_bytes_within", "smallest_budget_bytes")
_RIVALS = ("rival", "float_ms")
# As the suite on a card says it: what a longer run would have had.
_NOT_TRIED = ("no time was left for it", "no time left to compile it", "not part of a quick run")


class CannotCompare(Exception):
    """Nothing can be said, and why."""


@dataclass(frozen=True)
class Reading:
    """One measured number.

    Attributes
    ----------
    value
        Median, or the one number.
    low, high
        Where the middle of its runs lies; None where there is one number.
    is_more_better
        Of rates.
    is_ours
        Whether it would be this project's regression.
    """

    value: float
    low: float | None
    high: float | None
    is_more_better: bool
    is_ours: bool


@dataclass(frozen=True)
class Row:
    """A reading in both folders.

    Attributes
    ----------
    change
        How many times as much time or memory B takes: 1.1 is worse by a tenth, for rates too.
    verdict
        ``"same"``, ``"better"``, ``"worse"``, or ``"gone"`` where B lacks what A has.
    """

    case: str
    name: str
    a: float
    b: float | None
    change: float | None
    verdict: str
    is_ours: bool

    @property
    def is_regression(self) -> bool:
        """Whether the exit code says so."""
        return self.is_ours and self.verdict in ("worse", "gone")


def readings(result: Mapping[str, Any]) -> dict[str, Reading]:
    """What a result measured, by its place in the file."""
    return dict(_walk({k: v for k, v in result.items() if not (k == "wall_s" and result.get("suite") == "gpu")}))


def _walk(node: Mapping[str, Any], path: str = "", is_ours: bool = True) -> Iterator[tuple[str, Reading]]:
    is_ours = is_ours and node.get("is_ours", True)
    has_time = any(_number_of(node.get(key)) is not None for key in _TIMES)
    for key, value in node.items():
        name = f"{path}.{key}" if path else key
        mine = is_ours and key not in _RIVALS
        if key in _NO_READINGS:
            continue
        is_rate = key.endswith("_per_s") and not has_time
        if (key in _TIMES or key in _BYTES or is_rate) and (found := _number_of(value, node)) is not None:
            yield name, Reading(*found, is_more_better=is_rate, is_ours=mine)
        elif key in _TIMES and isinstance(value, Mapping):  # of several ways
            for way, seconds in value.items():
                if (found := _number_of(seconds)) is not None:
                    yield f"{name}.{way}", Reading(*found, is_more_better=False, is_ours=mine)
        elif isinstance(value, Mapping):
            yield from _walk(value, name, mine)
        elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            for each in value:
                yield from _walk(each, f"{name}[{_label(each)}]", mine)


def _label(row: Mapping[str, Any]) -> str:
    """What tells a row of a list from the others: its words and whole numbers."""
    return " ".join(str(value) for key, value in row.items() if isinstance(value, str | int) and key not in _BYTES)


def _number_of(value: Any, node: Mapping[str, Any] | None = None) -> tuple[float, float | None, float | None] | None:
    """Value and range of a measurement; None of what is none. ``node`` holds the halves of its times, if anything."""
    if isinstance(value, Mapping):
        if "p50" in value:
            halves = (node or {}).get("halves_ms")
            low, high = (min(halves), max(halves)) if halves else (value["p10"], value["p90"])
            return value["p50"], low, high
        if "median" in value:
            return value["median"], value["min"], value["max"]
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value, None, None
    return None


def compared(case: str, name: str, a: Reading, b: Reading, least: float = LEAST) -> Row:
    """Whether ``b`` differs from ``a`` beyond noise."""
    change = (a.value / b.value if a.is_more_better else b.value / a.value) if a.value and b.value else 1.0
    size = max(change, 1 / change) - 1
    if None in (a.low, b.low):
        needed = max(least, ALONE_BYTES if name.rpartition(".")[2] in _BYTES else ALONE)
        is_beyond = size > needed
    else:
        is_beyond = size > least and not (_is_within(a.value, b) or _is_within(b.value, a))
    verdict = "same" if not is_beyond else "worse" if change > 1 else "better"
    return Row(case, name, a.value, b.value, change, verdict, a.is_ours)


def _is_within(value: float, reading: Reading) -> bool:
    assert reading.low is not None
    assert reading.high is not None
    return reading.low <= value <= reading.high


def compare(
    a: Mapping[str, Mapping[str, Any]],
    b: Mapping[str, Mapping[str, Any]],
    *,
    least: float = LEAST,
    any_machine: bool = False,
) -> tuple[list[Row], list[str]]:
    """Rows of everything that can be compared, and what else is to be said.

    Parameters
    ----------
    a, b
        Case to result.
    least
        Share below which a change is none.
    any_machine
        Compare results of different machines too.

    Raises
    ------
    CannotCompare
        No case is in both, or they come from different machines.
    """
    common = [case for case in a if case in b]
    if not common:
        raise CannotCompare(f"no case is in both: {_named(a)} on one side, {_named(b)} on the other")
    rows, notes = [], []
    for case in common:
        first, second = a[case], b[case]
        places = _machine(first), _machine(second)
        if places[0] != places[1] and not any_machine:
            raise CannotCompare(
                f"{case} was measured on {places[0]} and on {places[1]}: that is no comparison of sources; "
                "--any-machine makes it all the same"
            )
        if other := _other_problem(first, second):
            notes.append(f"{case} is another problem ({other}) and was not compared")
            continue
        found, said = _rows(case, first, second, least)
        rows += found
        notes += said
    for name, one, other in (("A", a, b), ("B", b, a)):
        if alone := [case for case in one if case not in other]:
            notes.append(f"only in {name}: {', '.join(alone)}")
    if not rows:
        raise CannotCompare("; ".join(["nothing was measured in both", *notes]))
    return rows, notes


def _rows(case: str, first: Mapping[str, Any], second: Mapping[str, Any], least: float) -> tuple[list[Row], list[str]]:
    """One case: its rows, and what must be known to read them."""
    old, new = readings(first), readings(second)
    others = {
        name: why
        for name, variant in first.get("variants", {}).items()
        if (why := _different(variant, second["variants"].get(name, variant), _VARIANT))
    }
    rows = []
    notes = [f"{case}, {name}, is another problem ({why}) and was not compared" for name, why in others.items()]
    for name, reading in old.items():
        place = name.split(".")
        variant = place[1] if place[0] == "variants" else ""
        if variant in others:
            continue
        if name in new:
            rows.append(compared(case, name, reading, new[name], least))
        elif reading.is_ours:
            why = _absent(second, variant, place[-2] if variant else "")
            if why in _NOT_TRIED:
                notes.append(f"{case}: {name} is not in B: {why}")
            else:
                rows.append(Row(case, name, reading.value, None, None, "gone", True))
                notes += [f"{case}: {name} is gone: {why}"] if why else []
    loads = [result.get("provenance", {}).get("load_1min", 0.0) for result in (first, second)]
    if max(loads) > max(result.get("provenance", {}).get("n_cores", 1) for result in (first, second)):
        notes.append(f"{case} was measured beside other work (load {loads[0]:g} and {loads[1]:g})")
    changes = [row.change for row in rows if not row.is_ours and row.change is not None]
    if changes and any(row.is_ours and row.verdict == "worse" for row in rows) and median(changes) > 1 + least:
        notes.append(f"{case}: rivals too take {median(changes):.2f} times as much, by their median")
    return rows, notes


def _absent(result: Mapping[str, Any], variant: str, row: str) -> str:
    """Why a result on a card has no such row, as far as it says."""
    if variant in result.get("skipped", ()):
        return _NOT_TRIED[0]
    found = result.get("variants", {}).get(variant, {})
    return str(found.get("left_out", {}).get(row, found.get("error", "")))


def _machine(result: Mapping[str, Any]) -> str:
    at = result.get("provenance", {})
    if "gpu" in at:
        return str(at["gpu"]["name"])
    return f"{at.get('machine', 'a machine without name')}, {at.get('n_cores')} cores"


def _other_problem(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    if not all(result.get("is_measurement", True) for result in (first, second)):
        return "a dry run"
    return _different(first, second, _PROBLEM)


def _different(first: Mapping[str, Any], second: Mapping[str, Any], keys: Sequence[str]) -> str:
    """What is not the same, of what both have."""
    found = []
    for key in keys:
        if key in first and key in second:
            mine, other = ({k: v for k, v in one[key].items() if k != "floor_ms"} if isinstance(one[key], Mapping)
                           else one[key] for one in (first, second))  # fmt: skip
            if mine != other:
                found.append(f"{key} {mine} and {other}")
    return "; ".join(found)


def _named(results: Mapping[str, Any]) -> str:
    names = sorted(results)
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])]) or "nothing"


def results_in(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Case to result, of a folder of a machine, of a folder of such folders, or of one file.

    Raises
    ------
    CannotCompare
        There are none, or a file cannot be read.
    """
    if not folder.exists():
        raise CannotCompare(f"{folder} does not exist")
    paths = [folder] if folder.is_file() else sorted(folder.glob("*.json")) or sorted(folder.glob("*/*.json"))
    found = {}
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise CannotCompare(f"{path} is no JSON: {error}") from None
        if isinstance(content, dict) and "case" in content:
            place = "" if path.parent == folder or folder.is_file() else f"{path.parent.name}/"
            found[place + content["case"]] = content
    if not found:
        raise CannotCompare(f"{folder} holds no results")
    return found


def table(rows: Sequence[Row]) -> str:
    """Aligned text, worst first within ours, then the rivals."""
    order = {"gone": 0, "worse": 1, "better": 2, "same": 3}
    lines = [("", "A", "B", "B / A", "")]
    for row in sorted(rows, key=lambda row: (not row.is_ours, order[row.verdict], row.case, row.name)):
        change = "" if row.change is None else f"{row.change:.3f}"
        who = row.verdict if row.is_ours else f"{row.verdict} (rival)"
        lines.append((f"{row.case}: {row.name}", _digits(row.a), "" if row.b is None else _digits(row.b), change, who))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(
        f"{line[0]:<{widths[0]}}  " + "  ".join(f"{line[i]:>{widths[i]}}" for i in (1, 2, 3)) + f"  {line[4]}".rstrip()
        for line in lines
    )


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two folders; 0 if nothing of ours is worse."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("a", type=Path, metavar="A", help="results before: a machine's folder, or one file")
    parser.add_argument("b", type=Path, metavar="B", help="results after")
    parser.add_argument("--least", type=float, default=LEAST, metavar="SHARE", help=f"no change (default: {LEAST})")
    parser.add_argument("--all", action="store_true", help="show what is the same, too")
    parser.add_argument("--any-machine", action="store_true", help="also results of different machines")
    parser.add_argument("--json", action="store_true", help="rows and notes as JSON")
    args = parser.parse_args(argv)
    if not 0 <= args.least < 1:
        parser.error(f"--least is a share between 0 and 1, not {args.least}")
    try:
        rows, notes = compare(results_in(args.a), results_in(args.b), least=args.least, any_machine=args.any_machine)
    except CannotCompare as why:
        print(f"python -m bench compare: {why}", file=sys.stderr)
        return 2
    regressions = [row for row in rows if row.is_regression]
    if args.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "notes": notes}, indent=1))
        return 1 if regressions else 0
    shown = [row for row in rows if args.all or row.verdict != "same"]
    if shown:
        print(table(shown))
    print("\n".join(notes))
    n_better = sum(row.is_ours and row.verdict == "better" for row in rows)
    print(f"{len(rows)} numbers compared; of ours {len(regressions)} worse or gone, {n_better} better beyond noise")
    return 1 if regressions else 0


if __name__ == "__main__":
    sys.exit(main())
