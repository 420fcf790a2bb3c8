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


@pytest.mark.parametrize(("precision", "band"), [("bfloat16", 0.01), ("float16", 0.003)])
def test_lower_precision_learns_the_same(ground: Ground, precision: str, band: float) -> None:
    """Autocast over float32 weights; float16 with its losses scaled, so that small gradients survive."""
    recipe = SHORT
    models = {name: ground.model(dropout=0.0, attention_dropout=0.0) for name in ("float32", precision)}
    histories = {
        name: ground.fit(model, dataclasses.replace(recipe, precision=name), eval_cells=ground.eval_cells)
        for name, model in models.items()
    }
    exact, found = histories["float32"], histories[precision]
    assert found.losses != exact.losses
    np.testing.assert_allclose(found.losses, exact.losses, rtol=band)
    assert found.evaluations[-1]["loss"] == pytest.approx(exact.evaluations[-1]["loss"], rel=band)
    norms = [[record.grad_norm for record in history.steps] for history in (found, exact)]
    np.testing.assert_allclose(*norms, rtol=0.1)  # of the mean loss: not scaled any more
    assert all(parameter.dtype == torch.float32 for parameter in models[precision].parameters())


def test_steps_that_overflow_float16_are_left_out(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaling begins with a factor that is too large here and halves it until gradients are finite."""
    model = ground.model(dropout=0.0, attention_dropout=0.0)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=2.0**24))
    start, ends = weights(model), []
    history = ground.fit(
        model,
        dataclasses.replace(SHORT, epochs=3, precision="float16", warmup_share=0.0),
        on_step=lambda record: ends.append(weights(model)),
    )
    assert same(ends[0], start)
    assert not np.isfinite(history.steps[0].grad_norm)
    assert np.isfinite(history.losses).all()
    assert np.isfinite(history.steps[-1].grad_norm)
    assert not same(ends[-1], start)


def test_recomputation_changes_memory_only(ground: Ground) -> None:
    models = [ground.model(), ground.model()]
    histories = [
        ground.fit(model, dataclasses.replace(SHORT, is_recomputing=is_recomputing))
        for model, is_recomputing in zip(models, (False, True), strict=True)
    ]
    assert models[1].is_recomputing
    np.testing.assert_allclose(histories[0].losses, histories[1].losses, rtol=1e-6)


def test_frozen_layers_stay(ground: Ground) -> None:
    model = ground.model()
    for parameter in (*model.embeddings.parameters(), *model.blocks[0].parameters()):
        parameter.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ground.fit(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name


class Doubled(MaskedGenes):
    """Every term has a weight of its own: 3 for targets with even ids, else 1."""

    def loss(self, model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.where(batch.targets % 2 == 0, 3.0, 1.0)
        terms = model.mlm_loss(model(batch.tokens), batch.rows, batch.targets, reduction="none")
        return (terms * weight).sum(), weight.sum()


def test_weights_are_normalised_over_the_whole_step(ground: Ground) -> None:
    """Cut into pieces or not, a step's loss is the weighted mean of all its terms."""
    good, histories = ground.objective(), []
    for token_budget in (20, 10_000):
        model = ground.model(dropout=0.0, attention_dropout=0.0)
        recipe = dataclasses.replace(SHORT, token_budget=token_budget)
        histories.append(ground.fit(model, recipe, objective=Doubled(good.kinds, good.masking)))
    assert all(record.weight > 16 for record in histories[0].steps)
    np.testing.assert_allclose(histories[0].losses, histories[1].losses, rtol=1e-5)
    np.testing.assert_allclose(*[[r.grad_norm for r in h.steps] for h in histories], rtol=1e-4)
    plain = ground.fit(ground.model(dropout=0.0, attention_dropout=0.0))
    assert abs(plain.losses[0] - histories[0].losses[0]) > 1e-4


class Everything:
    """A sampler that shows cell 3 eight times."""

    def order(self, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.full(8, 3)


def test_a_sampler_is_asked(ground: Ground) -> None:
    seen: list[np.ndarray] = []

    class Watching(MaskedGenes):
        def collate(self, tokens: Any, cells: np.ndarray, rng: Any) -> Any:
            seen.append(cells)
            batch = super().collate(tokens, cells, rng)
            # The same cell again has another mask: it has another place in the epoch.
            shown = batch.tokens.cells()
            assert any(not torch.equal(shown[0], other) for other in shown[1:])
            return batch

    good = ground.objective()
    history = ground.fit(
        ground.model(),
        dataclasses.replace(SHORT, token_budget=10_000, epochs=2),
        objective=Watching(good.kinds, good.masking),
        sampler=Everything(),
    )
    assert len(history.steps) == 2
    assert np.concatenate(seen).tolist() == [3] * 16


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
        (dict(), r"holds a run already; continue it with --resume \(resume=True\)"),
        (dict(recipe=dataclasses.replace(SHORT, steps=2, learning_rate=1e-4), resume=True), "with learning_rate 0.003"),
        (dict(train_cells=np.arange(59), recipe=dataclasses.replace(SHORT, steps=2), resume=True), "other train cells"),
        (dict(model=ground.model(width=64), recipe=dataclasses.replace(SHORT, steps=2), resume=True), "other config"),
    ):
        options = {"model": ground.model(), "recipe": SHORT, **options}
        with pytest.raises(OutputError, match=message):
            ground.fit(options.pop("model"), options.pop("recipe"), out=tmp_path / "run", **options)
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json").exists()


def test_time_ends_training(ground: Ground, tmp_path: Path) -> None:
    recipe = dataclasses.replace(SHORT, steps=100_000, max_seconds=1.2, save_every=10**6)
    history = ground.fit(ground.model(), recipe, eval_cells=ground.eval_cells, out=tmp_path / "run")
    assert 0 < len(history.steps) < 100_000
    # The rate has fallen with the time, though hardly any of the steps are done.
    assert history.steps[-1].learning_rate < 0.5 * recipe.learning_rate
    assert history.evaluations[-1]["step"] == len(history.steps)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{len(history.steps):08d}"]
    again = ground.fit(ground.model(), recipe, eval_cells=ground.eval_cells, out=tmp_path / "run", resume=True)
    assert again.steps == []
    assert again.evaluations == history.evaluations


class Undefined(MaskedGenes):
    """A metric that is NaN until it is not, as a ROC AUC of one class is."""

    n_calls = 0

    def metrics(self, model: torch.nn.Module, batches: Any) -> dict[str, float]:
        self.n_calls += 1
        found = super().metrics(model, batches)
        return found | {"auc": np.float32("nan") if self.n_calls in (1, 3) else np.float32(0.5 + self.n_calls / 100)}


def test_undefined_metrics_are_no_best(ground: Ground, tmp_path: Path) -> None:
    good = ground.objective()
    recipe = dataclasses.replace(SHORT, steps=8, eval_every=2, save_every=2, monitor="auc", is_greater_better=True)
    options: dict[str, Any] = dict(eval_cells=ground.eval_cells, out=tmp_path / "run")
    history = ground.fit(ground.model(), recipe, objective=Undefined(good.kinds, good.masking), **options)
    assert [np.isnan(entry["auc"]) for entry in history.evaluations] == [True, False, True, False]
    assert history.best == history.evaluations[3]
    again = ground.fit(ground.model(), recipe, objective=good, resume=True, **options)
    assert str(again.evaluations) == str(history.evaluations)
    assert again.best == history.best
