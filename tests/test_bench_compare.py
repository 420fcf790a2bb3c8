"""Two folders of results side by side: what is a difference, what is noise, and what is no comparison."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as bench_main
from bench import compare
from bench.gpu.measure import NO_TIME, NOT_QUICK
from bench.machine import RESULTS

EPYC = {"machine": "Imaginary 9000", "n_cores": 2, "load_1min": 0.1}


def spread(p50: float, share: float = 0.02) -> dict[str, float]:
    return {"p10": p50 * (1 - share), "p50": p50, "p90": p50 * (1 + share)}


def embed_result(ours_s: float = 3.0, rival_s: float = 9.0, share: float = 0.02) -> dict[str, Any]:
    rows = {
        name: {"is_ours": is_ours, "seconds": spread(s, share), "cells_per_s": spread(160 / s), "peak_bytes": 9 * 10**8}
        for name, is_ours, s in (("ours", True, ours_s), ("stock", False, rival_s))
    }
    return {"case": "embed_x", "provenance": EPYC, "n_cells": 160, "lengths": {"p50": 691.0}, "candidates": rows}


def card_result(ms: float, halves: list[float], **changes: Any) -> dict[str, Any]:
    row = {"is_ours": True, "ms": spread(ms, 0.2), "halves_ms": halves, "peak_bytes": 10**9}
    variant = {"work": {"flops": 1e9, "floor_ms": 0.1}, "rows": {"ours": row}, "left_out": {}}
    provenance = {"gpu": {"name": "Imaginary X1"}, "load_1min": 0.0}
    return {
        "case": "attention", "suite": "gpu", "wall_s": 90.0, "provenance": provenance, "skipped": [],
        "variants": {"full": variant}, **changes,
    }  # fmt: skip


def saved(folder: Path, *results: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        (folder / f"{result['case']}.json").write_text(json.dumps(result))
    return folder


def verdicts(a: dict[str, Any], b: dict[str, Any], **options: Any) -> dict[str, str]:
    rows, _ = compare.compare({a["case"]: a}, {b["case"]: b}, **options)
    return {row.name: row.verdict for row in rows}


def _is_timed(result: dict[str, Any]) -> bool:
    """Whether seconds or bytes are somewhere in it, whatever reads them."""
    measured = {key: value for key, value in result.items() if key not in ("provenance", "pretraining", "sets")}
    if result.get("suite") == "gpu":
        measured = result["variants"]
    names = {"ms", "seconds", "wall_s", "int8_ms", "peak_bytes"}
    return any(f'"{name}":' in json.dumps(measured) for name in names)


def test_results_are_the_same_as_themselves() -> None:
    for folder in RESULTS.iterdir():
        found = compare.results_in(folder)
        rows, _ = compare.compare(found, found)
        assert {row.verdict for row in rows} == {"same"}
        # Whatever is timed is read: no case that was measured in time or memory is passed over.
        timed = {case for case, result in found.items() if _is_timed(result)}
        assert timed == {row.case for row in rows}


def test_a_difference_beyond_the_range_of_either_counts() -> None:
    name = "candidates.ours.seconds"
    assert verdicts(embed_result(3.0), embed_result(3.3))[name] == "worse"
    assert verdicts(embed_result(3.3), embed_result(3.0))[name] == "better"
    assert verdicts(embed_result(3.0, share=0.15), embed_result(3.3, share=0.15))[name] == "same"  # noise
    assert verdicts(embed_result(3.0, share=0.001), embed_result(3.05, share=0.001))[name] == "same"  # too little
    assert verdicts(embed_result(3.0, share=0.001), embed_result(3.05, share=0.001), least=0.01)[name] == "worse"


def test_rates_are_not_times() -> None:
    """A rate that falls is worse, and it is read only where there is no time of the same."""
    a = {"case": "r", "provenance": EPYC, "rank": {"tokens_per_s": 100.0}}
    b = {**a, "rank": {"tokens_per_s": 80.0}}
    assert verdicts(a, b) == {"rank.tokens_per_s": "worse"}
    assert verdicts(b, a) == {"rank.tokens_per_s": "better"}
    assert "candidates.ours.cells_per_s" not in verdicts(embed_result(), embed_result())


def test_the_halves_of_rounds_are_narrower_than_percentiles_of_repetitions() -> None:
    name = "variants.full.rows.ours.ms"
    assert verdicts(card_result(1.0, [0.99, 1.01]), card_result(1.1, [1.09, 1.11]))[name] == "worse"
    assert verdicts(card_result(1.0, [0.9, 1.2]), card_result(1.1, [1.09, 1.11]))[name] == "same"
    assert "wall_s" not in verdicts(card_result(1.0, [1.0, 1.0]), card_result(1.0, [1.0, 1.0]))  # of the whole case


def test_memory_stands_alone_and_has_to_differ_by_more() -> None:
    a, b = embed_result(), embed_result()
    for peak_bytes, verdict in ((int(9.4 * 10**8), "same"), (int(9.6 * 10**8), "worse"), (8 * 10**8, "better")):
        b["candidates"]["ours"]["peak_bytes"] = peak_bytes
        assert verdicts(a, b)["candidates.ours.peak_bytes"] == verdict


def test_a_rival_that_is_slower_is_no_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = saved(tmp_path / "a", embed_result(3.0, 9.0)), saved(tmp_path / "b", embed_result(3.0, 10.0))
    assert compare.main([str(a), str(b)]) == 0
    assert "worse (rival)" in capsys.readouterr().out
    saved(b, embed_result(3.4, 10.0))
    assert compare.main([str(a), str(b)]) == 1
    assert "embed_x: rivals too take 1.06 times as much" in capsys.readouterr().out


def test_exit_codes_and_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {"case": "gone", "provenance": EPYC, "wall_s": {"min": 1.0, "median": 1.1, "max": 1.2}}
    a = saved(tmp_path / "a", embed_result(3.0), old)
    b = saved(tmp_path / "b", embed_result(3.5))
    # The command of the README, with its exit code.
    command = ["bench", "compare", str(a), str(b)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", command)
        assert bench_main.main() == 1
    said = capsys.readouterr().out
    assert "candidates.ours.seconds" in said.splitlines()[1]
    assert "only in A: gone" in said
    assert "of ours 1 worse or gone, 0 better" in said
    assert compare.main([str(b), str(a)]) == 0
    assert "of ours 0 worse or gone, 1 better" in capsys.readouterr().out
    assert compare.main([str(a), str(b), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert any(row["verdict"] == "worse" and row["is_ours"] for row in found["rows"])
    # Folders of machines' folders, and files.
    assert compare.main([str(a / "embed_x.json"), str(b / "embed_x.json")]) == 1
    saved(tmp_path / "all_a" / "m", embed_result(3.0))
    saved(tmp_path / "all_b" / "m", embed_result(3.5))
    assert compare.main([str(tmp_path / "all_a"), str(tmp_path / "all_b")]) == 1


def test_what_is_no_comparison_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = saved(tmp_path / "a", embed_result())
    empty, spoilt = tmp_path / "empty", tmp_path / "spoilt"
    empty.mkdir()
    spoilt.mkdir()
    (spoilt / "x.json").write_text("{")
    other = saved(tmp_path / "other", {**embed_result(), "provenance": {**EPYC, "machine": "Imaginary 8000"}})
    elsewhere = saved(tmp_path / "elsewhere", {**embed_result(), "case": "train_x"})
    smaller = saved(tmp_path / "smaller", {**embed_result(), "n_cells": 80})
    dry = saved(tmp_path / "dry", {**embed_result(), "is_measurement": False})
    for b, why in (
        (tmp_path / "nowhere", "nowhere does not exist"),
        (empty, "empty holds no results"),
        (spoilt, "x.json is no JSON"),
        (other, "embed_x was measured on Imaginary 9000, 2 cores and on Imaginary 8000, 2 cores"),
        (elsewhere, "no case is in both: embed_x on one side, train_x on the other"),
        (smaller, "n_cells 160 and 80"),
        (dry, "a dry run"),
    ):
        assert compare.main([str(a), str(b)]) == 2
        assert why in capsys.readouterr().err
    assert compare.main([str(a), str(other), "--any-machine"]) == 0
    with pytest.raises(SystemExit):
        compare.main([str(a), str(a), "--least", "3"])


def test_what_ours_lost_is_a_regression_unless_there_was_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = card_result(1.0, [1.0, 1.0])
    whole["variants"]["real"] = copy.deepcopy(whole["variants"]["full"])
    a = saved(tmp_path / "a", whole)
    for why, code in ((NO_TIME, 0), (NOT_QUICK, 0), ("computes something else: relative errors {'out': 0.4}", 1)):
        found = copy.deepcopy(whole)
        del found["variants"]["real"]["rows"]["ours"]
        found["variants"]["real"]["left_out"] = {"ours": why}
        assert compare.main([str(a), str(saved(tmp_path / "b", found))]) == code
        assert why in capsys.readouterr().out
    found = copy.deepcopy(whole)
    del found["variants"]["real"]
    assert compare.main([str(a), str(saved(tmp_path / "b", {**found, "skipped": ["real"]}))]) == 0
    assert "no time was left for it" in capsys.readouterr().out
    assert compare.main([str(a), str(saved(tmp_path / "b", found))]) == 1
    # Another problem under the same name.
    whole["variants"]["real"]["work"]["flops"] = 2e9
    assert compare.main([str(a), str(saved(tmp_path / "b", whole))]) == 0
    assert "attention, real, is another problem (work" in capsys.readouterr().out
