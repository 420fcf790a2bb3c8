"""Where reports and traces go: nothing that is there is replaced unsaid, and what cannot be written is said first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from profiled_loops import CONFIG, QUICK, batches, packed

from geneformer_fast import Encoder
from geneformer_fast.errors import OutputError
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.run import Run, profile


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(CONFIG).eval()


def test_what_is_written_is_the_report(tmp_path: Path) -> None:
    encoder = Encoder(CONFIG).eval()
    with profile(encoder, n_warmup=0, n_steps=2, n_active=1, out=tmp_path / "made" / "here", **QUICK) as run:
        for lengths in batches(6):
            with torch.inference_mode():
                encoder(packed(lengths))
            run.step()
    assert Report.load(tmp_path / "made" / "here" / "report.json") == run.report
    assert "<html" in (tmp_path / "made" / "here" / "report.html").read_text()
    assert run.report.operations
    assert run.is_complete


@pytest.mark.parametrize("name", ["report.json", "report"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, name):
    (tmp_path / "taken").write_text("")
    for what in ("out", "trace"):
        with pytest.raises(OutputError, match="cannot be written"):
            profile(torch.nn.Linear(2, 2), **{what: tmp_path / "taken" / name})
        assert profile(torch.nn.Linear(2, 2), **{what: tmp_path / "not" / "there" / name}) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def once(encoder: Encoder, **options: Any) -> Run:
    with profile(encoder, n_warmup=0, n_steps=1, n_active=0, **QUICK, **options) as run, torch.inference_mode():
        encoder(packed([3]))
        run.step()
    return run


@pytest.mark.parametrize("name", ["report.json", "report.html", "report"])
def test_a_report_that_is_there_is_replaced_only_where_that_is_said(
    name: str, encoder: Encoder, tmp_path: Path
) -> None:
    out = tmp_path / name
    once(encoder, out=out)
    files = [out] if out.is_file() else sorted(out.iterdir())
    before = [path.read_bytes() for path in files]
    with pytest.raises(OutputError, match=r"exists already: name another place for the report, or pass overwrite=True"):
        profile(encoder, out=out)
    assert [path.read_bytes() for path in files] == before
    once(encoder, out=out, overwrite=True, name="again")
    assert "again" in files[-1].read_text()
    if name == "report":  # half of one is one
        (out / "report.json").unlink()
        with pytest.raises(OutputError, match=r"report\.html exists already"):
            profile(encoder, out=out)


def test_a_report_that_came_meanwhile_stays_and_ours_can_be_saved_elsewhere(encoder: Encoder, tmp_path: Path) -> None:
    run = profile(encoder, n_warmup=0, n_steps=1, n_active=0, out=tmp_path / "report.json", **QUICK)

    def loop() -> None:
        with run, torch.inference_mode():
            encoder(packed([3]))
            run.step()
            (tmp_path / "report.json").write_text("of somebody else")

    with pytest.raises(OutputError, match="was written by somebody else meanwhile"):
        loop()
    assert (tmp_path / "report.json").read_text() == "of somebody else"
    assert Report.load(run.report.save(tmp_path / "mine.json")).cells.n == 1


def test_a_trace_that_is_there_is_replaced_only_where_that_is_said(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "trace.json.gz").write_text("of last week")
    with pytest.raises(OutputError, match="exists already: name another place for the trace"):
        profile(encoder, trace=tmp_path / "trace.json.gz")
    with pytest.raises(OutputError, match="is a folder: name a file for the trace"):
        profile(encoder, trace=tmp_path)
    assert profile(encoder, trace=tmp_path / "trace.json.gz", overwrite=True) is not None
