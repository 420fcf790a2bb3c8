"""The folder of a fine-tuning: what was asked for, what each fold gave, scores, pictures, and the model.

``finetune.json``
    What was asked for; a killed run goes on only with the same.
``splits.json``
    How many cells, groups and cells of every class are in every part of every fold.
``folds/fold-1/``
    ``predictions.parquet`` and ``scores.json`` of a finished fold, with their checksums; ``run/``, checkpoints of one
    that is not.
``predictions.parquet``, ``scores.json``, ``confusion.png``, ``roc.png``
    Of all test cells (or genes).
``final/``
    The model, as transformers loads it.
``adapter/``
    What a fine-tuning by LoRA learned, as PEFT loads it.
``search.db``
    Trials of a hyperparameter search.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geneformer_fast.errors import OutputError
from geneformer_fast.files.checksums import DIGEST, check_digest, check_file, is_verifying, sha256_of, with_digest
from geneformer_fast.files.locks import folder_lock
from geneformer_fast.files.schema import number, read_json, whole
from geneformer_fast.files.writing import write_json
from geneformer_fast.finetuning.lora import FOLDER as ADAPTER
from geneformer_fast.finetuning.search import STORAGE
from geneformer_fast.training.checkpoint import checkpoints_in
from geneformer_fast.training.identity import check_same
from geneformer_fast.training.occupied import FINETUNING, RESUME, check_finetuning_folder, check_is_no_file
from geneformer_fast.training.profiled import FOLDER as PROFILE
from geneformer_fast.training.run_folder import remove_unfinished

ASKED, SPLITS, SCORES, PREDICTIONS, FINAL, FOLDS, RUN = (
    *(FINETUNING, "splits.json", "scores.json", "predictions.parquet", "final", "folds", "run"),
)

_PREDICTED = "predictions_sha256"
_AGAIN = "remove its folder to make that fold again"


@dataclass(frozen=True)
class Finetuned:
    """What a fine-tuning made.

    Attributes
    ----------
    folder
        Where everything is.
    model
        Folder of the model, which :func:`geneformer_fast.predict` and transformers load; None if none was asked for.
    scores
        Contents of ``scores.json``.
    """

    folder: Path
    model: Path | None
    scores: dict[str, Any]

    @property
    def predictions(self) -> Path:
        """Parquet file with truth, prediction and probabilities of every cell (or gene) that was tested."""
        return self.folder / PREDICTIONS

    def __repr__(self) -> str:
        tested = f"{self.scores['n']:,} {self.scores['of']} tested" if self.scores["tasks"] else "nothing tested"
        return f"Finetuned({str(self.folder)!r}: {', '.join(self.scores['tasks']) or 'no scores'}, {tested})"

    def __str__(self) -> str:
        if not self.scores["tasks"]:
            said = f"no {self.scores['of']} were held out for testing (a test_share of 0), so there are no scores"
            return f"{said} -> {self.folder}"
        lines = [f"{'':<24}{'accuracy':>16}{'macro-F1':>16}{'ROC AUC':>16}"]
        for name, task in self.scores["tasks"].items():
            lines.append(f"{name[:22]:<24}" + "".join(f"{_shown(task, key):>16}" for key in _SHOWN))
        n_folds = self.scores["n_folds"]
        told = f"mean ± standard deviation of {n_folds} folds" if n_folds > 1 else "held-out test set"
        lines.append(f"({told}; {self.scores['n']:,} {self.scores['of']}) -> {self.folder}")
        return "\n".join(lines)


_SHOWN = ("accuracy", "macro_f1", "roc_auc")


def _shown(task: Mapping[str, Any], key: str) -> str:
    value = task["over_folds"].get(key)
    if value is None:
        return "-"
    return f"{value['mean']:.3f}" + ("" if value["sd"] is None else f" ± {value['sd']:.3f}")


@contextlib.contextmanager
def out_folder(path: Path, asked: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Iterator[OutFolder]:
    """The folder of one fine-tuning, into which nobody else writes meanwhile.

    Raises
    ------
    OutputError
        As :class:`OutFolder`; or another process is writing there.
    """
    check_is_no_file(path)
    with folder_lock(path):
        yield OutFolder(path, asked, resume=resume, overwrite=overwrite)


class OutFolder:
    """The folder of one fine-tuning, locked by :func:`out_folder`.

    Parameters
    ----------
    path
        Made if absent.
    asked
        What decides the result, in plain values.
    resume, overwrite
        Whether to go on with what is there, or to remove it.

    Raises
    ------
    OutputError
        The folder holds a fine-tuning already, another one than is to be resumed, or files of something else.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.path = path
        check_finetuning_folder(path, is_resuming=resume, is_replacing=overwrite)
        if (path / ASKED).exists():
            if overwrite:
                self._clear()
            else:
                check_same(path, read_json(path / ASKED, OutputError), asked, what="fine-tuning")
        for folder in (path, *(path / FOLDS).glob("*")):
            remove_unfinished(folder)
        write_json(path / ASKED, asked)
        #: Stands for the pretrained weights.
        self.begins_with: str | None = asked.get("weights")

    @property
    def search(self) -> Path:
        """File of search trials."""
        return self.path / STORAGE

    @property
    def final(self) -> Path:
        """Folder of the model."""
        return self.path / FINAL

    @property
    def adapter(self) -> Path:
        """Folder of what LoRA learned."""
        return self.path / ADAPTER

    def fold(self, name: str) -> Path:
        """Folder of one fold, made if absent."""
        folder = self.path / FOLDS / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _clear(self) -> None:
        for name in (FOLDS, FINAL, ADAPTER, PROFILE):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for pattern in (SPLITS, SCORES, PREDICTIONS, STORAGE, "confusion*.png", "roc*.png"):
            for file in self.path.glob(pattern):
                file.unlink()


@dataclass
class _Part:
    """What is summed up of one task's scores in a fold."""

    accuracy: number(0, 1)  # type: ignore[valid-type]
    macro_f1: number(0, 1)  # type: ignore[valid-type]
    roc_auc: number(0, 1) | None  # type: ignore[valid-type]
    confusion: list[list[whole(0)]]  # type: ignore[valid-type]


@dataclass
class _Fold:
    """What is read of a fold's scores."""

    fold: whole(1)  # type: ignore[valid-type]
    tasks: dict[str, _Part] | None = None
    roc: dict[str, list[float] | None] | None = None
    predictions_sha256: str | None = None


def write_fold(place: Path, scores: Mapping[str, Any]) -> None:
    """Write the scores of a fold, whose predictions are there already: with them it is finished."""
    content = json.loads(json.dumps(scores))  # as they are read again
    if (place / PREDICTIONS).exists():
        content[_PREDICTED] = sha256_of(place / PREDICTIONS)
    write_json(place / SCORES, with_digest(content))


def read_fold(place: Path) -> dict[str, Any]:
    """The scores of a finished fold.

    Raises
    ------
    OutputError
        They, or its predictions, are not what was written.
    """
    path, predictions = place / SCORES, place / PREDICTIONS
    try:
        scores = read_json(path, OutputError, _Fold)
    except OutputError as error:
        raise OutputError(f"{error}; or {_AGAIN}") from None
    check_digest(scores, path, OutputError, _AGAIN)
    if _PREDICTED in scores and predictions.exists() and is_verifying():
        check_file(predictions, scores[_PREDICTED], OutputError, _AGAIN)
    return {key: value for key, value in scores.items() if key not in (_PREDICTED, DIGEST)}


def interrupted_message(folder: Path) -> str:
    """What to say when a fine-tuning is interrupted: how far it is, and how to go on."""
    if not (folder / ASKED).exists():
        return "nothing was written yet; run the same command again"
    done = len(list((folder / FOLDS).glob(f"*/{SCORES}")))
    said = [f"{done} fold{'s are' if done != 1 else ' is'} finished"]
    for run in (folder / FOLDS).glob(f"*/{RUN}"):
        if there := checkpoints_in(run / "checkpoints"):
            said.append(f"the last checkpoint of {run.parent.name} is of step {int(there[-1].name[5:]):,}")
    return f"{'; '.join(said)}, in {folder}; run the same command with {RESUME} to go on"
