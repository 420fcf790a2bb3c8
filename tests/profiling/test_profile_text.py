"""The table for the terminal and the table of pandas hold the report's figures, and reasons where there are none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sample_reports import sample_report

from geneformer_fast.profiling.figures import Finding, Missing
from geneformer_fast.profiling.frame import COLUMNS
from geneformer_fast.profiling.text import MOST_OPERATIONS, table


def test_the_table_says_what_everybody_asks_first() -> None:
    said = table(replace(sample_report(), compared=[]))
    for words in (
        "geneformer-v1-10m: embed, bfloat16, cpu (Example CPU)",
        "pbmc.tokens: 512 of 2,700 cells",
        "token budget 8,192",
        "97.6 % of 656,000 computed positions",
        "65 %, 67 %",
        "0.63 T op/s in bfloat16, measured here",
        "no counter of energy can be read here",
        "varlen_attention",
        "1. 2 % of computed positions were padding (expected 1x)",
    ):
        assert words in said, words
    assert "times as fast" not in said


def test_engines_stand_side_by_side() -> None:
    report = sample_report()
    other = report.compared[0]
    slower = replace(other, cells=replace(other.cells, per_s=20.48))
    said = table(replace(report, compared=[slower]), width=120)
    head = next(line for line in said.splitlines() if "transformers" in line)
    rates = next(line for line in said.splitlines() if line.startswith("cells/s"))
    assert head.index("transformers") == rates.index("20.5")
    assert head.index("geneformer_fast") == rates.index("41")
    assert "geneformer_fast 2.00x" in said


def test_how_many_times_as_fast_is_told_as_it_was_in_turns_where_both_took_turns() -> None:
    report = sample_report()
    turns = Finding("stock", "on these cells this project is 6.50 times as fast", {"ratio": 6.5})
    row = next(line for line in table(replace(report, findings=[turns])).splitlines() if line.startswith("times as"))
    assert row.split(None, 3)[-1] == "geneformer_fast 6.50x, in turns"


def test_what_is_missing_is_told_without_the_words_around_it() -> None:
    report = sample_report()
    none = Missing("no model was given")
    flops = replace(report.flops, mfu=none, hfu=none, per_cell=none, ceiling_dtype=None, basis="unknown")
    said = table(replace(report, flops=flops, compared=[])).splitlines()
    rows = {line[:22].strip(): line[22:] for line in said}
    assert rows["operations"] == "not available (no model was given)"
    assert rows["of"] == "not available (no ceiling of products was measured)"


@pytest.mark.parametrize("width", [60, 100, 160])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    report = sample_report()
    long = Finding("long", "a word " * 60, {"n": 1.0})
    said = table(replace(report, findings=[long], compared=[]), width=width)
    assert max(map(len, said.splitlines())) <= width


def test_what_came_from_outside_is_not_acted_on_by_a_terminal() -> None:
    report = sample_report()
    said = table(replace(report, subject=replace(report.subject, model="a\x1b[31mred", cells="b\rover")))
    assert "\x1b" not in said
    assert "\r" not in said


def test_of_many_operations_the_largest_are_shown_and_the_rest_is_added_up() -> None:
    report = sample_report()
    many = [replace(report.operations[0], name=f"operation {i}", time_ms=100.0, share=0.05) for i in range(20)]
    said = table(replace(report, operations=many))
    assert f"operation {MOST_OPERATIONS - 1} " in said
    assert f"operation {MOST_OPERATIONS} " not in said
    rest = next(line for line in said.splitlines() if line.startswith("8 others"))
    assert "800.00" in rest
    assert "40 %" in rest


def test_a_report_is_printed_as_its_table() -> None:
    assert str(sample_report()) == table(sample_report())


def test_every_figure_is_a_row_with_its_value_or_its_reason() -> None:
    report = sample_report()
    frame = report.to_frame()
    assert tuple(frame.columns) == COLUMNS
    ours = frame[frame.engine == "geneformer_fast"].set_index("name")
    assert ours.loc["cells.per_s", "value"] == 40.96
    assert ours.loc["cells.per_s", "unit"] == "cells/s"
    assert ours.loc["cells.lengths.p90", "value"] == 2048
    assert ours.loc["operations.varlen_attention.time_ms", "value"] == 4800
    assert ours.loc["blocks.1.time_ms", "value"] == report.blocks[1]
    energy = ours.loc["energy.joules_per_cell"]
    assert energy.isna().value
    assert energy.reason == "no counter of energy can be read here"
    assert ours.loc["flops.note", "text"] == "from the cells' lengths"
    assert set(frame.engine) == {"geneformer_fast", "transformers"}
    assert not frame.duplicated(["engine", "name"]).any()
    # Nothing is lost: a row has a value, a text or a reason.
    assert (frame.value.notna() | (frame.text != "") | (frame.reason != "")).all()


def test_missing_figures_of_every_kind_are_told() -> None:
    report = sample_report()
    none = Missing("made up")
    bare = replace(
        report,
        cells=replace(report.cells, per_s=none, tokens_per_s=none, lengths=None),
        tokens=replace(report.tokens, useful_share=none),
        time=replace(report.time, cpu_s=none, first_step_s=none, parts={"data": none}),
        memory=replace(report.memory, parts={"weights": none}, peak_bytes=none),
        operations=[], compared=[], findings=[], sweep=[],
    )  # fmt: skip
    said = table(bare)
    assert said.count("not available (made up)") >= 6
    assert "unknown lengths" in said
