"""The encoder against float64 numbers that the original implementations produced (shared/fixtures)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from formula_weights import formula_weights

from geneformer_fast import families
from geneformer_fast.checkpoints.mapping import bert_entries, to_ours
from geneformer_fast.config import EncoderConfig
from geneformer_fast.encoder import Encoder
from geneformer_fast.ragged import Ragged

ROUNDED = 2e-9  # the files are rounded to 1e-10; sums of rounded numbers may differ by a little more


def read_fixture(shared_dir: Path, name: str) -> dict:
    return json.loads((shared_dir / "fixtures" / f"{name}.json").read_text())


def filled(encoder: Encoder, table: list, is_norm_weight, names: list[str] | None = None) -> Encoder:
    """The encoder in float64 with formula weights under the checkpoint's names."""
    encoder = encoder.double().eval()
    state = encoder.state_dict()
    shapes = {name: entry.their_shape(state[entry.ours].shape) for entry in table for name in entry.theirs}
    tensors = formula_weights(names or list(shapes), shapes, is_norm_weight)
    encoder.load_state_dict(to_ours(tensors, table, {n: t.shape for n, t in state.items()}, source="formula"))
    return encoder


def bert_tiny(fixture: dict, head: str | None, names: list[str], n_classes: int = 2) -> Encoder:
    config = fixture["config"]
    encoder = Encoder(
        EncoderConfig(
            n_layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            n_heads=config["num_attention_heads"],
            ff_width=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_len=config["max_position_embeddings"],
        ),
        head,
        n_classes=n_classes,
    )
    return filled(encoder, bert_entries(encoder.config, head), lambda n: n.endswith("LayerNorm.weight"), names)


def packed(fixture: dict) -> tuple[Ragged, torch.Tensor]:
    mask = torch.tensor(fixture["attention_mask"])
    return Ragged.from_padded(torch.tensor(fixture["input_ids"]), mask), mask.bool()


@pytest.fixture
def bert_fixture(shared_dir: Path) -> dict:
    return read_fixture(shared_dir, "hf_bert_tiny")


def test_bert_hidden_states_and_logits(bert_fixture: dict) -> None:
    encoder = bert_tiny(bert_fixture, "mlm", bert_fixture["mlm_keys_sorted_without_decoder"])
    assert sum(p.numel() for p in encoder.parameters()) == bert_fixture["n_params"]
    tokens, mask = packed(bert_fixture)
    states = encoder.hidden_states(tokens)
    for state, expected in zip(states, bert_fixture["hidden_states"], strict=True):
        torch.testing.assert_close(
            state.values, torch.tensor(expected, dtype=torch.float64)[mask], atol=ROUNDED, rtol=0
        )
    logits = encoder.logits(states[-1])
    expected = torch.tensor(bert_fixture["logits_valid_first_row_pos0"], dtype=torch.float64)
    torch.testing.assert_close(logits[0], expected, atol=ROUNDED, rtol=0)
    labels = torch.tensor(bert_fixture["mlm_labels"])[mask]
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert abs(loss.item() - bert_fixture["mlm_loss"]) < 1e-12
    # The same loss from masked rows only.
    rows = labels != -100
    some = encoder.logits(states[-1], rows)
    assert abs(torch.nn.functional.cross_entropy(some, labels[rows]).item() - bert_fixture["mlm_loss"]) < 1e-12


def test_bert_classifiers(bert_fixture: dict) -> None:
    tokens, mask = packed(bert_fixture)
    cells = bert_tiny(bert_fixture, "cells", bert_fixture["seqcls"]["keys_sorted"], n_classes=3)
    expected = torch.tensor(bert_fixture["seqcls"]["logits"], dtype=torch.float64)
    torch.testing.assert_close(cells.logits(cells(tokens)), expected, atol=ROUNDED, rtol=0)
    genes = bert_tiny(bert_fixture, "genes", bert_fixture["tokcls"]["keys_sorted"])
    expected = torch.tensor(bert_fixture["tokcls"]["logits"], dtype=torch.float64)[mask]
    torch.testing.assert_close(genes.logits(genes(tokens)), expected, atol=ROUNDED, rtol=0)


def test_bionemo(shared_dir: Path) -> None:
    fixture = read_fixture(shared_dir, "bionemo_geneformer_tiny_DERIVED")
    tiny = fixture["config"]
    config = EncoderConfig.preset(
        "bionemo-10m",
        n_layers=tiny["layers"],
        width=tiny["hidden"],
        n_heads=tiny["heads"],
        ff_width=tiny["ffn"],
        vocab_size=tiny["vocab"],
        max_len=tiny["seq"],
    )
    encoder = filled(
        Encoder(config, "mlm"),
        families.family("bionemo").entries(config, "mlm"),
        lambda n: n.endswith(("layer_norm_weight", "norm.weight")),
        fixture["keys_sorted"],
    )
    tokens, mask = packed(fixture)
    hidden = encoder(tokens)
    expected = torch.tensor(fixture["hidden"], dtype=torch.float64)
    expected = expected[mask] if expected.shape[:2] == mask.shape else expected
    torch.testing.assert_close(hidden.values, expected, atol=ROUNDED, rtol=0)
    logits = torch.tensor(fixture["logits"], dtype=torch.float64)
    logits = logits[mask] if logits.shape[:2] == mask.shape else logits
    torch.testing.assert_close(encoder.logits(hidden), logits, atol=ROUNDED, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_aido_cell(shared_dir: Path, masked: bool) -> None:
    fixture = read_fixture(shared_dir, "aido_cell_tiny")
    tiny = fixture["config"]
    config = EncoderConfig.preset(
        "aido-cell-3m",
        n_layers=tiny["num_hidden_layers"],
        width=tiny["hidden_size"],
        n_heads=tiny["num_attention_heads"],
        ff_width=tiny["intermediate_size"],
        max_len=tiny["max_position_embeddings"] + 2,
        n_bins=tiny["bin_num"],
        bin_alpha=tiny["bin_alpha"],
    )
    norms = set(fixture["norm_weight_keys"])
    encoder = filled(
        Encoder(config, "mlm"),
        families.family("aido-cell").entries(config, "mlm"),
        norms.__contains__,
        fixture["keys_sorted"],
    )
    values = torch.tensor(fixture["masked_input" if masked else "model_input"], dtype=torch.float64)
    tokens = Ragged.from_padded(values, torch.ones_like(values))
    states = encoder.hidden_states(tokens)
    expected = [fixture["masked_hidden_last"]] if masked else fixture["hidden_states"]
    for state, wanted in zip(states[-len(expected) :], expected, strict=True):
        wanted = torch.tensor(wanted, dtype=torch.float64).flatten(0, 1)
        torch.testing.assert_close(state.values, wanted, atol=5e-9, rtol=0)
    logits = torch.tensor(fixture["masked_logits" if masked else "logits"], dtype=torch.float64).flatten(0, 1)
    torch.testing.assert_close(encoder.logits(states[-1]), logits, atol=5e-9, rtol=0)
