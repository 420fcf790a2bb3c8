"""Tokens and a model that all tests of fine-tuning share, and one fine-tuning of cells that several look at."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from typed_cells import SHORT, write_model, write_tokens

import geneformer_fast as gf
from geneformer_fast.finetuning.outputs import Finetuned


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``tokens``, ``cells.h5ad`` and ``model``."""
    folder = tmp_path_factory.mktemp("typed")
    write_tokens(folder)
    write_model(folder)
    return folder


@pytest.fixture(autouse=True)
def quick_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are put together, and files as large as theirs written; those of ``done`` and ``test_scores`` are drawn.

    Letters and lines take as long as a small model takes to learn.
    """
    if request.path.stem != "test_scores" and find_spec("matplotlib") is not None:
        from matplotlib.figure import Figure

        monkeypatch.setattr(Figure, "savefig", lambda _, path, **options: path.write_bytes(bytes(30_000)))
        monkeypatch.setattr("geneformer_fast.profiling.page.svg.Plot.svg", lambda _, label: "<svg></svg>")


@pytest.fixture(scope="session")
def done(home: Path) -> Finetuned:
    """Three folds by donor, and a final model."""
    return gf.finetune_cells(
        home / "tokens", home / "model", "kind", home / "done", group="donor", folds=3,
        recipe=SHORT,
    )  # fmt: skip
