"""Figures as they are written for people, and the list of all of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from sample_reports import bare_report, rich_report

from geneformer_fast.profiling import figures
from geneformer_fast.profiling.figures import Missing, Spread
from geneformer_fast.profiling.listing import SECTIONS, entries
from geneformer_fast.profiling.units import digits, unit_of, visible, words, written


@pytest.mark.parametrize(
    ("name", "unit", "said"),
    [
        ("wall_s", "s", "wall"),
        ("power_watts", "W", "power"),
        ("padding_share", "share", "padding share"),
        ("free_bytes", "bytes", "free"),
        ("joules_per_cell", "J/cell", "joules per cell"),
        ("cells_per_s_now", "cells/s", "cells per s now"),
        ("kwh_per_million_cells", "kWh/million cells", "kwh per million cells"),
        ("sm_mhz_at_most", "MHz", "sm at most"),
        ("temperature_celsius", "°C", "temperature"),
        ("time_with_kernels_percent", "%", "time with kernels"),
        ("memory_gib", "GiB", "memory"),
        ("n_positions", "", "positions"),
        ("length_p90", "", "length p90"),
        ("s", "s", "s"),
        ("", "", ""),
        ("per", "", "per"),
        ("a\x00b_s", "s", "a\\x00b"),
    ],
)
def test_names_tell_their_unit(name: str, unit: str, said: str) -> None:
    assert unit_of(name) == unit
    assert words(name) == said


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.0, "0"), (-0.0, "0"), (51_234, "51,234"), (51_234.4, "51,234"), (40.96, "41"), (40.94, "40.9"),
        (9.996, "10"), (0.1390, "0.139"), (0.00001234, "0.0000123"), (1e-9, "1.00e-09"), (-2.5, "-2.5"),
        (1e18, "1.00e+18"), (999.6, "1,000"), (math.nan, "not a number"), (math.inf, "∞"), (-math.inf, "-∞"),
    ],
)  # fmt: skip
def test_three_digits_are_written(value: float, text: str) -> None:
    assert digits(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0244, "share", "2.44 %"), (1.0, "share", "100 %"), (331e6, "bytes", "331 MB"), (0, "bytes", "0 bytes"),
        (999, "bytes", "999 bytes"), (1000, "bytes", "1 kB"), (999_999, "bytes", "1 MB"), (1.39e10, "bytes", "13.9 GB"),
        (-2e6, "bytes", "-2 MB"), (1.29e15, "op", "1.29 P op"), (12.5, "s", "12.5 s"), (20, "", "20"),
        (math.nan, "bytes", "not a number"), (math.inf, "share", "∞"),
        (Spread(590.0, 620.0, 700.0), "ms", "620 ms (590 to 700)"),
        (Spread(0.1, 0.2, 0.3), "share", "20 % (10 % to 30 %)"),
        (Missing("why"), "J", "not available (why)"), (None, "J", "none"), (True, "", "yes"), ("text", "W", "text"),
        (["avx2", "amx"], "", "avx2, amx"), ([], "", "none"), ({"a": 1, "b": [2.5]}, "", "a 1, b 2.5"),
    ],
)  # fmt: skip
def test_figures_are_written_with_their_unit(value: Any, unit: str, text: str) -> None:
    assert written(value, unit) == text


def test_what_is_not_seen_is_written_out() -> None:
    assert visible("a\x00\u202eb\ud800\u2028") == "a\\x00\\u202eb\\ud800\\u2028"
    assert visible("two\nlines\tand 細胞 🧬 é") == "two lines and 細胞 🧬 é"


def test_every_number_of_every_record_is_listed_once_in_order() -> None:
    listed = [entry.name for entry in entries(rich_report())]
    assert len(listed) == len(set(listed))
    records = {
        "cells": figures.Cells, "time": figures.Timing, "tokens": figures.Tokens, "flops": figures.Flops,
        "memory": figures.Memory, "energy": figures.Energy, "ceilings": figures.Ceilings,
    }  # fmt: skip
    # Tables of their own, and sums that nothing but a finding rests on.
    apart = {"tokens.batches", "memory.at_peak", "tokens.n_real_squares", "tokens.n_position_squares"}
    for record, kind in records.items():
        for field in dataclasses.fields(kind):
            name = f"{record}.{field.name}"
            assert name in apart or any(each == name or each.startswith(f"{name}.") for each in listed), name
    sections = [SECTIONS.index(entry.section) for entry in entries(rich_report())]
    assert sections == sorted(sections)


def test_every_figure_has_a_label_and_a_definition_and_its_value() -> None:
    report = rich_report()
    for entry in entries(report):
        assert entry.label
        assert entry.definition.endswith(".")
        found: Any = report
        *path, last = entry.name.replace("energy.state.", "energy.state\0").replace(".parts.", ".parts\0").split(".")
        for part in (*path, last):
            name, _, key = part.partition("\0")
            found = found[name] if isinstance(found, dict) else getattr(found, name)
            found = found[key] if key else found
        assert entry.value == found or isinstance(entry.value, Missing)
    assert all(isinstance(entry.value, Missing) for entry in entries(bare_report()) if entry.section == "Energy")
