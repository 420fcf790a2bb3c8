"""What a fine-tuned model's card says: the scores are those of ``scores.json``, and it is clear whose they are."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
import toys
from typed_cells import SHORT, SHORT_GENES, gene_classes

import geneformer_fast as gf

ONE_EPOCH = dataclasses.replace(SHORT, epochs=1)


def read(model):
    hub = pytest.importorskip("huggingface_hub")
    text = (model / "README.md").read_text()
    return text, hub.ModelCard(text).data.to_dict()


def test_folds(done):
    text, card = read(done.model)
    assert card["pipeline_tag"] == "text-classification"
    assert "base_model" not in card, "a folder here is no id on the Hub"
    assert "Fine-tuned from model." in text
    over = done.scores["tasks"]["kind"]["over_folds"]
    (result,) = card["model-index"][0]["results"]
    metrics = {metric["type"]: metric["value"] for metric in result["metrics"]}
    expected = {"accuracy": "accuracy", "f1": "macro_f1", "roc_auc": "roc_auc"}
    assert metrics == {theirs: pytest.approx(over[ours]["mean"], abs=1e-5) for theirs, ours in expected.items()}
    row = " | ".join(f"{over[name]['mean']:.3f} ± {over[name]['sd']:.3f}" for name in expected.values())
    assert f"| kind | {row} |" in text
    assert "over 3 folds, in which 90 cells were tested once each" in text
    assert "this model has learned from all folds" in text
    for words in ("kind (3 classes)", "- kind: `B`, `NK`, `T`", "tokens, 90 cells", "`cells.h5ad`", "names none"):
        assert words in text
    recipe = json.loads((done.model / "finetuned.json").read_text())["recipe"]
    assert f'"learning_rate": {recipe["learning_rate"]}' in text
    assert str(done.folder.parent) not in text


def test_the_lines_of_code_are_true_beside_the_card(done, tmp_path, monkeypatch):
    text, _ = read(done.model)
    use = re.search(r"## Use\n\n```python\n(.*?)```", text, re.S)[1]
    toys.cells(4).write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.chdir(done.model)
    ran = {}
    exec(use.replace("cells.h5ad", str(tmp_path / "cells.h5ad")), ran)
    assert "kind_predicted" in ran["table"].columns
    assert len(ran["table"]) == 4


def test_one_split_some_cells_adapters_and_the_licence_of_the_base(home, tmp_path):
    base = shutil.copytree(home / "model", tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    done = gf.finetune_cells(
        home / "tokens", base, ["kind", "is_lymphoid"], tmp_path / "out", where={"batch": [0, 1]}, max_cells=60,
        lora=2, recipe=ONE_EPOCH,
    )  # fmt: skip
    text, card = read(done.model)
    assert card["license"] == "apache-2.0"
    assert [result["task"]["name"] for result in card["model-index"][0]["results"]] == ["kind", "is_lymphoid"]
    n = done.scores["n"]
    for words in (
        f"Of {n:,} cells that were held out from this model.", "by adapters of rank 2 that are merged into it",
        'cells with: `{"batch": ["0", "1"]}`', "cells drawn: 60 (seed 1)", "from which this model was made: apache-2.0",
    ):  # fmt: skip
        assert words in text
    said, adapter = read(done.folder / "adapter")
    assert adapter["library_name"] == "peft"
    assert "base_model" not in card | adapter
    assert 'BertForSequenceClassification.from_pretrained("path/to/base", num_labels=5)' in said
    assert 'PeftModel.from_pretrained(model, ".")' in said
    assert "Adapters of rank 2 (LoRA) for base" in said
    # A run that was killed before its card goes on to it.
    (done.model / "README.md").unlink()
    gf.finetune_cells(
        home / "tokens", base, ["kind", "is_lymphoid"], tmp_path / "out", where={"batch": [0, 1]}, max_cells=60,
        lora=2, recipe=ONE_EPOCH, resume=True,
    )  # fmt: skip
    assert read(done.model)[0] == text


def test_genes_that_nobody_tested(home, tmp_path):
    done = gf.finetune_genes(
        home / "tokens", gf.load(home / "model"), gene_classes(), tmp_path / "out", dictionary=home / "model", folds=0,
        test_share=0, recipe=dataclasses.replace(SHORT_GENES, epochs=1),
    )  # fmt: skip
    text, card = read(done.model)
    assert card["pipeline_tag"] == "token-classification"
    assert not {"base_model", "model-index", "license"} & set(card)
    assert "Fine-tuned from an encoder that was in memory" in text
    assert "No genes were held out for testing." in text
