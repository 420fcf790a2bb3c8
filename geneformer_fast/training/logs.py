"""What a run says while it goes: JSON lines, TensorBoard, Weights & Biases, progress."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.files.writing import system_errors, whole_file
from geneformer_fast.progress import Progress
from geneformer_fast.training.recipe import Recipe
from geneformer_fast.training.weights_and_biases import WeightsAndBiases, library

LOG = "log.jsonl"


class Log(Protocol):
    """Receives what is known after steps and evaluations."""

    @property
    def is_active(self) -> bool:
        """Whether anybody looks."""

    def step(self, values: Mapping[str, Any]) -> None:
        """Values of one step; ``step`` says which."""

    def evaluation(self, values: Mapping[str, Any]) -> None:
        """Metrics of one evaluation; ``step`` says after which step."""

    def close(self) -> None:
        """Nothing comes any more."""


class JsonLines:
    """``log.jsonl``: one JSON object per line, written at once. Numbers that are not finite are null.

    Parameters
    ----------
    folder
        Of the run.
    first_step
        Lines of later steps are removed: a run that continues from a checkpoint makes them again.
    """

    is_active = True

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        self._path = folder / LOG
        kept = _lines(self._path, first_step)
        with whole_file(self._path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        # Unbuffered: what cannot be written is known at once, and nothing waits to fail when the file is closed.
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - open for the whole run

    def step(self, values: Mapping[str, Any]) -> None:
        """One line."""
        self._write({"kind": "step", **values})

    def evaluation(self, values: Mapping[str, Any]) -> None:
        """One line."""
        self._write({"kind": "evaluation", **values})

    def _write(self, values: Mapping[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and v - v != 0 else v for k, v in values.items()}
        line = memoryview((json.dumps(finite, allow_nan=False) + "\n").encode())
        with system_errors(self._path):
            while line:
                line = line[self._file.write(line) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines(path: Path, last_step: int) -> list[str]:
    """Whole lines of a log up to a step; the last one may have been cut off by a kill or a full disk."""
    if not path.exists():
        return []
    kept, n_damaged = [], 0
    whole = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    for line in whole:
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            n_damaged += 1
    if n_damaged:
        warnings.warn(f"{path}: {n_damaged} damaged lines are left out; training does not depend on them", stacklevel=3)
    return kept


class TensorBoard:
    """Event files in ``tensorboard/``."""

    is_active = True

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UnsupportedError(
                "TensorBoard is not installed here: pip install 'geneformer-fast[train]', or leave it off"
            ) from None
        self._path = folder / "tensorboard"
        # Events of steps that are made again are taken out of the charts.
        with system_errors(self._path):
            self._writer = SummaryWriter(str(self._path), purge_step=first_step + 1 if first_step else None)
        self._hook = threading.excepthook
        threading.excepthook = self._of_writer

    def step(self, values: Mapping[str, Any]) -> None:
        """Scalars under ``train/``."""
        self._add("train", values)

    def evaluation(self, values: Mapping[str, Any]) -> None:
        """Scalars under ``evaluation/``."""
        self._add("evaluation", values)

    def _add(self, group: str, values: Mapping[str, Any]) -> None:
        with system_errors(self._path):  # of the thread that writes, whose errors come with the next value
            for name, value in values.items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(f"{group}/{name}", value, values["step"])

    def close(self) -> None:
        """Write what is left."""
        try:
            with system_errors(self._path):
                self._writer.close()
        finally:
            if threading.excepthook == self._of_writer:
                threading.excepthook = self._hook

    def _of_writer(self, args: threading.ExceptHookArgs) -> None:
        """What the thread that writes cannot write comes with the next value, and needs no traceback of its own."""
        is_said = isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")
        if not is_said:
            self._hook(args)


class Bar:
    """Progress with loss, tokens per second and, where it is known, the share of the peak (MFU)."""

    def __init__(self, n_steps: int, first_step: int, progress: bool | None) -> None:
        self._bar = Progress(n_steps, "training", "steps", progress, initial=first_step)
        self.is_active = self._bar.is_active

    def step(self, values: Mapping[str, Any]) -> None:
        """Move on."""
        shown = {"loss": f"{values['loss']:.3f}", "tokens/s": f"{values['tokens_per_s']:,.0f}"}
        if values.get("mfu") is not None:
            shown["MFU"] = f"{values['mfu']:.0%}"
        self._bar.update(values["step"] - self._bar.n, **shown)

    def evaluation(self, values: Mapping[str, Any]) -> None:
        """A line above the bar, or one of the log."""
        known = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if k != "step" and isinstance(v, float))
        self._bar.write(f"evaluation after step {values['step']:,}: {known}")

    def close(self) -> None:
        """End of the bar."""
        self._bar.close()


def check_logs(recipe: Recipe) -> None:
    """Refuse, before anything is made, to report to what is not installed.

    Raises
    ------
    UnsupportedError
        Names it.
    """
    if recipe.wandb is not None:
        library()


def logs_of(recipe: Recipe, n_steps: int, first_step: int, folder: Path | None) -> list[Log]:
    """Everything that is told of a run's steps.

    Parameters
    ----------
    recipe
        Says what.
    n_steps, first_step
        Of the run, and done before.
    folder
        Of the run; without one only progress is shown.
    """
    logs: list[Log] = [Bar(n_steps, first_step, recipe.progress)]
    if folder is not None:
        logs.append(JsonLines(folder, first_step))
        if recipe.tensorboard:
            logs.append(TensorBoard(folder, first_step))
        if recipe.wandb is not None:
            logs.append(WeightsAndBiases(folder, recipe.wandb, recipe.to_dict()))
    return logs
