"""Energy of what is predicted: fitted where it was measured, with its error; else bounded by the limit of power."""

from __future__ import annotations

import dataclasses

import pytest

from bench.gpu.energy import joules_per_run
from geneformer_fast.config import PRESETS
from geneformer_fast.profiling.figures import Energy, Missing, Series
from geneformer_fast.profiling.lengths import Lengths
from geneformer_fast.profiling.prediction import measurements
from geneformer_fast.profiling.prediction.answer import ONE, cells_like
from geneformer_fast.profiling.prediction.energy import EnergySample, energy_of, fit_energy, note_of_limit
from geneformer_fast.profiling.prediction.measurements import Measured, measured
from geneformer_fast.profiling.prediction.predict import predict

V1 = "geneformer-v1-10m"


def test_power_and_operations_are_told_apart_by_three_problems():
    work = {"a": (1.0, 1e14), "b": (2.0, 9e14), "c": (5.0, 1e14), "d": (0.5, 3e14)}
    found = fit_energy([EnergySample(name, s, n, 90 * s + 4e-13 * n) for name, (s, n) in work.items()])
    assert (found.watts, found.per_flop) == pytest.approx((90, 4e-13), rel=1e-6)
    assert found.error == pytest.approx(0, abs=1e-6)
    assert found.joules(10, 1e15) == pytest.approx(1300)


def test_two_problems_give_a_mean_power_and_vouch_for_each_other():
    """At 100 W and at 120 W: the first says 5/6 of the second, the second 6/5 of the first."""
    found = fit_energy([EnergySample("a", 1.0, 1e12, 100.0), EnergySample("b", 2.0, 1e15, 240.0)])
    assert found.per_flop == 0
    assert 100 < found.watts < 120
    assert found.error == pytest.approx(0.2)


def test_one_problem_gives_energy_whose_error_is_not_known():
    joules, error = energy_of([EnergySample("a", 2.0, 1e12, 300.0)], "X", 10.0, 1e15, 0.1)
    assert joules == pytest.approx(1500)
    assert error == ONE


def test_the_error_of_energy_holds_that_of_time():
    samples = [EnergySample("a", 1.0, 0.0, 100.0), EnergySample("b", 1.0, 0.0, 120.0)]
    assert energy_of(samples, "X", 1.0, 0.0, 0.1)[1] == pytest.approx(1.2 * 1.1 - 1)
    assert energy_of(samples, "X", 1.0, 0.0, None)[1] == ONE


def test_measured_energy_is_predicted_with_its_error(monkeypatch):
    """Every run on the card at 400 W: a million cells take 400 W x the predicted time."""
    machines = [
        dataclasses.replace(
            each, measurements=[dataclasses.replace(row, joules=400 * row.seconds) for row in each.measurements]
        )
        if each.kind == "cuda"
        else each
        for each in measured().machines
    ]
    monkeypatch.setattr(measurements, "measured", lambda: Measured(machines, {}))
    config = PRESETS[V1]
    found = predict("H200", cells_like(10**6, Lengths.parsed("real"), config.max_len), V1, config)
    assert found.joules == pytest.approx(400 * found.seconds, rel=1e-6)
    assert found.energy_error == pytest.approx(found.error, abs=1e-6)
    assert f"energy  {found.joules / 3.6e6:.3g} kWh, off by up to {found.error:.0%}" in found.as_text()
    assert not any("energy" in note for note in found.notes)


def test_where_none_was_measured_the_limit_of_power_bounds_it():
    missing = Missing("never")
    said = "energy is at most 0.7 kWh, at the card's limit of 700 W all the time"
    assert note_of_limit(700.0, 3600.0, missing) == [said]
    assert note_of_limit(None, 3600.0, missing) == note_of_limit(700.0, missing, missing) == []
    assert note_of_limit(700.0, 3600.0, 5.0) == []
    config = PRESETS[V1]
    found = predict("H200", cells_like(1000, Lengths.parsed("real"), config.max_len), V1, config)
    assert any(note.startswith("energy is at most") and "700 W" in note for note in found.notes)


class _Meter:
    def __init__(self, joules):
        self.joules, self.series = joules, Series()

    def start(self):
        self.is_on = True

    def stop(self, n):
        assert self.is_on
        joules = self.joules
        watts = joules if isinstance(joules, Missing) else joules / 2.2
        return Energy("", 2.2, joules, watts, Missing("no"), Missing("no"), Missing("no"), Missing("no"), {})


def test_a_benchmark_on_a_card_fills_the_window_and_gives_the_energy_of_one_run():
    calls, waits = [], []
    found = joules_per_run(lambda: calls.append(1), lambda: waits.append(1), 10.0, _Meter(880.0))
    assert len(calls) == 220  # of 10 ms in a window of 2.2 s
    assert len(waits) == 220 // 8 + 2
    assert found == {"joules": 4.0, "watts": 400.0}


def test_a_benchmark_says_why_there_is_no_energy():
    found = joules_per_run(lambda: None, lambda: None, 3000.0, _Meter(Missing("NVML: GPU is lost")))
    assert found == {"no_energy": "NVML: GPU is lost"}
