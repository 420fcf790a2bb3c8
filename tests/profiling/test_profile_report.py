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


def _with_version(version: Any) -> Any:
    return lambda content: content.update(schema_version=version)


def _compared_with_a_later_one(content: dict[str, Any]) -> None:
    content["compared"][0]["schema_version"] = SCHEMA_VERSION + 1


def _beyond_counting(content: dict[str, Any]) -> None:
    content["tokens"]["batches"][1][2] = 10**400


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_without, "time.wall_s is missing"),
        (_text, "cells.per_s"),
        (_with_version(SCHEMA_VERSION + 1), "was written by a later version"),
        (_with_version(0), "there is no schema 0 of reports"),
        (_with_version(-1), "there is no schema -1 of reports"),
        (_with_version("1"), 'schema_version is "1"'),
        (_with_version(None), "schema_version is null"),
        (lambda content: content.pop("schema_version"), "schema_version is missing, so this is no report"),
        (_compared_with_a_later_one, "compared.0 was written by a later version"),
        (_beyond_counting, "tokens.batches.1.2 is larger than any count"),
    ],
)
def test_what_is_no_report_is_refused(spoil: Any, said: str, tmp_path: Path) -> None:
    content = sample_report().to_dict()
    spoil(content)
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=said):
        Report.load(tmp_path / "report.json")


@pytest.mark.parametrize(
    "damage", [lambda text: text[: len(text) // 2], lambda text: "", lambda text: "[]", lambda text: "[" * 10**5]
)
def test_a_damaged_file_is_refused_in_one_sentence_that_names_it(damage: Any, tmp_path: Path) -> None:
    path = sample_report().save(tmp_path / "report.json")
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=r"report\.json(: holds no JSON object| cannot be read)") as error:
        Report.load(path)
    assert "\n" not in str(error.value)


def test_a_report_of_before_a_field_was_there_is_read(tmp_path: Path) -> None:
    content = sample_report().to_dict()
    del content["time"]["n_at_once"], content["cells"]["read_gbps"], content["tokens"]["n_real_squares"]
    assert Report.from_dict(content).time.n_at_once == 1


def test_figures_are_computed_with_or_say_why_not() -> None:
    why = Missing("nobody counted")
    assert divided(6.0, 3.0) == 2.0
    assert divided(why, 3.0) == why == divided(3.0, why) == times(2.0, why)
    assert divided(1.0, 0.0, "the time") == Missing("the time is 0")
    assert Spread.of([1, 2, 3]).p50 == 2
