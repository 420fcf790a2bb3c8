"""Results of a card, made up: the tables of the README, and the choices that follow from them."""

from __future__ import annotations

import pytest

from bench import measured
from bench.gpu import report as gpu_report
from bench.gpu import tests_on_card
from bench.gpu.cases import Goal
from bench.gpu.impls import CUDNN, Question
from bench.gpu.measure import NO_TIME, NOT_QUICK
from bench.gpu.sources import parts


def row_of(ms: float, *, is_ours: bool = False, what: str = "this project", **rates: float) -> dict:
    return {
        "what": what, "is_ours": is_ours, "is_same": True, "ms": {"p10": ms * 0.9, "p50": ms, "p90": ms * 1.1},
        "peak_bytes": 2.5e9, "share_of_floor": 0.5, "relative_error": {}, **rates,
    }  # fmt: skip


def gpu_result(case: str, title: str, rows: dict, goals: list[dict], **work: float) -> dict:
    at = {"gpu": {"name": "Imaginary X1", "memory_gib": 80.0, "driver": "999.1", "cuda": "13.0"}}
    packages = {"torch": "2.11.0", "triton": "3.6.0"}
    return {
        "case": case, "suite": "gpu", "title": title, "is_measurement": True, "is_quick": False, "goals": goals,
        "failed": [],
        "skipped": ["768"] if case == "residual_layernorm" else [],
        "provenance": {**at, "commit": "0123456789ab", "source": "ff", "date": "2030-01-02", "packages": packages},
        "ceilings": {"product_tflops": 700.0, "copy_gbps": 4000.0},
        "variants": {"full": {"what": "inference, 64 cells", "work": work, "rows": rows, "left_out": {}}},
    }  # fmt: skip


def test_the_readme_gets_a_table_per_card() -> None:
    goal = {"variant": "full", "metric": "cells_per_s", "goal": 900, "impossible": 1200, "reached": 1000.0}
    rows = {
        "ours": row_of(80.0, is_ours=True, tflops=300.0, cells_per_s=800.0),
        "ours-graph": row_of(64.0, is_ours=True, tflops=400.0, cells_per_s=1000.0),
        "ours-torch": row_of(65.0, what="this project on torch operations", tflops=1.0, cells_per_s=1.0),
        "rival": row_of(160.0, what="a rival", tflops=160.0, cells_per_s=400.0),
    }
    norm = {"ours": row_of(0.25, is_ours=True, gbps=3000.0), "eager": row_of(0.5, what="torch, eager", gbps=1500.0)}
    results = [
        gpu_result("encoder_x", "some preset, inference", rows, [goal], cells=64),
        gpu_result("residual_layernorm", "residual_layernorm", norm, []),
    ]
    text = gpu_report.render([results, [{"case": "tokenize_v1"}]])
    assert "### Imaginary X1, 80 GiB" in text
    assert "700 TFLOP/s" in text
    row = "| some preset, inference | 64 cells | 1,000 (909 to 1,111) | 400 | 2.5 (without its graph) | 50% | a rival |"
    assert f"{row} 400 | 2.50x |" in text
    assert "**900**, 1,200 |" in text
    missing = text.partition("Not measured on this card yet: ")[2].partition(".\n")[0].split(", ")
    assert "ceilings" in missing
    assert "residual_layernorm (768)" in missing
    assert "residual_layernorm" not in missing
    assert "0.250 (0.225 to 0.275) | 3,000 GB/s | 50% | torch, eager | 0.500 | 2.00x |" in text
    for block in text.split("\n\n"):
        widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1
    assert gpu_report.render([[{**results[0], "is_measurement": False}]]) == gpu_report.NOTHING
    assert "Tests on this card" not in text


def test_the_readme_says_which_tests_ran_on_a_card() -> None:
    results = [gpu_result("encoder_x", "some preset, inference", {"ours": row_of(80.0, is_ours=True)}, [], cells=64)]
    del results[0]["variants"]["full"]["rows"]["ours"]
    green = {group: {"status": "passed", "passed": 10} for group in tests_on_card.GROUPS}
    n_groups = len(green)
    text = gpu_report.render([[], results], [{}, {"groups": green}])
    assert f"Tests on this card: {10 * n_groups} passed, in {n_groups} of {n_groups} groups." in text
    assert "Which sources have changed since was not kept." in text
    assert "no tests of encoder_x." in text
    some = {**green, "encoder": {"status": "timeout"}, "wrapped": {"status": "failed", "passed": 9, "failed": 1}}
    del some["sanitizer"]
    about = {"commit": "0123456789ab", "torch": "2.11.0", "triton": "3.6.0", "parts": parts()}
    text = gpu_report.render([results], [{**about, "groups": some}])
    assert "Tests on this card (commit `0123456789ab`, torch 2.11.0, triton 3.6.0): " in text
    assert f"{10 * (n_groups - 3)} passed, in {n_groups - 3} of {n_groups} groups; " in text
    assert "encoder (ended by its limit of time), wrapped (red), sanitizer (not run)." in text
    assert "Nothing that runs on a card has changed since." in text


def test_the_readme_says_what_has_changed_since_the_tests() -> None:
    results = [gpu_result("encoder_x", "some preset", {"ours": row_of(80.0, is_ours=True, tflops=1.0)}, [], cells=64)]
    green = {group: {"status": "passed", "passed": 10, "seconds": 1.0} for group in tests_on_card.GROUPS}
    old = {**parts(), "rank_genes: launches": "another", "the encoder": "another"}
    del old["rank_genes: the fused pass and its other kernels"]
    found = {"commit": "ba9876543210", "parts": old, "groups": green}
    results[0]["tests"] = {"encoder": green["encoder"]}
    text = gpu_report.render([results], [found])
    assert (
        "**not run on a card** as it is now: rank_genes (the fused pass and its other kernels, launches); the encoder."
        in text
    )
    assert "were green; those of numbers at `0123456789ab` had run at `ba9876543210`." in text
    text = gpu_report.render([results], [{**found, "commit": "0123456789ab"}])
    assert "the tests that each number rests on were green.</sub>" in text
    results[0]["tests"] = {"encoder": {"status": "failed"}}
    text = gpu_report.render([results], [found])
    assert "red tests of encoder_x." in text
    assert "were green" not in text


def test_the_readme_says_what_is_missing_and_why() -> None:
    goals = [
        {"variant": "full", "metric": "tflops", "goal": 400, "impossible": 460, "reached": None, "impl": "triton"},
        {"variant": "full", "metric": "time_against:ours-no-dropout", "goal": 1.25, "impossible": 1.1, "reached": 1.51},
    ]
    rows = {"ours": {**row_of(0.8, is_ours=True, tflops=477.0), "impl": "cudnn", "relative_error": {"out": 0.002}}}
    attention = gpu_result("attention_x", "attention", rows, goals)
    off = "computes something else: relative errors {'hidden': 0.391}"
    attention["variants"]["full"]["left_out"] = {"flex": NO_TIME}
    ours = row_of(80.0, is_ours=True, tflops=1.0, cells_per_s=8.0)
    model = gpu_result(
        "encoder_x", "some preset", {"ours": {**ours, "relative_error": {"hidden": 0.243}}}, [], cells=64
    )
    model["variants"]["full"]["left_out"] = {"transformers-sdpa": off, "ours-compile": NOT_QUICK}
    model["corrections"] = ["some label"]
    text = gpu_report.render([[attention, model]])
    assert "inference, 64 cells, **run by cuDNN** | 0.800" in text
    assert (
        "| goals of the Triton kernel, not timed here: 400 TFLOP/s, 460 TFLOP/s; 1.51x the time of ours-no-dropout; "
        in text
    )
    assert "to cuDNN. So it was in attention_x (full)." in text
    assert "| transformers-sdpa: refused, off by 39% |  |  |" in text
    assert "Ours is off from float32 in: encoder_x (full), hidden states by 24%." in text
    assert "allowed: transformers-sdpa in encoder_x (full), by 39%." in text
    assert "No time was left to compile: flex in attention_x." in text
    assert "left out: ours-compile in encoder_x." in text
    assert "Labels corrected after the run, as the files say: encoder_x." in text
    rows["ours-triton"] = {**row_of(0.9, tflops=410.0), "impl": "triton", "relative_error": {}}
    goals[0]["reached"] = 410.0
    text = gpu_report.render([[attention]])
    assert "| goals of the Triton kernel, 410 TFLOP/s: **400 TFLOP/s**, 460 TFLOP/s;" in text


def test_the_report_knows_what_the_suite_says() -> None:
    assert (gpu_report.NO_TIME, gpu_report.NOT_QUICK, gpu_report.CUDNN) == (NO_TIME, NOT_QUICK, CUDNN)


def test_times_of_cudnn_are_no_times_of_a_kernel() -> None:
    rows = {
        "ours": {**row_of(1.0, is_ours=True), "impl": "cudnn", "tflops": 500.0},
        "ours-torch": {**row_of(2.0), "impl": "torch"},
    }
    result = gpu_result("attention_d64_forward", "attention", rows, [])
    result["variants"]["full"]["question"] = Question("varlen_attention", "bfloat16", {"head_dim": 64}).as_json()
    assert "varlen_attention" not in measured.render([result])
    goal = Goal("full", "tflops", 400, 460, impl="triton")
    assert goal.reached(rows) is None
    rows["ours-triton"] = {**row_of(1.5), "impl": "triton", "tflops": 410.0}
    assert "{'torch': 2.0, 'triton': 1.5}" in measured.render([result])
    assert goal.reached(rows) == 410
    for row in rows.values():
        row.pop("impl")
    assert Goal("full", "tflops", 400, 460).reached(rows) == 500
    # The committed rows of equal lengths, forward, ran on cuDNN, and are no goal's.
    (forward,) = (found for found in measured.committed() if found["case"] == "attention_d64_forward")
    for name in ("2048", "4096"):
        ours, cudnn = (forward["variants"][name]["rows"][row] for row in ("ours", "sdpa-cudnn"))
        assert ours["impl"] == "cudnn" or "ours-triton" in forward["variants"][name]["rows"]
        assert ours["ms"]["p50"] == pytest.approx(cudnn["ms"]["p50"], rel=0.01)


def test_rows_of_a_card_become_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a result to the generated module, and from there to what runs."""
    from geneformer_kernels import dispatch
    from geneformer_kernels.target import Target

    question = Question("feed_forward", "bfloat16", {"width": 768, "ff_width": 3072, "needs_grad": True})
    rows = {
        "ours": {**row_of(2.0, is_ours=True), "impl": "triton"},
        "ours-torch": {**row_of(1.0), "impl": "torch"},
        "eager": row_of(0.1),
    }
    result = gpu_result("feed_forward", "feed_forward", rows, [])
    result["variants"]["full"]["question"] = question.as_json()
    text = measured.render([result, {**result, "is_measurement": False}, {"case": "tokenize_v1"}])
    namespace: dict = {}
    exec(text, namespace)
    (key,) = namespace["MEASURED"]
    assert key == ("feed_forward", "Imaginary X1", "bfloat16")
    assert len(namespace["MEASURED"][key]) == 1
    monkeypatch.setattr(dispatch, "MEASURED", namespace["MEASURED"])
    card = Target.cuda(90, name="Imaginary X1")
    choice = dispatch.choose("feed_forward", "bfloat16", card, shape=question.shape)
    assert choice.impl == "torch"
    assert "2.00 times as fast as triton on Imaginary X1, measured 2030-01-02 at 0123456789ab" in choice.reason


def test_committed_rows_are_those_of_the_committed_results() -> None:
    assert measured.render(measured.committed()) == measured.TARGET.read_text(), "run python -m bench.measured"
