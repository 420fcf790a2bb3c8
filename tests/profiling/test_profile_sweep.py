"""Which token budget is found, what is not tried, and what is said of memory."""

from __future__ import annotations

import mmap
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.profiling.figures import Missing
from geneformer_fast.profiling.meters.resident import resident
from geneformer_fast.profiling.sweep import ProcessWatch, best_of, finding_of, sweep

GB = 1e9


class Made:
    """Rates and peaks by token budget, made up."""

    def __init__(self, rates, peaks=None, n_tokens=10**9, budget=None):
        self.rates, self.peaks, self.budget = rates, peaks or {}, budget
        self.encoder = SimpleNamespace(device=torch.device("cpu"))
        self.cells = SimpleNamespace(lengths=lambda: np.array([n_tokens]))

    def with_budget(self, budget):
        return Made(self.rates, self.peaks, budget=budget)

    def cells_per_s(self):
        rate = self.rates[self.budget] if self.budget in self.rates else self.rates[max(self.rates)]
        if rate is None:
            raise torch.OutOfMemoryError("no")
        WATCH.now = self.peaks.get(self.budget, 1 * GB)
        return rate


class Watch:
    now = 0.0

    def reset(self):
        self.now = 0.0

    def peak(self):
        return self.now

    def total(self):
        return int(10 * GB)


WATCH = Watch()


def swept(rates, **options):
    return sweep(Made(rates, **options), watch=WATCH)


def test_the_fastest_budget_is_the_best_and_its_memory_is_told():
    found = swept({1024: 10.0, 2048: 20.0, 4096: 25.0, 8192: 24.0, 16_384: 20.0}, peaks={4096: 3 * GB})
    best = best_of(found)
    assert (best.token_budget, best.cells_per_s, best.note) == (4096, 25.0, "best")
    assert (best.peak_bytes, best.free_bytes) == (3 * GB, 7 * GB)
    assert [each.token_budget for each in found] == [1024, 2048, 4096, 8192, 16_384, 32_768]


def test_of_budgets_as_good_the_smaller_one_is_taken():
    best = best_of(swept({1024: 10.0, 2048: 24.6, 4096: 25.0}))
    assert best.token_budget == 2048
    assert "within 2 %" in best.note


def test_out_of_memory_ends_the_sweep_and_is_said():
    found = swept({1024: 10.0, 2048: 20.0, 4096: None})
    assert [each.token_budget for each in found] == [1024, 2048, 4096]
    assert found[-1].cells_per_s == Missing("out of memory") == found[-1].peak_bytes
    assert best_of(found).token_budget == 2048


def test_what_would_not_fit_is_not_tried():
    """Peaks of 2, 3 and 5 GB: the next would take about 9 of 10 GB, which is more than four fifths."""
    rates = {1024: 10.0, 2048: 20.0, 4096: 40.0, 8192: 80.0}
    found = swept(rates, peaks={1024: 2 * GB, 2048: 3 * GB, 4096: 5 * GB})
    assert [each.token_budget for each in found] == [1024, 2048, 4096, 8192]
    assert "not tried: it would take about 9.0 of 10.0 GB" in str(found[-1].cells_per_s)


def test_larger_budgets_are_not_tried_once_three_were_no_faster():
    found = swept({1024: 10.0, 2048: 10.1, 4096: 10.1, 8192: 10.15, 16_384: 99.0})
    assert [each.token_budget for each in found] == [1024, 2048, 4096, 8192]


def test_budgets_end_where_all_cells_are_in_one_batch():
    rates = {2**n: float(2**n) for n in range(10, 20)}
    assert [each.token_budget for each in swept(rates, n_tokens=3000)] == [1024, 2048, 4096]


def test_where_not_even_the_smallest_fits_it_is_an_error():
    with pytest.raises(UnsupportedError, match=r"batches of 1,024 tokens do not fit"):
        swept({1024: None})


def test_that_another_budget_is_faster_than_the_usual_one_is_a_finding():
    found = swept({1024: 10.0, 2048: 20.0, 4096: 25.0, 8192: 24.0}, peaks={4096: 3 * GB})
    told = finding_of(found, 1024)
    assert told.gain == pytest.approx(2.5)
    assert told.numbers == {"token_budget": 4096.0, "cells_per_s": 25.0, "usual_cells_per_s": 10.0}
    assert "2.50 times as fast as the usual ones of 1,024, and leave 7.0 GB" in told.text
    assert finding_of(found, 4096) is None
    assert finding_of(found, 512) is None


def test_each_setting_is_told_as_it_comes():
    told = []
    sweep(Made({1024: 1.0}, n_tokens=2000), watch=WATCH, tell=told.append)
    assert [each.token_budget for each in told] == [1024, 2048]


def test_the_peak_of_this_process_is_seen():
    watch = ProcessWatch()
    # Beside what is in use and not beside the peak: the system may take idle pages back at any time.
    before = resident()
    # Pages of its own: the C library may have as much that is resident already, and give that.
    with mmap.mmap(-1, 64 << 20) as block:
        block.write(bytes([1]) * len(block))
        high = watch.peak()
        assert high >= before + len(block) // 2
    watch.reset()  # where the system's record stays, resident memory is looked at instead
    assert watch.peak() <= high - (32 << 20)
    assert watch.total() > watch.peak()
