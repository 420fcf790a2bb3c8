"""What the GPU suite measures, on a CPU: nothing is timed in earnest, but everything that needs no card runs."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from geneformer_kernels.dispatch import use_impl
from geneformer_kernels.target import cpu_features

from bench.gpu import case as gpu_case
from bench.gpu import tests_on_card
from bench.gpu.case import run_case
from bench.gpu.cases import CASES, H200, Case, Goal, case_named, floors
from bench.gpu.impls import Question, uses_cudnn, with_impls
from bench.gpu.measure import (
    NO_TIME,
    NOT_QUICK,
    Candidate,
    Compiling,
    Place,
    Prepared,
    Unavailable,
    Variant,
    Work,
    measure,
    relative_error,
)
from bench.gpu.timer import time_in_turns
from bench.lengths import BLOOD, DEEP, real_lengths, uniform_lengths
from geneformer_fast.profiling.clock import WallClock, percentiles

CPU = torch.device("cpu")


# One of each kind; the others differ in numbers only.
DRY = (
    *("ceilings", "attention_d64_forward", "attention_d64_backward", "attention_d64_dropout"),
    *("encoder_10m_inference", "encoder_106m_inference", "encoder_10m_training", "encoder_106m_training"),
    *("encoder_aido-100m_inference", "mlm_cross_entropy", "residual_layernorm", "feed_forward", "int8_linear"),
    "int8_feed_forward",
    *("embed_tokens", "rank_genes"),
)
# Why candidates may be absent on a CPU.
LEFT_OUT = (
    *("needs CUDA", "installed", "ours runs it already", "CUDA graphs", "no dropout", "compiled for minutes"),
    *("takes no mask", "no stock encoder"),
)
PLACE = Place(CPU, WallClock(), H200, deadline=float("inf"), is_tiny=True, backend="")


@pytest.mark.parametrize("name", DRY)
def test_every_kind_of_case_runs_small_on_a_cpu(name: str) -> None:
    pytest.importorskip("transformers")
    # Far more than it takes: a machine that is busy, or compiles for the first time, must not skip anything.
    result = run_case(case_named(name), CPU, seconds=100, is_tiny=True)
    assert not result["is_measurement"]
    for found in result["variants"].values():
        if "this version has no" in found["left_out"].get("ours", ""):
            pytest.skip(found["left_out"]["ours"])
    assert result["failed"] == []
    assert result["skipped"] == []
    for found in result["variants"].values():
        assert any(row["is_ours"] for row in found["rows"].values())
        assert any(not row["is_ours"] for row in found["rows"].values())
        for row in found["rows"].values():
            assert 0 < row["ms"]["p10"] <= row["ms"]["p50"] <= row["ms"]["p90"]
            assert row["relative_error"] or not row["is_same"]
        for name, reason in found["left_out"].items():
            # torch's own product of int8 cuts sums of pairs at 16 bits where a CPU has no instructions for it.
            if name.startswith("int8-by-hand") and not {"int8_dot", "avx512_vnni", "avx_vnni"} & cpu_features():
                continue
            assert any(known in reason for known in LEFT_OUT), reason
    json.dumps(result)


def candidate(name: str, value: float, *, is_ours: bool = False, ms: float = 0.0, **options: bool) -> Candidate:
    def make() -> Prepared:
        if value != value:
            raise Unavailable("is not there")
        if value < 0:
            raise torch.OutOfMemoryError
        return Prepared(lambda: time.sleep(ms / 1e3), lambda: {"out": torch.full((3,), value)})

    return Candidate(name, name, make, is_ours=is_ours, **options)


def variant(*candidates: Candidate) -> Variant:
    work = Work(flops=1e9, counts={"cells": 10})
    return Variant("v", "v", work, lambda: candidates, lambda: {"out": torch.ones(3)}, {"out": 0.01})


def test_only_what_computes_the_same_is_timed() -> None:
    found = measure(
        variant(
            candidate("ours", 1.001, is_ours=True, ms=2),
            candidate("rival", 1.0, ms=6),
            candidate("wrong", 1.1),
            candidate("infinite", float("inf")),
            candidate("absent", float("nan")),
            candidate("large", -1.0),
            candidate("other", 7.0, is_same=False),
        ),
        PLACE,
        seconds=0.1,
    )
    assert set(found["rows"]) == {"ours", "rival", "other"}
    assert "something else" in found["left_out"]["wrong"]
    assert "something else" in found["left_out"]["infinite"]
    assert found["left_out"]["absent"] == "is not there"
    assert found["left_out"]["large"] == "out of memory"
    ours, rival = found["rows"]["ours"], found["rows"]["rival"]
    assert ours["relative_error"] == {"out": 0.001}
    assert 2 <= ours["ms"]["p50"] < 6 <= rival["ms"]["p50"]
    assert ours["cells_per_s"] == pytest.approx(10 / ours["ms"]["p50"] * 1e3, rel=1e-3)
    assert ours["share_of_floor"] == pytest.approx(1e9 / 788e12 * 1e3 / ours["ms"]["p50"], rel=1e-3)


def test_a_result_of_nothing_or_of_another_shape_is_wrong() -> None:
    truth = torch.ones(3, dtype=torch.float64)
    assert relative_error(torch.ones(2), truth) == float("inf")
    assert relative_error(torch.tensor([1.0, 1.0, float("nan")]), truth) == float("inf")
    assert relative_error(torch.zeros(3), truth) == 1.0
    nothing = Candidate("n", "n", lambda: Prepared(lambda: None, dict), is_ours=True)
    assert "of nothing" in measure(variant(nothing, candidate("rival", 1.0)), PLACE, seconds=0)["left_out"]["n"]


def test_an_encoder_whose_cells_see_each_other_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from geneformer_fast import encoder

    plain = encoder.attention_cells

    def one_cell(cu_seqlens: torch.Tensor, *args: Any, **options: Any) -> Any:
        return plain(cu_seqlens[[0, -1]], *args, **{**options, "longest": None})

    monkeypatch.setattr(encoder, "attention_cells", one_cell)
    result = run_case(case_named("encoder_10m_inference"), CPU, seconds=100, is_tiny=True)
    assert result["failed"] == ["full", "uniform"]
    assert "something else" in result["variants"]["full"]["left_out"]["ours"]


@pytest.mark.parametrize("preset", ["geneformer-v2-104m", "bionemo-106m"])
def test_what_a_comparison_allows_lies_between_rounding_and_another_function(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a deep encoder: random weights that are not tame amplify rounding to 6 % (ours) and 12 % (stock)."""
    pytest.importorskip("transformers")
    from bench.gpu.models import StockBert, StockPreNorm, in_half, packed_hidden, random_encoder
    from bench.gpu.providers.encoder import TOLERANCE
    from bench.gpu.workload import Mix, Workload
    from geneformer_fast import Encoder, EncoderConfig, encoder

    sizes = dict(n_layers=24, width=64, n_heads=4, ff_width=128, vocab_size=97, max_len=128)
    config = EncoderConfig.from_dict({**EncoderConfig.preset(preset).to_dict(), **sizes})
    model, load = random_encoder(config, CPU), Workload.of(config, Mix("uniform", 4, 1 << 30, low=20, high=128))
    (batch,) = load.packed(1 << 30, CPU)

    def hidden(model: Encoder) -> torch.Tensor:
        with torch.inference_mode(), use_impl("torch"):
            return model(batch.tokens).values.float()

    mean = hidden(model).mean(0)
    truth = hidden(model) - mean
    ours = hidden(in_half(model, torch.bfloat16)) - mean
    rival = (StockBert(model, "sdpa") if config.norm == "post" else StockPreNorm(model)).to(torch.bfloat16)
    stock = packed_hidden(rival, load.padded(1 << 30, CPU), len(load.cells)) - mean
    plain = encoder.attention_cells

    def one_cell(cu_seqlens: torch.Tensor, *args: Any, **options: Any) -> Any:
        return plain(cu_seqlens[[0, -1]], *args, **{**options, "longest": None})

    monkeypatch.setattr(encoder, "attention_cells", one_cell)
    other = hidden(model) - mean
    assert max(relative_error(ours, truth), relative_error(stock, truth)) < TOLERANCE["hidden"] / 2
    assert relative_error(other, truth) > 2 * TOLERANCE["hidden"]


def test_quick_runs_and_short_times_leave_out_what_takes_long() -> None:
    candidates = (candidate("ours", 1.0, is_ours=True), candidate("slow", 1.0, is_slow=True))
    quick = Place(CPU, WallClock(), H200, deadline=float("inf"), is_quick=True)
    assert set(measure(variant(*candidates), quick, seconds=0)["rows"]) == {"ours"}
    compiled = Candidate("compiled", "compiled", candidate("x", 1.0).make, compile_s=30.0)
    assert measure(variant(candidates[0], compiled), quick, seconds=0)["left_out"] == {"compiled": NOT_QUICK}
    late = Compiling(until=time.monotonic() + 10)
    place = Place(CPU, WallClock(), H200, deadline=float("inf"), compiling=late)
    assert measure(variant(candidates[0], compiled), place, seconds=0)["left_out"] == {"compiled": NO_TIME}


def test_what_is_compiled_has_time_of_its_own() -> None:
    """It comes last, when the others have used up theirs, and it takes nothing from variants to come."""

    def slowly() -> Prepared:
        time.sleep(0.2)
        return candidate("x", 1.0).make()

    first, second = (Candidate(name, name, slowly, compile_s=0.2) for name in ("first", "second"))
    place = Place(CPU, WallClock(), H200, deadline=time.monotonic() - 1, compiling=Compiling(seconds=0.1))
    found = measure(variant(candidate("ours", 1.0, is_ours=True), first, second), place, seconds=0)
    assert set(found["rows"]) == {"ours", "first"}
    assert found["left_out"] == {"second": NO_TIME}
    assert place.compiling.spent >= 0.2
    assert place.seconds_left - (place.deadline - time.monotonic()) == pytest.approx(place.compiling.spent, abs=0.02)


class Some:
    """Three variants: of the second the inputs cannot be made, and at the third the process dies."""

    def __repr__(self) -> str:
        return "Some()"

    def variants(self, place: Place) -> list[Variant]:
        def broken() -> list[Candidate]:
            raise ValueError("no inputs")

        def dead() -> list[Candidate]:
            raise KeyboardInterrupt

        first = variant(candidate("ours", 1.0, is_ours=True))
        return [first, replace(first, name="w", build=broken), replace(first, name="x", build=dead)]


def test_a_variant_that_fails_loses_itself_only(tmp_path: Path) -> None:
    case, known = Case("some", "", Some(), (), 10), []

    def keep(content: dict) -> None:
        known.append(json.loads(json.dumps(content)))
        gpu_case.write(content, tmp_path)

    with pytest.raises(KeyboardInterrupt):
        run_case(case, CPU, seconds=100, is_tiny=True, keep=keep)
    assert [(content["failed"], content["skipped"]) for content in known] == [([], ["w", "x"]), (["w"], ["x"])]
    written = json.loads((tmp_path / "some.json").read_text())
    assert written["variants"]["v"]["rows"]["ours"]["ms"]
    assert written["variants"]["w"]["error"] == "ValueError: no inputs"
    (tmp_path / "some.json").unlink()
    gpu_case.write({**written, "variants": {"w": written["variants"]["w"]}}, tmp_path)
    assert not (tmp_path / "some.json").exists()


def test_candidates_take_turns_in_changing_order() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    found = time_in_turns(runs, WallClock(), seconds=0, has_lead=False, least_rounds=3, most_per_turn=1)
    assert "".join(order[-9:]) == "abcbcacab"
    assert all(row["n"] == 3 for row in found.values())
    assert percentiles([1, 2, 3]) == {"p10": 1.2, "p50": 2.0, "p90": 2.8}


def test_lengths_are_reproducible_and_have_the_mean_asked_for() -> None:
    lengths = real_lengths(128, mean=1442)
    assert lengths == real_lengths(128, mean=1442)
    assert lengths != sorted(lengths)
    assert np.mean(lengths) == pytest.approx(1442, rel=0.02)
    assert set(lengths) <= set(BLOOD) | set(DEEP)
    assert max(real_lengths(50, mean=900, max_len=2048)) == 2048
    assert sorted(uniform_lengths(3, 300, 2048)) == [300, 1174, 2048]
    with pytest.raises(ValueError, match="not between"):
        real_lengths(10, mean=5000)


@pytest.mark.parametrize(
    ("preset", "length", "gigaflops"),
    [
        ("geneformer-v1-10m", 2048, 38.7),
        ("bionemo-106m", 2048, 502),
        ("geneformer-v2-104m", 4096, 1314),
        ("geneformer-v2-316m", 4096, 3740),
        ("aido-cell-100m", 19_266, 20_456),
    ],
)
def test_operations_are_counted_as_in_the_goals(preset: str, length: int, gigaflops: float) -> None:
    from bench.gpu.models import encoder_flops
    from geneformer_fast import EncoderConfig

    assert encoder_flops(EncoderConfig.preset(preset), [length]) / 1e9 == pytest.approx(gigaflops, rel=2e-3)


def test_cases_are_consistent() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert names[0] == "ceilings"
    assert {group for case in CASES for group in case.tests} <= set(tests_on_card.GROUPS)
    rows = floors()
    for case in CASES:
        for goal in case.goals:
            assert any(row.startswith(f"| {case.name} {goal.variant} |") for row in rows), (case.name, goal.variant)
            assert (goal.impossible < goal.goal) == goal.is_less_better
        assert case.seconds <= 120


def test_goals_read_the_best_of_ours() -> None:
    rows = {
        "ours": {"is_ours": True, "ms": {"p50": 2.0}, "cells_per_s": 50.0, "peak_bytes": 3e9},
        "ours-graph": {"is_ours": True, "ms": {"p50": 1.0}, "cells_per_s": 100.0, "peak_bytes": 4e9},
        "eager": {"is_ours": False, "ms": {"p50": 3.0}, "cells_per_s": 33.0, "peak_bytes": 1},
    }
    assert Goal("v", "cells_per_s", 1, 2).reached(rows) == 100
    assert Goal("v", "peak_gb", 2, 1).reached(rows) == 3
    assert Goal("v", "faster_than:eager", 1, 2).reached(rows) == 3
    assert Goal("v", "time_against:eager", 1, 2).reached(rows) == pytest.approx(1 / 3)
    assert Goal("v", "time_against:absent", 1, 2).reached(rows) is None
    assert Goal("v", "cells_per_s", 1, 2).reached({"eager": rows["eager"]}) is None


def test_implementations_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen, and what is not, each with its name; a card would run both."""
    from geneformer_kernels import feed_forward
    from geneformer_kernels.dispatch import choose
    from geneformer_kernels.target import target_of

    generator = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(*shape, generator=generator) for shape in ((5, 8), (16, 8), (8, 16)))
    if target_of("cpu").prefers_float32_loops:
        pytest.skip("this CPU, which stands for a card, has loops of its own that are chosen first")
    seen = []

    def run() -> torch.Tensor:
        seen.append(choose("feed_forward", "float32", target_of("cpu")).impl)
        return feed_forward(x, up, None, down, None, activation="relu")

    ours = Candidate("ours", "this project", lambda: Prepared(run, lambda: {"out": run()}), is_ours=True)
    question = Question("feed_forward", "float32", {"width": 8, "ff_width": 16, "needs_grad": False})
    first, triton, torch_ = with_impls(ours, question, CPU)
    assert (first.name, triton.name, torch_.name) == ("ours", "ours-triton", "ours-torch")
    assert first.make().notes == {"impl": "torch"}
    for other, reason in ((triton, "needs CUDA"), (torch_, "ours runs it already")):
        with pytest.raises(Unavailable, match=reason):
            other.make()
    # As on a card, with the interpreter in its place.
    monkeypatch.setattr("bench.gpu.impls.target_of", lambda device: target_of("cpu"))
    _, triton, _ = with_impls(ours, question, SimpleNamespace(type="cuda"))  # type: ignore[arg-type]
    seen.clear()
    prepared = triton.make()
    torch.testing.assert_close(prepared.result()["out"], first.make().result()["out"])
    prepared.run()
    assert prepared.notes == {"impl": "triton"}
    assert seen.count("triton") == 3
    assert not triton.is_ours


def test_what_ran_is_noted_and_not_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of cells of one length is left to cuDNN on Hopper, whatever is chosen; the kernel stands beside it."""
    from geneformer_kernels import dispatch
    from geneformer_kernels.ops.varlen_attention import op, sdpa
    from geneformer_kernels.target import target_of

    if target_of("cpu").prefers_float32_loops:
        pytest.skip("this CPU, which stands for a card, has loops of its own that are chosen first")
    monkeypatch.setattr("bench.gpu.impls.target_of", lambda device: target_of("cpu"))
    monkeypatch.setattr(sdpa, "attend_equal", lambda q, k, v, length, scale: q)
    q = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(0))

    def attend() -> torch.Tensor:
        return op.varlen_attention(q, q, q, cu_seqlens=torch.tensor([0, 4, 8]))

    assert not uses_cudnn(attend)
    ours = Candidate("ours", "this project", lambda: Prepared(attend, lambda: {"out": attend()}), is_ours=True)
    question = Question("varlen_attention", "float32", {"head_dim": 4, "length": 4, "needs_grad": False})
    card = SimpleNamespace(type="cuda")
    first, triton, torch_ = with_impls(ours, question, card, is_cudnn=uses_cudnn)  # type: ignore[arg-type]
    assert first.make().notes == {"impl": "torch"}
    with pytest.raises(Unavailable, match="ours runs it already"):
        torch_.make()
    monkeypatch.setattr(
        op, "_length_for_cudnn", lambda q, impl, *args: 0 if dispatch.is_forced("varlen_attention") else 4
    )
    assert uses_cudnn(attend)
    first, triton, torch_ = with_impls(ours, question, card, is_cudnn=uses_cudnn)  # type: ignore[arg-type]
    assert first.make().notes == {"impl": "cudnn"}
    assert torch_.make().notes == {"impl": "torch"}
    # Asked for by name: what cuDNN did not compute.
    assert not torch.equal(torch_.make().result()["out"], q)
    assert torch_.is_slow
    assert not triton.is_slow
    assert with_impls(ours, question, card)[1].is_slow  # type: ignore[arg-type]
