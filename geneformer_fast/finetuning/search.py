"""Hyperparameters by Optuna: sampled, pruned early, kept in a file so that a killed search goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from geneformer_fast.arguments import check_seed, renamed_fields
from geneformer_fast.errors import InputError, OutputError, TrainingError, UnsupportedError
from geneformer_fast.progress import Progress
from geneformer_fast.training.identity import current_names
from geneformer_fast.training.recipe import MACHINE, RENAMED, Recipe
from geneformer_fast.training.schedule import SCHEDULES

if TYPE_CHECKING:
    import optuna

STORAGE = "search.db"
# Of a study: what it searches, and for what.
_ASKED = "asked"
# What a study calls a field, where earlier versions called it otherwise: their studies are gone on with.
_STORED = {new: old for old, new in RENAMED.items()}
#: Evaluations of one trial that are reported to the pruner: called with the metrics, may raise.
Report = Callable[[dict[str, float]], None]


@renamed_fields(warmup_ratio="warmup_share")
@dataclass(frozen=True)
class Space:
    """What is searched. Bounds are inclusive; two equal ones fix a value.

    Attributes
    ----------
    learning_rate, weight_decay, warmup_share
        Lowest and highest; the learning rate on a logarithmic scale.
    schedule
        Choices.
    freeze_layers
        Lowest and highest number of frozen blocks; None leaves it as asked for.
    """

    learning_rate: tuple[float, float] = (1e-5, 1e-3)
    weight_decay: tuple[float, float] = (0.0, 0.3)
    warmup_share: tuple[float, float] = (0.0, 0.2)
    schedule: tuple[str, ...] = ("linear", "cosine", "constant")
    freeze_layers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        limits = {"learning_rate": math.inf, "weight_decay": math.inf, "warmup_share": 1.0}
        for name, most in limits.items():
            low, high = getattr(self, name)
            if not (math.isfinite(high) and 0 <= low <= high <= most) or (name == "learning_rate" and low == 0):
                raise UnsupportedError(f"{name} cannot be searched from {low} to {high}")
        if self.freeze_layers is not None and not 0 <= self.freeze_layers[0] <= self.freeze_layers[1]:
            raise UnsupportedError(
                f"freeze_layers cannot be searched from {self.freeze_layers[0]} to {self.freeze_layers[1]}"
            )
        if not self.schedule or not set(self.schedule) <= set(SCHEDULES):
            raise UnsupportedError(f"schedules to search must be some of {', '.join(SCHEDULES)}, not {self.schedule}")


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
        check_seed(self.seed)
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
    OutputError
        The file holds a search of something else, is damaged, or cannot be written.
    """
    with _study(storage, name, recipe, asked.space) as study:
        return _searched(study, asked, recipe, train, storage)


def _searched(
    study: optuna.Study,
    asked: Search,
    recipe: Recipe,
    train: Callable[[Recipe, int | None, Report], float],
    storage: Path,
) -> tuple[Recipe, int | None, dict[str, Any]]:
    """The trials that are missing, and the best of all."""
    import optuna
    from optuna.trial import TrialState

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
        with Progress(asked.n_trials, "searching", "trials", recipe.progress, initial=done) as bar:
            # A learning rate at which the loss is no number is a bad trial, not the end of the search.
            study.optimize(
                objective, n_trials=asked.n_trials - done, catch=(TrainingError,),
                callbacks=[lambda study, trial: bar.update(1)],
            )  # fmt: skip
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not finished:
        raise InputError(f"{storage}: none of {len(study.trials)} trials came to an end; ask for more (--search)")
    best = study.best_trial
    pruned = len(study.get_trials(deepcopy=False, states=(TrialState.PRUNED,)))
    values = current_names(best.params)
    summary = {"n_trials": len(finished) + pruned, "n_pruned": pruned, "best": values, "value": best.value}
    return *_proposed(best, recipe, asked.space), summary


@contextlib.contextmanager
def _study(storage: Path, name: str, recipe: Recipe, space: Space) -> Iterator[optuna.Study]:
    """A study, made or gone on with; what its database says against it is one sentence."""
    import optuna
    import sqlalchemy

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    backend = None
    try:
        backend = optuna.storages.RDBStorage(f"sqlite:///{storage}")
        direction: Literal["maximize", "minimize"] = "maximize" if recipe.is_greater_better else "minimize"
        study = optuna.create_study(storage=backend, study_name=name, direction=direction, load_if_exists=True)
        _check_same(study, storage, recipe, space)
        yield study
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise OutputError(f"{storage} {_said_by_sqlite(error)}") from None
    finally:
        if backend is not None:
            backend.engine.dispose()


def _said_by_sqlite(error: BaseException) -> str:
    """What a database says, in our words: a full disk is no damage, and what it holds is whole in either case."""
    text = str(error)
    while (cause := error.__cause__ or error.__context__) is not None:
        error, text = cause, f"{text} {cause}"
    if "disk is full" in text or "disk I/O error" in text:
        return "cannot be written: the disk is full, or failed: make room, and go on with --resume (resume=True)"
    if "readonly" in text or "unable to open" in text:
        return "cannot be written: there is no permission, or no room, for files there: name another place"
    return f"cannot be read ({error}): remove it to search anew"


def _check_same(study: optuna.Study, storage: Path, recipe: Recipe, space: Space) -> None:
    """Refuse to go on with a search of another space or for something else: its trials say nothing about this one."""
    searched = {field.name for field in dataclasses.fields(Space)} | {"warmup_steps"}
    fixed = {key: value for key, value in recipe.to_dict().items() if key not in (*searched, *MACHINE)}
    asked = json.loads(json.dumps({"space": dataclasses.asdict(space), "recipe": fixed}))
    there = current_names(study.user_attrs.get(_ASKED))
    expected = _distributions(space)
    differing = [
        name
        for trial in study.get_trials(deepcopy=False)
        for name, found in trial.distributions.items()
        if expected.get(name) != found
    ]
    for part in ("space", "recipe"):
        if isinstance(there, dict) and there.get(part) != asked[part]:
            old = there.get(part) or {}
            differing += [key for key, value in asked[part].items() if old.get(key) != value]
    if differing:
        raise OutputError(
            f"{storage} holds a search with another {RENAMED.get(differing[0], differing[0])}: go on with the same "
            "space and recipe, or search into another folder"
        )
    if there is None:
        study.set_user_attr(_ASKED, asked)


def _distributions(space: Space) -> dict[str, Any]:
    """What is searched, as Optuna writes it down with every trial."""
    from optuna import distributions as kinds

    found: dict[str, Any] = {
        "learning_rate": kinds.FloatDistribution(*space.learning_rate, log=True),
        "weight_decay": kinds.FloatDistribution(*space.weight_decay),
        _STORED["warmup_share"]: kinds.FloatDistribution(*space.warmup_share),
        "schedule": kinds.CategoricalDistribution(list(space.schedule)),
    }
    if space.freeze_layers is not None:
        found["freeze_layers"] = kinds.IntDistribution(*space.freeze_layers)
    return found


def _proposed(trial: Any, recipe: Recipe, space: Space) -> tuple[Recipe, int | None]:
    """A recipe from a trial's suggestions; of a finished trial the same ones again."""
    if hasattr(trial, "suggest_float"):
        values = {
            "learning_rate": trial.suggest_float("learning_rate", *space.learning_rate, log=True),
            "weight_decay": trial.suggest_float("weight_decay", *space.weight_decay),
            "warmup_share": trial.suggest_float(_STORED["warmup_share"], *space.warmup_share),
            "schedule": trial.suggest_categorical("schedule", list(space.schedule)),
        }
        layers = None if space.freeze_layers is None else trial.suggest_int("freeze_layers", *space.freeze_layers)
    else:
        values = {key: value for key, value in current_names(trial.params).items() if key != "freeze_layers"}
        layers = trial.params.get("freeze_layers")
    return dataclasses.replace(recipe, **values, warmup_steps=None), layers
