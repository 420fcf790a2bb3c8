"""The card of a fine-tuned model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geneformer_fast.checkpoints.model_card import ModelCard, Score, as_code, hub_id_of, listed, name_of, table
from geneformer_fast.data.described import described
from geneformer_fast.finetuning.models import ARCHITECTURE
from geneformer_fast.finetuning.scores import SUMMED_UP
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.training.card import plain_recipe
from geneformer_fast.training.recipe import Recipe

# What the Hub calls these tasks and scores: cells are texts of genes there.
_TASKS = {"cells": "text-classification", "genes": "token-classification"}
_METRICS = {"accuracy": "accuracy", "macro_f1": "f1", "roc_auc": "roc_auc"}
_NAMES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "roc_auc": "ROC AUC"}
_MOST_CLASSES = 30
_USE = """import geneformer_fast as gf

table = gf.predict("cells.h5ad", ".")  # ".": the folder of this card"""

_ADAPTED = """from peft import PeftModel
from transformers import {architecture}

model = {architecture}.from_pretrained("{base}", num_labels={n_classes})
model = PeftModel.from_pretrained(model, ".")  # ".": the folder of this card"""


def finetuned_card(
    final: Path,
    about: Mapping[str, Any],
    tokens: TokenFolder,
    scores: Mapping[str, Any],
    base: Path | None,
    *,
    is_bert: bool,
    family: str | None = None,
) -> ModelCard:
    """What there is to say.

    Parameters
    ----------
    final
        Folder of the model.
    about
        What its ``finetuned.json`` says.
    tokens
        What it was trained and tested on.
    scores
        As in ``scores.json``.
    base
        Folder of the pretrained model, if it came from one.
    is_bert
        Whether transformers loads it.
    family
        Of models, if it is of one.
    """
    kind, tasks = about["kind"], about["tasks"]
    told = " and ".join(f"{task['name']} ({len(task['classes'])} classes)" for task in tasks)
    adapted = f", by adapters of rank {about['lora']['rank']} that are merged into it" if "lora" in about else ""
    pretrained = "an encoder that was in memory" if base is None else name_of(base)
    found = [
        Score(_TASKS[kind], name, tokens.path.absolute().name, _means(task)) for name, task in scores["tasks"].items()
    ]
    return ModelCard(
        title=name_of(final),
        lead=f"Tells classes of {kind} of single-cell data: {told}. Fine-tuned from {pretrained}{adapted}.",
        sections=[
            ("Use", as_code(_USE, "python")),
            ("Classes", "\n".join(f"- {task['name']}: {_classes(task['classes'])}" for task in tasks)),
            ("Data", listed({**described(tokens), **_selected(about)})),
            ("Scores", _scores(scores)),
            ("Recipe", as_code(_how(about))),
        ],
        base=base,
        library="transformers" if is_bert else "geneformer-fast",
        task=_TASKS[kind],
        family=family,
        scores=found,
    )


def adapter_card(card: ModelCard, base: Path | None, about: Mapping[str, Any]) -> ModelCard:
    """The card of an adapter that lies beside a model, from that of the model."""
    n_classes = sum(len(task["classes"]) for task in about["tasks"])
    name = "BASE" if base is None else name_of(base)
    # Whoever reads this has the base elsewhere, if not on the Hub.
    place = name if name == hub_id_of(base) else f"path/to/{name}"
    use = _ADAPTED.format(architecture=ARCHITECTURE[about["kind"]], base=place, n_classes=n_classes)
    rest = [section for section in card.sections if section[0] != "Use"]
    return dataclasses.replace(
        card,
        title=f"{card.title}, adapter",
        lead=f"Adapters of rank {about['lora']['rank']} (LoRA) for {name}, and the head on top; merged they are "
        f"{card.title}. {card.lead}",
        sections=rest if card.library == "geneformer-fast" else [("Use", as_code(use, "python")), *rest],
        library="peft",
        relation="adapter",
    )


def _means(task: Mapping[str, Any]) -> dict[str, float]:
    """Scores of a task in the Hub's terms: means over folds."""
    over = task["over_folds"]
    return {_METRICS[name]: over[name]["mean"] for name in SUMMED_UP if over.get(name) is not None}


def _scores(scores: Mapping[str, Any]) -> str:
    """The scores of all tasks, and what they are of."""
    if not scores["tasks"]:
        return f"No {scores['of']} were held out for testing."
    rows = []
    for name, task in scores["tasks"].items():
        over = task["over_folds"]
        rows.append([name, *(_shown(over.get(score)) for score in SUMMED_UP)])
    n_folds = scores["n_folds"]
    which = (
        f"Mean and standard deviation over {n_folds} folds, in which {scores['n']:,} {scores['of']} were tested once "
        "each by models that had not seen them; this model has learned from all folds."
        if n_folds > 1
        else f"Of {scores['n']:,} {scores['of']} that were held out from this model."
    )
    return f"{table(['task', *(_NAMES[score] for score in SUMMED_UP)], rows)}\n\n{which}"


def _shown(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.3f}" + ("" if value["sd"] is None else f" ± {value['sd']:.3f}")


def _classes(classes: list[str]) -> str:
    more = f" and {len(classes) - _MOST_CLASSES:,} more" if len(classes) > _MOST_CLASSES else ""
    return ", ".join(f"`{name}`" for name in classes[:_MOST_CLASSES]) + more


def _selected(about: Mapping[str, Any]) -> dict[str, Any]:
    """Which of the cells were taken."""
    drawn = f"{about['max_cells']:,} (seed {about['seed']})" if "max_cells" in about else None
    return {"cells with": f"`{about['where']}`" if "where" in about else None, "cells drawn": drawn}


def _how(about: Mapping[str, Any]) -> dict[str, Any]:
    """Losses, frozen blocks and the recipe that was used, which a search may have chosen."""
    recipe = plain_recipe(Recipe.from_dict(about["recipe"]))
    del recipe["masking"]  # of pretraining
    return {"losses": about["losses"], "freeze_layers": about["freeze_layers"], **recipe}
