"""Reports are records: what is written is read again, and what is no report is refused by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sample_reports import sample_report

from geneformer_fast.errors import InputError
from geneformer_fast.profiling.figures import Missing, Spread, divided, times
from geneformer_fast.profiling.report import SCHEMA_VERSION, Report


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    report = sample_report()
    assert Report.load(report.save(tmp_path / "new" / "report.json")) == report


def test_a_figure_that_is_missing_is_a_reason_and_never_0(tmp_path: Path) -> None:
    content = json.loads(sample_report().save(tmp_path / "report.json").read_text())
    assert content["energy"]["joules"] == {"not_available": "no counter of energy can be read here"}
    assert Report.from_dict(content).energy.joules == Missing("no counter of energy can be read here")


def _without(content: dict[str, Any]) -> None:
    del content["time"]["wall_s"]


def _text(content: dict[str, Any]) -> None:
    content["cells"]["per_s"] = "many"


def _later(content: dict[str, Any]) -> None:
    content["schema_version"] = SCHEMA_VERSION + 1


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(_without, "time.wall_s is missing"), (_text, "cells.per_s"), (_later, "later version")],
)
def test_what_is_no_report_is_refused(spoil: Any, said: str, tmp_path: Path) -> None:
    content = sample_report().to_dict()
    spoil(content)
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=said):
        Report.load(tmp_path / "report.json")


def test_figures_are_computed_with_or_say_why_not() -> None:
    why = Missing("nobody counted")
    assert divided(6.0, 3.0) == 2.0
    assert divided(why, 3.0) == why == divided(3.0, why) == times(2.0, why)
    assert divided(1.0, 0.0, "the time") == Missing("the time is 0")
    assert Spread.of([1, 2, 3]).p50 == 2
