"""Predictions from committed measurements: what is fitted, how far off it is, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from geneformer_fast.config import PRESETS, EncoderConfig
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.profiling.figures import Missing
from geneformer_fast.profiling.lengths import Lengths
from geneformer_fast.profiling.prediction import measurements
from geneformer_fast.profiling.prediction.answer import Cells, cells_like
from geneformer_fast.profiling.prediction.fitted import (
    GOOD_ENOUGH,
    MemorySample,
    Sample,
    Work,
    fit,
    fit_memory,
    interval,
)
from geneformer_fast.profiling.prediction.measurements import (
    Machine,
    Measured,
    Timed,
    Tokenized,
    machine_named,
    measured,
)
from geneformer_fast.profiling.prediction.predict import predict
from geneformer_fast.profiling.prediction.tokenizing import fit_passes, predict_tokenizing
from geneformer_fast.profiling.prediction.training import Step, fit_steps, operations_s

ROOT = Path(__file__).resolve().parent.parent.parent
V1, V2 = "geneformer-v1-10m", "geneformer-v2-104m"


def predicted(card, model=V1, *, n=1000, lengths="real", **options):
    config = PRESETS[model]
    return predict(card, cells_like(n, Lengths.parsed(lengths), config.max_len), model, config, **options)


def test_time_bound_by_the_device_and_by_the_host_is_told_apart():
    work = [
        *(Work(1e12, 1e8, 1), Work(4e12, 1e8, 1), Work(1e12, 9e8, 2), Work(2e12, 3e8, 2)),
        *(Work(1e10, 1e6, 300), Work(2e10, 2e6, 900)),
    ]

    def seconds(each):
        return max(2e-15 * each.flops + 3e-11 * each.numbers, 1e-3 * each.launches)

    samples = [Sample(f"problem {i}", each, seconds(each)) for i, each in enumerate(work)]
    found = fit(samples)
    assert found.coefficients == pytest.approx({"flops": 2e-15, "numbers": 3e-11, "launches": 1e-3}, rel=1e-6)
    assert found.error == pytest.approx(0, abs=1e-6)
    assert found.seconds(Work(1e9, 1e5, 1e6)) == pytest.approx(1000)
    assert found.seconds(Work(1e9, 1e5, 1e6), is_device_alone=True) == pytest.approx(2e-6 + 3e-6)


def test_the_error_is_that_on_problems_that_were_left_out():
    """Two problems of equal work, of which one took 1.2 times as long: each predicts the other to a fifth."""
    samples = [Sample(name, Work(1e12, 0, 0), seconds) for name, seconds in (("a", 1.0), ("b", 1.2))]
    found = fit(samples)
    assert found.error == pytest.approx(0.2)
    least, most = interval(10.0, found.error)
    assert (least, most) == pytest.approx((10 / 1.2, 12.0))


def test_measurements_of_one_problem_do_not_vouch_for_each_other():
    samples = [Sample("a", Work(1e12, 0, 0), 1.0), Sample("a", Work(2e12, 0, 0), 2.0)]
    assert fit(samples).error is None
    assert interval(1.0, fit(samples).error) is None
    assert fit(samples).seconds(Work(3e12, 0, 0)) == pytest.approx(3.0)


def test_there_are_as_many_terms_as_any_problem_left_out_leaves_determined():
    work = [Work(1e12, 1e9, 0), Work(3e12, 1e9, 0), Work(1e12, 8e9, 0)]
    samples = [Sample(str(i), each, 1e-12 * each.flops + 1e-9 * each.numbers) for i, each in enumerate(work)]
    assert list(fit(samples).coefficients) == ["flops", "numbers"]
    assert list(fit(samples[:2]).coefficients) == ["flops"]


def test_memory_is_what_is_known_and_a_coefficient():
    samples = [MemorySample(name, 1e8, units, 1e8 + 20 * units) for name, units in (("a", 1e6), ("b", 4e7))]
    assert fit_memory(samples) == pytest.approx((20.0, 0.0), abs=1e-9)
    assert fit_memory(samples[:1]) == (pytest.approx(20.0), None)


def test_what_is_shipped_is_what_the_results_say():
    from bench.distil import RESULTS, distilled

    shipped = measured()
    again = distilled(RESULTS, shipped.sums_of_squares)
    assert dataclasses.asdict(again) == dataclasses.asdict(shipped), "run python -m bench.distil"
    text = json.dumps(dataclasses.asdict(again), indent=1) + "\n"
    assert measurements.FILE.read_text(encoding="utf-8") == text


def test_sums_of_squares_are_those_of_the_real_cells():
    if not (ROOT.parent / "shared" / "data" / "reference_official").is_dir():
        pytest.skip("the real cells are not here (shared/ beside the checkout is absent)")
    from bench.distil import RESULTS, sums_of_real_cells

    assert sums_of_real_cells(RESULTS) == measured().sums_of_squares


GROUPS = [
    pytest.param(machine.name, mode, dtype, threads, id=f"{machine.name}-{mode}-{dtype}-{threads}")
    for machine in measured().machines
    for mode, dtype, threads in sorted({(m.mode, m.dtype, m.threads) for m in machine.measurements}, key=str)
]


@pytest.mark.parametrize(("name", "mode", "dtype", "threads"), GROUPS)
def test_what_is_called_good_is_within_15_percent_of_what_it_has_not_seen(monkeypatch, name, mode, dtype, threads):
    """With each problem taken out of the file in turn, predicted again by the function users call."""
    machine = machine_named(name)
    seen = [m for m in machine.measurements if (m.mode, m.dtype, m.threads) == (mode, dtype, threads)]
    problems = sorted({m.problem for m in seen})
    whole = predicted(name, mode=mode, dtype=dtype, threads=threads)
    if len(problems) == 1:
        assert isinstance(whole.error, Missing)
        assert not whole.is_good
        assert any("error is not known" in note for note in whole.notes)
        return
    errors = []
    for problem in problems:
        rest = dataclasses.replace(machine, measurements=[m for m in seen if m.problem != problem])
        monkeypatch.setattr(measurements, "measured", lambda rest=rest: Measured([rest], {}))
        for m in seen:
            if m.problem == problem and not m.is_device_alone:
                errors.append(abs(np.log(_of_measurement(m, name, threads) / m.seconds)))
        monkeypatch.undo()
    assert whole.is_good == (whole.error <= GOOD_ENOUGH)
    if whole.is_good:
        assert np.expm1(max(errors)) <= GOOD_ENOUGH
    else:
        assert any("not known to 15 %" in note for note in whole.notes)


def _of_measurement(m, name, threads):
    """What is predicted for the cells of a measurement."""
    config = PRESETS[m.model]
    blocks = "last" if m.blocks == config.n_layers else m.blocks - 1
    mean = m.n_tokens / m.n_cells
    # Two lengths with the mean and the mean square of the cells.
    spread = max(0.0, m.sum_of_squares / m.n_cells - mean**2) ** 0.5
    cells = Cells(m.n_cells, np.array([mean - spread, mean + spread]), "as measured")
    found = predict(
        name, cells, m.model, config, mode=m.mode, layer=blocks, dtype=m.dtype, threads=threads,
        batch_tokens=m.batch_tokens,
    )  # fmt: skip
    return found.seconds


def test_the_h200_and_the_epyc_are_known_well_enough():
    """Against what was measured there, in words of the results: cells/s of whole encoders, and of embedding."""
    h200, epyc = predicted("NVIDIA H200"), predicted("amd epyc")
    assert h200.is_good
    assert epyc.is_good
    uniform = predicted("H200", lengths="uniform:300-2048", layer="last")
    assert uniform.cells_per_s == pytest.approx(12_051, rel=0.1)
    assert epyc.cells_per_s == pytest.approx(49.03, rel=0.15)


def test_training_on_the_h200_is_known_well_enough():
    """Each of its two problems from the steps of the other one, and from operations measured by themselves."""
    found = predicted("H200", mode="train")
    assert found.is_good
    assert any("attention_d64_dropout.json" in source for source in found.sources)
    assert any("the optimizer's step comes on top" in note for note in found.notes)
    assert any("fitted to 2 runs of whole steps, of cells of 2,048 tokens" in note for note in found.notes)


def steps_of(*per_number):
    sizes = [(0.1, 1e9, 20), (0.3, 2e9, 60)]
    return [
        Step(f"problem {i}", alone, numbers, launches, alone + each * numbers, 1e-3 * launches)
        for i, ((alone, numbers, launches), each) in enumerate(zip(sizes, per_number, strict=True))
    ]


def test_steps_are_their_operations_and_a_rest_or_what_the_host_takes():
    found = fit_steps(steps_of(1e-10, 1e-10))
    assert (found.per_number, found.per_launch) == pytest.approx((1e-10, 1e-3))
    assert found.error == pytest.approx(0, abs=1e-9)
    assert found.seconds(0.2, 1e9, 10) == pytest.approx(0.3)
    assert found.seconds(0.2, 1e9, 1000) == pytest.approx(1.0)


def test_the_error_of_steps_is_that_on_problems_left_out():
    """The rest of one is twice that of the other: 0.1 + 0.2 s said to take 0.1 + 0.1, and 0.3 + 0.2 said 0.3 + 0.4."""
    assert fit_steps(steps_of(2e-10, 1e-10)).error == pytest.approx(max(0.3 / 0.2, 0.7 / 0.5) - 1)
    assert fit_steps(steps_of(1e-10, 1e-10)[:1]).error is None


def test_steps_that_waited_for_their_host_say_nothing_of_the_card():
    busy = [dataclasses.replace(step, host_s=step.seconds) for step in steps_of(1e-10, 1e-10)]
    assert fit_steps(busy) is None
    assert fit_steps([*busy[:1], *steps_of(1e-10, 1e-10)[1:]]).error is None


def test_operations_by_themselves_add_up_to_what_a_hand_counts():
    """One of each, measured at 1 ms for what one block of two cells of 8 tokens takes; products at 1 T op/s."""
    config = EncoderConfig(n_layers=2, width=64, n_heads=1, ff_width=128, vocab_size=50, max_len=16)
    amounts = {
        "varlen_attention": {"pairs": 2 * 64.0, "rows": 16.0}, "residual_layernorm": {"numbers": 16 * 64.0},
        "mlm_cross_entropy": {"flops": 6 * 3 * 64 * 50.0, "logits": 3 * 50.0},
    }  # fmt: skip
    timed = [
        Timed(name, each, 1e-3, "", "", "", head_dim=64 if name == "varlen_attention" else None, has_dropout=True)
        for name, each in amounts.items()
    ]
    card = Machine("card", "cuda", operations=timed, product_tflops=1.0)
    products = 3 * (2 * 2 * 16 * (4 * 64 * 64 + 2 * 64 * 128) + 2 * 3 * 64 * 64) / 1e12
    # Attention in two blocks; five norms of 16 rows, and one of the head's three; the loss once.
    assert operations_s(card, config, 16, 2 * 64, 3) == pytest.approx(1e-3 * (2 + 5 + 3 / 16 + 1) + products)
    for other in ({"n_heads": 2}, {"attention_dropout": 0.0}):
        assert operations_s(card, dataclasses.replace(config, **other), 16, 2 * 64, 3) is None
    assert operations_s(dataclasses.replace(card, product_tflops=None), config, 16, 2 * 64, 3) is None


def test_training_without_operations_is_predicted_from_whole_runs_and_says_so(monkeypatch):
    bare = dataclasses.replace(machine_named("H200"), operations=[])
    monkeypatch.setattr(measurements, "measured", lambda: Measured([bare], {}))
    found = predicted("H200", mode="train")
    assert not found.is_good
    assert any("not known to 15 %" in note for note in found.notes)


def passes_of(per_token, start, sizes=(1e6, 1e7, 1e8), preset="v2"):
    return [
        Tokenized(
            preset, f"{n:g}", int(n / 1000), int(n), per_token * n + is_whole * start, is_whole, 2, "a.json", "c", "d",
            peak_bytes=int(1e8 + 10 * n / 1000) if is_whole else None,
        )
        for n in sizes
        for is_whole in (False, True)
    ]  # fmt: skip


def test_tokenizing_is_so_much_for_each_token_and_a_start():
    found = fit_passes(passes_of(1e-8, 1.5))
    assert (found.per_token, found.start) == pytest.approx((1e-8, 1.5))
    assert (found.bytes_per_cell, found.start_bytes) == pytest.approx((10, 1e8), rel=1e-3)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert found.memory_error == pytest.approx(0, abs=1e-3)
    one = fit_passes(passes_of(1e-8, 1.5, sizes=(1e7,)))
    assert (one.error, one.bytes_per_cell, one.start) == (None, None, pytest.approx(1.5))
    warm = fit_passes([each for each in passes_of(1e-8, 1.5) if not each.is_whole_process])
    assert (warm.start, warm.error) == (None, pytest.approx(0, abs=1e-9))


def test_tokenizing_is_predicted_for_machines_where_it_was_measured(monkeypatch):
    epyc = predict_tokenizing("EPYC", 1_000_000, Lengths.parsed("696"))
    assert epyc.model == "the dictionaries of v2"
    assert epyc.seconds_least < 8.25 < epyc.seconds_most  # memory_tokenize.json
    assert not epyc.is_good
    assert "not known to 15 %" in epyc.as_text()
    v1 = predict_tokenizing("EPYC", 101_898, Lengths.parsed("696"), preset="v1")
    assert v1.seconds == pytest.approx(1.72, rel=0.02)  # tokenize_v1.json, the fresh process
    assert "error not known" in v1.as_text()
    assert "starting Python comes on top" in predict_tokenizing("Intel", 1000, Lengths.parsed("real")).as_text()
    for options, said in (
        ({"preset": "bionemo"}, "tokenizing bionemo was not measured there; there is v1 with 2 workers, v2 with 2"),
        ({"threads": 64}, "tokenizing with 64 workers was not measured there"),
    ):
        with pytest.raises(UnsupportedError, match=said):
            predict_tokenizing("EPYC", 1000, Lengths.parsed("real"), **options)
    with pytest.raises(UnsupportedError, match="H200: tokenizing was not measured there; there is nothing"):
        predict_tokenizing("H200", 1000, Lengths.parsed("real"))
    with pytest.raises(UnsupportedError, match="more than the 2,048 that the dictionaries of v1 leave"):
        predict_tokenizing("EPYC", 1000, Lengths.parsed("3000"), preset="v1")
    machine = Machine("box", "cpu", tokenized=passes_of(1e-8, 1.5))
    monkeypatch.setattr(measurements, "measured", lambda: Measured([machine], {}))
    good = predict_tokenizing("box", 10_000, Lengths.parsed("1000"))
    assert good.is_good
    assert good.seconds == pytest.approx(1e-8 * 1e7 + 1.5)
    assert good.to_dict()["batch_tokens"] is None


def test_time_grows_with_cells_as_they_do_and_the_interval_holds_it():
    one, ten = (predicted("AMD EPYC", n=n) for n in (4096, 40_960))
    assert ten.seconds == pytest.approx(10 * one.seconds, rel=1e-6)
    assert ten.seconds_least < ten.seconds < ten.seconds_most
    assert ten.n_tokens == pytest.approx(10 * one.n_tokens, rel=1e-3)


def test_memory_on_a_cpu_is_that_of_the_formulas_and_near_what_was_measured():
    for model, peak in ((V1, 924_143_616), (V2, 1_661_628_416)):
        found = predicted("AMD EPYC", model)
        assert found.peak_bytes == pytest.approx(peak, rel=0.05)
        assert found.memory_error < GOOD_ENOUGH
    small, large = (predicted("AMD EPYC", V2, batch_tokens=n).peak_bytes for n in (4096, 16_384))
    assert large - small == pytest.approx(2 * 12_288 * 18_456)  # two workers; bytes of a token by hand


def test_memory_of_training_is_near_what_was_measured_on_the_card():
    found = predicted("H200", V1, mode="train", batch_tokens=131_072, lengths="2048")
    assert found.peak_bytes == pytest.approx(4_683_820_032, rel=0.05)


def test_energy_is_missing_where_it_was_never_measured():
    found = predicted("H200")
    assert isinstance(found.joules, Missing)
    assert "no energy was measured on NVIDIA H200" in found.joules.not_available
    assert "energy  not available (no energy" in found.as_text()
    assert found.to_dict()["joules"] == {"not_available": found.joules.not_available}


@pytest.mark.parametrize("name", ["A100", "", "NVIDIA H100", "cores"])
def test_other_cards_are_refused_with_those_that_are_known(name):
    with pytest.raises(UnsupportedError, match=r"There are: AMD EPYC, 2 cores; Intel.*; NVIDIA H200") as error:
        machine_named(name)
    assert ("fits several" if name == "cores" else "is not among those") in str(error.value)


@pytest.mark.parametrize("name", ["NVIDIA H200", "nvidia-h200", "h200", "H200 "])
def test_names_are_found_in_any_spelling(name):
    assert machine_named(name).kind == "cuda"


def test_what_was_not_measured_is_refused_with_what_was():
    with pytest.raises(UnsupportedError, match="embed float16 was not measured there; of embed there is bfloat16"):
        predicted("H200", dtype="float16")
    with pytest.raises(UnsupportedError, match="with 64 threads was not measured there"):
        predicted("AMD EPYC", threads=64)
    with pytest.raises(UnsupportedError, match="H200 is a card"):
        predicted("H200", threads=2)


def test_what_goes_beyond_the_measurements_is_said():
    assert any("no model of this size" in note for note in predicted("H200", "geneformer-v2-316m").notes)
    assert any("no cells as long" in note for note in predicted("AMD EPYC", V2, lengths="4096").notes)
    assert not any("as long" in note or "size" in note for note in predicted("H200").notes)


def test_the_answer_says_what_it_rests_on():
    text = predicted("AMD EPYC", n=1_000_000).as_text()
    assert "1,000,000 cells" in text
    assert "off by up to" in text
    assert "amd-epyc-2-cores/embed_v1-10m_all-threads.json" in text
    assert "h (" in text  # hours, with their interval


def test_a_machine_without_measurements_of_a_mode_says_so(monkeypatch):
    monkeypatch.setattr(measurements, "measured", lambda: Measured([Machine("Card X", "cuda", [])], {}))
    with pytest.raises(UnsupportedError, match="of train there is nothing"):
        predicted("Card X", mode="train")
