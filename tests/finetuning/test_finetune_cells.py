"""Fine-tuning on cells, end to end: it learns, nothing leaks, and every file says what it should."""

from __future__ import annotations

import dataclasses
import itertools
import json

import anndata
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typed_cells import SHORT, TYPES, typed_cells

import geneformer_fast as gf
from geneformer_fast.errors import GeneformerFastError, InputError, OutputError, TrainingError
from geneformer_fast.finetuning import cells as finetuning_cells
from geneformer_fast.finetuning import engine
from geneformer_fast.finetuning.losses import cross_entropy
from geneformer_fast.finetuning.names import RESERVED, check_names

ONE_EPOCH = dataclasses.replace(SHORT, epochs=1)


def test_it_learns(done):
    task = done.scores["tasks"]["kind"]
    assert task["classes"] == list(TYPES)
    assert task["over_folds"]["macro_f1"]["mean"] > 0.9
    assert task["over_folds"]["roc_auc"]["mean"] > 0.95
    assert len(task["over_folds"]["accuracy"]["folds"]) == 3


def test_every_cell_is_tested_once_by_a_model_that_saw_nobody_of_its_donor(done, home):
    table = pq.read_table(done.predictions).to_pandas()
    obs = anndata.read_h5ad(home / "cells.h5ad").obs
    assert sorted(table["source_row"]) == list(range(90))
    assert set(table["source_file"]) == {"cells.h5ad"} or table["source_file"].str.endswith("cells.h5ad").all()
    assert (obs["kind"].to_numpy()[table["source_row"]] == table["kind"]).all()
    donors = obs["donor"].to_numpy()[table["source_row"]]
    assert (table.groupby(donors)["fold"].nunique() == 1).all()


def test_table_scores_and_confusion_say_the_same(done):
    table = pq.read_table(done.predictions).to_pandas()
    probabilities = table[[f"kind: {name}" for name in TYPES]].to_numpy()
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    assert (np.array(TYPES)[probabilities.argmax(1)] == table["kind_predicted"]).all()
    np.testing.assert_array_equal(probabilities.max(1), table["kind_probability"])
    task = done.scores["tasks"]["kind"]
    confusion = np.zeros((3, 3), dtype=int)
    np.add.at(confusion, (table["kind"].map(TYPES.index), table["kind_predicted"].map(TYPES.index)), 1)
    assert task["confusion"] == confusion.tolist()
    for fold, part in enumerate(task["folds"], 1):
        rows = table[table["fold"] == fold]
        assert part["accuracy"] == pytest.approx((rows["kind"] == rows["kind_predicted"]).mean())
    assert json.loads((done.folder / "scores.json").read_text()) == done.scores


def test_pictures_and_report(done):
    for name in ("confusion.png", "roc.png"):
        assert (done.folder / name).read_bytes()[:4] == b"\x89PNG"
    assert "kind" in str(done)
    assert "mean ± standard deviation of 3 folds; 90 cells" in str(done)


def test_checkpoints_of_finished_folds_are_gone(done):
    assert sorted(path.name for path in (done.folder / "folds").iterdir()) == ["fold-1", "fold-2", "fold-3"]
    assert not list(done.folder.rglob("step-*"))
    assert not list(done.folder.rglob(".*"))


def test_transformers_loads_the_model_and_says_the_same(done, home):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertForSequenceClassification.from_pretrained(done.model).eval()
    assert theirs.config.id2label == dict(enumerate(TYPES))
    assert theirs.config.label2id == {name: code for code, name in enumerate(TYPES)}
    tokens = gf.open_tokens(home / "tokens")
    ours = gf.load(done.model)
    values, bounds = tokens.read(range(5))
    for start, stop in itertools.pairwise(bounds):
        cell = torch.from_numpy(values[start:stop].astype(np.int64))
        batch = gf.Ragged.from_cells([cell])
        with torch.inference_mode():
            expected = theirs(input_ids=cell[None]).logits[0]
            found = ours.logits(ours(batch))[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_every_column_that_names_rows_is_reserved(done):
    """What predictions hold besides the task's columns is on the list."""
    columns = pq.read_table(done.predictions).column_names
    own = {"kind", "kind_predicted", "kind_probability"}
    assert {name for name in columns if name not in own and not name.startswith("kind: ")} <= set(RESERVED)
    for name in RESERVED:
        with pytest.raises(InputError, match="says which row is which"):
            check_names({name: ["a", "b"]})
    check_names({"cells": ["a", "b"], "other": ["a", "b"]})


def test_the_pretrained_model_stays_as_it_was(done, home):
    # `done` was made from it; a fresh one with the same seed has the same weights.
    encoder = gf.load(home / "model")
    torch.manual_seed(3)
    fresh = gf.Encoder(encoder.config, head="mlm")
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name


def test_hold_out_saves_the_model_it_tested(home, tmp_path):
    made = gf.finetune_cells(home / "tokens", home / "model", "kind", tmp_path / "out", test_share=0.3, recipe=SHORT)
    table = pq.read_table(made.predictions).to_pandas()
    assert len(table) == 27
    again = gf.predict(home / "tokens", made.model, dtype="float32", progress=False).set_index("row")
    rows = again.loc[table["cell"]]
    np.testing.assert_allclose(rows["kind_probability"], table["kind_probability"], rtol=1e-5)
    assert made.scores["folds"][0]["best"]["macro_f1"] > 0.9


# Values and gradients of all of them are those of test_losses.py; of those with weights per class one is trained here.
@pytest.mark.parametrize(
    "loss",
    [
        *("class-balanced", "focal", "bce", "ldam:s=10"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("weighted", "dice", "logit-adjusted")),
    ],
)
def test_every_loss_trains(home, tmp_path, loss):
    recipe = dataclasses.replace(SHORT, epochs=12 if loss == "dice" else SHORT.epochs)  # it learns slowly
    made = gf.finetune_cells(
        home / "tokens", home / "model", "kind", tmp_path / "out", test_share=0.3, loss=loss, recipe=recipe
    )
    assert made.scores["tasks"]["kind"]["over_folds"]["accuracy"]["mean"] > 0.8


def test_ldam_leaves_a_model_whose_probabilities_mean_something(home, tmp_path):
    """Its loss multiplies logits by s: without that factor in the model, softmax would be nearly uniform."""
    made = gf.finetune_cells(
        home / "tokens", home / "model", "kind", tmp_path / "out", test_share=0.3, loss="ldam", recipe=SHORT
    )
    table = pq.read_table(made.predictions).to_pandas()
    right = table[table["kind"] == table["kind_predicted"]]
    assert right["kind_probability"].median() > 0.8


def test_samplers_change_how_many_cells_an_epoch_shows(home, tmp_path, monkeypatch):
    seen = {}
    original = finetuning_cells.CellObjective.collate

    def collate(self, tokens, cells, rng):
        seen.setdefault(name, []).append(cells)
        return original(self, tokens, cells, rng)

    monkeypatch.setattr(finetuning_cells.CellObjective, "collate", collate)
    tokens = gf.open_tokens(home / "tokens")
    kinds = np.array(tokens.column("kind").to_pylist())
    counts = {}
    for name in ("none", "over", "under"):
        gf.finetune_cells(
            home / "tokens", home / "model", "kind", tmp_path / name, sampler=name, eval_share=0, test_share=0.3,
            recipe=ONE_EPOCH,
        )  # fmt: skip
        counts[name] = {kind: int((kinds[np.concatenate(seen[name])] == kind).sum()) for kind in TYPES}
    most, least = max(counts["none"].values()), min(counts["none"].values())
    assert set(counts["over"].values()) == {most}
    assert set(counts["under"].values()) == {least}


def test_a_nan_loss_loses_no_finished_fold_and_the_rest_is_made_later(home, tmp_path, monkeypatch):
    arguments = (home / "tokens", home / "model", "kind")
    options = dict(folds=2, eval_share=0.0, recipe=ONE_EPOCH)
    calls = []

    def breaking(name, counts):
        calls.append(name)
        return cross_entropy if len(calls) < 5 else lambda x, y: (x.sum() * float("nan"), torch.tensor(1.0))

    whole = gf.finetune_cells(*arguments, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        # Three calls look at the splits before training, the fourth trains the first fold, the fifth the second.
        patch.setattr(finetuning_cells, "make_loss", breaking)
        with pytest.raises(TrainingError, match="the loss is nan"):
            gf.finetune_cells(*arguments, tmp_path / "out", **options)
    kept = tmp_path / "out" / "folds" / "fold-1" / "predictions.parquet"
    stamp = kept.stat().st_mtime_ns
    with pytest.raises(OutputError, match="holds a fine-tuning already; go on with it"):
        gf.finetune_cells(*arguments, tmp_path / "out", **options)
    made = gf.finetune_cells(*arguments, tmp_path / "out", resume=True, **options)
    assert kept.stat().st_mtime_ns == stamp
    assert made.scores == whole.scores
    assert pq.read_table(made.predictions).equals(pq.read_table(whole.predictions))


def test_a_killed_fold_goes_on_from_its_checkpoint_bit_for_bit(home, tmp_path, monkeypatch):
    arguments = (home / "tokens", home / "model", "kind")
    options = dict(recipe=dataclasses.replace(SHORT, epochs=3, save_every=7), test_share=0.3)
    whole = gf.finetune_cells(*arguments, tmp_path / "whole", **options)
    steps = []

    def killed(*args, **given):
        def on_step(record):
            steps.append(record.step)
            if record.step == 12 and len(steps) == 12:
                raise KeyboardInterrupt

        return fit(*args, **given, on_step=on_step)

    fit = engine.fit
    monkeypatch.setattr(engine, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        gf.finetune_cells(*arguments, tmp_path / "out", **options)
    made = gf.finetune_cells(*arguments, tmp_path / "out", resume=True, **options)
    assert steps[12] > 1  # not from the beginning
    assert made.scores == whole.scores
    assert pq.read_table(made.predictions).equals(pq.read_table(whole.predictions))
    assert (made.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()


def test_resume_refuses_another_fine_tuning_and_overwrite_replaces_it(home, tmp_path):
    arguments = (home / "tokens", home / "model")
    first = gf.finetune_cells(*arguments, "kind", tmp_path / "out", recipe=ONE_EPOCH)
    with pytest.raises(OutputError, match=r"a fine-tuning with losses .*cross-entropy.*, not .*focal"):
        gf.finetune_cells(*arguments, "kind", tmp_path / "out", recipe=ONE_EPOCH, loss="focal", resume=True)
    again = gf.finetune_cells(*arguments, "kind", tmp_path / "out", recipe=ONE_EPOCH, resume=True)
    assert again.scores == first.scores
    second = gf.finetune_cells(*arguments, "batch", tmp_path / "out", recipe=ONE_EPOCH, overwrite=True)
    assert list(second.scores["tasks"]) == ["batch"]
    assert gf.load(second.model).head.classifier.out_features == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match="holds files that finetune did not make"):
            gf.finetune_cells(*arguments, "kind", tmp_path / "mine", recipe=ONE_EPOCH, **options)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("label", "options", "said"),
    [
        ("celltype", {}, "has no column 'celltype' for the label; it carries kind, is_lymphoid, donor"),
        ("length", {}, "has no column 'length' for the label"),
        ("score", {}, "'score' holds fractions, which are no classes"),
        ("same", {}, r"'same' has one class only \('x'\)"),
        (
            "patchy",
            {},
            r"18 of 90 cells have no 'patchy' \(the first is cell 0\); leave them out with --drop-unlabelled",
        ),
        ("kind", {"group": "person"}, "has no column 'person' for the group"),
        ("kind", {"group": "patchy"}, "18 labelled cells have no 'patchy'"),
        ("kind", {"group": "kind"}, r"all cells of B, NK, T come from one group.*B \(B\), NK \(NK\)"),
        ("kind", {"folds": 20}, r"20 folds need 20 cells of every class, but there are fewer of NK \(18\)"),
        ("kind", {"group": "donor", "folds": 7}, "7 folds need 7 groups, but there are 6"),
        ("kind", {"ignore": ["B cell"]}, "no cell's 'kind' is 'B cell', which was to be ignored"),
        ("kind", {"min_cells": 40}, r"one class only \('T'\) of at least 40 cells"),
        ("kind", {"loss": "hinge"}, "no loss named 'hinge'"),
        ("kind", {"loss": {"type": "focal"}}, "a loss is given for 'type', which is no label"),
        ("kind", {"sampler": "smote"}, "sampler must be one of none, over, under"),
        ("kind", {"freeze_layers": 3}, "cannot freeze 3 layers: the model has 2"),
        ("kind", {"eval_share": 0.9, "test_share": 0.2}, "leave nothing to learn from"),
        ({"kind": 0.0}, {}, "weights above 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(home, tmp_path, label, options, said):
    with pytest.raises(GeneformerFastError, match=said):
        gf.finetune_cells(home / "tokens", home / "model", label, tmp_path / "out", recipe=ONE_EPOCH, **options)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.safetensors"))


def test_tokens_of_another_vocabulary_are_refused(home, tmp_path):
    import toys

    words = toys.vocabulary(name="other")
    gf.tokenize(typed_cells(12), tmp_path / "tokens", dictionary=words, obs=["kind"], progress=False)
    with pytest.raises(GeneformerFastError, match="these tokens were made with other, but the model reads toy"):
        gf.finetune_cells(tmp_path / "tokens", home / "model", "kind", tmp_path / "out")


def test_several_processes_are_refused(home, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GeneformerFastError, match="start it without torchrun"):
        gf.finetune_cells(home / "tokens", home / "model", "kind", tmp_path / "out")


def test_unlabelled_and_ignored_cells_are_left_out(home, tmp_path):
    made = gf.finetune_cells(
        home / "tokens", home / "model", "patchy", tmp_path / "out", folds=2, recipe=ONE_EPOCH, is_final=False,
        drop_unlabelled=True, ignore=["NK"],
    )  # fmt: skip
    table = pq.read_table(made.predictions).to_pandas()
    assert made.model is None
    assert made.scores["tasks"]["patchy"]["classes"] == ["B", "T"]
    assert not (table["cell"] % 5 == 0).any()
    assert len(table) == sum(i % 5 != 0 and kind != "NK" for i, kind in enumerate(typed_cells().obs["kind"]))
