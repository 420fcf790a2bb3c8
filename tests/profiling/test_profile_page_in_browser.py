"""The page of a report in Chromium: nothing is fetched, every plot shows something, all is legible, also on paper."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browsers
import pytest
from sample_reports import bare_report, hostile_report, rich_report

from geneformer_fast.profiling.page.html import page as page_of
from geneformer_fast.profiling.report import Report

pytestmark = pytest.mark.skipif(bool(browsers.missing()), reason=browsers.missing() or "a browser is here")

#: One page is a matter of seconds; the others take as long again.
REPORTS = [rich_report, *(pytest.param(make, marks=pytest.mark.slow) for make in (hostile_report, bare_report))]

# Of each plot that is seen: what it is called, its marks (title, box), its texts (content, box), and its own box.
_PLOTS = """() => {
  const box = element => { const {left, top, right, bottom} = element.getBoundingClientRect();
                           return {left, top, right, bottom}; };
  return [...document.querySelectorAll('figure svg')].filter(svg => svg.getClientRects().length).map(svg => ({
    label: svg.getAttribute('aria-label'), box: box(svg),
    marks: [...svg.querySelectorAll('.mark')].map(
      mark => ({title: mark.querySelector(':scope > title').textContent, box: box(mark)})),
    texts: [...svg.querySelectorAll('text')].filter(text => /rotate\\(-0 /.test(text.getAttribute('transform')))
      .map(text => ({text: text.textContent, box: box(text)})),
  }));
}"""
# Of each text that is seen: its contrast with what is behind it (WCAG 2.2).
_CONTRASTS = """() => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => { const [r, g, b] = channels(color).slice(0, 3).map(each => each / 255)
                             .map(each => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
                           return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = element => { for (let each = element; each; each = each.parentElement) {
                                const color = getComputedStyle(each).backgroundColor;
                                if (channels(color)[3] !== 0) return color; }
                              return 'rgb(255, 255, 255)'; };
  return [...document.querySelectorAll('body *:not(svg *)')]
    .filter(element => element.checkVisibility({visibilityProperty: true}))
    .filter(element => [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()))
    .map(element => { const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
                      return [element.textContent.trim().slice(0, 40),
                              (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]; });
}"""
_SHOWN = """[...document.querySelectorAll('figure svg')].filter(svg => svg.getClientRects().length)
  .map(svg => svg.classList[0])"""
_FILLS = "[...new Set([...document.querySelectorAll('.wide text')].map(text => getComputedStyle(text).fill))]"
_ACROSS = "[document.documentElement.scrollWidth, window.innerWidth]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsers.chromium() as started:
        yield started


@pytest.fixture(scope="module")
def file_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], Report]], Path]:
    """Pages as files, each written once."""
    folder, written = tmp_path_factory.mktemp("pages"), {}

    def write(make: Callable[[], Report]) -> Path:
        if make not in written:
            written[make] = folder / f"{make.__name__}.html"
            written[make].write_text(page_of(make()), encoding="utf-8")
        return written[make]

    return write


@pytest.mark.parametrize("make", REPORTS, ids=lambda make: make.__name__)
def test_nothing_is_fetched_nothing_runs_and_nothing_is_complained_about(make: Any, browser: Any, file_of: Any) -> None:
    path = file_of(make)
    with browsers.opened(browser, path) as (page, seen):
        assert page.title().endswith(": throughput profile")
        assert page.evaluate("document.scripts.length + document.images.length") == 0
        assert seen.requests == [path.as_uri()]
        assert seen.complaints == []


def test_what_would_fetch_or_complain_is_noticed(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("<!DOCTYPE html><img src='https://example.com/a.png'><script>console.log('seen')</script>")
    with browsers.opened(browser, path) as (_, seen):
        assert "https://example.com/a.png" in seen.requests
        assert "seen" in seen.complaints


@pytest.mark.parametrize("width", [1280, 360])
def test_every_plot_has_marks_within_it_and_texts_that_do_not_cover_each_other(
    width: int, browser: Any, file_of: Any
) -> None:
    with browsers.opened(browser, file_of(rich_report), width=width) as (page, _):
        plots = page.evaluate(_PLOTS)
    assert len(plots) == 11
    for plot in plots:
        assert plot["label"]
        assert plot["marks"], plot["label"]
        assert plot["texts"], plot["label"]
        for each in (*plot["marks"], *plot["texts"]):
            assert _is_within(each["box"], plot["box"]), (plot["label"], each)
        assert all(mark["title"] and _size(mark["box"]) > 0 for mark in plot["marks"])
        covered = [
            (one["text"], other["text"])
            for i, one in enumerate(plot["texts"])
            for other in plot["texts"][:i]
            if _is_covered(one["box"], other["box"])
        ]
        assert covered == [], plot["label"]


def _size(box: dict[str, float]) -> float:
    return box["right"] - box["left"] + box["bottom"] - box["top"]


def _is_within(inner: dict[str, float], outer: dict[str, float], room: float = 4) -> bool:
    return (
        inner["left"] >= outer["left"] - room
        and inner["right"] <= outer["right"] + room
        and inner["top"] >= outer["top"] - room
        and inner["bottom"] <= outer["bottom"] + room
    )


def _is_covered(one: dict[str, float], other: dict[str, float]) -> bool:
    """Boxes of text are higher than their letters by some pixels."""
    across = min(one["right"], other["right"]) - max(one["left"], other["left"])
    down = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
    return across > 1 and down > 4


@pytest.mark.parametrize("make", REPORTS, ids=lambda make: make.__name__)
def test_nothing_is_wider_than_the_window(make: Any, browser: Any, file_of: Any) -> None:
    with browsers.opened(browser, file_of(make), width=360) as (page, _):
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        for width in (360, 640, 700, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            across, window = page.evaluate(_ACROSS)
            assert across <= window == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(scheme: str, browser: Any, file_of: Any) -> None:
    with browsers.opened(browser, file_of(rich_report), scheme=scheme) as (page, _):
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        contrasts = page.evaluate(_CONTRASTS)
        fills = page.evaluate(_FILLS)
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)")
    assert len(contrasts) > 300
    assert [each for each in contrasts if each[1] < 4.5] == []
    assert len(fills) == 4  # ink and muted of the page, and two kinds of text on marks


def test_it_prints_in_light_colours_on_a_few_sheets(browser: Any, file_of: Any) -> None:
    with browsers.opened(browser, file_of(rich_report), scheme="dark") as (page, seen):
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        shown = page.evaluate(_SHOWN)
        pdf = page.pdf(format="A4", prefer_css_page_size=True)
        assert seen.complaints == []
    assert shown.count("wide") == 9
    assert "narrow" not in shown
    assert pdf.startswith(b"%PDF")
    assert 4 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12
