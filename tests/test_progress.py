"""Progress: a bar on a terminal, lines of the log elsewhere, at a steady pace."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from geneformer_fast import progress
from geneformer_fast.progress import Progress, duration


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert all(record.name == "geneformer_fast.progress" for record in caplog.records)
    return [record.getMessage() for record in caplog.records]


def test_lines_off_a_terminal(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """The first after 5 s, then one every 30 s, and one at the end."""
    caplog.set_level(logging.INFO, "geneformer_fast")
    with Progress(1000, "embedding", "cells") as bar:
        assert bar.is_active
        for _ in range(100):
            clock.now += 1
            bar.update(10)
    assert lines(caplog) == [
        "embedding: 50 of 1,000 cells, 10 cells/s, 95 s left".replace("95 s", "2 min"),
        "embedding: 350 of 1,000 cells, 10 cells/s, 65 s left",
        "embedding: 650 of 1,000 cells, 10 cells/s, 35 s left",
        "embedding: 950 of 1,000 cells, 10 cells/s, 5 s left",
        "embedding: 1,000 cells, 10 cells/s, after 2 min",
    ]


def test_what_is_short_says_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "geneformer_fast")
    with Progress(10, "embedding", "cells") as bar:
        clock.now += 4.9
        bar.update(10)
    assert lines(caplog) == []


def test_what_was_done_before_is_no_part_of_the_rate(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "geneformer_fast")
    with Progress(100, "training", "steps", initial=90) as bar:
        clock.now += 10
        bar.update(5, loss="7.213")
    assert lines(caplog) == [
        "training: 95 of 100 steps, loss 7.213, 0.5 steps/s, 10 s left",
        "training: stopped at 95 of 100 steps, loss 7.213, 0.5 steps/s, after 10 s",
    ]


def test_without_a_total(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "geneformer_fast")
    with Progress(None, "measuring", "passes") as bar:
        clock.now += 8
        bar.update(4)
        bar.write("one more")
    said = "measuring: 4 passes, 0.5 passes/s"
    assert lines(caplog) == [said, "one more", f"{said}, after 8 s"]


def test_nobody_looks(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither where progress is off, nor where nobody reads the log."""
    with Progress(3, "embedding", "cells") as bar:
        assert not bar.is_active
    caplog.set_level(logging.INFO, "geneformer_fast")
    with Progress(3, "embedding", "cells", False) as bar:
        assert not bar.is_active
        bar.write("nothing")
    assert lines(caplog) == []
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("show", [None, True])
def test_a_bar_on_a_terminal(
    show: bool | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    caplog.set_level(logging.INFO, "geneformer_fast")
    screen = Terminal() if show is None else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress(8, "training", "steps", show) as bar:
        bar.update(8, loss="1.5")
        progress.write_above_bars("a line", sys.stderr)
        bar.write("another")
        clock.now += 60
    said = screen.getvalue()
    assert "training" in said
    assert "8/8" in said
    assert "loss=1.5" in said
    assert "a line\n" in said
    assert "another\n" in said
    assert lines(caplog) == []
    progress.write_above_bars("after it", sys.stderr)
    assert screen.getvalue().endswith("after it\n")
    assert progress._n_bars == 0


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        *((0.4, "0 s"), (89, "89 s"), (90, "2 min"), (1000, "17 min"), (3600, "1 h"), (12_000, "3 h 20 min")),
        *((2 * 86_400, "2 d"), (187_200, "2 d 4 h"), (-1, "0 s")),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
