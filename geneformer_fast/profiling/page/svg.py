"""One plot as SVG within a page: its colours are the page's, its text is text, its marks say what they show."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

from geneformer_fast.profiling.units import visible

#: Name on the page (a CSS variable) to the colour on white. Those of data are Okabe and Ito's, which people with any
#: kind of colour blindness tell apart; their yellow is darker, for it is hardly seen on white.
COLORS = {
    "ink": "#1c2127",
    "muted": "#5c6670",
    "line": "#dde1e6",
    "paper": "#ffffff",
    "blue": "#0072b2",
    "sky": "#56b4e9",
    "green": "#009e73",
    "yellow": "#d9c021",
    "orange": "#e69f00",
    "vermillion": "#d55e00",
    "purple": "#cc79a7",
    "grey": "#9aa3ad",
}
#: Text on those colours.
ON_COLOR = "#111417"
#: Pixels across: beside a screen's or sheet's margins, and on a phone.
WIDE, NARROW = 720, 320

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "geneformer-fast",  # identifiers are the same every time
    "text.parse_math": False,  # a name may hold dollars
    "text.usetex": False,
    "font.size": 12,
    "axes.edgecolor": COLORS["muted"],
    "axes.labelcolor": COLORS["muted"],
    "axes.labelsize": 12,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlecolor": COLORS["ink"],
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "grid.color": COLORS["line"],
    "grid.linewidth": 0.8,
    "text.color": COLORS["ink"],
    "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"],
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
}
_VARIABLES = {value: f"var(--{name},{value})" for name, value in COLORS.items()}
_COLOR = re.compile(r"#[0-9a-f]{6}\b")
_FAMILY = re.compile(r"font-family:[^;]*;?\s*")
_FONT = re.compile(r"font:\s*(?P<rest>(?:\w+\s+)*?)(?P<size>[\d.]+px)\s[^;]*")
_XLINK = "{http://www.w3.org/1999/xlink}href"


class Plot:
    """A figure of matplotlib, and what its marks say.

    Parameters
    ----------
    name
        Identifier, unique on the page.
    width, height
        Pixels.
    """

    def __init__(self, name: str, width: int, height: int) -> None:
        from matplotlib.figure import Figure

        self.name = name
        self.is_narrow = width < WIDE
        # A point of 1/72 inch is a unit of the SVG, which is drawn one to one.
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        self._size = (width, height)
        self._titles: list[str] = []

    def axes(self, rows: int = 1, columns: int = 1, *, left: int = 52, top: int = 22) -> list[Any]:
        """Axes with room for what stands around them, in pixels; it is the same on all plots, so that they line up.

        matplotlib would find out how much each needs, in half the time that a page takes.
        """
        (width, height), bottom, right = self._size, 38, 3
        wide, high = ((width - columns * (left + right)) / columns, (height - rows * (top + bottom)) / rows)
        grid = self.figure.subplots(
            rows, columns, squeeze=False,
            gridspec_kw={
                "left": left / width, "right": 1 - right / width, "bottom": bottom / height, "top": 1 - top / height,
                "wspace": (left + right) / wide, "hspace": (top + bottom) / high,
            },
        )  # fmt: skip
        return list(grid.flat)

    def mark(self, artist: Any, title: str) -> None:
        """An artist is a mark: it shows data, and says which to who points at it."""
        artist.set_gid(f"mark{len(self._titles)}")
        self._titles.append(visible(title))

    def svg(self, label: str) -> str:
        """The plot as one ``<svg>``; ``label`` is what it shows, in words."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        root = ElementTree.fromstring(buffer.getvalue())
        for parent in root.iter():
            for child in [each for each in parent if _local(each.tag) in ("metadata", "style")]:
                parent.remove(child)
        used = {each[1:] for element in root.iter() if (each := element.get(_XLINK, "")).startswith("#")}
        used |= {name for element in root.iter() for value in element.attrib.values() for name in _URL.findall(value)}
        for element in root.iter():
            self._settle(element, used)
        root.attrib = {
            **{"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": visible(label)},
            **{"class": "narrow" if self.is_narrow else "wide"},
        }
        return ElementTree.tostring(root, encoding="unicode")

    def _settle(self, element: ElementTree.Element, used: set[str]) -> None:
        """Make an element one of the page: no namespaces, its identifier unique, its colours variables."""
        element.tag = _local(element.tag)
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", f"{self.name}-{name}")
        elif name is not None and name.startswith("mark"):
            element.set("class", "mark")
            title = ElementTree.Element("title")
            title.text = self._titles[int(name.removeprefix("mark"))]
            element.insert(0, title)
        for key, value in list(element.attrib.items()):
            if key == _XLINK:
                del element.attrib[key]
                element.set("href", f"#{self.name}-{value[1:]}")
            elif key == "style":
                value = _FAMILY.sub("", _FONT.sub(r"\g<rest>font-size: \g<size>", value))
                element.set(key, _COLOR.sub(lambda found: _VARIABLES.get(found[0], found[0]), value))
            elif _URL.search(value):
                element.set(key, _URL.sub(rf"url(#{self.name}-\1)", value))
        element.text = element.text if (element.text or "").strip() else None
        element.tail = None


_URL = re.compile(r"url\(#([^)]+)\)")


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


@contextmanager
def style() -> Iterator[None]:
    """Plots look as they do here, whatever the user has set for others."""
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # matplotlib measures text with a font of its own; the reader's browser draws it with another.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield
