"""Where reports go."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

from geneformer_fast.errors import OutputError, UnsupportedError
from geneformer_fast.files.writing import reason_of, system_errors, whole_file
from geneformer_fast.profiling.report import Report

JSON, PAGE = "report.json", "report.html"
# What draws pages.
_DRAWS = ("matplotlib", "jinja2")


def paths_of(out: Path) -> list[Path]:
    """The files of a report that goes to a ``.json``, an ``.html``, or a folder."""
    return [out] if out.suffix.lower() in (".json", ".html", ".htm") else [out / JSON, out / PAGE]


def check_place(out: Path, *, is_replacing: bool, how: str = "pass overwrite=True") -> None:
    """Refuse, before anything is measured, where no report can go.

    Parameters
    ----------
    out
        As :func:`paths_of` takes it.
    is_replacing
        Whether a report that is there may be replaced.
    how
        What to do besides naming another place, where one is.

    Raises
    ------
    OutputError
        A file is where a folder should be, or the other way round; a report is there already; nothing can be written
        there.
    UnsupportedError
        A page is asked for, and what draws it is not installed.
    """
    paths = paths_of(out)
    for path in paths:
        if path.is_dir():
            raise OutputError(f"{path} is a folder: name a file for the report, or a folder without a suffix")
    if len(paths) > 1 and out.is_file():
        raise OutputError(f"{out} is a file: name a folder for the report, or a file that ends in .json or .html")
    if not is_replacing and (there := reports_in(out)):
        raise OutputError(f"{there[0]} exists already: name another place for the report, or {how}")
    _check_writable(out, paths[0].parent)
    absent = [name for name in _DRAWS if find_spec(name) is None]
    if absent and any(path.suffix.lower() != ".json" for path in paths):
        raise UnsupportedError(
            f"the page of a report needs {', '.join(absent)}, not installed here: pip install "
            "'geneformer-fast[profile]', or name a file that ends in .json"
        )


def reports_in(out: Path) -> list[Path]:
    """The files of a report that are there already."""
    return [path for path in paths_of(out) if path.is_file()]


def check_trace(trace: Path, *, is_replacing: bool) -> None:
    """Refuse, before anything is measured, where no trace can go.

    Raises
    ------
    OutputError
        It is a folder, or a file that may not be replaced; nothing can be written there.
    """
    if trace.is_dir():
        raise OutputError(f"{trace} is a folder: name a file for the trace, such as {trace / 'trace.json.gz'}")
    if trace.exists() and not is_replacing:
        raise OutputError(f"{trace} exists already: name another place for the trace, or pass overwrite=True")
    _check_writable(trace, trace.parent)


def _check_writable(path: Path, folder: Path) -> None:
    """Refuse what the system would: a file is made in the folder, or in what is there of it, and goes at once."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {reason_of(error)}") from error


def write_report(report: Report, out: Path, *, is_replacing: bool) -> list[Path]:
    """Write a report to where it was asked for.

    Parameters
    ----------
    report
        To be written.
    out
        A ``.json``, an ``.html``, or a folder for ``report.json`` and ``report.html``; other files in it stay.
    is_replacing
        Whether it may replace one that has come there meanwhile.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    OutputError
        They cannot be written; nothing half-written is left.
    """
    paths = paths_of(out)
    if not is_replacing and (there := reports_in(out)):
        raise OutputError(f"{there[0]} was written by somebody else meanwhile; save the report (run.report) elsewhere")
    for path in paths:
        if path.suffix.lower() == ".json":
            report.save(path)
        else:
            with system_errors(path), whole_file(path) as temporary:
                temporary.write_text(report.to_html(), encoding="utf-8")
    return paths
