"""Folds one after another, each from the same pretrained encoder; a killed run goes on with the fold it was in."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from geneformer_fast import __version__, families
from geneformer_fast.checkpoints.hf import is_bert
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import OutputError, UnsupportedError
from geneformer_fast.files.schema import read_json
from geneformer_fast.files.writing import write_json
from geneformer_fast.finetuning import scores as scoring
from geneformer_fast.finetuning.card import adapter_card, finetuned_card
from geneformer_fast.finetuning.lora import Adapter, add_adapters, check_lora, merge_adapters, save_adapter
from geneformer_fast.finetuning.models import CARD, freeze, save_classifier, scale_classifier, vocabulary_in, with_head
from geneformer_fast.finetuning.outputs import (
    PREDICTIONS,
    RUN,
    SCORES,
    SPLITS,
    Finetuned,
    OutFolder,
    read_fold,
    write_fold,
)
from geneformer_fast.finetuning.pictures import check_pictures, plot_confusion, plot_roc
from geneformer_fast.finetuning.predictions import read_parquet, write_parquet
from geneformer_fast.finetuning.search import Report, Search, check_search, search
from geneformer_fast.finetuning.splits import Split, told
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.training.logs import check_logs
from geneformer_fast.training.loop import Objective, fit
from geneformer_fast.training.profiled import FOLDER
from geneformer_fast.training.recipe import Recipe

logger = logging.getLogger(__name__)


def check_ready(asked: Search | int | None) -> Search | None:
    """Refuse what cannot run here before anything is read; returns the search, of which a number means its trials.

    Raises
    ------
    UnsupportedError
        A library is missing, or torchrun started several processes.
    """
    check_pictures()
    if asked is not None:
        check_search()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnsupportedError("fine-tuning runs in one process: start it without torchrun")
    return Search(asked) if isinstance(asked, int) else asked


@dataclass(frozen=True)
class Tested:
    """What a fold's test set gave: rows for the table of predictions, and truth and probabilities per task."""

    table: pa.Table
    tasks: dict[str, tuple[np.ndarray, np.ndarray]]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


class Work(Protocol):
    """What differs between cells and genes."""

    kind: str
    classes: dict[str, list[str]]
    tokens: TokenFolder

    def numbers(self, split: Split) -> dict[str, dict[str, Any]]:
        """What is in every part of a split, see :func:`~geneformer_fast.finetuning.splits.numbers_of`."""

    def objective(self, split: Split) -> tuple[Objective, np.ndarray]:
        """What a split's training set is learned by, and the factor [n_classes] on the logits afterwards."""

    def training(self, split: Split) -> dict[str, Any]:
        """``train_cells``, ``eval_cells``, ``eval_tokens`` and ``sampler`` of ``fit``."""

    def test(self, encoder: Encoder, split: Split, fold: int) -> Tested:
        """Predictions of the test set."""


@dataclass(frozen=True)
class Choices:
    """What decides how every fold is trained."""

    recipe: Recipe
    freeze_layers: int
    freeze_embeddings: bool
    search: Search | None
    lora: int | None = None


def check_splits(work: Work, base: Encoder, choices: Choices, splits: Sequence[Split]) -> None:
    """Refuse, before anything is trained, what some fold would be refused for.

    Raises
    ------
    InputError
        A training set lacks a class.
    UnsupportedError
        An evaluation set that something chooses by is empty; there are fewer layers than are to be frozen, or none of
        them would learn while it is searched how many do; adapters cannot be.
    """
    space = None if choices.search is None else choices.search.space.freeze_layers
    check_logs(choices.recipe)
    check_lora(choices.lora, base, max((choices.freeze_layers, *(space or ()))))
    if base.quantization is not None:
        _say_what_learns(base, choices, is_searched=space is not None)
    for n_layers in (choices.freeze_layers, *(space or ())):
        if not 0 <= n_layers <= base.config.n_layers:
            raise UnsupportedError(f"cannot freeze {n_layers} layers: the model has {base.config.n_layers}")
    for split in splits:
        work.objective(split)
        if not len(split.eval):
            for name, is_asked in (("a search", choices.search), ("patience", choices.recipe.patience)):
                if is_asked is not None:
                    raise UnsupportedError(
                        f"{name} needs evaluation cells to choose by, and there are none in some split; give an "
                        "eval_share above 0, or take no group column where no group can be spared"
                    )


def _say_what_learns(base: Encoder, choices: Choices, *, is_searched: bool) -> None:
    """Warn that nothing of a quantized model learns, unless that is asked for anyway."""
    assert base.quantization is not None
    scheme = base.quantization.scheme
    if is_searched:
        raise UnsupportedError(
            f"freeze_layers cannot be searched: the model is quantized ({scheme}), and nothing of it learns but the "
            "classifier on top; leave freeze_layers out of the space, or search with the model before it was quantized"
        )
    if choices.freeze_layers < base.config.n_layers or not choices.freeze_embeddings:
        warnings.warn(
            f"the model is quantized ({scheme}), and eight bits do not learn: only the classifier on top is trained, "
            f"as with freeze_layers={base.config.n_layers} and freeze_embeddings=True; to train the encoder too, take "
            "the model before it was quantized, and quantize what comes out",
            stacklevel=5,
        )


class Engine:
    """Trains and tests.

    Parameters
    ----------
    work
        Cells or genes.
    base
        The pretrained encoder; stays as it is.
    choices
        How.
    folder
        Where to.
    origin
        What the model's card says of where it comes from.
    source
        Folder of the pretrained model, whose ``vocabulary.json`` is put beside the new one; None where it has none.
    profile
        Where a report of the first training goes, as for :func:`geneformer_fast.training.loop.fit`.
    """

    def __init__(
        self,
        work: Work,
        base: Encoder,
        choices: Choices,
        folder: OutFolder,
        origin: Mapping[str, Any],
        source: Path | None,
        profile: str | os.PathLike[str] | bool = False,
    ) -> None:
        self.work, self.base, self.choices, self.folder = work, base, choices, folder
        self.origin, self.source = origin, source
        self._adapter: Adapter | None = None  # of the last training
        self._profile = profile
        self._n_splits = 1

    def run(
        self, splits: Sequence[Split], final: Split | None, of: str, tell: Callable[[str], None] | None = None
    ) -> Finetuned:
        """Every fold, then the final model.

        Parameters
        ----------
        splits
            One per fold; with a single one its model is the final one.
        final
            What the final model learns from after several folds; None makes none.
        of
            ``"cells"`` or ``"genes"``.
        tell
            Called with what is in every part of every split, before the first step.
        """
        self._n_splits = len(splits)
        named = {f"fold-{number}": split for number, split in enumerate(splits, 1)}
        named |= {} if final is None or len(splits) == 1 else {"final": final}
        numbers = {name: self.work.numbers(split) for name, split in named.items()}
        write_json(self.folder.path / SPLITS, numbers)
        if tell is not None:
            for name, parts in numbers.items():
                tell(told("split" if len(numbers) == 1 else name, parts, of))
        for number, split in enumerate(splits, 1):
            self._fold(number, split, is_final=len(splits) == 1)
        scores = self._sum_up(len(splits), of)
        if final is not None and len(splits) > 1:
            if not self.folder.final.exists():
                logger.info("the final model, of all but the evaluation %s", of)
                encoder, how = self._fit("final", final)
                self._save(encoder, how)
            self._tidy("final")
        write_json(self.folder.path / SCORES, scores)
        if self.folder.final.exists():
            self._describe(scores)
        return Finetuned(self.folder.path, self.folder.final if self.folder.final.exists() else None, scores)

    def _fold(self, number: int, split: Split, *, is_final: bool) -> None:
        name = f"fold-{number}"
        place = self.folder.fold(name)
        if (place / SCORES).exists():
            return
        if self._n_splits > 1:
            logger.info("fold %d of %d", number, self._n_splits)
        encoder, how = self._fit(name, split)
        found: dict[str, Any] = {
            "fold": number, "sizes": {k: len(v) for k, v in vars(split).items()}, "split": self.work.numbers(split),
            **how,
        }  # fmt: skip
        if len(split.test):
            tested = self.work.test(encoder, split, number)
            found["tasks"] = {
                task: scoring.score(*values, self.work.classes[task]) for task, values in tested.tasks.items()
            }
            found |= tested.extra
            found["roc"] = {task: _listed(scoring.roc_on_grid(*values)) for task, values in tested.tasks.items()}
            write_parquet(tested.table, place / PREDICTIONS)
        if is_final:
            self._save(encoder, how)
        write_fold(place, found)
        self._tidy(name)

    def _fit(self, name: str, split: Split) -> tuple[Encoder, dict[str, Any]]:
        """A model trained on one split, and how it was trained."""
        choices = self.choices
        recipe, layers, how = choices.recipe, choices.freeze_layers, {}
        if choices.search is not None:
            recipe, found, summary = search(
                choices.search, recipe, self._trial(split, layers), self.folder.search, name
            )
            layers, how = layers if found is None else found, {"search": summary}
        encoder, best = self._train(split, recipe, layers, self.folder.fold(name) / RUN, None)
        return encoder, {**how, "recipe": recipe.to_dict(), "freeze_layers": layers, "best": best}

    def _trial(self, split: Split, layers: int) -> Callable[[Recipe, int | None, Report], float]:
        def train(recipe: Recipe, freeze_layers: int | None, report: Report) -> float:
            n_frozen = layers if freeze_layers is None else freeze_layers
            _, best = self._train(split, recipe, n_frozen, None, report)
            assert best is not None
            return float(best[recipe.monitor])

        return train

    def _train(
        self, split: Split, recipe: Recipe, layers: int, out: Path | None, report: Report | None
    ) -> tuple[Encoder, dict[str, float] | None]:
        n_classes = sum(map(len, self.work.classes.values()))
        encoder = with_head(self.base, self.work.kind, n_classes, seed=recipe.seed)
        rank = self.choices.lora
        if rank is None:
            freeze(encoder, layers, embeddings=self.choices.freeze_embeddings)
        else:
            add_adapters(encoder, rank, layers, seed=recipe.seed)
        objective, factor = self.work.objective(split)
        asked: str | os.PathLike[str] | bool = False
        if report is None:  # no trial of a search
            asked, self._profile = self._profile, False
        history = fit(
            encoder, self.work.tokens, objective, recipe, out=out, resume=True, on_eval=report,
            begins_with=self.folder.begins_with, profile=self.folder.path / FOLDER if asked is True else asked,
            **self.work.training(split),
        )  # fmt: skip
        self._adapter = None if rank is None else merge_adapters(encoder)
        scale_classifier(encoder, factor)
        return encoder, history.best

    def _save(self, encoder: Encoder, how: Mapping[str, Any]) -> None:
        classes = self.work.classes
        many = len(classes) > 1
        labels = [f"{task}: {label}" if many else label for task, names in classes.items() for label in names]
        card = {
            "made_by": f"geneformer-fast {__version__}",
            "kind": self.work.kind,
            "tasks": [{"name": task, "classes": names} for task, names in classes.items()],
            **self.origin,
            **how,
        }
        base = self.base.source.settings if self.base.source is not None else {}
        if self._adapter is not None:
            card["lora"] = {"rank": self._adapter.rank, "alpha": self._adapter.alpha}
            save_adapter(self._adapter, encoder, self.folder.adapter, self.source)
        save_classifier(encoder, self.folder.final, labels, card, vocabulary_in(self.source), base)

    def _describe(self, scores: Mapping[str, Any]) -> None:
        """The card of the final model, and of its adapter, now that its scores are known."""
        final = self.folder.final
        about = read_json(final / CARD, OutputError)
        card = finetuned_card(
            final,
            about,
            self.work.tokens,
            scores,
            self.source,
            is_bert=is_bert(self.base),
            family=families.family_name(self.base.config),
        )
        card.save(final)
        if self.folder.adapter.exists():
            adapter_card(card, self.source, about).save(self.folder.adapter)

    def _tidy(self, name: str) -> None:
        """Checkpoints of a finished fold have served their purpose."""
        place = self.folder.fold(name)
        shutil.rmtree(place if name == "final" else place / RUN, ignore_errors=True)

    def _sum_up(self, n_folds: int, of: str) -> dict[str, Any]:
        """Scores over folds and of all tested cells together; predictions and pictures."""
        places = [self.folder.fold(f"fold-{number}") for number in range(1, n_folds + 1)]
        found = [read_fold(place) for place in places]
        tested = [(scores, place) for scores, place in zip(found, places, strict=True) if "tasks" in scores]
        summary: dict[str, Any] = {"of": of, "n_folds": len(tested), "n": 0, "tasks": {}}
        if tested:
            table = pa.concat_tables([read_parquet(place / PREDICTIONS) for _, place in tested])
            summary["n"] = table.num_rows
            write_parquet(table, self.folder.path / PREDICTIONS, {"geneformer_fast": __version__})
        for task, classes in self.work.classes.items():
            with_task = [scores for scores, _ in tested if task in scores["tasks"]]
            if not with_task:
                continue
            parts = [scores["tasks"][task] for scores in with_task]
            confusion = np.sum([part["confusion"] for part in parts], axis=0).tolist()
            summary["tasks"][task] = {
                "classes": classes, "over_folds": scoring.over_folds(parts), "confusion": confusion, "folds": parts,
            }  # fmt: skip
            self._draw(task, classes, confusion, [scores["roc"][task] for scores in with_task], parts)
        summary["folds"] = [
            {key: value for key, value in scores.items() if key not in ("tasks", "roc")} for scores in found
        ]
        return summary

    def _draw(
        self, task: str, classes: list[str], confusion: list[list[int]], curves: list[Any], parts: list[dict[str, Any]]
    ) -> None:
        suffix = "" if len(self.work.classes) == 1 else _suffix(task, list(self.work.classes))
        path = self.folder.path
        f1 = np.mean([part["macro_f1"] for part in parts])
        plot_confusion(confusion, classes, path / f"confusion{suffix}.png", title=f"{task}: macro-F1 {f1:.3f}")
        known = [(curve, part["roc_auc"]) for curve, part in zip(curves, parts, strict=True) if curve is not None]
        if known:
            drawn, areas = zip(*known, strict=True)
            shown = classes[1] if len(classes) == 2 else "mean of each class against the rest"
            plot_roc([np.array(curve) for curve in drawn], areas, path / f"roc{suffix}.png", title=f"{task}: {shown}")


def _suffix(task: str, tasks: list[str]) -> str:
    """What the pictures of a task have in their names; tasks that differ in signs only are numbered."""
    plain = ["_" + "".join(c if c.isalnum() else "_" for c in name) for name in tasks]
    place = tasks.index(task)
    return plain[place] if plain.count(plain[place]) == 1 else f"{plain[place]}_{place + 1}"


def _listed(curve: np.ndarray | None) -> list[float] | None:
    return None if curve is None else [round(float(value), 6) for value in curve]
