"""Cards of models: what the Hub reads of them, what is kept of others, and whose licence it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from geneformer_fast.checkpoints.model_card import (
    ModelCard,
    Score,
    as_code,
    body_in,
    front_matter_in,
    hub_id_of,
    licence_in,
    listed,
    name_of,
    table,
)

ODD = """---
license: other
license_name: "my: licence"
license_link: https://example.org/licence
tags:
- one
- "two: three"
datasets: [a/b]
---

# Before

Text with --- within.
"""


def data_of(card: Path) -> dict:
    """Front matter as the Hub's own library reads it."""
    hub = pytest.importorskip("huggingface_hub")
    return hub.ModelCard.load(card).data.to_dict()


def written(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(text)
    return folder


def test_the_hub_reads_it(tmp_path: Path) -> None:
    there = tmp_path / "models--somebody--base" / "snapshots" / "0f0f"
    base = written(there, "---\nlicense: apache-2.0\n---\n# Base\n")
    card = ModelCard(
        'cells: "new" | ü', "What it is.", [("Data", "- tokens: 3")], base=base, task="text-classification",
        scores=[Score("text-classification", "cell type", "tokens", {"accuracy": 0.987654321, "f1": 1.0})],
    )  # fmt: skip
    path = card.save(tmp_path)
    data = data_of(path)
    assert (data["license"], data["base_model"]) == ("apache-2.0", "somebody/base")
    assert data["base_model_relation"] == "finetune"
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-classification")
    assert "single-cell" in data["tags"]
    (index,) = data["model-index"]
    assert index["name"] == 'cells: "new" | ü'
    (result,) = index["results"]
    assert result["dataset"]["name"] == "tokens"
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {"accuracy": 0.98765, "f1": 1.0}
    text = path.read_text()
    assert text.count("\n---\n") == 1
    assert "## Licence\n\nAs of somebody/base, from which this model was made: apache-2.0." in text


def test_what_another_card_says_is_kept_as_it_was_written(tmp_path: Path) -> None:
    base = written(tmp_path / "base", ODD)
    front = front_matter_in(base)
    assert list(front) == ["license", "license_name", "license_link", "tags", "datasets"]
    assert front["tags"] == 'tags:\n- one\n- "two: three"\n'
    assert body_in(base) == "# Before\n\nText with --- within."
    assert list(licence_in(base)) == ["license", "license_name", "license_link"]
    data = data_of(ModelCard("x", "y", [], base=base, relation="quantized", kept=front).save(tmp_path))
    assert data["license_name"] == "my: licence"
    assert data["tags"] == ["one", "two: three"]
    assert data["datasets"] == ["a/b"]


@pytest.mark.parametrize("text", [None, "", "# No front matter\n", "---\nlicense: mit\n# never ends\n"])
def test_a_licence_that_nobody_names_is_not_made_up(tmp_path: Path, text: str | None) -> None:
    base = tmp_path / "base"
    if text is None:
        base.mkdir()
    else:
        written(base, text)
    card = ModelCard("x", "y", [], base=base).save(tmp_path)
    assert "license" not in data_of(card)
    assert "The card of base, from which this model was made, names none" in card.read_text()
    alone = ModelCard("x", "y", []).save(tmp_path)
    assert not {"license", "base_model"} & set(data_of(alone))
    assert "To be named by whoever publishes this model" in alone.read_text()


def test_names_tables_and_lists(tmp_path: Path) -> None:
    assert name_of(tmp_path / "run" / "final") == "run"
    assert name_of(tmp_path / "model") == "model"
    assert table(["task", "F1"], [["a|b", "0.5"]]) == "| task | F1 |\n| --- | ---: |\n| a\\|b | 0.5 |"
    assert listed({"a": 1, "b": None, "c": "x"}) == "- a: 1\n- c: x"
    assert as_code({"a": [1]}) == '```json\n{\n "a": [\n  1\n ]\n}\n```'


def test_a_base_is_named_by_its_id_on_the_hub_or_in_words_only(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--the-name" / "snapshots" / "0f0f"
    assert hub_id_of(snapshot) == hub_id_of(snapshot / "small") == "owner/the-name"
    assert (name_of(snapshot), name_of(snapshot / "small")) == ("owner/the-name", "small")
    assert hub_id_of(tmp_path / "models--gpt2" / "snapshots" / "0f0f") == "gpt2"
    for folder in (None, tmp_path / "model", tmp_path / "snapshots" / "model", snapshot.parent):
        assert hub_id_of(folder) is None
    card = ModelCard("new", "Made from base.", [], base=written(tmp_path / "base", "---\nlicense: mit\n---\n"))
    data = data_of(card.save(tmp_path))
    assert not {"base_model", "base_model_relation"} & set(data), "the Hub would look for a model of that name"
    assert "As of base, from which this model was made: mit." in card.text()
