"""Fine-tuning on some of the cells: no other cell is learned from or tested, and a run goes on with the same ones."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import toys
from typed_cells import SHORT, SHORT_GENES, gene_classes

import geneformer_fast as gf
from geneformer_fast.cli import main
from geneformer_fast.errors import InputError, OutputError, UnsupportedError
from geneformer_fast.finetuning import engine

ONE_EPOCH = dataclasses.replace(SHORT, epochs=1)
GENES_ONCE = dataclasses.replace(SHORT_GENES, epochs=1)


@pytest.fixture
def seen(monkeypatch):
    """Cells of every training, and what nothing was computed for."""
    found = []

    def fit(encoder, tokens, objective, recipe, **options):
        found.append(np.union1d(options["train_cells"], options["eval_cells"]))
        return made(encoder, tokens, objective, recipe, **options)

    made = engine.fit
    monkeypatch.setattr(engine, "fit", fit)
    return found


def test_no_other_cell_is_learned_from_or_tested(home, tmp_path, seen):
    out = tmp_path / "out"
    done = gf.finetune_cells(
        home / "tokens", home / "model", "kind", out, where={"batch": 1, "donor": ["d1", "d3"]}, folds=3,
        eval_share=0, recipe=ONE_EPOCH,
    )  # fmt: skip
    expected = {i for i in range(90) if i % 2 == 1 and i % 6 in (1, 3)}
    assert sorted(pq.read_table(done.predictions)["cell"].to_pylist()) == sorted(expected)
    assert set(np.concatenate(seen).tolist()) == expected
    card = json.loads((done.model / "finetuned.json").read_text())
    assert json.loads(card["where"]) == {"batch": ["1"], "donor": ["d1", "d3"]}


def test_classes_are_those_of_the_selected_cells_and_labels_that_others_lack_do_not_matter(home, tmp_path):
    two = gf.finetune_cells(
        home / "tokens", home / "model", "kind", tmp_path / "two", where={"kind": ["B", "T"]}, recipe=ONE_EPOCH
    )
    assert two.scores["tasks"]["kind"]["classes"] == ["B", "T"]
    with pytest.raises(InputError, match="have no 'patchy'"):
        gf.finetune_cells(home / "tokens", home / "model", "patchy", tmp_path / "no", recipe=ONE_EPOCH)
    labelled = {"patchy": ["B", "NK", "T"]}
    made = gf.finetune_cells(
        home / "tokens", home / "model", "patchy", tmp_path / "all", where=labelled, test_share=0.5, recipe=ONE_EPOCH
    )
    assert all(cell % 5 for cell in pq.read_table(made.predictions)["cell"].to_pylist())


def test_a_draw_is_of_labelled_cells_and_decided_by_a_seed(home, tmp_path, seen):
    options = {"drop_unlabelled": True, "test_share": 0, "is_final": False, "recipe": ONE_EPOCH}
    for number, seed in enumerate((None, ONE_EPOCH.seed, 8)):
        gf.finetune_cells(
            home / "tokens", home / "model", "patchy", tmp_path / str(number), max_cells=40, seed=seed, **options
        )
    assert [len(cells) for cells in seen] == [40, 40, 40]
    assert all(cell % 5 for cell in np.concatenate(seen))
    assert seen[0].tolist() == seen[1].tolist() != seen[2].tolist()
    with pytest.raises(UnsupportedError, match="is of the draw of cells"):
        gf.finetune_cells(home / "tokens", home / "model", "kind", tmp_path / "no", seed=8, **options)


def test_a_run_goes_on_with_the_same_cells_or_not_at_all(home, tmp_path):
    out = tmp_path / "out"

    def run(**options):
        return gf.finetune_cells(home / "tokens", home / "model", "kind", out, recipe=ONE_EPOCH, **options)

    run(where={"batch": 0})
    run(where={"batch": "0"}, resume=True)
    for other in ({}, {"where": {"batch": 1}}, {"where": {"batch": 0}, "max_cells": 20}):
        with pytest.raises(OutputError, match=r"a fine-tuning (with|of other) selection"):
            run(**other, resume=True)
    # Of an earlier version, which had no such entry: fingerprints decide.
    path = out / "finetune.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in content.items() if key != "selection"}))
    with pytest.raises(OutputError, match=r"a fine-tuning of other (splits|labels or splits)"):
        run(where={"batch": 1}, resume=True)
    run(where={"batch": 0}, resume=True)


def test_genes_in_some_cells(home, tmp_path, seen):
    options = {"folds": 0, "recipe": GENES_ONCE}
    done = gf.finetune_genes(
        home / "tokens", home / "model", gene_classes(), tmp_path / "out", where={"batch": 1}, max_cells=20, **options
    )
    assert len(seen[0]) == 20
    assert set(seen[0] % 2) == {1}
    assert max(pq.read_table(done.predictions)["n_cells"].to_pylist()) <= 20
    # Genes that only cells beside those hold are expressed in none of them.
    with gf.open_tokens(home / "tokens") as folder:
        alone, _ = folder.read([0])
    genes = toys.gene_ids()
    tokens = {token: gene for gene, token in toys.vocabulary().token_ids.items()}
    there = {tokens[int(token)] for token in alone if int(token) in tokens}
    absent = next(gene for gene in genes[30:] if gene not in there)
    with pytest.raises(InputError, match=rf"expressed in no selected cell of .*{absent}"):
        gf.finetune_genes(
            home / "tokens", home / "model", {**dict.fromkeys(there, "a"), absent: "b"}, tmp_path / "no",
            where={"obs_names": "cell0"}, **options,
        )  # fmt: skip


def test_the_command_hands_it_on(home, tmp_path, monkeypatch):
    found = []

    def cells(*args, **options):
        found.append(options)
        return gf.finetuning.outputs.Finetuned(tmp_path, None, {"tasks": {}, "of": "cells"})

    monkeypatch.setattr("geneformer_fast.finetuning.cells.finetune_cells", cells)
    monkeypatch.setattr("geneformer_fast.finetuning.genes.finetune_genes", cells)
    (tmp_path / "c.csv").write_text("gene,class\n")
    tokens = str(home / "tokens")
    for kind in (["cells", tokens, "--label", "kind"], ["genes", tokens, "--classes", str(tmp_path / "c.csv")]):
        where = ["--where", "batch=1", "--where", "donor=d1,d2", "--max-cells", "7", "--seed", "5"]
        assert main(["finetune", *kind, "--model", str(home / "model"), "--out", str(tmp_path / "o"), *where]) == 0
        assert found[-1]["where"] == {"batch": ["1"], "donor": ["d1", "d2"]}
        assert found[-1]["max_cells"] == 7
        assert found[-1]["recipe"].seed == 5
