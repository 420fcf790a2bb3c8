"""The folder of a run: what it is a run of, its checkpoints, its best weights.

``run.json``
    What a run must agree with to be continued.
``log.jsonl``, ``tensorboard/``
    What it said.
``checkpoints/step-00001000/``
    Where it can be continued.
``best-00001000.safetensors``
    Weights of the best evaluation, where the recipe asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import OutputError
from geneformer_fast.files.writing import remove_leftovers, write_json
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.tokenization.manifest import read_json
from geneformer_fast.training.checkpoint import checkpoints_in
from geneformer_fast.training.distributed import Ranks
from geneformer_fast.training.recipe import MACHINE, Recipe

RUN = "run.json"


class RunFolder:
    """The folder of a run.

    Parameters
    ----------
    path
        Made if absent.
    identity
        From :func:`identity_of_run`.
    is_resuming
        Whether a run in the folder is to be continued.
    ranks
        Of this process; the first one writes.

    Attributes
    ----------
    last
        The checkpoint to continue from, or None.

    Raises
    ------
    OutputError
        The folder holds another run, or one that was not to be continued, or files of something else.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, is_resuming: bool, ranks: Ranks) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; name a folder for the run")
        if (path / RUN).exists():
            if not is_resuming:
                raise OutputError(f"{path} holds a run already; continue it with resume, or name another folder")
            _compare(path / RUN, identity)
        elif path.is_dir() and any(path.iterdir()):
            raise OutputError(f"{path} holds files that are no training run; name another folder")
        ranks.barrier()  # everybody has looked before anybody writes
        if ranks.is_first:
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / RUN, identity)
            remove_leftovers(self.checkpoints)
        ranks.barrier()
        self.last = next(reversed(checkpoints_in(self.checkpoints)), None)

    def weights_of(self, evaluation: Mapping[str, float] | None) -> Path:
        """The file with the weights of an evaluation. It goes by the step, since a checkpoint may be older than it."""
        assert evaluation is not None
        return self.path / f"best-{int(evaluation['step']):08d}.safetensors"

    def forget_all_but(self, best: Mapping[str, float] | None) -> None:
        """Remove weights of evaluations that the last checkpoint does not call the best."""
        for path in self.path.glob("best-*.safetensors"):
            if best is None or path != self.weights_of(best):
                path.unlink()


def identity_of_run(
    model: nn.Module, recipe: Recipe, tokens: TokenFolder, train_cells: np.ndarray, eval_cells: np.ndarray
) -> dict[str, Any]:
    """What decides a run's numbers, in plain values."""
    configs = [module.config.to_dict() for module in model.modules() if isinstance(module, Encoder)]
    vocabulary = tokens.vocabulary or {}
    return {
        "recipe": recipe.to_dict(),
        "config": configs,
        "parameters": {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad},
        "tokens": {
            "n_cells": tokens.n_cells,
            "n_tokens": tokens.n_tokens,
            "vocabulary": vocabulary.get("fingerprint"),
        },
        "train_cells": {"n": len(train_cells), "sha256": _digest(train_cells)},
        "eval_cells": {"n": len(eval_cells), "sha256": _digest(eval_cells)},
    }


def _digest(cells: np.ndarray) -> str:
    return sha256(np.ascontiguousarray(cells, dtype="<i8").tobytes()).hexdigest()


def _compare(path: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to continue another run, naming the first thing that differs."""
    there = read_json(path)
    for key, value in identity.items():
        old = there.get(key)
        if key == "recipe" and isinstance(old, dict):
            for name in value:
                if name not in MACHINE and old.get(name) != value[name]:
                    raise OutputError(
                        f"{path.parent} holds a run with {name} {old.get(name)!r}, not {value[name]!r}: continue it "
                        "with the same recipe, or name another folder"
                    )
        elif old != value:
            raise OutputError(
                f"{path.parent} holds a run of other {key.replace('_', ' ')}: continue it with the same ones, or name "
                "another folder"
            )
