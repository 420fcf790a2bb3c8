"""Labels of every kind of column, several tasks at once, and the same from the command line."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from typed_cells import SHORT, gene_classes, write_model

import geneformer_fast as gf
from geneformer_fast.cli import main
from geneformer_fast.finetuning.labels import read_task

ONE_EPOCH = dataclasses.replace(SHORT, epochs=1)


def test_columns_of_every_kind(home):
    tokens = gf.open_tokens(home / "tokens")
    kind = read_task(tokens, "kind")
    assert kind.classes == ["B", "NK", "T"]
    assert (np.array(kind.classes)[kind.codes] == tokens.column("kind").to_pylist()).all()
    assert read_task(tokens, "is_lymphoid").classes == ["False", "True"]
    assert read_task(tokens, "batch").classes == ["0", "1"]
    patchy = read_task(tokens, "patchy", drop_unlabelled=True)
    assert (patchy.codes[::5] == -100).all()
    assert (np.delete(patchy.codes, np.s_[::5]) == np.delete(kind.codes, np.s_[::5])).all()
    rare = read_task(tokens, "kind", min_cells=20)
    assert rare.classes == ["B", "T"]
    assert (rare.codes == -100).sum() == 18


def test_several_tasks_at_once(home, tmp_path):
    """One model, one head each; a task in which cells lack labels is scored on those that have one."""
    made = gf.finetune_cells(
        home / "tokens", home / "model", {"patchy": 1.0, "is_lymphoid": 0.5}, tmp_path / "out",
        loss={"patchy": "weighted"}, test_share=0.3, recipe=SHORT,
    )  # fmt: skip
    tasks = made.scores["tasks"]
    assert list(tasks) == ["patchy", "is_lymphoid"]
    assert tasks["is_lymphoid"]["over_folds"]["accuracy"]["mean"] > 0.7
    table = pq.read_table(made.predictions).to_pandas()
    assert table["patchy_predicted"].notna().all()
    known = table["patchy"].notna()
    assert 0 < known.sum() < len(table)
    assert tasks["patchy"]["folds"][0]["n"] == known.sum()
    assert (made.folder / "confusion_patchy.png").exists()
    assert (made.folder / "roc_is_lymphoid.png").exists()
    assert made.scores["folds"][0]["best"].keys() >= {"patchy/macro_f1", "is_lymphoid/accuracy"}
    predicted = gf.predict(home / "tokens", made.model, dtype="float32", progress=False).set_index("row")
    assert (predicted.loc[table["cell"], "is_lymphoid_predicted"] == table["is_lymphoid_predicted"].to_numpy()).all()
    settings = json.loads((made.model / "config.json").read_text())
    assert settings["id2label"]["0"] == "patchy: B"
    assert settings["id2label"]["4"] == "is_lymphoid: True"


def test_the_command_line_does_what_the_function_does(home, tmp_path, capsys):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(
        json.dumps({"batch_cells": 8, "token_budget": 2048, "epochs": 9, "eval_every": 14, "save_every": 14})
    )
    options = ["--recipe", str(recipe), "--epochs", "1", "--learning-rate", "2e-2", "--seed", "1"]
    common = [str(home / "tokens"), "--model", str(home / "model"), "--device", "cpu"]
    cells = ["finetune", "cells", *common, "--label", "kind", "--group", "donor", "--folds", "2", "--no-final"]
    sampled = ["--sampler", "under", "--loss", "focal:gamma=1", "--freeze-layers", "1", "--freeze-embeddings"]
    assert main([*cells, *sampled, *options, "--out", str(tmp_path / "cli")]) == 0
    said = capsys.readouterr().out
    assert "mean ± standard deviation of 2 folds; 90 cells" in said
    made = gf.finetune_cells(
        home / "tokens", home / "model", "kind", tmp_path / "function", group="donor", folds=2, is_final=False,
        sampler="under", loss="focal:gamma=1", freeze_layers=1, freeze_embeddings=True, device="cpu",
        recipe=ONE_EPOCH,
    )  # fmt: skip
    assert json.loads((tmp_path / "cli" / "scores.json").read_text())["tasks"] == made.scores["tasks"]


def test_genes_search_and_predict_on_the_command_line(home, tmp_path, capsys):
    (tmp_path / "classes.csv").write_text("".join(f"{gene},{name}\n" for gene, name in gene_classes().items()))
    common = [str(home / "tokens"), "--model", str(home / "model"), "--epochs", "1", "--quiet"]
    genes = ["--classes", str(tmp_path / "classes.csv"), "--folds", "0", "--eval-share", "0.2", "--search", "1"]
    assert main(["finetune", "genes", *common, *genes, "--out", str(tmp_path / "genes")]) == 0
    assert capsys.readouterr().out == ""
    model = str(tmp_path / "genes" / "final")
    out = str(tmp_path / "genes.parquet")
    assert main(["predict", str(home / "cells.h5ad"), "--model", model, "--out", out]) == 0
    assert "genes.parquet" in capsys.readouterr().out
    assert set(pq.read_table(out)["gene_class_predicted"].to_pylist()) <= {"loud", "quiet"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--label", "nothing"], "has no column 'nothing'"),
        (["--label", "kind=much", "--label", "batch"], "the weight must be a number, not 'much'"),
        (["--label", "kind", "--learning-rate", "-1"], "learning_rate must be above 0"),
        (["--label", "kind", "--recipe", "absent.json"], "absent.json: no such file"),
    ],
)
def test_errors_on_the_command_line_are_one_sentence(home, tmp_path, capsys, words, said):
    common = [str(home / "tokens"), "--model", str(home / "model"), "--out", str(tmp_path / "out")]
    assert main(["finetune", "cells", *common, *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_an_encoder_that_bert_cannot_express_is_saved_under_our_own_names(home, tmp_path):
    pre = dict(norm="pre", embedding_norm=False, final_norm=True, activation="gelu_tanh", n_token_types=0)
    model = write_model(tmp_path, **pre)
    made = gf.finetune_cells(
        home / "tokens", model, "kind", tmp_path / "out", test_share=0.3, freeze_layers=1, recipe=ONE_EPOCH
    )
    tested = pq.read_table(made.predictions).to_pandas()
    told = gf.predict(home / "tokens", made.model, dtype="float32", progress=False).set_index("row")
    assert (told.loc[tested["cell"], "kind_predicted"] == tested["kind_predicted"].to_numpy()).all()
    assert gf.load(made.model).config.norm == "pre"


def test_labels_to_ignore_count_in_every_task_that_has_them(home, tmp_path):
    made = gf.finetune_cells(
        home / "tokens", home / "model", ["kind", "is_lymphoid"], tmp_path / "out", ignore=["NK"], test_share=0.3,
        recipe=ONE_EPOCH,
    )  # fmt: skip
    assert made.scores["tasks"]["kind"]["classes"] == ["B", "T"]
    assert made.scores["tasks"]["is_lymphoid"]["classes"] == ["False", "True"]
