"""Labels for new cells: into an AnnData, an .h5ad copy, a table; from our models and from others'."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import toys
from typed_cells import TYPES, typed_cells

import geneformer_fast as gf
from geneformer_fast.errors import CheckpointError, OutputError, UnsupportedError


@pytest.fixture(scope="module")
def new_cells():
    adata = typed_cells(30, seed=9)
    counts = adata.X.tolil()
    counts[4] = 0  # no gene at all: no prediction
    adata.X = counts.tocsr()
    return adata


def test_into_an_anndata(done, new_cells):
    adata = new_cells.copy()
    assert gf.predict(adata, done.model, progress=False) is None
    predicted = adata.obs["kind_predicted"]
    assert list(predicted.cat.categories) == list(TYPES)
    assert pd.isna(predicted.iloc[4])
    assert np.isnan(adata.obsm["kind_probabilities"][4]).all()
    others = np.arange(30) != 4
    probabilities = adata.obsm["kind_probabilities"][others]
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    assert (np.array(TYPES)[probabilities.argmax(1)] == predicted[others]).all()
    np.testing.assert_array_equal(adata.obs["kind_probability"][others], probabilities.max(1))
    assert (predicted[others] == adata.obs["kind"][others]).mean() > 0.8
    provenance = adata.uns["kind_predicted"]
    assert list(provenance["classes"]) == list(TYPES)
    assert provenance["model"] == "final"
    assert provenance["vocabulary"] == "toy"


def test_a_copy_leaves_the_original_alone(done, new_cells):
    made = gf.predict(new_cells, done.model, copy=True, key_added="guess", progress=False)
    assert "guess_predicted" in made.obs
    assert not [name for name in new_cells.obs if "predicted" in name]


def test_an_h5ad_copy_holds_what_memory_holds(done, new_cells, tmp_path):
    new_cells.write_h5ad(tmp_path / "new.h5ad")
    made = gf.predict(tmp_path / "new.h5ad", done.model, tmp_path / "out.h5ad", progress=False)
    assert made == tmp_path / "out.h5ad"
    there, here = anndata.read_h5ad(made), gf.predict(new_cells, done.model, copy=True, progress=False)
    pd.testing.assert_frame_equal(there.obs, here.obs, check_categorical=False, check_dtype=False)
    np.testing.assert_array_equal(there.obsm["kind_probabilities"], here.obsm["kind_probabilities"])
    assert list(there.uns["kind_predicted"]["classes"]) == list(TYPES)
    assert (there.X != here.X).nnz == 0
    # Once more over the same columns: replaced, not doubled.
    again = gf.predict(made, done.model, tmp_path / "again.h5ad", progress=False)
    assert list(anndata.read_h5ad(again).obs.columns) == list(there.obs.columns)
    assert json.loads((tmp_path / "out.h5ad.json").read_text())["cells"] == 29
    assert not toys.leftovers(tmp_path)


def test_a_table_with_the_source_of_every_cell(done, home, new_cells, tmp_path):
    new_cells.write_h5ad(tmp_path / "new.h5ad")
    path = gf.predict(tmp_path / "new.h5ad", done.model, tmp_path / "out.parquet", progress=False)
    table = pq.read_table(path).to_pandas()
    assert list(table["source_row"]) == [row for row in range(30) if row != 4]
    assert table["source_file"].str.endswith("new.h5ad").all()
    assert set(table.columns) >= {"kind_predicted", "kind_probability", *(f"kind: {name}" for name in TYPES)}
    frame = gf.predict(tmp_path / "new.h5ad", done.model, progress=False)
    pd.testing.assert_frame_equal(frame, table)
    tokens = gf.predict(home / "tokens", done.model, progress=False)
    assert len(tokens) == 90


def test_a_model_of_other_making_is_read_by_its_id2label(home, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = json.loads((home / "model" / "config.json").read_text())
    names = {0: "left", 1: "right"}
    theirs = transformers.BertForSequenceClassification(
        transformers.BertConfig(**{**config, "id2label": names, "label2id": {v: k for k, v in names.items()}})
    )
    theirs.save_pretrained(tmp_path / "theirs")
    table = gf.predict(home / "tokens", tmp_path / "theirs", progress=False)
    assert set(table["label_predicted"]) <= {"left", "right"}


def test_refusals(done, home, new_cells, tmp_path):
    with pytest.raises(CheckpointError, match="holds no classifier; make one with geneformer-fast finetune"):
        gf.predict(home / "tokens", home / "model")
    with pytest.raises(OutputError, match=r"must end in one of \.parquet, \.csv, \.h5ad"):
        gf.predict(home / "tokens", done.model, tmp_path / "out.npy")
    with pytest.raises(UnsupportedError, match=r"an \.h5ad output is a copy of an \.h5ad input"):
        gf.predict(home / "tokens", done.model, tmp_path / "out.h5ad")
    (tmp_path / "there.parquet").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        gf.predict(home / "tokens", done.model, tmp_path / "there.parquet")
    assert (tmp_path / "there.parquet").read_text() == "mine"
