"""Labels of BertForMaskedLM: torch's errors where they are wrong, although no logits are made to be compared with."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from small_berts import ARCHITECTURES, N_TOKENS, bert, inputs, labels_for

import geneformer_fast as gf
from geneformer_fast.drop_in import reasons

WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fewer cells": lambda labels: labels[:-1],
    "fewer columns": lambda labels: labels[:, 1:],
    "one for each cell": lambda labels: labels[:, 0],
    "too many": lambda labels: torch.cat([labels, labels]),
    "a token beyond the table": lambda labels: labels.masked_fill(labels > 0, N_TOKENS),
    "a negative token": lambda labels: labels.masked_fill(labels > 0, -1),
    "another ignored value": lambda labels: labels.masked_fill(labels == -100, -1),
    "floats": lambda labels: labels.double(),
    "32 bits": lambda labels: labels.int(),
    "booleans": lambda labels: labels > 0,
}
RIGHT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "flat": lambda labels: labels.flatten(),
    "another shape of as many": lambda labels: labels.reshape(8, 20),
    "all of them": lambda labels: labels.clamp(min=0),
}


@pytest.fixture(autouse=True)
def nothing_told() -> None:
    reasons._told.clear()


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("what", WRONG)
def test_wrong_labels_fail_as_in_the_stock_model(what: str, is_training: bool) -> None:
    model, given = bert("BertForMaskedLM").train(is_training), inputs()
    labels = WRONG[what](labels_for(model, given)["labels"])
    with pytest.raises((ValueError, RuntimeError, IndexError)) as stock:
        model(**given, labels=labels)
    gf.accelerate(model, training_logits=False)
    with pytest.raises(type(stock.value)) as ours, pytest.warns(UserWarning, match="label"):
        model(**given, labels=labels)
    assert str(ours.value) == str(stock.value)


@pytest.mark.parametrize("what", RIGHT)
def test_labels_of_every_shape_that_the_stock_model_flattens(what: str) -> None:
    model, given = bert("BertForMaskedLM").train(), {**inputs(), "attention_mask": torch.ones(4, 40)}
    labels = RIGHT[what](labels_for(model, inputs())["labels"])
    stock = model(**given, labels=labels).loss
    gf.accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.testing.assert_close(model(**given, labels=labels).loss, stock, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES[2:])
def test_wrong_labels_of_classifiers_fail_as_they_did(architecture: str) -> None:
    model, given = bert(architecture).train(), inputs()
    labels = labels_for(model, given)["labels"]
    gf.accelerate(model)
    with pytest.raises(ValueError, match="batch_size"):
        model(**given, labels=labels[:-1])
    with pytest.raises(IndexError):
        model(**given, labels=labels + 7)


def test_a_configuration_that_disagrees_with_the_decoder_runs_as_stock() -> None:
    model, given = bert("BertForMaskedLM").train(), inputs()
    labels = labels_for(model, given)
    model.config.vocab_size = N_TOKENS - 1
    with pytest.raises(RuntimeError) as stock:
        model(**given, **labels)
    gf.accelerate(model)
    with pytest.raises(RuntimeError) as ours, pytest.warns(UserWarning, match="config.vocab_size is 60"):
        model(**given, **labels)
    assert str(ours.value) == str(stock.value)
