"""A report as a table of pandas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.profiling.figures import Missing, Spread
from geneformer_fast.profiling.listing import entries
from geneformer_fast.profiling.units import unit_of

if TYPE_CHECKING:
    import pandas

    from geneformer_fast.profiling.report import Report

COLUMNS = ("engine", "section", "name", "value", "unit", "text", "reason")
_OF_OPERATIONS = ("calls", "time_ms", "share", "flops", "n_bytes", "roof_share")


def frame_of(report: Report) -> pandas.DataFrame:
    """See :meth:`Report.to_frame`."""
    try:
        import pandas
    except ImportError:
        raise UnsupportedError("a table of a report needs pandas: pip install pandas, or take to_dict()") from None
    rows = [(each.subject.engine, *row) for each in (report, *report.compared) for row in _rows(each)]
    return pandas.DataFrame(rows, columns=list(COLUMNS)).astype({"value": "float64"})


def _rows(report: Report) -> Iterator[tuple[str, str, float, str, str, str]]:
    for each in entries(report):
        if isinstance(each.value, Spread):
            for name in ("p10", "p50", "p90"):
                yield _row(each.section, f"{each.name}.{name}", getattr(each.value, name), each.unit)
        else:
            yield _row(each.section, each.name, each.value, each.unit)
    for operation in report.operations:
        for name in _OF_OPERATIONS:
            value = getattr(operation, name)
            yield _row("Operations", f"operations.{operation.name}.{name}", value, unit_of(name))
    for index, time_ms in enumerate(report.blocks):
        yield _row("Operations", f"blocks.{index}.time_ms", time_ms, "ms")


def _row(section: str, name: str, value: Any, unit: str) -> tuple[str, str, float, str, str, str]:
    if isinstance(value, Missing):
        return section, name, float("nan"), unit, "", value.not_available
    if isinstance(value, int | float):
        return section, name, float(value), unit, "", ""
    return section, name, float("nan"), unit, str(value), ""
