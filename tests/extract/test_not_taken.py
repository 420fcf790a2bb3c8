"""Cells that were not taken keep a place in an AnnData, which is said with what follows from it."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import toys

import geneformer_fast as gf


def test_rows_without_embeddings_are_said_where_there_are_any(tmp_path: Path) -> None:
    words, adata = toys.vocabulary(), toys.cells(9)
    model = toys.encoder(words)
    options = {"pool": "mean", "dictionary": words, "progress": False, "max_cells": 4}
    with pytest.warns(UserWarning, match=r"5 of 9 cells were not taken: their rows of obsm\['X_geneformer'\] are NaN"):
        gf.embed(adata, model, **options)
    assert np.isnan(adata.obsm["X_geneformer"]).all(axis=1).sum() == 5
    toys.cells(9).write_h5ad(tmp_path / "cells.h5ad")
    with pytest.warns(UserWarning, match="subset before neighbours"):
        gf.embed(tmp_path / "cells.h5ad", model, tmp_path / "out.h5ad", **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*were not taken")
        gf.embed(toys.cells(9), model, as_frame=True, **options)
        gf.embed(toys.cells(9), model, **options | {"max_cells": 9})
        gf.embed(toys.cells(9), model, **options | {"pool": "gene"})
