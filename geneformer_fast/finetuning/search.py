"""Hyperparameters by Optuna: sampled, pruned early, kept in a file so that a killed search goes on."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from geneformer_fast.errors import InputError, TrainingError, UnsupportedError
from geneformer_fast.training.recipe import Recipe

STORAGE = "search.db"
#: Evaluations of one trial that are reported to the pruner: called with the metrics, may raise.
Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Space:
    """What is searched. Bounds are inclusive; two equal ones fix a value.

    Attributes
    ----------
    learning_rate, weight_decay, warmup_ratio
        Lowest and highest; the learning rate on a logarithmic scale.
    schedule
        Choices.
    freeze_layers
        Lowest and highest number of frozen blocks; None leaves it as asked for.
    """

    learning_rate: tuple[float, float] = (1e-5, 1e-3)
    weight_decay: tuple[float, float] = (0.0, 0.3)
    warmup_ratio: tuple[float, float] = (0.0, 0.2)
    schedule: tuple[str, ...] = ("linear", "cosine", "constant")
    freeze_layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Search:
    """A search.

    Attributes
    ----------
    n_trials
        Over all sittings: a resumed search makes those that are missing.
    space
        What is searched.
    seed
        Of the sampler.
    """

    n_trials: int
    space: Space = dataclasses.field(default_factory=Space)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_trials < 1:
            raise UnsupportedError(f"a search of {self.n_trials} trials finds nothing; take 1 or more")


def check_search() -> None:
    """Refuse, before anything is computed, to search without Optuna."""
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        raise UnsupportedError("a search needs optuna, not installed here: pip install 'geneformer-fast[train]'")


def search(
    asked: Search,
    recipe: Recipe,
    train: Callable[[Recipe, int | None, Report], float],
    storage: Path,
    name: str,
) -> tuple[Recipe, int | None, dict[str, Any]]:
    """The best recipe of a number of trials.

    Parameters
    ----------
    asked
        How many trials, of what.
    recipe
        What is not searched.
    train
        Trains with a recipe and a number of frozen blocks (None: as asked for), reports every evaluation, and returns
        the best value of ``recipe.monitor``. It sees training and evaluation cells only.
    storage
        SQLite file of the trials, made or gone on with.
    name
        Of the study in it; one per fold, because a fold's test cells may have no say in its hyperparameters.

    Returns
    -------
    recipe, freeze_layers, summary
        The recipe with the best trial's values; its frozen blocks, or None; values and number of trials for the record.

    Raises
    ------
    InputError
        No trial came to an end.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    backend = optuna.storages.RDBStorage(f"sqlite:///{storage}")
    direction: Literal["maximize", "minimize"] = "maximize" if recipe.is_greater_better else "minimize"
    study = optuna.create_study(storage=backend, study_name=name, direction=direction, load_if_exists=True)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)  # of a sitting that was killed
    counted = (TrialState.COMPLETE, TrialState.PRUNED)
    done = len(study.get_trials(deepcopy=False, states=counted))
    # A sampler that began with the same seed again would propose its first points again.
    study.sampler = optuna.samplers.TPESampler(seed=asked.seed + len(study.trials))
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=0)

    def objective(trial: optuna.Trial) -> float:
        changed, freeze_layers = _proposed(trial, recipe, asked.space)
        step = 0

        def report(metrics: dict[str, float]) -> None:
            nonlocal step
            trial.report(metrics[recipe.monitor], step)
            step += 1
            if trial.should_prune():
                raise optuna.TrialPruned

        return train(changed, freeze_layers, report)

    if done < asked.n_trials:
        # A learning rate at which the loss is no number is a bad trial, not the end of the search.
        study.optimize(objective, n_trials=asked.n_trials - done, catch=(TrainingError,))
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not finished:
        raise InputError(f"{storage}: none of {len(study.trials)} trials came to an end; ask for more (--search)")
    best = study.best_trial
    pruned = len(study.get_trials(deepcopy=False, states=(TrialState.PRUNED,)))
    summary = {"n_trials": len(finished) + pruned, "n_pruned": pruned, "best": best.params, "value": best.value}
    backend.engine.dispose()
    return *_proposed(best, recipe, asked.space), summary


def _proposed(trial: Any, recipe: Recipe, space: Space) -> tuple[Recipe, int | None]:
    """A recipe from a trial's suggestions; of a finished trial the same ones again."""
    if hasattr(trial, "suggest_float"):
        values = {
            "learning_rate": trial.suggest_float("learning_rate", *space.learning_rate, log=True),
            "weight_decay": trial.suggest_float("weight_decay", *space.weight_decay),
            "warmup_ratio": trial.suggest_float("warmup_ratio", *space.warmup_ratio),
            "schedule": trial.suggest_categorical("schedule", list(space.schedule)),
        }
        layers = None if space.freeze_layers is None else trial.suggest_int("freeze_layers", *space.freeze_layers)
    else:
        values = {key: value for key, value in trial.params.items() if key != "freeze_layers"}
        layers = trial.params.get("freeze_layers")
    return dataclasses.replace(recipe, **values, warmup_steps=None), layers
