"""Pictures of embeddings."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import toys
from pictures import n_colors, pixels

from geneformer_fast import plot
from geneformer_fast.errors import OutputError, UnsupportedError
from geneformer_fast.plot import check_picture, plot_umap

# Found, not imported: every worker loads this file, and one of them runs it.
pytestmark = pytest.mark.skipif(
    find_spec("umap") is None or find_spec("matplotlib") is None, reason="pictures need umap-learn and matplotlib"
)


@pytest.fixture(autouse=True)
def umap_in_slow_tests_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """UMAP is compiled for 15 seconds."""
    if request.node.get_closest_marker("slow") is None:
        toys.draw_without_umap(monkeypatch)


def clusters(n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings in three clearly separate groups, and the group of each."""
    rng = np.random.default_rng(seed)
    groups = np.arange(n) % 3
    return (rng.normal(size=(n, 8)) * 0.1 + groups[:, None] * 10).astype(np.float32), groups


def test_classes_get_colours_of_their_own(tmp_path: Path) -> None:
    embeddings, groups = clusters()
    path = plot_umap(embeddings, np.array(["T", "B", "NK"])[groups], tmp_path / "umap.png", label="type")
    image = pixels(path)
    assert image.shape[0] > 500
    assert image.shape[1] > 500
    assert n_colors(image) >= 3
    plot_umap(embeddings, None, tmp_path / "plain.png")
    assert 1 <= n_colors(pixels(tmp_path / "plain.png")) < n_colors(image)


def test_torch_keeps_its_number_of_threads(tmp_path: Path) -> None:
    # A process of its own: numba starts its threads once, and an earlier test has had it do so. It finds torch's OpenMP
    # where threadpoolctl has looked at it before, as it does in much of scikit-learn. What UMAP does to threads its
    # first parallel loop does, and so does whoever tells numba how many of them to use. Nothing is drawn.
    code = f"""
import sys, types
import numba, numpy as np, threadpoolctl, torch
from matplotlib.figure import Figure
from geneformer_fast.plot import plot_umap

Figure.savefig = lambda figure, path, **options: path.write_bytes(b"drawn")

class UMAP:
    def __init__(self, **options):
        pass
    def fit_transform(self, x):
        numba.set_num_threads(2)
        return x[:, :2]

sys.modules["umap"] = types.SimpleNamespace(UMAP=UMAP)
torch.set_num_threads(1)
assert torch.get_num_threads() == 1  # the first call sets OpenMP's number once more
threadpoolctl.threadpool_info()
plot_umap(np.random.default_rng(0).normal(size=(60, 8)), None, {str(tmp_path / "umap.png")!r})
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""
    environment = os.environ | {"NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_umap_takes_the_options_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []

    class Recorded(sys.modules["umap"].UMAP):
        def __init__(self, **options: object) -> None:
            given.append(options)

    monkeypatch.setattr(sys.modules["umap"], "UMAP", Recorded)
    plot_umap(clusters()[0], None, tmp_path / "p.png", seed=3)
    monkeypatch.undo()
    from umap import UMAP

    assert given[0]["random_state"] == 3
    assert set(given[0]) <= set(inspect.signature(UMAP.__init__).parameters)
    assert callable(UMAP.fit_transform)


@pytest.mark.slow
def test_umap_itself(tmp_path: Path) -> None:
    """Groups stay apart and get their colours, the same ones every time; and four cells are enough."""
    embeddings, groups = clusters()
    names = np.array(["T", "B", "NK"])[groups]
    for name in ("a.png", "b.png"):
        plot_umap(embeddings, names, tmp_path / name, label="type")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    assert n_colors(pixels(tmp_path / "a.png")) >= 3
    assert plot_umap(np.random.default_rng(0).normal(size=(4, 4)), None, tmp_path / "p.png").stat().st_size > 1000


def test_the_same_seed_gives_the_same_picture(tmp_path: Path) -> None:
    embeddings, groups = clusters()
    for name in ("a.png", "b.png"):
        plot_umap(embeddings, groups.astype(str), tmp_path / name)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def test_numbers_get_a_scale(tmp_path: Path) -> None:
    embeddings, _ = clusters()
    plot_umap(embeddings, np.linspace(0, 1, len(embeddings)), tmp_path / "scale.png", label="score")
    # A colour bar has many shades, which classes have not.
    assert n_colors(pixels(tmp_path / "scale.png")) > 50


@pytest.mark.parametrize("labels", ["booleans", "missing values", "sixty classes"])
def test_odd_labels(labels: str, tmp_path: Path) -> None:
    embeddings, groups = clusters(80)
    values = {
        "booleans": groups == 1,
        "missing values": np.array(["a", None, np.nan], dtype=object)[groups],
        "sixty classes": np.array([f"class {i % 60}" for i in range(80)]),
    }[labels]
    assert n_colors(pixels(plot_umap(embeddings, values, tmp_path / "p.png"))) >= 2


def test_a_sample_is_drawn_of_many_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import umap

    seen = []
    fit = umap.UMAP.fit_transform

    def fit_transform(self: umap.UMAP, data: np.ndarray, *args: object) -> np.ndarray:
        seen.append(len(data))
        return fit(self, data, *args)

    monkeypatch.setattr(umap.UMAP, "fit_transform", fit_transform)
    monkeypatch.setattr(plot, "MOST_CELLS", 40)
    embeddings, groups = clusters(90)
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters stay letters
        plot_umap(embeddings, groups.astype(str), tmp_path / "p.svg")
    assert seen == [40]
    assert "40 of 90 cells" in (tmp_path / "p.svg").read_text()


def test_pictures_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"pictures end in \.png"):
        check_picture(tmp_path / "p.xyz")
    with pytest.raises(OutputError, match=r"pictures end in \.png"):
        plot_umap(*clusters(), tmp_path / "p.xyz")


def test_folders_are_made_and_nothing_half_drawn_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot_umap(*clusters(), tmp_path / "new" / "p.png")
    before = (tmp_path / "new" / "p.png").read_bytes()

    def savefig(self: object, path: Path, **options: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    with pytest.raises(OutputError, match=r"p\.png cannot be written: the disk is full"):
        plot_umap(*clusters(), tmp_path / "new" / "p.png")
    assert (tmp_path / "new" / "p.png").read_bytes() == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["p.png"]


def test_too_few_cells(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="at least 4"):
        plot_umap(np.zeros((3, 4), np.float32), None, tmp_path / "p.png")
    assert plot_umap(np.random.default_rng(0).normal(size=(4, 4)), None, tmp_path / "p.png").stat().st_size > 1000


def test_missing_umap_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(UnsupportedError, match=r"umap.*geneformer-fast\[plot\]"):
        check_picture(tmp_path / "p.png")
