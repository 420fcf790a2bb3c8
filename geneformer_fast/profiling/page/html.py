"""The report as a page: one file that asks nothing of any server, for screens, phones and paper, without scripts."""

from __future__ import annotations

import re
from importlib.resources import files
from itertools import groupby
from typing import TYPE_CHECKING, Any

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.profiling.figures import Missing
from geneformer_fast.profiling.listing import Entry, entries
from geneformer_fast.profiling.page import sections
from geneformer_fast.profiling.page.svg import style
from geneformer_fast.profiling.units import visible

if TYPE_CHECKING:
    from geneformer_fast.profiling.report import Report

# Between a number and its unit, where no line may end.
_UNIT = re.compile(
    r"(?<=\d) (?=(?:%|°C|W|J|s|ms|[kMGTP]?B|GiB|MiB|MHz|[kMGTP] op|kWh|cells/s|tokens/s|GB/s|T op/s)(?!\w))"
)


def page(report: Report) -> str:
    """A report as one HTML file.

    Findings come first, then the figures that matter most, plots, all figures with their definitions, and what was
    set and installed. The page follows the reader's light or dark scheme, fits phones and prints. It has no scripts and
    nothing in it is fetched: its own policy forbids both. Everything that comes from the report is escaped.

    Parameters
    ----------
    report
        Any report; figures that are missing are said to be, with the reason.

    Returns
    -------
    str
        HTML, to be written as UTF-8.

    Raises
    ------
    UnsupportedError
        matplotlib or jinja2 is not installed; the message says what to install.
    """
    try:
        import matplotlib  # noqa: F401
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise UnsupportedError(
            f"the page of a report needs {error.name}, which is not installed: pip install 'geneformer-fast[profile]'"
        ) from None
    here = files(__package__)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    template = environment.from_string(here.joinpath("page.html").read_text(encoding="utf-8"))
    with style():
        content = _content(report)
    css = Markup(here.joinpath("page.css").read_text(encoding="utf-8").strip())
    return template.render(content, css=css).lstrip() + "\n"


def _shown(value: Any) -> Any:
    """What the template writes of a value: plots and styles as they are, text visible, units at their numbers."""
    return value if hasattr(value, "__html__") else _UNIT.sub("\N{NO-BREAK SPACE}", visible(str(value)))


def _content(report: Report) -> dict[str, Any]:
    subject = report.subject
    heading = subject.model.rstrip("/").rpartition("/")[2] or subject.model
    return {
        "title": f"{heading}, {subject.mode}: throughput profile",
        "heading": heading,
        "lead": sections.lead_of(report),
        "findings": [sections.finding_of(each) for each in report.findings],
        "tiles": list(sections.tiles_of(report)),
        "compared": sections.compared_section(report),
        "time": sections.time_section(report),
        "operations": sections.operations_section(report),
        "tokens": sections.tokens_section(report),
        "memory": sections.memory_section(report),
        "energy": sections.energy_section(report),
        "sweep": sections.sweep_section(report),
        **sections.readings_section(report),
        "sections": [
            (name, [_row(entry) for entry in group])
            for name, group in groupby(entries(report), lambda entry: entry.section)
        ],
        "settings": list(sections.settings_of(report)),
        "schema_version": report.schema_version,
    }


def _row(entry: Entry) -> dict[str, Any]:
    is_missing = isinstance(entry.value, Missing)
    return {"label": entry.label, "written": entry.written, "definition": entry.definition, "is_missing": is_missing}
