"""The search: trials are made, pruned, remembered and gone on with, and never see a test cell."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from typed_cells import SHORT

import geneformer_fast as gf
from geneformer_fast.errors import InputError, TrainingError, UnsupportedError
from geneformer_fast.finetuning import engine
from geneformer_fast.finetuning.search import Search, Space, search

optuna = pytest.importorskip("optuna")
FREE = Search(4, Space(freeze_layers=(0, 2)))


def trials(path, name="s"):
    return optuna.load_study(study_name=name, storage=f"sqlite:///{path}").trials


def by_rate(recipe, freeze_layers, report):
    """A made-up score: the closer the rate is to 1e-4 the better, reported twice."""
    value = -abs(np.log10(recipe.learning_rate) + 4)
    report({"macro_f1": value - 0.1})
    report({"macro_f1": value})
    return value


def test_the_best_trial_is_returned_as_a_recipe(tmp_path):
    recipe, layers, summary = search(dataclasses.replace(FREE, n_trials=12), SHORT, by_rate, tmp_path / "s.db", "s")
    found = trials(tmp_path / "s.db")
    done = [trial for trial in found if trial.state.name == "COMPLETE"]
    best = max(done, key=lambda trial: trial.value)
    assert recipe.learning_rate == best.params["learning_rate"] == summary["best"]["learning_rate"]
    assert recipe.weight_decay == best.params["weight_decay"]
    assert layers == best.params["freeze_layers"]
    assert recipe.epochs == SHORT.epochs
    assert summary["n_trials"] == 12 == len(found)
    assert 1e-5 <= recipe.learning_rate <= 1e-3
    # Hopeless trials end at their first evaluation.
    assert summary["n_pruned"] == 12 - len(done) > 0


def test_a_search_goes_on_after_a_kill_and_draws_new_points(tmp_path):
    calls = []

    def killed(recipe, freeze_layers, report):
        calls.append(recipe.learning_rate)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return by_rate(recipe, freeze_layers, report)

    with pytest.raises(KeyboardInterrupt):
        search(FREE, SHORT, killed, tmp_path / "s.db", "s")
    # What a kill leaves behind is a trial that seems to run.
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 's.db'}")
    study.ask()
    _, _, summary = search(FREE, SHORT, by_rate, tmp_path / "s.db", "s")
    found = trials(tmp_path / "s.db")
    assert summary["n_trials"] == 4
    assert [trial.state.name for trial in found].count("FAIL") == 2
    rates = [trial.params["learning_rate"] for trial in found if "learning_rate" in trial.params]
    assert len(set(rates)) == len(rates)
    # Nothing is left to do: the same answer, without a trial.
    again = search(FREE, SHORT, killed, tmp_path / "s.db", "s")
    assert again[2] == summary
    assert len(calls) == 3


def test_a_trial_whose_loss_is_no_number_does_not_end_the_search(tmp_path):
    calls = []

    def breaking(recipe, freeze_layers, report):
        calls.append(recipe.learning_rate)
        if len(calls) == 2:
            raise TrainingError("the loss is nan")
        return by_rate(recipe, freeze_layers, report)

    recipe, _, summary = search(FREE, SHORT, breaking, tmp_path / "s.db", "s")
    assert len(calls) == 4
    assert summary["n_trials"] == 3
    assert recipe.learning_rate in calls
    assert recipe.learning_rate != calls[1]


def test_a_search_without_a_finished_trial_says_so(tmp_path):
    def pruned(recipe, freeze_layers, report):
        raise optuna.TrialPruned

    with pytest.raises(InputError, match="none of 4 trials came to an end"):
        search(FREE, SHORT, pruned, tmp_path / "s.db", "s")


def test_refusals(home, tmp_path):
    with pytest.raises(UnsupportedError, match="a search of 0 trials"):
        Search(0)
    with pytest.raises(UnsupportedError, match="a search needs evaluation cells"):
        gf.finetune_cells(
            home / "tokens", home / "model", "kind", tmp_path / "out", eval_share=0, search=Search(1), recipe=SHORT
        )


def test_folds_search_on_their_own_and_never_see_a_test_cell(home, tmp_path, monkeypatch):
    seen = []
    original = engine.fit

    def fit(*args, **options):
        seen.append((options["out"] is None, set(options["train_cells"]) | set(options["eval_cells"])))
        return original(*args, **options)

    monkeypatch.setattr(engine, "fit", fit)
    made = gf.finetune_cells(
        home / "tokens", home / "model", "kind", tmp_path / "out", folds=2, is_final=False, search=2,
        recipe=dataclasses.replace(SHORT, epochs=1),
    )  # fmt: skip
    assert [is_trial for is_trial, _ in seen] == [True, True, False] * 2
    import pyarrow.parquet as pq

    table = pq.read_table(made.predictions).to_pandas()
    for fold in (1, 2):
        tested = set(table.loc[table["fold"] == fold, "cell"])
        assert all(not cells & tested for _, cells in seen[3 * (fold - 1) : 3 * fold])
        summary = made.scores["folds"][fold - 1]
        assert summary["search"]["n_trials"] == 2
        assert summary["recipe"]["learning_rate"] == summary["search"]["best"]["learning_rate"]
    names = optuna.get_all_study_names(f"sqlite:///{tmp_path / 'out' / 'search.db'}")
    assert sorted(names) == ["fold-1", "fold-2"]
