"""What a notebook shows of a report is one line; ``print`` shows the table."""

from __future__ import annotations

from sample_reports import rich_report, sample_report


def test_a_report() -> None:
    for report in (sample_report(), rich_report()):
        shown = repr(report)
        assert "\n" not in shown
        assert len(shown) < 200
        assert f"{report.subject.mode} of {report.subject.model}" in shown
        assert f"{report.cells.n:,} cells" in shown
        assert "\n" in str(report)
