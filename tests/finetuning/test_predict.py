"""Labels for new cells: into an AnnData, an .h5ad copy, a table; from our models and from others'."""

from __future__ import annotations

import json
import shutil
import warnings

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import toys
from typed_cells import TYPES, typed_cells

import geneformer_fast as gf
from geneformer_fast.cli import main
from geneformer_fast.errors import CheckpointError, OutputError, UnsupportedError
from geneformer_fast.finetuning.names import check_card


@pytest.fixture(scope="module")
def new_cells():
    adata = typed_cells(30, seed=9)
    counts = adata.X.tolil()
    counts[4] = 0  # no gene at all: no prediction
    adata.X = counts.tocsr()
    return adata


def test_cells_that_were_not_taken_are_said_where_they_keep_a_row(done, new_cells, tmp_path):
    adata, options = new_cells.copy(), {"max_cells": 7, "progress": False}
    with pytest.warns(UserWarning, match="23 of 30 cells were not taken: their rows have no kind_predicted, and their"):
        gf.predict(adata, done.model, **options)
    assert adata.obs["kind_predicted"].isna().sum() >= 23
    new_cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.warns(UserWarning, match="their rows have no guess_predicted"):
        gf.predict(tmp_path / "cells.h5ad", done.model, tmp_path / "out.h5ad", key_added="guess", **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*were not taken")
        assert (
            len(gf.predict(new_cells.copy(), done.model, tmp_path / "out.csv", **options).read_text().splitlines()) == 8
        )
        gf.predict(new_cells.copy(), done.model, **options | {"max_cells": 30})


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


@pytest.mark.parametrize("column", ["kind_predicted", "kind_probability"])
def test_columns_of_the_users_are_not_written_over(done, new_cells, tmp_path, column):
    adata = new_cells.copy()
    adata.obs[column] = "mine"
    with pytest.raises(OutputError, match=rf"the AnnData: its obs holds '{column}' already.*key_added=, --key-added"):
        gf.predict(adata, done.model, progress=False)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(OutputError, match=rf"cells\.h5ad: its obs holds '{column}' already"):
        gf.predict(tmp_path / "cells.h5ad", done.model, tmp_path / "out.h5ad", progress=False)
    assert not (tmp_path / "out.h5ad").exists()
    gf.predict(adata, done.model, key_added="guess", progress=False)
    assert (adata.obs[column] == "mine").all()
    gf.predict(adata, done.model, key_added="guess", progress=False)  # our own are replaced


def test_places_beside_obs_are_not_written_over_either(done, new_cells, tmp_path):
    for place, name, value in (
        ("obsm", "kind_probabilities", np.zeros((30, 2))),
        ("uns", "kind_predicted", {"colors": "red"}),
    ):
        adata = new_cells.copy()
        getattr(adata, place)[name] = value
        with pytest.raises(OutputError, match=f"its {place} holds '{name}' already"):
            gf.predict(adata, done.model, progress=False)
    adata = new_cells.copy()
    adata.obs.index.name = "kind_predicted"
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(OutputError, match="holds 'kind_predicted' already"):
        gf.predict(tmp_path / "cells.h5ad", done.model, tmp_path / "out.h5ad", progress=False)
    new_cells.write_h5ad(tmp_path / "plain.h5ad")
    with pytest.raises(OutputError, match="a name with a slash, 'a/b'"):
        gf.predict(tmp_path / "plain.h5ad", done.model, tmp_path / "out.h5ad", key_added="a/b", progress=False)


def test_tasks_that_would_be_written_under_one_name_are_refused(done, home, tmp_path):
    with pytest.raises(CheckpointError, match="two of its tasks would be written as 'kind: x: y'"):
        check_card(
            {"tasks": [{"name": "kind", "classes": ["x: y", "z"]}, {"name": "kind: x", "classes": ["y"]}]}, tmp_path
        )
    assert check_card({"tasks": [{"name": "a", "classes": ["x"]}, {"name": "b", "classes": ["x"]}]}, tmp_path) is None
    # Two classes of one name: nobody could tell them apart, wherever they are read from.
    shutil.copytree(done.model, tmp_path / "model")
    for name in ("finetuned.json", "SHA256SUMS"):
        (tmp_path / "model" / name).unlink(missing_ok=True)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["id2label"]["1"] = config["id2label"]["0"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="two of its class names are 'B'"):
        gf.predict(home / "tokens", tmp_path / "model", progress=False)


def test_several_inputs_on_the_command_line(done, home, tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 2)):
        cells = typed_cells(12, seed=seed)
        cells.obs_names = [f"{name}{number}" for number in range(12)]
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
    words = ["predict", str(tmp_path / "a.h5ad"), str(tmp_path / "b.h5ad"), "--model", str(done.model)]
    assert main([*words, "--out", str(tmp_path / "out.parquet")]) == 0
    table = pq.read_table(tmp_path / "out.parquet").to_pandas()
    assert len(table) == 24
    assert table["source_file"].nunique() == 2
    assert main([*words, "--out", str(tmp_path / "out.h5ad")]) == 2
    tokens = str(home / "tokens")
    assert main(["predict", tokens, tokens, "--model", str(done.model), "--out", str(tmp_path / "two.parquet")]) == 2
    said = capsys.readouterr().err
    assert "one folder of tokens" in said
    assert "Traceback" not in said
