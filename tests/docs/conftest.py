"""A folder as the quickstart leaves it, with fewer cells and a smaller model, of which every page gets a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_tour import small_tour


@pytest.fixture(scope="session")
def quickstart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``geneformer-fast quickstart`` leaves."""
    pytest.importorskip("matplotlib")
    where = tmp_path_factory.mktemp("reader") / "quickstart"
    small_tour(where)
    return where


@pytest.fixture
def folder(quickstart_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy, in which the test runs."""
    shutil.copytree(quickstart_folder, tmp_path / "quickstart")
    monkeypatch.chdir(tmp_path)
    return tmp_path
