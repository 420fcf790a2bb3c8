"""Every rule finds what it is for in a made-up report, with its number, and nothing in one that is fine."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest

from geneformer_fast import EncoderConfig
from geneformer_fast.profiling.figures import (
    KINDS,
    PARTS,
    Ceilings,
    Cells,
    Energy,
    Finding,
    Flops,
    Memory,
    Missing,
    Operation,
    Setting,
    Spread,
    Subject,
    Timing,
    Tokens,
)
from geneformer_fast.profiling.findings import RULES, findings
from geneformer_fast.profiling.flops.work import encoder_flops
from geneformer_fast.profiling.report import Report

CONFIG = EncoderConfig.preset("geneformer-v1-10m")
NONE = Missing("made up")


def fine(device: str = "cuda:0", **changes: Any) -> Report:
    """A report of a run in which nothing is to be changed."""
    report = Report(
        subject=Subject(
            "embed", "made up", "geneformer_fast", 10_000_000, CONFIG.to_dict(), "bfloat16", device, "made up",
            {"token_budget": 8192, "threads": 4},
        ),
        machine={"n_cores": 4, "memory_gib": 16.0, "gpu": {"name": "Example", "memory_gib": 80.0}},
        ceilings=Ceilings({"float32": 100.0, "bfloat16": 800.0, "int8": 900.0}, 3000.0),
        time=Timing(10, 3, 10.0, 35.0, 1.0, Spread(900, 1000, 1100), dict.fromkeys(PARTS, 0.0) | {"forward": 10.0}),
        cells=Cells(1000, 100.0, 50_000.0, Spread(300, 500, 900)),
        tokens=Tokens(500_000, 500_000, 1.0, [[100, 50_000, 50_000]] * 10, 10**9, 10**9),
        flops=Flops(1e15, 1e15, 1e12, 0.5, 0.5, 0.4, 0.4, "bfloat16", "formula", "made up"),
        memory=Memory({**dict.fromkeys(KINDS, 0.0), "weights": 60e9}, 60e9, 64e9, 0.06, 4e9, []),
        energy=Energy("NVML", 10.0, 6e3, 600.0, 80.0, 6.0, 6e5, 1.67, {"throttle_reasons": "none", "sm_mhz": 1980.0}),
        operations=[
            Operation("varlen_attention", 10, 2000.0, 0.2, 1e14, 1e10, 0.5),
            Operation("feed_forward", 10, 8000.0, 0.8, 9e14, 1e12, 0.9),
        ],
    )  # fmt: skip
    for name, values in changes.items():
        part = getattr(report, name)
        if dataclasses.is_dataclass(part):
            values = replace(part, **values)  # type: ignore[type-var]
        elif isinstance(part, dict):
            values = part | values
        report = replace(report, **{name: values})
    return report


def spent(**parts: Any) -> dict[str, Any]:
    return {"parts": dict.fromkeys(PARTS, 0.0) | {"forward": 10.0 - sum(parts.values())} | parts}


def used(**parts: float) -> dict[str, Any]:
    return {"parts": {**dict.fromkeys(KINDS, 0.0), **parts}, "peak_bytes": sum(parts.values())}


def operation(name: str, share: float, flops: Any = 1e14, n_bytes: Any = 1e10) -> Operation:
    return Operation(name, 1, 1e4 * share, share, flops, n_bytes, 0.5)


def ours(per_s: float) -> Report:
    return fine(cells={"per_s": per_s})


STOCK = {"engine": "transformers"}
WORK = encoder_flops(CONFIG, 850_000, 2e9) / encoder_flops(CONFIG, 500_000, 1e9)
PADDED = {"n_positions": 850_000, "useful_share": 500 / 850, "n_position_squares": 10**9}

#: Name of the rule, what the report is like, its number, what the text says, gain.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, float], str, float | None]] = {
    "padding of rows": (
        "padding", {"tokens": {**PADDED, "n_real_squares": 0}}, {"padding_share": 0.4118}, "41 % of computed positions",
        1.7,
    ),
    "padding of squares": (
        "padding", {"tokens": {**PADDED, "n_position_squares": 2 * 10**9}},
        {"work_ratio": WORK}, "sort cells by length", WORK,
    ),
    "padding of a stock model": ("padding", {"tokens": PADDED, "subject": STOCK}, {}, "accelerate(model)", None),
    "padding beside what it does not touch": (
        "padding", {"tokens": {**PADDED, "n_real_squares": 0}, "time": spent(data=3.0, communication=2.0)}, {}, "41 %",
        1 / (0.5 + 0.5 / 1.7),
    ),
    "data": ("data", {"time": spent(data=3.0)}, {"data_share": 0.3}, "30 % of the time went by waiting", 1 / 0.7),
    "gaps": ("host_gaps", {"time": spent(host_gaps=2.0)}, {"gap_share": 0.2}, "nothing to do", 1.25),
    "copies": ("copies", {"time": spent(copies=2.0)}, {"copy_share": 0.2}, "between host and device", 1.25),
    "communication": (
        "communication", {"time": spent(communication=2.0)}, {"communication_share": 0.2},
        "20 % of the time went into communication between processes", 1.25,
    ),
    "batch": (
        "batch",
        {"sweep": [Setting(8192, 100.0, 1e9, 2e9), Setting(32768, 150.0, 3e9, 1e9), Setting(65536, NONE, NONE, NONE)]},
        {"token_budget": 32768, "cells_per_s": 150, "cells_per_s_now": 100}, "set the token budget to 32,768", 1.5,
    ),
    "small batches": (
        "small_batches", {"operations": [operation("linear", 0.6, 1e12, 1e11), operation("varlen_attention", 0.3)]},
        {"share": 0.6, "operations_per_byte": 10, "balance": 800 / 3}, "products that memory holds up (linear", None,
    ),
    "dtype": (
        "dtype", {"subject": {"dtype": "float32"}}, {"ratio": 8, "tflops": 800, "tflops_now": 100},
        "bfloat16 is 8 times as fast here", 8.0,
    ),
    "dtype of some of the time": (
        "dtype",
        {"subject": {"dtype": "float32"}, "operations": [operation("linear", 0.5), operation("aten::add", 0.5, NONE)]},
        {}, "measured", 1 / (0.5 + 0.5 / 8),
    ),
    "int8": (
        "int8", {"ceilings": {"products": {"bfloat16": 800.0, "int8": 1600.0}}}, {"tops_int8": 1600}, "quantize", 2.0,
    ),
    "logits": (
        "logits", {"memory": used(weights=60e9, logits=40e9)}, {"logits_share": 0.4}, "40 % of the memory", None,
    ),
    "logits of a stock model": (
        "logits", {"memory": used(weights=60e9, logits=40e9), "subject": {**STOCK, "mode": "train"}}, {},
        "never writes those that only the loss needs", None,
    ),
    "rows nobody asked for": (
        "unasked", {"flops": {"hardware": 3e15}, "subject": STOCK}, {"unasked_share": 2 / 3, "work_ratio": 3},
        "accelerate(model)", 3.0,
    ),
    "recomputation": (
        "recomputation",
        {
            "subject": {"mode": "train", "settings": {"recomputing": True}}, "memory": used(weights=8e9),
            "flops": {"hardware": 4 / 3 * 1e15},
        },
        {"peak_share": 8e9 / (80 * 2**30)}, "turn recomputation off", 4 / 3,
    ),
    "memory": ("memory", {"memory": used(weights=8e9)}, {"peak_share": 8e9 / (80 * 2**30)}, "larger batches fit", None),
    "idle power": (
        "idle_power", {"energy": {"idle_watts": 90.0, "watts": 150.0}}, {"idle_share": 0.6}, "90 W of 150 W", None,
    ),
    "throttling": (
        "throttling", {"energy": {"state": {"throttle_reasons": "power cap", "sm_mhz": 1200.0}}}, {"sm_mhz": 1200},
        "held down (power cap) at sm_mhz 1,200", None,
    ),
    "threads": (
        "threads", {"device": "cpu", "time": {"cpu_s": 10.0}}, {"cores_used": 1, "n_cores": 4}, "1 of 4 cores worked",
        None,
    ),
    "threads, as many as cores": (
        "threads", {"device": "cpu", "time": {"cpu_s": 10.0}}, {"cores_used": 1, "n_cores": 4},
        "1 of 4 cores worked with 4 torch threads: there are enough of them", None,
    ),
    "too few threads": (
        "threads", {"subject": {"device": "cpu", "settings": {"threads": 1}}, "time": {"cpu_s": 10.0}},
        {"cores_used": 1}, "with 1 torch thread: --threads 4 (torch.set_num_threads(4))", None,
    ),
    "too few workers": (
        "threads",
        {
            "subject": {"mode": "tokenize", "device": "cpu", "settings": {"threads": 4, "workers": 2}},
            "time": {"cpu_s": 10.0},
        },
        {"cores_used": 1}, "1 of 4 cores worked with 2 workers: --threads 4", None,
    ),
    "attention": (
        "attention", {"operations": [operation("varlen_attention", 0.5), operation("attention_softmax backward", 0.1)]},
        {"attention_share": 0.6, "length_p50": 500}, "60 % of the time, in cells of 500 tokens", None,
    ),
    "engine": (
        "engine", {"subject": STOCK, "compared": [ours(250.0)]}, {"cells_per_s": 250, "cells_per_s_now": 100},
        "accelerate(model)", 2.5,
    ),
}  # fmt: skip


def only(found: list[Finding], name: str) -> Finding:
    (finding,) = [each for each in found if each.name == name]
    return finding


@pytest.mark.parametrize("case", CASES)
def test_a_rule_finds_what_it_is_for(case: str) -> None:
    name, changes, numbers, said, gain = CASES[case]
    finding = only(findings(fine(**changes)), name)
    assert said in finding.text
    for key, value in numbers.items():
        assert finding.numbers[key] == pytest.approx(value, rel=1e-3)
    assert finding.numbers, "a finding rests on a number"
    if gain is not None:
        assert finding.gain == pytest.approx(gain, rel=1e-3)


def test_there_is_a_case_for_every_rule() -> None:
    assert {name for name, *_ in CASES.values()} == {
        found.name for rule in RULES for case in CASES.values() if (found := rule(fine(**case[1])))
    }
    assert len({name for name, *_ in CASES.values()}) == len(RULES)


@pytest.mark.parametrize("place", ["cuda:0", "cpu"])
def test_a_report_that_is_fine_says_so(place: str) -> None:
    (finding,) = findings(fine(place))
    assert finding.name == "nothing"
    assert finding.gain is None
    assert "MFU 50 %" in finding.text
    assert finding.numbers == {"mfu": 0.5, "useful_share": 1.0, "cells_per_s": 100.0}


#: What is not to be found, although it comes near.
NEAR: dict[str, tuple[str, dict[str, Any]]] = {
    "little padding": ("padding", {"tokens": {"n_positions": 540_000, "useful_share": 500 / 540}}),
    "padding that nobody knows": ("padding", {"tokens": {"useful_share": NONE}}),
    "little waiting": ("data", {"time": spent(data=0.5)}),
    "waiting that nobody knows": ("data", {"time": {"parts": {"data": NONE}}}),
    "gaps of a CPU": ("host_gaps", {"time": {"parts": {"host_gaps": NONE}}}),
    "a budget that is as good": (
        "batch", {"sweep": [Setting(8192, 100.0, NONE, NONE), Setting(32768, 103.0, NONE, NONE)]},
    ),
    "the best budget": ("batch", {"sweep": [Setting(8192, 100.0, NONE, NONE), Setting(32768, 50.0, NONE, NONE)]}),
    "attention of many bytes": ("small_batches", {"operations": [operation("varlen_attention", 0.9, 1e12, 1e11)]}),
    "products without ceilings": (
        "small_batches", {"operations": [operation("linear", 0.9, 1e12, 1e11)], "ceilings": {"products": {}}},
    ),
    "float32 that is as fast": (
        "dtype", {"subject": {"dtype": "float32"}, "ceilings": {"products": {"float32": 100.0, "bfloat16": 120.0}}},
    ),
    "float32 beside nothing known": (
        "dtype", {"subject": {"dtype": "float32"}, "ceilings": {"products": {"float32": 100.0, "bfloat16": NONE}}},
    ),
    "int8 that is refused": ("int8", {"ceilings": {"products": {"bfloat16": 800.0, "int8": Missing("refused")}}}),
    "int8 in training": (
        "int8", {"ceilings": {"products": {"bfloat16": 800.0, "int8": 1600.0}}, "subject": {"mode": "train"}},
    ),
    "int8 already": (
        "int8", {"ceilings": {"products": {"int8": 1600.0, "bfloat16": 8.0}}, "subject": {"dtype": "int8"}},
    ),
    "few logits": ("logits", {"memory": used(weights=60e9, logits=4e9)}),
    "recomputation that is needed": (
        "recomputation",
        {"subject": {"mode": "train", "settings": {"recomputing": True}}, "memory": used(weights=70e9)},
    ),
    "memory of a CPU": ("memory", {"device": "cpu", "memory": used(weights=1e9)}),
    "memory with a sweep": ("memory", {"memory": used(weights=8e9), "sweep": [Setting(8192, 100.0, 1e9, 1e9)]}),
    "little idle power": ("idle_power", {"energy": {"idle_watts": 80.0, "watts": 400.0}}),
    "no reason to throttle": ("throttling", {"energy": {"state": {"throttle_reasons": NONE}}}),
    "cores at work": ("threads", {"device": "cpu", "time": {"cpu_s": 38.0}}),
    "one core of one": ("threads", {"device": "cpu", "time": {"cpu_s": 5.0}, "machine": {"n_cores": 1}}),
    "threads beside a card": ("threads", {"time": {"cpu_s": 5.0}}),
    "little attention": ("attention", {"operations": [operation("varlen_attention", 0.2)]}),
    "attention of short cells": (
        "attention", {"operations": [operation("varlen_attention", 0.6, 1e12), operation("linear", 0.3, 1e13)]},
    ),
    "the other engine slower": ("engine", {"subject": STOCK, "compared": [ours(90.0)]}),
    "ours compared with the other": ("engine", {"compared": [ours(900.0)]}),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR)
def test_a_rule_leaves_alone_what_is_fine(case: str) -> None:
    name, changes = NEAR[case]
    assert name not in [each.name for each in findings(fine(**changes))]


def test_the_largest_gain_comes_first_and_what_has_none_last() -> None:
    found = findings(
        fine(
            time=spent(data=3.0, host_gaps=2.0),
            energy={"idle_watts": 90.0, "watts": 100.0},
            subject={"dtype": "float32"},
        )
    )
    assert [each.name for each in found] == ["int8", "dtype", "data", "host_gaps", "idle_power"]
    gains = [each.gain or 0.0 for each in found]
    assert gains == sorted(gains, reverse=True)


def test_where_everything_is_missing_nothing_is_found() -> None:
    report = fine(
        time={"parts": dict.fromkeys(PARTS, NONE), "cpu_s": NONE},
        cells={"per_s": NONE, "tokens_per_s": NONE, "lengths": None},
        tokens={"n_real": 0, "n_positions": 0, "useful_share": NONE},
        flops=dict.fromkeys(("model", "hardware", "per_cell", "mfu", "hfu"), NONE),
        memory={"parts": dict.fromkeys(KINDS, NONE), "peak_bytes": NONE},
        energy={"watts": NONE, "idle_watts": NONE, "state": {}},
        ceilings={"products": {}, "copy_gbps": NONE},
        operations=[],
    )
    (finding,) = findings(report)
    assert (finding.name, finding.text, finding.numbers) == ("nothing", "nothing to change was found", {})
