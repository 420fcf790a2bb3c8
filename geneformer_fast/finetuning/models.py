"""Encoders with a classifying head: made from a pretrained one, frozen in part, saved as Hugging Face folders."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from geneformer_fast import families
from geneformer_fast.checkpoints import load, save
from geneformer_fast.checkpoints.hf import Source, is_bert
from geneformer_fast.checkpoints.weights import CONFIG
from geneformer_fast.config import EncoderConfig, usable_device
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import CheckpointError, UnsupportedError
from geneformer_fast.families.gene_list import SAVED_FILE as GENES_FILE
from geneformer_fast.files.schema import read_json
from geneformer_fast.files.writing import whole_folder, write_json
from geneformer_fast.finetuning.official import classes_of
from geneformer_fast.heads import CellClassifier, GeneClassifier, Pooler, make_head
from geneformer_fast.tokenization.bundled import has_dictionaries
from geneformer_fast.tokenization.vocabulary import SAVED_FILE, Vocabulary

ARCHITECTURE = {"cells": "BertForSequenceClassification", "genes": "BertForTokenClassification"}
#: What the folder of a fine-tuned model holds besides what transformers reads.
CARD = "finetuned.json"


def pretrained(model: Encoder | str | os.PathLike[str], device: str | torch.device | None = None) -> Encoder:
    """The encoder to start from, in float32, which training needs.

    Raises
    ------
    CheckpointError
        The folder holds no model.
    UnsupportedError
        Models of its family are not fine-tuned here.
    """
    if isinstance(model, Encoder):
        encoder = copy.deepcopy(model)
        encoder = encoder if device is None else encoder.to(usable_device(device))
    else:
        fastest = "cuda" if torch.cuda.is_available() else "cpu"
        encoder = load(model, dtype="float32", device=fastest if device is None else device)
    families.refuse(encoder.config, "finetune")
    return encoder.cast("float32")


def vocabulary_in(folder: Path | None) -> Path | Vocabulary | None:
    """The ``vocabulary.json`` of a checkpoint folder, or what a checkpoint has inside instead, if there is any."""
    if folder is None:
        return None
    for name in (SAVED_FILE, GENES_FILE):
        if (folder / name).exists():
            return folder / name
    return Vocabulary.from_folder(folder) if has_dictionaries(folder) else None


def with_head(encoder: Encoder, kind: str, n_classes: int, *, seed: int = 0) -> Encoder:
    """A copy of an encoder with a fresh classifier on top.

    Parameters
    ----------
    encoder
        Unchanged. Its own head is left behind, but for a pooler, which a classifier of cells goes on with.
    kind
        ``"cells"`` or ``"genes"``.
    n_classes
        Over all tasks: one linear head per task is one matrix whose rows are dealt among the tasks.
    seed
        Of the fresh weights.
    """
    made, head = copy.deepcopy(encoder), encoder.head
    fresh = make_head(kind, encoder.config, n_classes)
    assert fresh is not None
    generator = torch.Generator().manual_seed(seed)
    draw = getattr(fresh, "draw", None)  # of a head whose authors begin otherwise
    if draw is not None:
        draw(generator)
    with torch.no_grad():
        for module in () if draw is not None else fresh.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, encoder.config.init_std, generator=generator)
                module.bias.zero_()
    found, pooler = getattr(head, "pooler", head), getattr(fresh, "pooler", None)
    if isinstance(found, Pooler) and isinstance(pooler, Pooler):
        pooler.load_state_dict(found.state_dict())
    made.head = fresh.to(encoder.device)
    if is_bert(encoder):
        made.source = None  # its architecture is another now; other formats keep what they came with
    return made


def freeze(encoder: Encoder, n_layers: int, *, embeddings: bool = False) -> None:
    """Freeze the first blocks, and the embeddings if asked.

    With the embeddings frozen too, nothing below the first block that learns keeps activations for a backward pass.
    Without, gradients still go through the frozen blocks to reach the embeddings, as in Geneformer's ``freeze_layers``.

    Parameters
    ----------
    encoder
        Changed in place.
    n_layers
        Blocks from the bottom.
    embeddings
        Whether token, position and type tables and their LayerNorm are frozen.

    Raises
    ------
    UnsupportedError
        There are fewer blocks.
    """
    if not 0 <= n_layers <= encoder.config.n_layers:
        raise UnsupportedError(f"cannot freeze {n_layers} layers: the model has {encoder.config.n_layers}")
    frozen: list[nn.Module] = [encoder.blocks[index] for index in range(n_layers)]
    if embeddings:
        frozen += [encoder.embeddings, *filter(None, [encoder.embedding_norm])]
    for module in frozen:
        module.requires_grad_(False)


def scale_classifier(encoder: Encoder, factors: np.ndarray) -> None:
    """Multiply logits by [n_classes] factors: a loss with a scale then leaves a model whose softmax means something."""
    assert isinstance(encoder.head, CellClassifier | GeneClassifier)
    classifier = encoder.head.classifier
    with torch.no_grad():
        factor = torch.from_numpy(factors).to(classifier.weight)
        classifier.weight.mul_(factor[:, None])
        classifier.bias.mul_(factor)


@dataclass
class Task:
    """A task in a card."""

    name: str
    classes: list[str]


@dataclass
class Card:
    """What is read of :data:`CARD`."""

    kind: Literal["cells", "genes"]
    tasks: list[Task]


def save_classifier(
    encoder: Encoder,
    folder: Path,
    labels: Sequence[str],
    card: Mapping[str, Any],
    vocabulary: Path | Vocabulary | None,
    base: Mapping[str, Any],
) -> Path:
    """Write a Hugging Face folder that transformers loads (of a BERT encoder), whole or not at all.

    Parameters
    ----------
    encoder
        With a head of classes.
    folder
        Replaced if it is there.
    labels
        [n_classes] for ``id2label``.
    card
        What :data:`CARD` says: tasks and their classes, and where the model comes from.
    vocabulary
        A ``vocabulary.json`` (of values ``genes.json``) to put beside the model, or what is to be written as one, so
        that counts can be given to it.
    base
        The pretrained model's config.json, whose further settings are kept.
    """
    kind = "cells" if isinstance(encoder.head, CellClassifier) else "genes"
    settings = {
        **{key: value for key, value in base.items() if key not in ("id2label", "label2id", "problem_type")},
        "id2label": {str(code): label for code, label in enumerate(labels)},
        "label2id": {label: code for code, label in enumerate(labels)},
    }
    if is_bert(encoder):
        encoder.source = Source(ARCHITECTURE[kind], settings, "bert.")
    encoder.config = config_of_card(encoder.config, card)
    with whole_folder(folder) as made:
        save(encoder, made)
        write_json(made / CARD, card)
        if isinstance(vocabulary, Vocabulary):
            vocabulary.save(made)
        elif vocabulary is not None:
            shutil.copyfile(vocabulary, made / vocabulary.name)
    return folder


def read_card(folder: Path, encoder: Encoder) -> dict[str, Any]:
    """What a fine-tuned model tells: from :data:`CARD`, or for a model of other making from its ``id2label``.

    What Geneformer's own classifier left beside it names classes that ``id2label`` does not.

    Returns
    -------
    dict
        ``kind`` (``"cells"`` or ``"genes"``) and ``tasks``, a list of ``{"name", "classes"}``.

    Raises
    ------
    CheckpointError
        The model has no head of classes, or other classes than the file says.
    """
    if not isinstance(encoder.head, CellClassifier | GeneClassifier):
        raise CheckpointError(f"{folder} holds no classifier; make one with geneformer-fast finetune")
    kind = "cells" if isinstance(encoder.head, CellClassifier) else "genes"
    n_classes = encoder.head.classifier.out_features
    path = folder / CARD
    if path.exists():
        card = read_json(path, CheckpointError, Card)
        if card["kind"] != kind:
            raise CheckpointError(f"{path}: kind is {card['kind']!r}, but the model is one of {kind}")
    else:
        path = folder / CONFIG
        settings = encoder.source.settings if encoder.source is not None else {}
        classes = classes_of(folder, settings.get("id2label") or {}, n_classes)
        card = {"kind": kind, "tasks": [{"name": "label", "classes": classes}]}
    _check_tasks(card["tasks"], kind, n_classes, path)
    return card


def config_of_card(config: EncoderConfig, card: Mapping[str, Any]) -> EncoderConfig:
    """A model's configuration with the gene list that it was fine-tuned on, where its own does not say which.

    A list in another order has as many genes, and the format of a family may have no place for a fingerprint.
    """
    family = families.family_of(config)
    if family is None or family.preparation is None or config.vocabulary_fingerprint is not None:
        return config
    return replace(config, vocabulary_fingerprint=card.get("vocabulary_fingerprint"))


def _check_tasks(tasks: Sequence[Mapping[str, Any]], kind: str, n_classes: int, path: Path) -> None:
    """Tasks have names of their own, so have their classes, and together they are the model's outputs."""
    for what, names in [("task", [task["name"] for task in tasks]), *(("class", task["classes"]) for task in tasks)]:
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise CheckpointError(f"{path}: two of its {what} names are {twice!r}; give each a name of its own")
    if kind == "genes" and len(tasks) != 1:
        raise CheckpointError(f"{path}: a model of genes has one task, not {len(tasks)}")
    found = sum(len(task["classes"]) for task in tasks)
    if found != n_classes:
        raise CheckpointError(f"{path}: its tasks have {found} classes, but the model tells {n_classes} apart")
