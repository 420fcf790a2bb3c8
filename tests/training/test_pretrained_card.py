"""What a pretrained model's card says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from ground import Ground

import geneformer_fast as gf


def test_data_recipe_scores_and_the_model_it_went_on_from(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    found: list[dict[str, float]] = []
    options = {"epochs": 1, "batch_cells": 16, "progress": False}
    first = gf.pretrain(
        ground.tokens, tmp_path / "first", config=ground.config(), eval_share=0.25, on_eval=found.append, **options
    )
    text = (first / "README.md").read_text()
    card = hub.ModelCard(text).data.to_dict()
    assert card["pipeline_tag"] == "fill-mask"
    assert not {"license", "base_model"} & set(card)
    (result,) = card["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(found[-1]["loss"], abs=1e-5)
    for words in (
        "trained from fresh weights", f"validation loss: {found[-1]['loss']:.4f}", "tokens, 80 cells",
        "training cells: 60", "validation cells: 20", "vocabulary: toy (`",
        ground.tokens.content_fingerprint[:16], "blocks: 2",
    ):  # fmt: skip
        assert words in text
    recipe = json.loads(re.search(r"## Recipe\n\n```json\n(.*?)```", text, re.S)[1])
    assert (recipe["batch_cells"], recipe["epochs"]) == (16, 1)
    assert not {"workers", "progress", "wandb"} & set(recipe)
    assert gf.Recipe.from_dict(recipe).batch_cells == 16

    (first / "README.md").write_text("---\nlicense: mit\n---\n")
    second = gf.pretrain(ground.tokens, tmp_path / "second", init=first, eval_share=0, **options)
    text = (second / "README.md").read_text()
    card = hub.ModelCard(text).data.to_dict()
    assert card["license"] == "mit"
    assert "base_model" not in card, "a folder here is no id on the Hub"
    assert "trained on from first" in text
    assert "No cells were held out." in text
    assert "model-index" not in card
    assert str(tmp_path) not in text
    # The lines of code are true beside the card.
    shutil.copytree(ground.tokens.path, second / "tokens")
    ran: dict[str, np.ndarray] = {}
    monkeypatch.chdir(second)
    exec(re.search(r"## Use\n\n```python\n(.*?)```", text, re.S)[1], ran)
    assert ran["embeddings"].shape == (80, ground.config().width)
