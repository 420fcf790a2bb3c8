"""Fine-tuning on classes of cells, in one task or several at once."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geneformer_fast.arguments import checked
from geneformer_fast.data.identity import identity_of
from geneformer_fast.data.selection import Selection
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import InputError, UnsupportedError
from geneformer_fast.families import family_of
from geneformer_fast.files.checksums import fingerprint_of_tensors
from geneformer_fast.finetuning.engine import Choices, Engine, Tested, check_ready, check_splits
from geneformer_fast.finetuning.labels import Task, check_ignored, column_values, read_task
from geneformer_fast.finetuning.losses import IGNORED, logit_scale, make_loss
from geneformer_fast.finetuning.models import pretrained
from geneformer_fast.finetuning.names import check_names
from geneformer_fast.finetuning.objectives import CellObjective
from geneformer_fast.finetuning.outputs import Finetuned, out_folder
from geneformer_fast.finetuning.predictions import ClassifyingRun, cell_table, probabilities_of, some_cells
from geneformer_fast.finetuning.recipes import CELLS, cells_of, with_progress
from geneformer_fast.finetuning.samplers import ClassSampler
from geneformer_fast.finetuning.search import Search
from geneformer_fast.finetuning.splits import Split, hold_out, numbers_of, share_for_testing
from geneformer_fast.finetuning.splits import folds as make_folds
from geneformer_fast.tokenization.arrow import TokenFolder, open_tokens
from geneformer_fast.training.identity import SELECTION
from geneformer_fast.training.loop import Objective
from geneformer_fast.training.profiled import checked_place
from geneformer_fast.training.recipe import Recipe


@checked
def finetune_cells(
    tokens: str | os.PathLike[str],
    model: Encoder | str | os.PathLike[str],
    label: str | Sequence[str] | Mapping[str, float],
    out: str | os.PathLike[str],
    *,
    group: str | None = None,
    where: Mapping[str, Any] | None = None,
    max_cells: int | None = None,
    seed: int | None = None,
    folds: int = 0,
    eval_share: float = 0.1,
    test_share: float | None = None,
    loss: str | Mapping[str, str] = "cross-entropy",
    sampler: str = "none",
    cap: int | None = None,
    freeze_layers: int = 0,
    freeze_embeddings: bool = False,
    lora: int | None = None,
    recipe: Recipe | None = None,
    search: Search | int | None = None,
    drop_unlabelled: bool = False,
    ignore: Sequence[str] = (),
    min_cells: int = 0,
    is_final: bool = True,
    device: str | torch.device | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tell: Callable[[str], None] | None = None,
    profile: str | os.PathLike[str] | bool = False,
    progress: bool | None = None,
) -> Finetuned:
    """Fine-tune a pretrained encoder to tell classes of cells.

    Parameters
    ----------
    tokens
        Token folder that carries the label as a column.
    model
        Checkpoint folder, or an encoder; it stays as it is.
    label
        Column to tell; several at once as a list, or as a mapping to the weights of their losses. Of several, cells may
        lack any but not all; folds are stratified, and cells sampled, by the first.
    out
        Folder for scores, predictions, pictures and the model.
    group
        Column (donor, say) whose cells stay together: none is ever in two of training, evaluation and test.
    where
        Cells to learn from and to test with: column -> a value, or several; of several columns all must hold.
    max_cells, seed
        Most cells, drawn from those that have a label; a seed of None is that of the recipe.
    folds
        0: one division into training, evaluation and test cells. 2 or more: cross-validation, after which the final
        model learns from all cells but an evaluation share.
    eval_share, test_share
        Of all cells (with folds: of those outside the test set); 0 for none. A ``test_share`` of None is 0.1; with
        folds there is none to choose. The evaluation cells choose the best epoch. With a group, sets of whole groups
        are taken that come nearest to the share and leave every class to learn from.
    loss
        One of :data:`~geneformer_fast.finetuning.losses.LOSSES` with options, such as ``"focal:gamma=1.5"``; one for
        all tasks or one per task.
    sampler, cap
        ``"none"``, ``"over"`` or ``"under"``, of the training cells only; most cells per class and epoch.
    freeze_layers, freeze_embeddings
        Blocks from the bottom that stay as they are, and whether the embeddings do. Only with the embeddings frozen too
        are activations of frozen blocks not kept. Of a quantized model nothing learns but the classifier, which a
        warning says.
    lora
        Rank of adapters that learn in place of the blocks (Hu et al., arXiv:2106.09685): every linear layer of every
        block that is not frozen gets one, with an alpha of twice the rank; embeddings and norms stay as they are, the
        classifier learns as ever. They want about ten times the learning rate. In the end they are added to the
        weights; ``out/adapter`` keeps them apart, as PEFT loads them.
    recipe
        How to train; None is what the authors of the model's family published for it, if anything, else
        :data:`~geneformer_fast.finetuning.recipes.CELLS`.
    search
        Hyperparameters to search in every fold, by its training and evaluation cells alone: a number of trials, or a
        :class:`~geneformer_fast.finetuning.search.Search`.
    drop_unlabelled, ignore, min_cells
        Leave out cells without a label, with one of these labels, or of classes with fewer cells.
    is_final
        Whether to make a final model after folds.
    device
        Where to train; None takes a GPU if there is one.
    resume, overwrite
        Go on with what is in ``out``, or replace it.
    tell
        Called, before the first step, with what is in every part of every split, such as ``print``; ``splits.json``
        holds the same.
    profile
        Where a report of how fast the first model is trained goes (:func:`geneformer_fast.profile`): a ``.json``, an
        ``.html``, or a folder for both; True: ``profile/`` in ``out``. One that is there already is refused, or with
        ``resume`` stays and nothing is profiled.
    progress
        Whether to show progress bars; None is what the recipe says, and if that is None too, bars on a terminal, and
        lines of the log elsewhere.

    Returns
    -------
    Finetuned
        Scores, and where the model and the predictions are.

    Raises
    ------
    InputError
        A column is missing, labels are, or classes or groups are too few.
    VocabularyError
        The tokens belong to another vocabulary than the model.
    OutputError
        ``out`` holds something else, or a fine-tuning of other tokens or pretrained weights; another process writes
        there; or a file cannot be written (a full disk): what is there stays whole, and ``resume`` goes on.
    TrainingError
        The loss is not finite; finished folds and checkpoints stay.
    UnsupportedError
        No such loss, sampler or option.
    """
    wanted = check_ready(search)
    profile = checked_place(profile, Path(out), is_resuming=resume, is_replacing=overwrite)
    test_share = share_for_testing(test_share, folds, 0.1)
    selection = Selection.of(where, max_cells, seed, default_seed=(recipe or CELLS).seed)
    with open_tokens(tokens) as folder:
        base = pretrained(model, device)
        recipe = with_progress(recipe or cells_of(family_of(base.config)), progress)
        identity = identity_of(folder, base.config)
        tasks, cells = _selected_tasks(folder, selection, label, drop_unlabelled, ignore, min_cells)
        check_names({task.name: task.classes for task in tasks})
        losses = _losses(tasks, loss)
        groups = None if group is None else group_values(folder, group, cells)
        work = CellWork(
            folder, identity, tasks, losses, ClassSampler(tasks[0].codes, sampler, cap), recipe.token_budget,
            recipe.progress,
        )  # fmt: skip
        splits, final = work.splits(cells, groups, folds, eval_share, test_share, recipe.seed)
        final = final if is_final else None
        choices = Choices(recipe, freeze_layers, freeze_embeddings, wanted, lora)
        every = [*splits, *([] if final is None else [final])]
        check_splits(work, base, choices, every)
        asked = {
            "kind": "cells", "tasks": {task.name: task.weight for task in tasks}, "losses": losses, "group": group,
            "folds": folds, "eval_share": eval_share, "test_share": test_share, "sampler": sampler, "cap": cap,
            "freeze_layers": freeze_layers, "freeze_embeddings": freeze_embeddings, "lora": lora,
            "recipe": recipe.to_dict(), "is_searching": search is not None,
            "classes": {task.name: task.classes for task in tasks}, "config": base.config.to_dict(),
            SELECTION: None if selection is None else selection.to_dict(),
            "data": digest(*(task.codes for task in tasks), folder.lengths(), *(s.test for s in splits)),
            **content_of(folder, base, wanted, every),
        }  # fmt: skip
        origin = origin_of(model, identity, losses, selection)
        with out_folder(Path(out), asked, resume=resume, overwrite=overwrite) as place:
            engine = Engine(work, base, choices, place, origin, source_of(model), profile)
            return engine.run(splits, final, "cells", tell)


class CellWork:
    """Classes of cells, see :class:`~geneformer_fast.finetuning.engine.Work`."""

    kind = "cells"

    def __init__(
        self,
        tokens: TokenFolder,
        identity: Mapping[str, Any],
        tasks: Sequence[Task],
        losses: Mapping[str, str],
        sampler: ClassSampler,
        token_budget: int,
        progress: bool | None = False,
    ) -> None:
        self.tokens, self.identity, self.tasks, self.losses = tokens, identity, list(tasks), losses
        self.sampler, self.token_budget, self.progress = sampler, token_budget, progress
        first = self.tasks[0]
        # Cells without a label in the task that splits are stratified by are a class of their own there.
        self._codes = np.where(first.codes == IGNORED, len(first.classes), first.codes)
        self._names = [*first.classes, f"(no {first.name})"]
        self._groups: np.ndarray | None = None
        self.classes = {task.name: task.classes for task in tasks}

    def splits(
        self,
        cells: np.ndarray,
        groups: np.ndarray | None,
        n_folds: int,
        eval_share: float,
        test_share: float,
        seed: int,
    ) -> tuple[list[Split], Split | None]:
        """Cell numbers of every fold, and of the final model after several."""
        codes, names = self._codes[cells], self._names
        if groups is not None:
            self._groups = np.full(len(self._codes), "", dtype=object)
            self._groups[cells] = groups
        shares: dict[str, Any] = {"groups": groups, "eval_share": eval_share, "seed": seed}

        def numbered(split: Split) -> Split:
            return Split(cells[split.train], cells[split.eval], cells[split.test])

        if not n_folds:
            return [numbered(hold_out(codes, names, test_share=test_share, **shares))], None
        found = make_folds(codes, names, n_folds, **shares)
        return list(map(numbered, found)), numbered(hold_out(codes, names, test_share=0, **shares))

    def numbers(self, split: Split) -> dict[str, dict[str, Any]]:
        """Cells, groups and classes of every part."""
        return numbers_of(split, self._codes, self._names, self._groups)

    def objective(self, split: Split) -> tuple[Objective, np.ndarray]:
        """The tasks' losses from the class counts of the training cells."""
        losses, factors = [], []
        for task in self.tasks:
            codes = task.codes[split.train]
            counts = np.bincount(codes[codes != IGNORED], minlength=len(task.classes))
            if not counts.all():
                absent = task.classes[int(np.argmin(counts))]
                raise InputError(
                    f"no training cell has {task.name} {absent!r} in one of the splits; leave rare classes out "
                    "(min_cells), or take fewer folds"
                )
            losses.append(make_loss(self.losses[task.name], counts))
            factors += [logit_scale(losses[-1])] * len(task.classes)
        return CellObjective(self.tasks, losses), np.array(factors)

    def training(self, split: Split) -> dict[str, Any]:
        """Arguments of ``fit``."""
        sampler = None if self.sampler.kind == "none" and self.sampler.cap is None else self.sampler
        return {"train_cells": split.train, "eval_cells": split.eval, "sampler": sampler}

    def test(self, encoder: Encoder, split: Split, fold: int) -> Tested:
        """Predictions of the test cells."""
        cells = some_cells(self.tokens, split.test, self.identity)
        logits = ClassifyingRun(encoder, cells, None, self.progress).to_memory()
        probabilities = probabilities_of(logits, [len(task.classes) for task in self.tasks])
        tasks = {}
        for task, values in zip(self.tasks, probabilities, strict=True):
            truth = task.codes[split.test]
            if (truth != IGNORED).any():
                tasks[task.name] = (truth[truth != IGNORED], values[truth != IGNORED])
        return Tested(cell_table(self.tokens, split.test, self.tasks, probabilities, fold), tasks)


def group_values(tokens: TokenFolder, group: str, cells: np.ndarray) -> np.ndarray:
    """[n] the group of each cell; every one must have one."""
    values = column_values(tokens, group, role="group")[cells]
    is_empty = values == None  # noqa: E711 - elementwise
    if is_empty.any():
        raise InputError(
            f"{tokens.path}: {is_empty.sum():,} labelled cells have no {group!r} (the first is cell "
            f"{int(cells[is_empty.argmax()])}), so nobody knows which cells must stay together"
        )
    return values.astype(str)


def digest(*arrays: np.ndarray) -> str:
    """A fingerprint of arrays of integers."""
    made = hashlib.sha256()
    for array in arrays:
        made.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return made.hexdigest()


def content_of(tokens: TokenFolder, base: Encoder, search: Search | None, splits: Sequence[Split]) -> dict[str, Any]:
    """Fingerprints of what a fine-tuning depends on: it is gone on with only where they are the same."""
    return {
        "tokens_content": tokens.content_fingerprint,
        "weights": fingerprint_of_tensors(base.state_dict()),
        "splits": digest(*(part for split in splits for part in vars(split).values())),
        "search": None if search is None else {"space": dataclasses.asdict(search.space), "seed": search.seed},
    }


def origin_of(
    model: Any, identity: Mapping[str, Any], losses: Mapping[str, str], selection: Selection | None
) -> dict[str, Any]:
    """What the card of a model says of its making."""
    return {
        "pretrained": "Encoder" if isinstance(model, Encoder) else Path(model).name,
        "vocabulary": identity.get("name"),
        "vocabulary_fingerprint": identity.get("fingerprint"),
        "losses": dict(losses),
        **({} if selection is None else selection.to_dict()),
    }


def source_of(model: Any) -> Path | None:
    """The folder of the pretrained model, where it comes from one."""
    return None if isinstance(model, Encoder) else Path(model)


def _selected_tasks(
    tokens: TokenFolder,
    selection: Selection | None,
    label: str | Sequence[str] | Mapping[str, float],
    drop_unlabelled: bool,
    ignore: Sequence[str],
    min_cells: int,
) -> tuple[list[Task], np.ndarray]:
    """Tasks whose codes are those of the selected cells, and these cells; of a draw only cells with a label count."""
    matching = None if selection is None else selection.matching(tokens)
    tasks = _tasks(tokens, label, drop_unlabelled, ignore, min_cells, matching)
    cells = _labelled(tasks)
    if selection is not None and len(drawn := selection.drawn(cells)) < len(cells):
        tasks = _tasks(tokens, label, drop_unlabelled, ignore, min_cells, drawn)
        cells = _labelled(tasks)
    return tasks, cells


def _labelled(tasks: Sequence[Task]) -> np.ndarray:
    return np.flatnonzero(np.any([task.codes != IGNORED for task in tasks], axis=0))


def _tasks(
    tokens: TokenFolder,
    label: str | Sequence[str] | Mapping[str, float],
    drop_unlabelled: bool,
    ignore: Sequence[str],
    min_cells: int,
    among: np.ndarray | None,
) -> list[Task]:
    named = {label: 1.0} if isinstance(label, str) else label
    weights = dict(named) if isinstance(named, Mapping) else dict.fromkeys(named, 1.0)
    if not weights or min(weights.values()) <= 0:
        raise UnsupportedError(f"tasks need a label column and weights above 0, not {weights}")
    check_ignored(tokens, list(weights), ignore)
    # Of several tasks each may have labels that are missing in others.
    may_lack = drop_unlabelled or len(weights) > 1
    return [
        read_task(
            tokens, name, drop_unlabelled=may_lack, ignore=ignore, min_cells=min_cells, weight=float(weight),
            among=among,
        )
        for name, weight in weights.items()
    ]  # fmt: skip


def _losses(tasks: Sequence[Task], loss: str | Mapping[str, str]) -> dict[str, str]:
    if isinstance(loss, str):
        return {task.name: loss for task in tasks}
    unknown = sorted(set(loss) - {task.name for task in tasks})
    if unknown:
        raise UnsupportedError(f"a loss is given for {unknown[0]!r}, which is no label to tell")
    return {task.name: loss.get(task.name, "cross-entropy") for task in tasks}
