"""Heatmaps of embeddings: what stands beside what, what colours mean, and what is refused."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from pictures import n_colors, pixels

from geneformer_fast import heatmap
from geneformer_fast.errors import InputError, OutputError, UnsupportedError
from geneformer_fast.heatmap import HATCHES, classes_of, column_order, look_of, plot_heatmap, row_order, standardized
from geneformer_fast.plot import COLORS, FAINT, MARKERS, check_format, draw_classes, places_of, texts_of

pytestmark = pytest.mark.skipif(find_spec("matplotlib") is None, reason="pictures need matplotlib")


def grouped(n: int = 90, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings whose even dimensions are high in the first group, odd ones in the others; and the group of each."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(3, size=n)
    values = rng.normal(size=(n, 8)) * 0.1 + 5
    values[:, ::2] += 3 * (groups == 0)[:, None]
    values[:, 1::2] += 3 * (groups != 0)[:, None]
    return values.astype(np.float32), np.array(["T", "B", "NK"])[groups]


def test_dimensions_have_one_scale_and_constant_ones_are_nought() -> None:
    values = np.random.default_rng(0).normal(3, 7, (50, 4))
    values[:, 2] = 1.5
    found = standardized(values)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(found.std(axis=0), [1, 1, 0, 1])


def test_cells_of_one_label_stand_together_and_dimensions_that_vary_alike() -> None:
    values, labels = grouped()
    codes, names = classes_of(labels)
    assert names == ["B", "NK", "T"]
    assert np.bincount(codes).tolist() == [(labels == each).sum() for each in ("B", "NK", "T")]
    order = row_order(standardized(values), codes)
    assert sorted(order) == list(range(90))
    assert (np.diff(codes[order]) >= 0).all()
    columns = column_order(standardized(values))
    assert sorted(columns) == list(range(8))
    assert len({column % 2 for column in columns[:4].tolist()}) == 1
    # Within a label by what varies most there.
    slope = np.linspace(-1, 1, 20)
    rows = row_order(np.outer(slope[::-1], np.ones(3)), np.zeros(20, dtype=int)).tolist()
    assert rows in (list(range(20)), list(range(19, -1, -1)))


def test_missing_labels_come_last_and_numbers_are_sorted() -> None:
    codes, names = classes_of(np.array(["b", None, "a", np.nan, "b"], dtype=object))
    assert names == ["a", "b", "(none)"]
    assert codes.tolist() == [1, 2, 0, 2, 1]
    assert classes_of(np.array([True, False]))[1] == ["False", "True"]
    numbers = np.array([3.0, np.nan, 1.0, 2.0])
    assert classes_of(numbers) == (None, [])
    assert row_order(np.zeros((4, 3)), numbers).tolist() == [2, 3, 0, 1]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.fixture
def letters() -> object:
    """Letters stay letters in .svg."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        yield


@pytest.mark.usefixtures("letters")
def test_what_a_picture_says(tmp_path: Path) -> None:
    values, labels = grouped()
    path = plot_heatmap(values, labels, tmp_path / "new" / "h.svg", label="cell type", title="model, layer last")
    said = text_of(path)
    for text in (f"T ({(labels == 'T').sum()})", "cell type", "model, layer last", "90 cells", "8 dimensions"):
        assert text in said
    plot_heatmap(values, np.arange(90.0), tmp_path / "n.svg", label="score")
    assert "score" in text_of(tmp_path / "n.svg")


@pytest.mark.usefixtures("letters")
def test_a_seeded_sample_is_drawn_of_many_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heatmap, "MOST_CELLS", 40)
    drawn: list[np.ndarray] = []
    monkeypatch.setattr(heatmap, "_draw", lambda figure, values, *a: drawn.append((values, a)))
    values, labels = grouped()
    for seed in (0, 0, 1):
        plot_heatmap(values, labels, tmp_path / "h.svg", label="type", seed=seed)
    assert [len(each[0]) for each in drawn] == [40, 40, 40]
    assert (drawn[0][0] == drawn[1][0]).all()
    assert not (drawn[0][0] == drawn[2][0]).all()
    assert drawn[0][1][-1] == "40 of 90 cells"


@pytest.mark.parametrize("n_classes", [3, 8, 13, 40, 50])
def test_a_class_has_one_colour_on_the_umap_and_here(
    n_classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    # The last classes by name are large, some cells have no label, and most cells are not drawn.
    labels = np.array([f"class {i:02d}" for i in range(n_classes) for _ in range(3 + i)] + [None] * 9, dtype=object)
    values = np.random.default_rng(0).normal(size=(len(labels), 4))
    umap = draw_classes(Figure().subplots(), values[:, :2], labels, size=1)
    here: list[object] = []
    draw = heatmap._draw_strip
    monkeypatch.setattr(heatmap, "_draw_strip", lambda *given: here.extend(draw(*given)) or here)
    monkeypatch.setattr(heatmap, "MOST_CELLS", 2 * len(labels) // 3)
    plot_heatmap(values, labels, tmp_path / "h.png", label="type")

    def told(label: str) -> str:
        return "smaller" if "smaller" in label else label.rpartition(" (")[0]

    there = {
        told(each.get_label()): to_hex(each.get_facecolor()[0]) for each in umap if told(each.get_label()) != "(none)"
    }
    mine = {told(each.get_label()): to_hex(each.get_facecolor()) for each in here}
    assert mine.pop("(none)") == FAINT
    assert mine.items() <= there.items()
    assert len(mine) > n_classes / 2
    assert len({(look["facecolor"], look["hatch"]) for look in map(look_of, range(40))}) == 40
    assert len(HATCHES) == len(MARKERS)
    assert [look_of(place)["facecolor"] for place in range(8)] == list(COLORS)
    assert list(places_of(texts_of(labels)).values()) == list(range(min(n_classes, 40)))


def test_classes_have_colours_of_their_own(tmp_path: Path) -> None:
    values, labels = grouped()
    assert n_colors(pixels(plot_heatmap(values, labels, tmp_path / "h.png", label="type"))) > 30
    many = np.array([f"class {i % 60}" for i in range(90)])
    assert plot_heatmap(values, many, tmp_path / "m.png", label="type").stat().st_size > 10_000


@pytest.mark.parametrize("n", [1, 2, 3])
def test_next_to_nothing_can_be_drawn(n: int, tmp_path: Path) -> None:
    plot_heatmap(np.random.default_rng(0).normal(size=(n, 2)), np.array(["a"] * n), tmp_path / "h.png", label="type")
    with pytest.raises(InputError, match="no cells"):
        plot_heatmap(np.zeros((0, 4)), np.array([], dtype=object), tmp_path / "z.png", label="type")


def test_what_cannot_be_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"h\.xyz: pictures end in \.png"):
        check_format(tmp_path / "h.xyz")
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'geneformer-fast\[plot\]'"):
        check_format(tmp_path / "h.png")
