"""Geneformer's own package as its users call it, by stand-ins of its call patterns, on folders our tokenizer wrote.

Its classes build transformers' BERTs with ``from_pretrained``, read folders with ``load_from_disk`` (``input_ids`` and
``length``), pad each batch themselves, and train with transformers' Trainer. Each pattern runs on the stock and on the
accelerated model.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from small_berts import bert, count_head_rows

import geneformer_fast as gf
from bench.cpu.embed_rival import attention_mask, extractor_embeddings, padded

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")


@dataclass(frozen=True)
class Lab:
    """What a user has on disk: tokenized cells, and a pretrained model that fits their dictionary."""

    tokens: Path
    pretrained: Path
    pad: int
    mask: int
    n_tokens: int
    family: str


@pytest.fixture(scope="module", params=["v1", "v2"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder, words = tmp_path_factory.mktemp("lab"), toys.vocabulary(request.param)
    toys.cells(24).write_h5ad(folder / "cells.h5ad")
    gf.tokenize(folder / "cells.h5ad", folder / "cells.dataset", dictionary=words, obs=["kind"])
    size = dict(vocab_size=words.n_tokens, max_position_embeddings=words.max_len)
    bert("BertForMaskedLM", **size).save_pretrained(folder / "model")
    special = words.special
    return Lab(
        folder / "cells.dataset", folder / "model", special["pad"], special["mask"], words.n_tokens, request.param
    )


# Training knows special tokens by their ids alone: with those of the other family it is a slow test.
ONE_LAB = pytest.mark.parametrize("lab", [pytest.param("v1", marks=pytest.mark.slow), "v2"], indirect=True)


def on_both(run: Any, model: Any) -> tuple[Any, Any]:
    """(accelerated, stock) results of a pattern, the model made anew for each."""
    stock = run(model())
    accelerated = model()
    gf.accelerate(accelerated)
    return run(accelerated), stock


def test_extractor_of_embeddings(lab: Lab) -> None:
    """Sorted by length, padded batches under no_grad, all hidden states asked for in the configuration."""
    cells = datasets.load_from_disk(str(lab.tokens))
    assert {"input_ids", "length", "kind"} <= set(cells.column_names)
    token_lists = [*cells["input_ids"]]
    has_cls, counts = lab.family == "v2", []

    def model() -> Any:
        made = transformers.BertForMaskedLM.from_pretrained(
            lab.pretrained, output_hidden_states=True, output_attentions=False
        ).eval()
        counts.append(count_head_rows(made))
        return made

    for mode in ("cls", "cell"):
        counts.clear()
        ours, stock = on_both(
            lambda made, mode=mode: extractor_embeddings(
                made, token_lists, emb_mode=mode, has_cls=has_cls, batch_size=7
            ),
            model,
        )
        np.testing.assert_allclose(ours, stock, atol=1e-5)
        # Logits, which the extractor throws away, were computed by the stock model only.
        assert [len(sizes) for sizes in counts] == [4, 0]
        pool = {"cls": "cls", "cell": "mean"}[mode]
        if mode == "cell" or has_cls:
            embedded = gf.embed(lab.tokens, gf.load(lab.pretrained), pool=pool, layer="penultimate")
            np.testing.assert_allclose(ours, embedded, atol=1e-5)


@dataclass
class ClassifierCollator:
    """Pads the batch to its longest cell, makes the mask, and hands labels on."""

    pad: int
    is_of_genes: bool = False

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, lengths = padded([feature["input_ids"] for feature in features])
        mask = attention_mask(ids, lengths)
        if self.is_of_genes:
            labels = torch.full_like(ids, -100)
            for row, feature in zip(labels, features, strict=True):
                row[: len(feature["labels"])] = torch.tensor(feature["labels"])
        else:
            labels = torch.tensor([feature["label"] for feature in features])
        return dict(input_ids=ids.masked_fill(mask == 0, self.pad), attention_mask=mask, labels=labels)


def arguments(folder: Path, **options: Any) -> Any:
    known = inspect.signature(transformers.TrainingArguments).parameters
    length_grouped = (
        dict(train_sampling_strategy="group_by_length")
        if "train_sampling_strategy" in known
        else dict(group_by_length=True)
    )
    return transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=6, per_device_eval_batch_size=6,
        learning_rate=5e-3, weight_decay=0.001, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, length_column_name="length", **length_grouped, **options,
    )  # fmt: skip


def result(loop: Any) -> tuple[list[float], np.ndarray]:
    loop.train()
    losses = [entry["loss"] for entry in loop.state.log_history if "loss" in entry]
    found = loop.predict(loop.eval_dataset)
    # Whoever evaluates reads positions that have a label; others are nobody's.
    return losses, found.predictions[found.label_ids != -100]


def assert_same_run(ours: tuple[list[float], np.ndarray], stock: tuple[list[float], np.ndarray]) -> None:
    """Losses and predictions; Adam's first steps, which divide by small gradients, widen roundings."""
    np.testing.assert_allclose(ours[0], stock[0], rtol=1e-3)
    assert np.mean(stock[0][-3:]) < np.mean(stock[0][:3])
    assert stock[1].size
    np.testing.assert_allclose(ours[1], stock[1], atol=1e-2)


@ONE_LAB
def test_classifier_of_cells(lab: Lab, tmp_path: Path) -> None:
    """A pretrained masked model becomes a classifier, its first layers frozen, batches grouped by length."""
    cells = datasets.load_from_disk(str(lab.tokens)).rename_column("kind", "label")
    kinds = {name: number for number, name in enumerate(sorted(set(cells["label"])))}
    cells = cells.map(lambda cell: {"label": kinds[cell["label"]]}).train_test_split(0.25, seed=42)

    def model() -> Any:
        torch.manual_seed(0)
        made = transformers.BertForSequenceClassification.from_pretrained(
            lab.pretrained, num_labels=len(kinds), output_attentions=False, output_hidden_states=False,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        for layer in made.bert.encoder.layer[:1]:
            layer.requires_grad_(False)
        return made

    def run(made: Any) -> tuple[list[float], np.ndarray]:
        frozen = made.bert.encoder.layer[0].intermediate.dense.weight.clone()
        loop = transformers.Trainer(
            model=made, args=arguments(tmp_path), data_collator=ClassifierCollator(lab.pad),
            train_dataset=cells["train"], eval_dataset=cells["test"],
            compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        )  # fmt: skip
        found = result(loop)
        assert torch.equal(frozen, made.bert.encoder.layer[0].intermediate.dense.weight)
        assert 0 <= loop.evaluate()["eval_accuracy"] <= 1
        return found

    assert_same_run(*on_both(run, model))


@ONE_LAB
def test_classifier_of_genes(lab: Lab, tmp_path: Path) -> None:
    """A label for each token of some genes, -100 for the others and for padding."""
    cells = datasets.load_from_disk(str(lab.tokens))
    cells = cells.map(lambda cell: {"labels": [t % 2 if t > 9 and t % 3 else -100 for t in cell["input_ids"]]})

    def model() -> Any:
        torch.manual_seed(0)
        return transformers.BertForTokenClassification.from_pretrained(
            lab.pretrained, num_labels=2, output_hidden_states=False, hidden_dropout_prob=0.0
        )

    def run(made: Any) -> tuple[list[float], np.ndarray]:
        loop = transformers.Trainer(
            model=made, args=arguments(tmp_path), data_collator=ClassifierCollator(lab.pad, is_of_genes=True),
            train_dataset=cells, eval_dataset=cells,
        )  # fmt: skip
        return result(loop)

    assert_same_run(*on_both(run, model))


@ONE_LAB
def test_pretrainer(lab: Lab, tmp_path: Path) -> None:
    """A Trainer of its own that samples by length, with masks drawn by its collator."""
    from transformers.trainer_pt_utils import LengthGroupedSampler

    cells = datasets.load_from_disk(str(lab.tokens))

    class Pretrainer(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            generator = torch.Generator().manual_seed(7)
            return LengthGroupedSampler(batch_size=6, lengths=[*cells["length"]], generator=generator)

    def masking(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, lengths = padded([feature["input_ids"] for feature in features])
        mask = attention_mask(ids, lengths)
        is_masked = ((ids * 2654435761 + torch.arange(ids.shape[1])) % 100 < 15) & mask.bool()
        labels = torch.where(is_masked, ids, -100)
        return dict(input_ids=ids.masked_fill(is_masked, lab.mask), attention_mask=mask, labels=labels)

    def model() -> Any:
        return bert("BertForMaskedLM", vocab_size=lab.n_tokens, max_position_embeddings=128, seed=3)

    def run(made: Any) -> tuple[list[float], np.ndarray]:
        loop = Pretrainer(
            model=made, args=arguments(tmp_path), data_collator=masking, train_dataset=cells, eval_dataset=cells
        )
        found = result(loop)
        loop.save_model(str(tmp_path / "saved"))
        assert gf.load(tmp_path / "saved").config.n_layers == 2
        return found

    assert_same_run(*on_both(run, model))
