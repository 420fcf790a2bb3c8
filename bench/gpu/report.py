"""The tables of what was measured on cards; :mod:`bench.report` puts them beside the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from bench.gpu.sources import parts

Result = Mapping[str, Any]
NOTHING = (
    "Numbers on a GPU are missing: no kernel of this project has been measured on a card yet. On a machine with one, "
    "`python -m bench gpu` runs the tests and then measures (`bench/README.md`); `geneformer-fast doctor` says what "
    "runs where."
)
OTHERS = (
    "Numbers of other cards are missing: elsewhere the kernels are compiled and interpreted, not measured. "
    "`python -m bench gpu` runs the tests and then measures (`bench/README.md`); `geneformer-fast doctor` says what "
    "runs where."
)
WHY_INEXACT = (
    "With the random weights of these runs, all tokens of a cell became almost the same vector in the deep V2 models; "
    "what still told tokens apart was as small as bfloat16's rounding, so every program that computes in bfloat16 was "
    "this far off float32, ours and transformers alike."
)
# As bench.gpu.measure and bench.gpu.impls say it, which need torch; a table of results does not.
NO_TIME, NOT_QUICK, CUDNN = "no time left to compile it", "not part of a quick run", "cudnn"
#: Relative error of a result that a table does not keep to itself.
INEXACT = 0.1
_WORDS = {"hidden": "hidden states"}
_RIVAL = ("of the floor", "fastest rival")
_END = ("ours is faster", "goal, sounds impossible")
_ENCODER = ("model", "cells", "cells/s (p10 to p90)", "TFLOP/s", "peak GB", *_RIVAL, "its cells/s", *_END)
_OTHER = ("problem", "ms (p10 to p90)", "TFLOP/s or GB/s", *_RIVAL, "its ms", *_END)


def is_gpu(result: Result) -> bool:
    """Whether a result is of the GPU suite."""
    return result.get("suite") == "gpu"


def render(folders: Iterable[Sequence[Result]], outcomes: Iterable[Result] = ()) -> str:
    """The Markdown for all cards; one plain sentence while there are none.

    Parameters
    ----------
    folders
        Per folder its results, of whatever suite.
    outcomes
        Per folder its ``tests.json``: what ran, on what, and how it ended; nothing where there is none.
    """
    cards = [[result for result in results if is_gpu(result) and result["is_measurement"]] for results in folders]
    measured = [_card(results, tests) for results, tests in zip_longest(cards, outcomes) if results]
    return "\n\n".join([*measured, OTHERS] if measured else [NOTHING])


def _card(results: Sequence[Result], tests: Result | None) -> str:
    at = results[0]["provenance"]["gpu"]
    versions = results[0]["provenance"]["packages"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers") if name in versions)
    best = {key: max(r["ceilings"].get(key, 0.0) for r in results) for key in ("product_tflops", "copy_gbps")}
    blocks = [
        f"### {at['name']}, {at['memory_gib']:.0f} GiB",
        f"Measured in the same runs: {best['product_tflops']:,.0f} TFLOP/s (16-bit matrix product of 8,192), "
        f"{best['copy_gbps']:,.0f} GB/s (copy, read and written). The floor of a problem is the longer of its "
        "operations and its bytes at these rates. Candidates took turns; medians. Ours is the fastest of its ways.",
    ]
    for title, prefix, header, row in (
        ("Whole encoders", "encoder_", _ENCODER, _encoder_row),
        ("Attention", "attention_", _OTHER, _other_row),
        ("Other operations", "", _OTHER, _other_row),
    ):
        rows = [row(result, name, found) for result, name, found in _variants(results, prefix)]
        if rows:
            blocks.append("\n".join([f"{title}:", "", _line(header), _line(["---"] * len(header)), *map(_line, rows)]))
    blocks += filter(None, (_on_cudnn(results), _inexact(results), _not_run(results)))
    if missing := _missing(results):
        blocks.append(f"Not measured on this card yet: {', '.join(missing)}.")
    if tests:
        blocks.append(_tests(tests))
    commits = sorted({f"`{r['provenance']['commit'] or r['provenance']['source']}`" for r in results})
    dates = sorted({r["provenance"]["date"] for r in results})
    blocks.append(
        f"<sub>Commit {', '.join(commits)}; {' and '.join(dates)}; driver {at['driver']}, CUDA {at['cuda']}, {named}; "
        f"{_green(results, tests or {})}.{_corrected(results)}</sub>"
    )
    return "\n\n".join(blocks)


def _tests(found: Result) -> str:
    """How many tests passed on the card, of which sources, which groups have no green run, and what changed since."""
    from bench.gpu.tests_on_card import GROUPS

    groups = found["groups"]
    words = {"timeout": "ended by its limit of time", "none": "all skipped", "failed": "red"}
    statuses = {group: groups.get(group, {}).get("status", "") for group in GROUPS}
    open_ = [f"{name} ({words.get(status, 'not run')})" for name, status in statuses.items() if status != "passed"]
    n_passed = sum(one.get("passed", 0) for one in groups.values() if one["status"] == "passed")
    at = [f"commit `{found['commit']}`"] if found.get("commit") else []
    at += [f"{name} {found[name]}" for name in ("torch", "triton") if found.get(name)]
    said = f"Tests on this card{' (' + ', '.join(at) + ')' if at else ''}: {n_passed} passed, "
    said += f"in {len(GROUPS) - len(open_)} of {len(GROUPS)} groups"
    said += f"; without a green run: {', '.join(open_)}." if open_ else "."
    return f"{said} {_changed(found.get('parts'))}"


def _changed(before: Mapping[str, str] | None) -> str:
    """What is not as it was when the tests ran."""
    if before is None:
        return "Which sources have changed since was not kept."
    now = parts()
    changed: dict[str, list[str]] = {}
    for part in {**now, **before}:
        if before.get(part) != now.get(part):
            name, _, which = part.partition(": ")
            changed.setdefault(name, []).append(which)
    if not changed:
        return "Nothing that runs on a card has changed since."
    named = [name + (f" ({', '.join(which)})" if which != [""] else "") for name, which in changed.items()]
    return f"Changed since, and **not run on a card** as it is now: {'; '.join(named)}."


def _green(results: Sequence[Result], tests: Result) -> str:
    """Whether the tests that numbers rest on passed, and at which commit if it was another one."""
    measured = [result for result in results if result["variants"]]
    red, unknown, earlier = [], [], set()
    for result in measured:
        found, commit = result.get("tests", {}), result["provenance"]["commit"]
        if not found:
            unknown.append(result["case"])
        elif any(one["status"] != "passed" for one in found.values()):
            red.append(result["case"])
        elif tests.get("commit", commit) != commit and all(tests["groups"].get(k) == one for k, one in found.items()):
            earlier.add(f"`{commit}`")
    said = [f"{what} of {', '.join(cases)}" for what, cases in (("red tests", red), ("no tests", unknown)) if cases]
    said = said or ["the tests that each number rests on were green"]
    if earlier:
        said.append(f"those of numbers at {', '.join(sorted(earlier))} had run at `{tests['commit']}`")
    return "; ".join(said)


def _corrected(results: Sequence[Result]) -> str:
    cases = [result["case"] for result in results if result.get("corrections")]
    return f" Labels corrected after the run, as the files say: {', '.join(cases)}." if cases else ""


def _on_cudnn(results: Sequence[Result]) -> str:
    """Which rows of ours rest on cuDNN's attention."""
    found = [
        f"{result['case']} ({name})"
        for result in results
        for name, one in result["variants"].items()
        if (ours := fastest_of_ours(one)) and CUDNN in (ours.get("impl"), ours.get("attention"))
    ]
    if not found:
        return ""
    return (
        "In inference this project leaves attention of cells of one length, a multiple of 1,024, to cuDNN. So it was "
        f"in {', '.join(found)}."
    )


def _inexact(results: Sequence[Result]) -> str:
    """Results far off that were timed, and those that were refused for that."""
    timed, refused = [], []
    for result in results:
        for name, one in result["variants"].items():
            where = f"{result['case']} ({name})"
            ours = fastest_of_ours(one)
            # The variance of a random mask is estimated from a few numbers.
            errors = {} if ours is None else {k: v for k, v in ours["relative_error"].items() if k != "variance"}
            timed += [
                f"{where}, {_WORDS.get(what, what)} by {error:.0%}" for what, error in errors.items() if error > INEXACT
            ]
            refused += [f"{who} in {where}, by {off:.0%}" for who, off in _refused(one).items()]
    said = [f"Ours is off from float32 in: {'; '.join(timed)}."] if timed else []
    said += [f"Refused, because it was off by more than was allowed: {'; '.join(refused)}."] if refused else []
    return " ".join([*said, WHY_INEXACT] if said else [])


def _refused(found: Result) -> dict[str, float]:
    """Candidate -> its largest relative error, of those that were not timed for it."""
    off = {who: re.findall(r": ([\d.]+(?:e[-+]\d+)?|inf)[,}]", why) for who, why in found["left_out"].items()
           if why.startswith("computes something else")}  # fmt: skip
    return {who: max(map(float, errors)) for who, errors in off.items() if errors}


def _not_run(results: Sequence[Result]) -> str:
    """Candidates that a longer run would have had."""
    said = []
    for why, words in ((NO_TIME, "No time was left to compile"), (NOT_QUICK, "Quick runs, of few rounds, left out")):
        where: dict[str, dict[str, list[str]]] = {}
        for result in results:
            for name, one in result["variants"].items():
                for who, reason in one["left_out"].items():
                    if reason == why:
                        where.setdefault(who, {}).setdefault(result["case"], []).append(name)
        cases = {result["case"]: len(result["variants"]) for result in results}
        each = [
            f"{who} in "
            + ", ".join(
                case if len(names) == cases[case] else f"{case} ({', '.join(names)})" for case, names in at.items()
            )
            for who, at in where.items()
        ]
        if each:
            said.append(f"{words}: {'; '.join(each)}.")
    return " ".join(said)


def _missing(results: Sequence[Result]) -> list[str]:
    """Cases without a result, and variants of which nothing of ours is in it."""
    # Imported late: the cases need torch, a table of results does not.
    from bench.gpu.cases import CASES

    found = {result["case"]: result for result in results}
    names = []
    for case in CASES:
        if case.name not in found:
            names.append(case.name)
        else:
            lost = [*found[case.name]["failed"], *found[case.name]["skipped"]]
            names += [f"{case.name} ({name})" for name in lost]
    return names


def _variants(results: Sequence[Result], prefix: str) -> Iterator[tuple[Result, str, Result]]:
    """Every variant of the cases that begin so (of those with no prefix of their own for the empty one)."""
    for result in results:
        own = next((p for p in ("encoder_", "attention_") if result["case"].startswith(p)), "")
        if own == prefix:
            for name, found in result["variants"].items():
                if fastest_of_ours(found):
                    yield result, name, found


def _encoder_row(result: Result, name: str, found: Result) -> list[str]:
    ours, rival = fastest_of_ours(found), fastest_rival(found)
    return [
        result["title"],
        found["what"].partition(", ")[2],
        _spread(found["work"]["cells"] * 1e3, ours["ms"], is_rate=True),
        f"{ours['tflops']:.0f}",
        _peak(found),
        f"{ours['share_of_floor']:.0%}",
        _named(found),
        "" if rival is None else _number(rival["cells_per_s"]),
        _faster(ours, rival),
        _goals(result, name),
    ]


def _other_row(result: Result, name: str, found: Result) -> list[str]:
    ours, rival = fastest_of_ours(found), fastest_rival(found)
    is_by_bytes = "tflops" not in ours
    return [
        f"{result['title']}: {found['what']}" + (", **run by cuDNN**" if ours.get("impl") == CUDNN else ""),
        _spread(1.0, ours["ms"], is_rate=False),
        f"{ours['gbps']:,.0f} GB/s" if is_by_bytes else f"{ours['tflops']:,.0f} TFLOP/s",
        f"{ours['share_of_floor']:.0%}",
        _named(found),
        "" if rival is None else f"{rival['ms']['p50']:.3f}",
        _faster(ours, rival),
        _goals(result, name),
    ]


def _peak(found: Result) -> str:
    """Of the fastest of ours; a graph's memory is set aside when it is captured, which no run of it shows."""
    ours, eager = fastest_of_ours(found), found["rows"].get("ours")
    if eager is not None and ours is found["rows"].get("ours-graph"):
        return f"{eager['peak_bytes'] / 1e9:.1f} (without its graph)"
    return f"{ours['peak_bytes'] / 1e9:.1f}"


def _named(found: Result) -> str:
    """The fastest rival, or why there is none."""
    rival = fastest_rival(found)
    if rival is not None:
        return rival["what"]
    off = [
        f"{who}: refused, off by {error:.0%}" for who, error in _refused(found).items() if not who.startswith("ours")
    ]
    return "; ".join(off)


def fastest_of_ours(found: Result) -> Any:
    """The fastest of ours."""
    return _fastest(found, lambda row: row["is_ours"])


def fastest_rival(found: Result) -> Any:
    """The fastest that computes the same and is not ours; what runs our own code on torch operations is no rival."""
    return _fastest(found, lambda row: not row["is_ours"] and row["is_same"] and "this project" not in row["what"])


def _fastest(found: Result, is_wanted: Callable[[Result], bool]) -> Any:
    rows = [row for row in found["rows"].values() if is_wanted(row)]
    return min(rows, key=lambda row: row["ms"]["p50"], default=None)


def _faster(ours: Result, rival: Result | None) -> str:
    return "" if rival is None else f"{rival['ms']['p50'] / ours['ms']['p50']:.2f}x"


def _goals(result: Result, name: str) -> str:
    """The goals of a variant, those reached in bold; a goal of another ratio than the column before says its own."""
    said = []
    ours = fastest_of_ours(result["variants"][name])
    for goal in result["goals"]:
        if goal["variant"] != name:
            continue
        kind, _, other = goal["metric"].partition(":")
        unit = {"peak_gb": " GB", "tflops": " TFLOP/s", "cells_per_s": ""}.get(kind, "x")
        is_less_better = kind in ("peak_gb", "time_against")
        texts, reached = [], goal["reached"]
        for limit in (goal["goal"], goal["impossible"]):
            is_met = reached is not None and (reached <= limit if is_less_better else reached >= limit)
            texts.append(f"**{limit:,g}{unit}**" if is_met else f"{limit:,g}{unit}")
        own = f"{reached:.2f}x the time of {other}; goals of that: " if kind == "time_against" and reached else ""
        if goal.get("impl") and goal["impl"] != ours.get("impl"):
            was = "not timed here" if reached is None else f"{reached:,g}{unit}"
            own = f"goals of the {goal['impl'].capitalize()} kernel, {was}: "
        said.append(own + ", ".join(texts))
    return "; ".join(said)


def _spread(count: float, ms: Mapping[str, float], *, is_rate: bool) -> str:
    if is_rate:
        return f"{_number(count / ms['p50'])} ({_number(count / ms['p90'])} to {_number(count / ms['p10'])})"
    return f"{ms['p50']:.3f} ({ms['p10']:.3f} to {ms['p90']:.3f})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
