"""What is done with models of AIDO.Cell beside loading them, on tiny ones over dense values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import toys

import geneformer_fast as gf
from geneformer_fast import Encoder, EncoderConfig, Ragged, load, quantize, save
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.extract.cells import Cells
from geneformer_fast.finetuning.labels import Task
from geneformer_fast.finetuning.lora import add_adapters, check_lora, merge_adapters
from geneformer_fast.finetuning.losses import cross_entropy
from geneformer_fast.finetuning.models import freeze, pretrained, with_head
from geneformer_fast.finetuning.objectives import CellObjective, LabelledCells
from geneformer_fast.finetuning.predictions import ClassifyingRun
from geneformer_fast.heads import MeanClassifier
from geneformer_fast.layers import QuantizedLinear
from geneformer_fast.profiling.flops.work import encoder_flops

LENGTH = 34
CONFIG = EncoderConfig.preset("aido-cell-3m", n_layers=2, width=64, n_heads=2, ff_width=64, max_len=LENGTH, n_bins=10)
CODES = np.array([0, 1] * 8)


def encoder_of(head: str | None = "mlm") -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(CONFIG, head, n_classes=2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder.eval()


def values_of(codes: np.ndarray = CODES) -> np.ndarray:
    """Cells of two kinds, which differ in the genes that they express."""
    rng = np.random.default_rng(0)
    values = np.where(rng.random((len(codes), LENGTH)) < 0.3, rng.random((len(codes), LENGTH)) * 4, 0)
    for row, code in zip(values, codes, strict=True):
        row[3 + 4 * code : 7 + 4 * code] = 5.0
    values[:, -2:] = 5.0
    return values.astype(np.float32)


def packed(values: np.ndarray) -> Ragged:
    return Ragged.from_cells([torch.from_numpy(row) for row in values])


def cells_of(values: np.ndarray) -> Cells:
    bounds = np.arange(len(values) + 1) * LENGTH
    return Cells(
        np.full(len(values), LENGTH), lambda cells: (values[cells].reshape(-1), bounds[: len(cells) + 1]),
        np.arange(len(values)), len(values), {"name": "aido-cell", "special": {}}, [], lambda name: None,
    )  # fmt: skip


def trained(model: Encoder, steps: int = 120, rate: float = 1e-3) -> list[float]:
    """Losses of some steps over all cells at once."""
    objective = CellObjective([Task("kind", ["a", "b"], CODES)], [cross_entropy])
    batch = LabelledCells(packed(values_of()), torch.from_numpy(CODES)[:, None])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        total, weight = objective.loss(model, batch)
        (total / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float((total / weight).detach()))
    return losses


def test_a_classifier_reads_the_mean_of_all_positions() -> None:
    model, tokens = encoder_of("cells"), packed(values_of())
    assert isinstance(model.head, MeanClassifier)
    hidden = model(tokens)
    means = torch.stack([rows.mean(0) for rows in hidden.cells()])
    expected = model.head.classifier(torch.tanh(model.head.pooler.dense(means)))
    torch.testing.assert_close(model.logits(hidden), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="whole cells; rows cannot be chosen"):
        model.logits(hidden, torch.tensor([0]))


@pytest.mark.parametrize("how", ["frozen", "lora", "full"])
def test_fine_tuning_learns_what_it_may(how: str) -> None:
    base = pretrained(encoder_of())
    model = with_head(base, "cells", 2).train()
    if how == "frozen":
        freeze(model, CONFIG.n_layers, embeddings=True)
    elif how == "lora":
        pytest.importorskip("peft")
        check_lora(4, base, 0)
        freeze(model, 0, embeddings=True)
        add_adapters(model, 4, 0, seed=0)
    losses = trained(model, rate=2e-2 if how == "frozen" else 1e-3)
    assert losses[0] > 0.5
    assert losses[-1] < 0.3
    if how == "lora":
        merge_adapters(model)
    kept, before = model.eval().state_dict(), base.state_dict()
    is_changed = {name for name in before if name in kept and not torch.equal(kept[name], before[name])}
    if how == "frozen":
        assert not {name for name in is_changed if not name.startswith(("head.", "final_norm."))}
    elif how == "lora":
        assert {f"blocks.1.{layer}.weight" for layer in ("qkv", "out", "up", "down")} <= is_changed
        assert not {name for name in is_changed if name.startswith("embeddings.")}
    else:
        assert {"embeddings.linear1.weight", "embeddings.position.weight", "final_norm.weight"} <= is_changed


def test_a_trained_classifier_is_saved_loaded_and_predicts(tmp_path: Path) -> None:
    model = with_head(pretrained(encoder_of()), "cells", 2).train()
    trained(model)
    again = load(save(model.eval(), tmp_path / "out"), dtype="float32")
    assert isinstance(again.head, MeanClassifier)
    values = values_of()
    logits = ClassifyingRun(again, cells_of(values), 3 * LENGTH, False).to_memory()
    assert (logits.argmax(1) == CODES).all()
    expected = model.logits(model(packed(values))).detach().numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_gradients_reach_soft_bins_and_the_masked_gene() -> None:
    model, values = encoder_of(), values_of()
    values[0, 5] = -1
    model(packed(values)).values.square().sum().backward()
    layer = model.embeddings
    for parameter in (layer.linear1.weight, layer.linear2.bias, layer.lookup_table.weight, layer.mask_embedding.weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    assert layer.pad_embedding.weight.grad is not None
    assert not layer.pad_embedding.weight.grad.any()


@pytest.mark.parametrize("scheme", ["int8", "int8-weights"])
def test_quantized_to_eight_bits(scheme: str, tmp_path: Path) -> None:
    model, tokens = encoder_of(), packed(values_of())
    made = quantize(model, scheme=scheme)
    for block in made.blocks:
        assert all(isinstance(getattr(block, name), QuantizedLinear) for name in ("qkv", "out", "up", "down"))
    assert type(made.embeddings.linear1) is torch.nn.Linear
    with torch.inference_mode():
        expected, found = model(tokens).values, made(tokens).values
        signal, noise = expected.square().mean(), (found - expected).square().mean()
        assert 10 * torch.log10(signal / noise) > 25
        again = load(save(made, tmp_path / "out"))
        torch.testing.assert_close(again(tokens).values, found, atol=1e-3, rtol=1e-3)
    assert again.config == CONFIG


def test_operations_of_a_full_cell_are_counted() -> None:
    config = EncoderConfig.preset("aido-cell-3m")
    width, ff_width, length = config.width, config.ff_width, config.max_len
    attention = 4 * length**2 * width
    products = 2 * length * (4 * width**2 + 3 * width * ff_width)
    bins = 2 * length * (config.n_bins + config.n_bins**2 + config.n_bins * width)
    assert encoder_flops(config, length, length**2) == config.n_layers * (attention + products) + bins


def test_what_has_no_meaning_is_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = save(encoder_of(), tmp_path / "model")
    tokens = gf.tokenize(toys.cells(6), tmp_path / "tokens", dictionary=toys.vocabulary(), progress=False)
    with pytest.raises(UnsupportedError, match="cannot be taken out of a cell"):
        gf.perturb(tokens.path, folder, tmp_path / "effects", genes=["G1"])
    with pytest.raises(UnsupportedError, match="that objective is not here"):
        gf.pretrain(tokens.path, tmp_path / "run", config="aido-cell-3m")
