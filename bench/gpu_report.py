"""The README's tables of what was measured on cards; :mod:`bench.report` puts them beside the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

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
        Per folder what its ``tests.json`` says of the groups of tests; nothing where there is none.
    """
    cards = [[result for result in results if is_gpu(result) and result["is_measurement"]] for results in folders]
    measured = [_card(results, groups) for results, groups in zip_longest(cards, outcomes) if results]
    return "\n\n".join([*measured, OTHERS] if measured else [NOTHING])


def _card(results: Sequence[Result], groups: Result | None) -> str:
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
    if missing := _missing(results):
        blocks.append(f"Not measured on this card yet: {', '.join(missing)}.")
    if groups:
        blocks.append(_tests(groups))
    commits = sorted({f"`{r['provenance']['commit'] or r['provenance']['source']}`" for r in results})
    dates = sorted({r["provenance"]["date"] for r in results})
    blocks.append(
        f"<sub>Commit {', '.join(commits)}; {' and '.join(dates)}; driver {at['driver']}, CUDA {at['cuda']}, {named}; "
        f"all tests of the operations were green.{_quick(results)}</sub>"
    )
    return "\n\n".join(blocks)


def _tests(groups: Result) -> str:
    """How many tests passed on the card, and which groups have no green run."""
    from bench.gpu_tests import GROUPS

    words = {"timeout": "ended by its limit of time", "none": "all skipped", "failed": "red"}
    statuses = {group: groups.get(group, {}).get("status", "") for group in GROUPS}
    open_ = [f"{name} ({words.get(status, 'not run')})" for name, status in statuses.items() if status != "passed"]
    n_passed = sum(found.get("passed", 0) for found in groups.values() if found["status"] == "passed")
    said = f"Tests on this card: {n_passed} passed, in {len(GROUPS) - len(open_)} of {len(GROUPS)} groups"
    return said + (f"; without a green run of these sources: {', '.join(open_)}." if open_ else ".")


def _missing(results: Sequence[Result]) -> list[str]:
    """Cases without a result, and variants of which nothing of ours is in it."""
    # Imported late: the cases need torch, a table of results does not.
    from bench.gpu_cases import CASES

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
                if _ours(found):
                    yield result, name, found


def _encoder_row(result: Result, name: str, found: Result) -> list[str]:
    ours, rival = _ours(found), _rival(found)
    return [
        result["title"],
        found["what"].partition(", ")[2],
        _spread(found["work"]["cells"] * 1e3, ours["ms"], is_rate=True),
        f"{ours['tflops']:.0f}",
        f"{found['rows'].get('ours', ours)['peak_bytes'] / 1e9:.1f}",
        f"{ours['share_of_floor']:.0%}",
        "" if rival is None else rival["what"],
        "" if rival is None else _number(rival["cells_per_s"]),
        _faster(ours, rival),
        _goals(result, name),
    ]


def _other_row(result: Result, name: str, found: Result) -> list[str]:
    ours, rival = _ours(found), _rival(found)
    is_by_bytes = "tflops" not in ours
    return [
        f"{result['title']}: {found['what']}",
        _spread(1.0, ours["ms"], is_rate=False),
        f"{ours['gbps']:,.0f} GB/s" if is_by_bytes else f"{ours['tflops']:,.0f} TFLOP/s",
        f"{ours['share_of_floor']:.0%}",
        "" if rival is None else rival["what"],
        "" if rival is None else f"{rival['ms']['p50']:.3f}",
        _faster(ours, rival),
        _goals(result, name),
    ]


def _ours(found: Result) -> Any:
    """The fastest of ours."""
    return _fastest(found, lambda row: row["is_ours"])


def _rival(found: Result) -> Any:
    """The fastest that computes the same and is not ours; what runs our own code on torch operations is no rival."""
    return _fastest(found, lambda row: not row["is_ours"] and row["is_same"] and "this project" not in row["what"])


def _fastest(found: Result, is_wanted: Callable[[Result], bool]) -> Any:
    rows = [row for row in found["rows"].values() if is_wanted(row)]
    return min(rows, key=lambda row: row["ms"]["p50"], default=None)


def _faster(ours: Result, rival: Result | None) -> str:
    return "" if rival is None else f"{rival['ms']['p50'] / ours['ms']['p50']:.2f}x"


def _goals(result: Result, name: str) -> str:
    """The goals of a variant, those reached in bold."""
    said = []
    for goal in result["goals"]:
        if goal["variant"] != name:
            continue
        unit = {"peak_gb": " GB", "tflops": " TFLOP/s", "cells_per_s": ""}.get(goal["metric"].partition(":")[0], "x")
        is_less_better = goal["metric"] == "peak_gb" or goal["metric"].startswith("time_against")
        texts = []
        for limit in (goal["goal"], goal["impossible"]):
            reached = goal["reached"]
            is_met = reached is not None and (reached <= limit if is_less_better else reached >= limit)
            texts.append(f"**{limit:,g}{unit}**" if is_met else f"{limit:,g}{unit}")
        said.append(", ".join(texts))
    return "; ".join(said)


def _quick(results: Sequence[Result]) -> str:
    quick = [result["case"] for result in results if result["is_quick"]]
    return f" Few rounds and few rivals: {', '.join(quick)}." if quick else ""


def _spread(count: float, ms: Mapping[str, float], *, is_rate: bool) -> str:
    if is_rate:
        return f"{_number(count / ms['p50'])} ({_number(count / ms['p90'])} to {_number(count / ms['p10'])})"
    return f"{ms['p50']:.3f} ({ms['p10']:.3f} to {ms['p90']:.3f})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
