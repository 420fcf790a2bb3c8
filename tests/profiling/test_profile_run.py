"""What a run reports is what an independent count of the same loop gives; wrong use is refused by name."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from profiled_loops import CONFIG, QUICK, batches, figure, measured_of, packed, training
from torch import nn
from toys import encoder as toy_encoder

import geneformer_fast
from geneformer_fast import Encoder, Ragged
from geneformer_fast.errors import ProfileError
from geneformer_fast.profiling.figures import Missing
from geneformer_fast.profiling.flops.work import encoder_flops, head_flops
from geneformer_fast.profiling.loop import steps
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.run import Run, profile


def test_embedding_with_an_encoder_is_measured_as_it_was_computed() -> None:
    encoder, given = Encoder(CONFIG).eval(), batches()
    with profile(encoder, **QUICK) as run:
        for lengths in given:
            with torch.inference_mode():
                encoder(packed(lengths))
            run.step()
    report = run.report
    window = measured_of(given)
    flat = np.concatenate(window)
    assert (report.time.n_steps, report.time.n_warmup) == (len(window), 3)
    assert (report.cells.n, report.tokens.n_real, report.tokens.n_positions) == (len(flat), flat.sum(), flat.sum())
    assert report.tokens.useful_share == 1
    assert report.tokens.batches == [[len(each), sum(each), sum(each)] for each in window]
    assert report.flops.model == report.flops.hardware == encoder_flops(CONFIG, flat.sum(), (flat**2).sum())
    assert report.flops.basis == "formula"
    assert figure(report.cells.per_s) == pytest.approx(len(flat) / report.time.wall_s)
    assert isinstance(report.flops.mfu, Missing)
    subject = report.subject
    assert (subject.engine, subject.model, subject.dtype, subject.device) == (
        "geneformer_fast", "Encoder", "float32", "cpu",
    )  # fmt: skip
    assert subject.geometry == CONFIG.to_dict()
    assert subject.n_parameters == sum(p.numel() for p in encoder.parameters())


class ToldTime:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


class Timed(nn.Module):
    """Takes two seconds forward and three backward."""

    def __init__(self, clock: ToldTime) -> None:
        super().__init__()
        self.weight, self.clock = nn.Parameter(torch.ones(1)), clock

    def pass_by(self, seconds: float) -> None:
        self.clock.seconds += seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.pass_by(2)
        product = self.weight * x
        if product.requires_grad:
            product.register_hook(lambda _: self.pass_by(3))
        return product.sum()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ToldTime:
    told = ToldTime()
    monkeypatch.setattr(steps, "time", told)
    return told


def test_every_second_of_a_training_is_in_its_part(clock: ToldTime) -> None:
    model = Timed(clock)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with profile(model, n_warmup=1, n_steps=4, n_active=0, **QUICK) as run:
        for _ in range(7):
            model.pass_by(1)  # the batch is waited for
            optimizer.zero_grad()
            model(torch.ones(3)).backward()
            optimizer.step(lambda: model.pass_by(4))
            model.pass_by(5)
            run.step(n_cells=3)
    spent = run.report.time
    parts = {"data": 4, "forward": 8, "backward": 12, "optimizer": 16, "other": 20}
    assert {name: spent.parts[name] for name in parts} == parts
    assert spent.wall_s == 60
    assert spent.step_ms.p10 == spent.step_ms.p50 == spent.step_ms.p90 == 15_000
    assert run.report.cells.per_s == 12 / 60
    for name in ("copies", "host_gaps"):
        assert isinstance(spent.parts[name], Missing)


def test_padding_of_a_foreign_model_is_no_work_of_the_model() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(9, 8), nn.Linear(8, 4)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.layer(self.table(input_ids)) * attention_mask[..., None]

    model, mask = Foreign(), torch.tensor([[1, 1, 1], [1, 0, 0]])
    with profile(model, n_warmup=0, n_steps=2, n_active=0, **QUICK) as run, torch.no_grad():
        for _ in range(4):
            model(input_ids=torch.ones(2, 3, dtype=torch.int64), attention_mask=mask)
            run.step()
    assert run.report.flops.hardware == 2 * 2 * 6 * 8 * 4
    assert "padding" in str(run.report.flops.model)
    assert run.report.tokens.useful_share == 4 / 6


def test_what_an_evaluation_takes_is_left_out(clock: ToldTime) -> None:
    model, given = Timed(clock), range(1, 10)
    with profile(model, n_warmup=1, n_steps=8, n_active=0, **QUICK) as run, torch.no_grad():
        for n_cells in given:
            model(torch.ones(1))
            run.step(n_cells=n_cells)
            with run.paused():
                model.pass_by(100)
                model(torch.ones(1))
    assert run.report.time.wall_s == 16
    assert run.report.time.parts["forward"] == 16
    assert run.report.cells.n == sum(given[1:])


class Sleeping(nn.Module):
    """Takes so many seconds, which other threads may use."""

    def forward(self, seconds: torch.Tensor) -> torch.Tensor:
        time.sleep(float(seconds))
        return seconds


def test_steps_computed_at_once_have_the_time_of_their_own_passes() -> None:
    """Two at a time, which end together: the time between two ends is that of nobody."""
    model, seconds = Sleeping(), torch.tensor([0.06] * 10)
    with ThreadPoolExecutor(2) as pool, profile(model, n_warmup=2, n_steps=8, n_active=0, **QUICK) as run:
        for done in pool.map(model, seconds):
            run.step(n_cells=len(done[None]))
    found = run.report.time
    assert found.n_at_once == 2
    assert 60 <= found.step_ms.p10 <= found.step_ms.p90
    assert 1e3 * found.wall_s < 8 * found.step_ms.p90
    assert isinstance(found.parts["forward"], Missing)
    assert ") of forward pass, 2 at once, 8 steps in" in " ".join(str(run.report).split())


def test_steps_of_several_passes_at_once_have_the_time_between_their_ends() -> None:
    """As of one model on several devices: each step has two passes, and no two steps are computed at once."""
    model, seconds = Sleeping(), torch.tensor([0.03, 0.03])
    with ThreadPoolExecutor(2) as pool, profile(model, n_warmup=1, n_steps=4, n_active=0, **QUICK) as run:
        for _ in range(6):
            list(pool.map(model, seconds))
            time.sleep(0.05)
            run.step(n_cells=2)
    assert run.report.time.n_at_once == 1
    assert run.report.time.step_ms.p10 >= 80


def test_wall_time_is_what_a_plain_loop_says() -> None:
    """Of the best of a few tries: other programs may come between two looks at the clock."""
    close = []
    for _ in range(3):
        with profile(None, n_warmup=1, n_steps=5, n_active=0, **QUICK) as run:
            run.step(n_cells=1)
            begin = time.perf_counter()
            for _ in range(5):
                time.sleep(0.04)
                stop = time.perf_counter()
                run.step(n_cells=1)
        close.append(abs(run.report.time.wall_s / (stop - begin) - 1))
        if close[-1] < 0.05:
            return
    pytest.fail(f"measured times differ by {min(close):.0%} from a plain clock's")


@pytest.mark.parametrize("is_recomputing", [False, True])
def test_training_is_three_times_the_forward_pass_with_the_rows_that_were_asked_for(is_recomputing: bool) -> None:
    model, given = Encoder(CONFIG, "mlm").train(), batches()
    model.is_recomputing = is_recomputing
    with profile(model, **QUICK) as run:
        training(model, given, run)
    window = measured_of(given)
    flat = np.concatenate(window)
    blocks = encoder_flops(CONFIG, flat.sum(), (flat**2).sum())
    rows = sum(len(range(0, sum(each), 5)) for each in window)
    assert run.report.flops.model == 3 * (blocks + head_flops(CONFIG, rows))
    assert run.report.flops.hardware == 3 * (blocks + head_flops(CONFIG, rows)) + is_recomputing * blocks
    assert run.report.subject.settings["training"] is True
    assert run.report.subject.settings.get("recomputing", False) is is_recomputing
    for part in ("forward", "backward", "optimizer"):
        assert figure(run.report.time.parts[part]) > 0


def test_cells_of_what_is_paused_are_left_out() -> None:
    encoder, given = Encoder(CONFIG).eval(), batches(9)
    with profile(encoder, n_warmup=1, n_steps=8, n_active=0, **QUICK) as run, torch.inference_mode():
        for lengths in given:
            encoder(packed(lengths))
            run.step()
            with run.paused():
                encoder(packed([60, 60]))
    assert run.report.tokens.n_real == sum(map(sum, given[1:]))


@pytest.fixture
def encoder() -> Iterator[Encoder]:
    yield Encoder(CONFIG).eval()
    assert Run._current is None, "a run was left open"


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_nothing_stays_in_a_model_whatever_happens(encoder: Encoder) -> None:
    run = profile(encoder, **QUICK)

    def loop() -> None:
        with run:
            encoder(packed([3]))
            run.step()
            raise RuntimeError("of the loop")

    with pytest.raises(RuntimeError, match="of the loop"):
        loop()
    assert hooks_of(encoder) == 0
    with pytest.raises(ProfileError, match=r"ended with an error \(RuntimeError\)"):
        run.report  # noqa: B018
    with profile(encoder, n_warmup=0, n_active=0, **QUICK) as run:
        encoder(packed([3]))
        run.step()
    assert hooks_of(encoder) == 0
    assert run.report.cells.n == 1


def test_runs_are_read_when_they_are_over_and_not_twice(encoder: Encoder) -> None:
    run = profile(encoder, n_warmup=0, n_active=0, **QUICK)
    with pytest.raises(ProfileError, match="has not begun"):
        run.report  # noqa: B018
    with pytest.raises(ProfileError, match="within the with-block"):
        run.step(n_cells=1)
    with run:
        with pytest.raises(ProfileError, match="still goes on"):
            run.report  # noqa: B018
        encoder(packed([3]))
        run.step()
    with pytest.raises(ProfileError, match="within the with-block"):
        run.step(n_cells=1)
    with pytest.raises(ProfileError, match="measured once"), run:
        pass
    with pytest.raises(ProfileError, match="within the with-block"), run.paused():
        pass


def test_runs_cannot_be_nested(encoder: Encoder) -> None:
    with profile(encoder, n_warmup=0, n_active=0, **QUICK) as outer:
        inner = profile(encoder, **QUICK)
        with pytest.raises(ProfileError, match="cannot be nested"), inner:
            pass
        encoder(packed([3]))
        outer.step()
    assert outer.report.cells.n == 1
    with inner:  # it was refused, and may begin now
        pass


@pytest.mark.parametrize(
    ("n_steps", "said"), [(0, "no step was made"), (2, "all 2 steps were warm-up")], ids=["none", "warm-up"]
)
def test_too_few_steps_are_said_to_be(n_steps: int, said: str, encoder: Encoder, tmp_path: Path) -> None:
    with profile(encoder, **QUICK) as run:
        for _ in range(n_steps):
            encoder(packed([3]))
            run.step()
    with pytest.raises(ProfileError, match=said):
        run.report  # noqa: B018
    with pytest.raises(ProfileError, match="no step was made"), profile(encoder, out=tmp_path / "report", **QUICK):
        pass
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_warmup": -1}, "n_warmup must be at least 0"),
        ({"n_steps": 0}, "n_steps must be at least 1"),
        ({"n_active": -2}, "n_active must be at least 0"),
        ({"mode": "fly"}, "mode must be one of"),
        ({"device": "meta"}, "the model is on cpu, and device says meta"),
    ],
)
def test_wrong_options_are_refused(options: Any, said: str, encoder: Encoder) -> None:
    with pytest.raises(ProfileError, match=said):
        profile(encoder, **options)


@pytest.mark.parametrize(
    "told",
    [
        {"lengths": []},
        {"lengths": torch.empty(0, dtype=torch.int64)},
        {"attention_mask": torch.ones(0, 3)},
        {"n_cells": 0},
    ],
    ids=["list", "tensor", "mask", "number"],
)
def test_steps_of_no_cells_are_refused(told: Any) -> None:
    with profile(None, n_warmup=0, n_active=0, **QUICK) as run:
        with pytest.raises(ProfileError, match="a step of no cells was told"):
            run.step(**told)
        run.step(n_cells=2)
    assert run.report.cells.n == 2


def test_rates_of_no_cells_are_no_numbers(encoder: Encoder) -> None:
    """A loop that gives the model nothing, as the last batch of a split may be: counted, and no rate of 0."""
    with profile(encoder, n_warmup=0, n_active=0, **QUICK) as run, torch.inference_mode():
        for _ in range(3):
            encoder(Ragged.from_lengths(torch.empty(0, dtype=torch.int64), []))
            run.step()
    cells = run.report.cells
    assert cells.n == 0
    assert str(cells.per_s) == str(cells.tokens_per_s) == "not available (no cells came by)"


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ProfileError, match="on the meta device"):
        profile(Encoder(CONFIG).to("meta"))


def test_steps_that_say_nothing_are_refused_and_the_run_goes_on() -> None:
    with profile(None, n_warmup=0, n_active=0, **QUICK) as run:
        with pytest.raises(ProfileError, match="nobody says what cells this step had"):
            run.step()
        with pytest.raises(ProfileError, match="NaN"):
            run.step(lengths=[float("nan")])
        run.step(attention_mask=torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert run.report.tokens.useful_share == 0.5
    assert "no model was given" in str(run.report.time.parts["forward"])
    assert "no model was given" in str(run.report.flops.model)


def test_the_first_names_of_the_package_are_these() -> None:
    assert geneformer_fast.profile is profile
    assert geneformer_fast.Report is Report


def test_forward_passes_in_several_threads_have_no_time_of_their_own() -> None:
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    barrier = Barrier(2, timeout=30)

    class Meeting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            barrier.wait()
            return x

    model = Meeting()
    with profile(model, n_warmup=0, n_steps=1, n_active=0, **QUICK) as run, ThreadPoolExecutor(2) as pool:
        list(pool.map(model, [torch.ones(1)] * 2))
        run.step(n_cells=2)
    assert "several threads" in str(run.report.time.parts["forward"])
    assert run.report.time.wall_s > 0


def test_operations_know_what_they_need_and_memory_adds_up() -> None:
    encoder, given = Encoder(CONFIG).eval(), batches(12)
    with profile(encoder, n_warmup=1, n_steps=3, energy=False) as run, torch.inference_mode():
        for lengths in given:
            encoder(packed(lengths))
            run.step()
    report = run.report
    rows = {each.name: each for each in report.operations}
    # The profiler starts in the step after that of memory, and watches the two that follow.
    watched = np.concatenate(given[6:8])
    assert rows["varlen_attention"].flops == 2 * 4 * 32 * (watched**2).sum()
    assert rows["varlen_attention"].calls == 2 * 2
    assert figure(rows["varlen_attention"].roof_share) > 0
    memory = report.memory
    assert sum(figure(each) for each in memory.parts.values()) == pytest.approx(figure(memory.peak_bytes))
    weights = sum(p.nbytes for p in encoder.parameters())
    assert figure(memory.parts["weights"]) == pytest.approx(weights, rel=0.05)
    assert 0 < figure(report.flops.mfu) < 2
    assert len(report.blocks) == 2


def test_energy_is_read_or_missing_with_its_reason() -> None:
    with profile(None, n_warmup=0, n_steps=2, n_active=0, ceilings=False) as run:
        for _ in range(3):
            time.sleep(0.15)
            run.step(n_cells=1)
    energy = run.report.energy
    assert isinstance(energy.joules, Missing)  # no window of two seconds, and on most machines no counter
    assert energy.joules.not_available
    assert figure(energy.window_s) == pytest.approx(0.3, abs=0.2)
    assert run.report.series.time_s
    assert figure(run.report.time.cpu_s) >= 0


def test_precision_is_that_of_the_first_pass() -> None:
    encoder = toy_encoder().train()
    with profile(encoder, n_warmup=0, n_steps=1, n_active=0, **QUICK) as run:
        with torch.autocast("cpu", torch.bfloat16):
            encoder(Ragged.from_cells([[2, 3, 4]]))
        run.step()
    assert run.report.subject.dtype == "bfloat16"
