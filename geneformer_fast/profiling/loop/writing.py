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


def check_place(out: Path) -> None:
    """Refuse, before anything is measured, where no report can go.

    Raises
    ------
    OutputError
        A file is where a folder should be, or the other way round; nothing can be written there.
    UnsupportedError
        A page is asked for, and what draws it is not installed.
    """
    paths = paths_of(out)
    for path in paths:
        if path.is_dir():
            raise OutputError(f"{path} is a folder: name a file for the report, or a folder without a suffix")
    if len(paths) > 1 and out.is_file():
        raise OutputError(f"{out} is a file: name a folder for the report, or a file that ends in .json or .html")
    folder = paths[0].parent
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {reason_of(error)}") from error
    absent = [name for name in _DRAWS if find_spec(name) is None]
    if absent and any(path.suffix.lower() != ".json" for path in paths):
        raise UnsupportedError(
            f"the page of a report needs {', '.join(absent)}, not installed here: pip install "
            "'geneformer-fast[profile]', or name a file that ends in .json"
        )


def write_report(report: Report, out: Path) -> list[Path]:
    """Write a report to where it was asked for.

    Parameters
    ----------
    report
        To be written.
    out
        A ``.json``, an ``.html``, or a folder for ``report.json`` and ``report.html``; other files in it stay.

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
    for path in paths:
        if path.suffix.lower() == ".json":
            report.save(path)
        else:
            with system_errors(path), whole_file(path) as temporary:
                temporary.write_text(report.to_html(), encoding="utf-8")
    return paths
