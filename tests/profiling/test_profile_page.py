"""The page of a report: whole, without scripts and requests, every name escaped, every figure with its meaning."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import matplotlib
import pytest
from sample_reports import (
    HOSTILE,
    bare_report,
    hostile_report,
    long_report,
    rich_report,
    sample_report,
    wild_report,
)

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.profiling.figures import KINDS, PARTS, Missing
from geneformer_fast.profiling.listing import entries
from geneformer_fast.profiling.page import html, plots, roofline
from geneformer_fast.profiling.page.html import page
from geneformer_fast.profiling.page.svg import COLORS
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.units import visible

_VOID = {"meta", "link", "br", "img", "hr", "input"}
_ALLOWED = {
    *("html", "head", "meta", "link", "title", "style", "body", "header", "main", "footer", "section", "h1", "h2"),
    *("h3", "p", "ol", "li", "strong", "small", "dl", "dt", "dd", "div", "figure", "table", "caption", "thead"),
    *("tbody", "tr", "th", "td", "details", "summary", "i", "span"),
    *("svg", "g", "path", "text", "tspan", "use", "defs", "clippath", "rect"),
}


class Read(HTMLParser):
    """Elements with attributes, the text outside of styles, and whether every element ends where it should."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.texts.append(" ")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@functools.cache
def written_page(make: Callable[[], Report]) -> str:
    """Pages take a second or two, and are the same every time."""
    return page(make())


@pytest.fixture(scope="module")
def rich() -> Read:
    return Read(written_page(rich_report))


@pytest.mark.parametrize(
    "make",
    [rich_report, sample_report, bare_report, hostile_report, long_report, wild_report],
    ids=lambda make: make.__name__,
)
def test_a_page_is_whole_holds_nothing_that_runs_and_asks_for_nothing(make: Any) -> None:
    text = written_page(make)
    read = Read(text)
    assert text.startswith("<!DOCTYPE html>")
    assert len(text.encode()) < 2_000_000
    assert {name for name, _ in read.elements} <= _ALLOWED
    for name, attributes in read.elements:
        assert not {
            key for key in attributes if key.startswith("on") or key in ("src", "srcset", "action", "xlink:href")
        }
        assert (attributes.get("href") or "#").startswith("data:," if name == "link" else "#")
        assert not re.search(r"url\((?!#)|@import|expression", attributes.get("style") or "")
    assert not re.search(r"url\(|@import", re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1])  # type: ignore[index]
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = {each for _, attributes in read.elements if (each := attributes.get("href")) and each != "data:,"}
    assert referred <= {f"#{each}" for each in ids}
    assert "default-src 'none'" in str(read.all("meta"))
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert '<g class="mark"><title>' in svg


def test_findings_come_first_each_with_what_it_rests_on(rich: Read) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", written_page(rich_report))
    assert headings[0] == "Findings"
    assert headings[-2:] == ["All figures, and what they mean", "Settings and versions"]
    for finding in rich_report().findings:
        assert finding.text in rich.text
    assert "expected 1.72×" in rich.text
    assert "Rests on padding share 42 %" in rich.text


def test_without_findings_that_is_said() -> None:
    assert "Nothing to change was found." in Read(written_page(bare_report)).text


def test_every_figure_stands_there_with_its_unit_and_meaning(rich: Read) -> None:
    listed = entries(rich_report())
    assert len(listed) > 60
    for entry in listed:
        assert f"{entry.label} {entry.written} {entry.definition}" in rich.text
    names = {entry.name for entry in listed}
    assert {f"time.parts.{name}" for name in PARTS} <= names
    assert {f"memory.parts.{name}" for name in KINDS} <= names


def test_what_is_missing_says_why_and_is_no_0() -> None:
    read = Read(written_page(bare_report))
    for entry in entries(bare_report()):
        if isinstance(entry.value, Missing):
            assert entry.value.not_available in read.text
    assert (
        "Energy is not available (no counter of energy can be read: /sys/class/powercap is for root only)." in read.text
    )
    assert "0 J" not in read.text
    assert read.all("svg") == []


def test_names_are_text_whatever_they_hold() -> None:
    read = Read(written_page(hostile_report))
    text = read.text
    for name in HOSTILE:
        assert " ".join(visible(name).split()) in text
    titles = [data for data in read.texts if "T op/s, 40 % of its roof" in data]
    assert len(titles) == 4 * len(HOSTILE)  # of disc and number, on both plots
    written_page(hostile_report).encode("utf-8")  # halves of surrogate pairs cannot be


def test_every_plot_of_a_rich_report_is_there_twice_and_says_what_it_shows(rich: Read) -> None:
    labels = [attributes["aria-label"] for attributes in rich.all("svg")]
    wide = [attributes for attributes in rich.all("svg") if attributes["class"] == "wide"]
    assert len(wide) == len([each for each in rich.all("svg") if each["class"] == "narrow"]) == 9
    assert len([each for each in rich.all("svg") if each["class"] == "small"]) == 2
    assert all(attributes["role"] == "img" for attributes in rich.all("svg"))
    assert any("Roofline: 10 operations" in str(label) and "under 702 T op/s" in str(label) for label in labels)


def test_the_same_report_is_the_same_page_whatever_the_user_set_for_plots() -> None:
    first = written_page(sample_report)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": True, "lines.linewidth": 9}):
        assert page(sample_report()) == first
        assert matplotlib.rcParams["font.size"] == 30


def test_colours_of_plots_are_those_of_the_page() -> None:
    text = written_page(rich_report)
    style = re.search(r":root \{(.*?)\}", text, re.DOTALL)[1]  # type: ignore[index]
    declared = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", style))
    assert COLORS.items() <= declared.items()
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    found = set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r"var\(--\w+,#[0-9a-f]{6}\)", "", svgs)))
    assert found <= {"#111417"}  # text on light colours, which are light in the dark as well


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_without_a_library_it_is_said_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match=rf"needs {name}.*pip install 'geneformer-fast\[profile\]'"):
        html.page(sample_report())


def test_many_batches_are_joined_into_bars_that_add_up() -> None:
    batches = long_report(10_001).tokens.batches
    joined = plots.bars(batches, 90)
    assert len(joined) <= 90
    assert joined[0][0] == 0
    assert joined[-1][1] == 10_000
    for before, after in pairwise(joined):
        assert after[0] == before[1] + 1
    assert sum((last - first + 1) * real for first, last, real, _ in joined) == pytest.approx(
        sum(b[1] for b in batches)
    )
    assert plots.bars(batches[:3], 90) == [(i, i, batches[i][1], 8192.0) for i in range(3)]
    assert plots.bars([], 90) == []


def test_pieces_of_a_stack_add_up_to_the_whole() -> None:
    stack = plots.pieces({"other": 1.0, "data": 2.0, "copies": Missing("no"), "new": 3.0}, plots.PART_COLORS, 10.0)
    assert [(piece.name, piece.value) for piece in stack] == [
        ("data", 2),
        ("other", 1),
        ("new", 3),
        ("not told apart", 4),
    ]
    assert [piece.name for piece in plots.pieces({"data": 10.0}, plots.PART_COLORS, 10.01)] == ["data"]


def test_points_of_the_roofline_are_computed_and_numbered_by_time() -> None:
    found = roofline.points(rich_report())
    assert [point.number for point in found] == [1, 2, 3, 4, 5, 6, None, 7, 8, 9, None, 10]
    attention = next(point for point in found if point.operation.name == "varlen_attention")
    assert attention.intensity == pytest.approx(6.5e12 / 8.0e9)
    assert attention.tflops == pytest.approx(6.5e12 / 41e-3 / 1e12)
    assert roofline.roofline(bare_report()) is None
