"""The loop: what a step computes, that nothing but the recipe decides it, and how it ends."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ground import SHORT, Ground

from geneformer_fast.errors import InputError, OutputError, TrainingError, UnsupportedError
from geneformer_fast.training.masked_genes import MaskedGenes


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_it_learns_and_says_so(ground: Ground) -> None:
    model, seen, looked_at = ground.model(), [], []
    recipe = dataclasses.replace(SHORT, epochs=12, eval_every=10)
    history = ground.fit(model, recipe, eval_cells=ground.eval_cells, on_step=seen.append, on_eval=looked_at.append)
    assert len(history.steps) == 12 * 4
    assert (seen, looked_at) == (history.steps, history.evaluations)
    assert [entry["step"] for entry in history.evaluations] == [10, 20, 30, 40, 48]
    assert np.mean(history.losses[-4:]) < np.mean(history.losses[:4]) - 0.05
    assert history.evaluations[-1]["loss"] < history.evaluations[0]["loss"]
    assert history.best == min(history.evaluations, key=lambda entry: entry["loss"])
    assert sum(record.n_cells for record in history.steps) == 12 * 60
    assert history.steps[-1].epoch == 12
    assert not model.training


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_change_nothing(ground: Ground, workers: int) -> None:
    model, again = ground.model(), ground.model()
    expected = ground.fit(model, SHORT)
    found = ground.fit(again, dataclasses.replace(SHORT, workers=workers))
    assert found.losses == expected.losses
    assert same(weights(model), weights(again))


def test_the_token_budget_changes_roundings_only(ground: Ground) -> None:
    histories, ends = [], []
    for token_budget in (1, 60, 10_000):
        model = ground.model(dropout=0.0, attention_dropout=0.0)
        histories.append(ground.fit(model, dataclasses.replace(SHORT, token_budget=token_budget)))
        ends.append(weights(model))
    for history, end in zip(histories[1:], ends[1:], strict=True):
        np.testing.assert_allclose(history.losses, histories[0].losses, rtol=1e-5)
        np.testing.assert_allclose(
            [record.grad_norm for record in history.steps],
            [record.grad_norm for record in histories[0].steps],
            rtol=1e-4,
        )
        for x, y in zip(end, ends[0], strict=True):
            torch.testing.assert_close(x, y, atol=2e-4, rtol=1e-3)


class Spoilt(MaskedGenes):
    """Goes wrong at one step."""

    n_calls = 0

    def loss(self, model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.n_calls += 1
        loss, weight = super().loss(model, batch)
        return loss * (float("nan") if self.n_calls == 7 else 1.0), weight


def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(ground: Ground, tmp_path: Path) -> None:
    good = ground.objective()
    model = ground.model()
    recipe = dataclasses.replace(SHORT, token_budget=10_000, save_every=3)
    before: list[list[torch.Tensor]] = []
    with pytest.raises(TrainingError, match=r"step 7: the loss is nan, with cells \d+.*step-00000006, is untouched"):
        ground.fit(
            model,
            recipe,
            objective=Spoilt(good.kinds, good.masking),
            out=tmp_path / "run",
            on_step=lambda record: before.append(weights(model)),
        )
    assert all(torch.isfinite(tensor).all() for tensor in weights(model))
    history = ground.fit(ground.model(), recipe, out=tmp_path / "run", resume=True)
    assert [record.step for record in history.steps] == [7, 8]


def test_refusals(ground: Ground, tmp_path: Path) -> None:
    model = ground.model()
    with pytest.raises(InputError, match="no cells to train on"):
        ground.fit(model, train_cells=np.arange(0))
    with pytest.raises(InputError, match=r"cells 0 to 80 are not all among the 80"):
        ground.fit(model, train_cells=np.arange(81))
    with pytest.raises(InputError, match="cell 59 is both"):
        ground.fit(model, eval_cells=np.arange(59, 70))
    with pytest.raises(InputError, match="more than once"):
        ground.fit(model, train_cells=np.array([3, 3]))
    with pytest.raises(InputError, match=r"cells are longer than the model's 20 positions"):
        ground.fit(ground.model(max_len=20))
    with pytest.raises(InputError, match="patience needs cells"):
        ground.fit(model, dataclasses.replace(SHORT, patience=1))
    with pytest.raises(UnsupportedError, match="no metric 'f1' to monitor; there are loss, perplexity"):
        ground.fit(model, dataclasses.replace(SHORT, monitor="f1"), eval_cells=ground.eval_cells)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UnsupportedError, match="frozen"):
        ground.fit(model)


def test_folders_of_other_things_are_refused(ground: Ground, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="no training run"):
        ground.fit(ground.model(), out=tmp_path / "notes")
    ground.fit(ground.model(), dataclasses.replace(SHORT, steps=2), out=tmp_path / "run")
    for options, message in (
        (dict(), "holds a run already; continue it with resume"),
        (dict(recipe=dataclasses.replace(SHORT, steps=2, learning_rate=1e-4), resume=True), "with learning_rate 0.003"),
        (dict(train_cells=np.arange(59), recipe=dataclasses.replace(SHORT, steps=2), resume=True), "other train cells"),
        (dict(model=ground.model(width=64), recipe=dataclasses.replace(SHORT, steps=2), resume=True), "other config"),
    ):
        options = {"model": ground.model(), "recipe": SHORT, **options}
        with pytest.raises(OutputError, match=message):
            ground.fit(options.pop("model"), options.pop("recipe"), out=tmp_path / "run", **options)
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json").exists()
