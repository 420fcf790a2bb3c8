"""Fine-tuning on genes: folds of genes, scores by gene and by occurrence, classes from files."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import toys
from typed_cells import GROUPS, SHORT_GENES, gene_classes

import geneformer_fast as gf
from geneformer_fast.errors import GeneformerFastError, InputError
from geneformer_fast.finetuning import genes as finetuning_genes
from geneformer_fast.finetuning.labels import read_gene_classes
from geneformer_fast.finetuning.objectives import GeneMeans


@pytest.fixture(scope="module")
def done(home):
    return gf.finetune_genes(
        home / "tokens", home / "model", gene_classes(), home / "genes", folds=3, recipe=SHORT_GENES
    )


def test_it_learns_and_every_gene_is_tested_once(done):
    table = pq.read_table(done.predictions).to_pandas()
    assert sorted(table["gene"]) == sorted(gene_classes())
    assert (table["gene_class"] == table["gene"].map(gene_classes())).all()
    assert (table["token"] == table["gene"].map(toys.vocabulary().token_ids)).all()
    task = done.scores["tasks"]["gene_class"]
    assert task["classes"] == sorted(GROUPS)
    # Genes the model has never seen a class of: only their place among the others tells.
    assert task["over_folds"]["roc_auc"]["mean"] > 0.75
    assert all(fold["occurrences"]["n"] > 90 for fold in done.scores["folds"])


def test_counts_of_cells_are_those_of_the_tokens(done, home):
    table = pq.read_table(done.predictions).to_pandas()
    values, _ = gf.open_tokens(home / "tokens").read(range(90))
    assert (table["n_cells"] == np.bincount(values, minlength=100)[table["token"]]).all()


def test_training_never_asks_for_a_gene_of_another_split(home, tmp_path, monkeypatch):
    asked: list[set[int]] = []
    original = finetuning_genes.GeneObjective.collate

    def collate(self, tokens, cells, rng):
        batch = original(self, tokens, cells, rng)
        asked[-1].update(tokens.values[batch.targets != -100].tolist())
        return batch

    def objective(self, split):
        asked.append(set())
        splits.append(split)
        return made(self, split)

    splits: list = []
    made = finetuning_genes.GeneWork.objective
    monkeypatch.setattr(finetuning_genes.GeneObjective, "collate", collate)
    monkeypatch.setattr(finetuning_genes.GeneWork, "objective", objective)
    gf.finetune_genes(
        home / "tokens", home / "model", gene_classes(), tmp_path / "out", folds=2, eval_share=0.2, is_final=False,
        recipe=dataclasses.replace(SHORT_GENES, epochs=1),
    )  # fmt: skip
    tokens = np.array(sorted(toys.vocabulary().token_ids[gene] for gene in gene_classes()))
    trained = [(split, seen) for split, seen in zip(splits, asked, strict=True) if seen]
    assert len(trained) == 2
    for split, seen in trained:
        assert seen == set(tokens[split.train].tolist())
        assert not seen & set(tokens[np.r_[split.eval, split.test]].tolist())


def test_transformers_loads_the_model(done):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertForTokenClassification.from_pretrained(done.model)
    assert theirs.config.id2label == dict(enumerate(sorted(GROUPS)))


def test_predict_tells_every_gene_that_occurs(done, home):
    table = gf.predict(home / "tokens", done.model, progress=False).set_index("gene")
    tested = pq.read_table(done.predictions).to_pandas().set_index("gene")
    assert set(tested.index) <= set(table.index)
    loud = [gene for gene, name in gene_classes().items() if name == "loud"]
    assert (table.loc[loud, "gene_class_predicted"] == "loud").mean() > 0.7


def test_means_over_cells_by_hand():
    means = GeneMeans(np.array([-100, 0, 1, 0]))
    logits = torch.log(torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.9, 0.1]]))
    means.add(torch.tensor([2, 1, 2]), logits)
    means.add(torch.tensor([2]), torch.log(torch.tensor([[0.1, 0.9]])))
    tokens, probabilities, n_cells = means.result()
    assert tokens.tolist() == [1, 2]
    assert n_cells.tolist() == [1, 3]
    np.testing.assert_allclose(probabilities, [[0.6, 0.4], [0.4, 0.6]], atol=1e-6)


FORMS = {
    "genes.json": json.dumps({"G1": "a", "G2": "b"}),
    "classes.json": json.dumps({"a": ["G1"], "b": ["G2"]}),
    "plain.csv": "G1,a\nG2,b\n",
    "header.csv": "gene_id,class\nG1,a\nG2,b\n",
    "tabs.tsv": "gene\tclass\textra\nG1\ta\t1\nG2\tb\t2\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_classes_are_read_in_every_form(tmp_path, name):
    (tmp_path / name).write_text(FORMS[name])
    assert read_gene_classes(tmp_path / name) == {"G1": "a", "G2": "b"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("c.json", "{", "c.json cannot be read as JSON"),
        ("c.json", "[1]", "holds no JSON object"),
        ("c.json", '{"G1": 3}', "'G1' is neither a gene with a class nor a class with a list"),
        ("c.json", '{"a": ["G1"], "b": ["G1", "G2"]}', "gene G1 is in the classes 'a' and 'b'"),
        ("c.csv", "G1,a\nG2\n", "line 2 does not hold a gene and a class"),
        ("c.csv", "G1,a\nG2,a\n", "1 classes of genes, but at least 2"),
        ("c.csv", "", "0 classes of genes"),
        ("missing.csv", None, "no such file of gene classes"),
    ],
)
def test_classes_that_cannot_be_read(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        read_gene_classes(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"ENSG00000000001": "loud"}, {}, r"of 31 genes with a class 1 are not in toy \(ENSG00000000001\)"),
        ({toys.gene_ids()[30]: "lone"}, {}, r"3 folds need 3 genes of every class, but there are fewer of lone \(1\)"),
        ({}, {"max_cells": 0}, "max_cells must be at least 1"),
        ({}, {"loss": "focal:delta=1"}, "no option 'delta'"),
        ({}, {"freeze_layers": 5}, "cannot freeze 5 layers"),
    ],
)
def test_bad_input(home, tmp_path, changes, options, said):
    with pytest.raises(GeneformerFastError, match=said):
        gf.finetune_genes(
            home / "tokens", home / "model", {**gene_classes(), **changes}, tmp_path / "out", folds=3,
            recipe=SHORT_GENES, **options,
        )  # fmt: skip
    assert not list(tmp_path.rglob("*.safetensors"))


def test_genes_without_a_dictionary_are_refused(home, tmp_path):
    gf.save(gf.load(home / "model"), tmp_path / "bare")
    with pytest.raises(InputError, match=r"pass dictionary= \(--dictionary\)"):
        gf.finetune_genes(home / "tokens", tmp_path / "bare", gene_classes(), tmp_path / "out")


def test_unknown_genes_may_be_left_out(home, tmp_path):
    # also where most are unknown, which in a file of counts would be refused
    classes = {**gene_classes(), **{f"ENSG{i:011d}": "loud" for i in range(1, 41)}}
    made = gf.finetune_genes(
        home / "tokens", home / "model", classes, tmp_path / "out", folds=0, max_cells=20, drop_unknown=True,
        recipe=dataclasses.replace(SHORT_GENES, epochs=1),
    )  # fmt: skip
    assert made.scores["n"] == 6
    assert pq.read_table(made.predictions)["n_cells"].to_pandas().max() <= 20
