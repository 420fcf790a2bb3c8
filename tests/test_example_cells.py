"""The cells that come with the package are the real ones, few enough, and say whose they are."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import geneformer_fast
from geneformer_fast.quickstart.example import CELLS

SOURCE = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "pbmc_facs" / "pbmc_facs.h5ad"


def test_what_they_are():
    cells = geneformer_fast.example_cells()
    assert cells.n_obs == 500
    counts = cells.X.data
    assert cells.X.dtype == np.float32
    assert (counts == np.floor(counts)).all()
    assert counts.min() >= 1
    np.testing.assert_array_equal(np.asarray(cells.X.sum(1)).ravel(), cells.obs["n_counts"])
    assert (cells.obs["cell_type"].value_counts() == 50).all()
    assert cells.obs["cell_type"].nunique() == 10
    assert cells.obs.groupby("cell_type", observed=True)["lineage"].nunique().max() == 1
    assert cells.obs_names.is_unique
    assert cells.var_names.is_unique
    assert cells.var["ensembl_id"].str.fullmatch(r"ENSG\d{11}").all()
    assert cells.var["ensembl_id"].is_unique
    # Any beginning has equally many of each type, so that a part of them is a smaller example.
    assert (cells.obs["cell_type"][:70].value_counts() == 7).all()


def test_nobody_shares_them():
    first = geneformer_fast.example_cells()
    first.obs["cell_type"] = "changed"
    first.X.data[:] = 0
    assert geneformer_fast.example_cells().obs["cell_type"].nunique() == 10
    assert geneformer_fast.example_cells().X.data.min() >= 1


def test_they_are_small_and_say_whose_they_are():
    folder = CELLS.parent
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000
    assert "Redistributions in binary form must reproduce" in (folder / "LICENSE.txt").read_text()
    assert "Zheng" in (folder / "README.md").read_text()


@pytest.mark.skipif(not SOURCE.exists(), reason="the cells they are drawn from are not beside the checkout")
def test_they_are_drawn_from_the_source_as_the_tool_says():
    import anndata

    again = import_module("example_cells").drawn(anndata.read_h5ad(SOURCE))
    cells = geneformer_fast.example_cells()
    assert (again.X != cells.X).nnz == 0
    assert again.obs.equals(cells.obs)
    assert again.var.equals(cells.var)
