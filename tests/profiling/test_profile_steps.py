"""Parts of steps add up to what the clock said; of very many values a regular selection is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from geneformer_fast.errors import ProfileError
from geneformer_fast.profiling.loop.steps import BACKWARD, DATA, FORWARD, OPTIMIZER, OTHER, Selection, StepClock


class ToldStamps:
    """A clock that says what it is told; a device that lags behind by some looks at it."""

    def __init__(self, times: list[float], lag: int = 0) -> None:
        self._times: Iterator[float] = iter(times)
        self.n_waits, self._lag = 0, lag

    def now(self) -> float:
        return next(self._times)

    def between(self, first: float, last: float) -> float:
        return last - first

    def is_past(self, stamp: float) -> bool:
        self._lag -= 1
        return self._lag < 0

    def wait(self) -> None:
        self.n_waits += 1


def steps_of(clock: StepClock, n: int, marks: tuple[str, ...]) -> None:
    for _ in range(n):
        for mark in marks:
            clock.mark(mark)
        clock.end_step()


@pytest.mark.parametrize("lag", [0, 2, 99])
def test_every_second_belongs_to_the_part_that_was_marked_before_it(lag: int) -> None:
    stamps = ToldStamps([0, 1, 3, 6, 10, 15, 16, 18, 21, 25, 30], lag)
    clock = StepClock(stamps)
    clock.begin()
    steps_of(clock, 2, (FORWARD, BACKWARD, OPTIMIZER, OTHER))
    clock.close()
    # Waiting 1, 1; forward 2, 2; backward 3, 3; optimizer 4, 4; the rest 5, 5.
    assert clock.parts == {DATA: 2, FORWARD: 4, BACKWARD: 6, OPTIMIZER: 8, OTHER: 10}
    assert clock.wall_s == sum(clock.parts.values()) == 30
    assert clock.step_s.values == [15, 15]
    assert clock.n_steps == 2
    assert stamps.n_waits == 2  # at the beginning and at the end


def test_what_is_outside_of_a_stretch_is_not_measured() -> None:
    clock = StepClock(ToldStamps([0, 1, 2, 100, 103]))
    clock.mark(FORWARD)
    clock.end_step()
    clock.begin()
    clock.mark(FORWARD)
    clock.end_step()  # at 2
    clock.close()
    clock.mark(OPTIMIZER)
    clock.begin()  # at 100
    clock.end_step()
    clock.close()
    assert clock.wall_s == 5
    assert clock.parts == {DATA: 4, FORWARD: 1, BACKWARD: 0, OPTIMIZER: 0, OTHER: 0}


def test_a_step_that_has_not_ended_is_not_measured() -> None:
    clock = StepClock(ToldStamps([0, 1, 2, 50]))
    clock.begin()
    clock.mark(FORWARD)
    clock.end_step()
    clock.mark(FORWARD)
    clock.close()
    assert (clock.n_steps, clock.wall_s) == (1, 2)


@pytest.mark.parametrize("last", [math.nan, -5.0])
def test_a_clock_that_was_set_meanwhile_is_refused(last: float) -> None:
    clock = StepClock(ToldStamps([0, 1, last]))
    clock.begin()
    clock.mark(FORWARD)
    clock.end_step()
    clock.close()
    with pytest.raises(ProfileError, match="the clock gave"):
        clock.check()


def test_marks_that_come_by_in_another_order_are_no_parts() -> None:
    clock = StepClock(ToldStamps([0, 5, 3, 9]))
    clock.begin()
    clock.mark(FORWARD)
    clock.mark(BACKWARD)
    clock.end_step()
    clock.close()
    clock.check()
    assert clock.wall_s == 9
    assert not clock.is_in_order


def test_few_values_are_all_kept_and_of_many_a_regular_part() -> None:
    few, many = Selection[int](8), Selection[int](8)
    for value in range(8):
        few.add(value)
    assert few.values == [*range(8)]
    for value in range(100):
        many.add(value)
    assert len(many.values) <= 8
    assert len({b - a for a, b in zip(many.values, many.values[1:], strict=False)}) == 1
    assert many.values[0] == 0
    assert many.values[-1] > 80
