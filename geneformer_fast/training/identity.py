"""What a run is a run of: everything that decides its numbers, so that it is continued with the same or not at all."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import OutputError
from geneformer_fast.files.checksums import fingerprint_of_tensors
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.training.recipe import MACHINE, RENAMED, Recipe

#: Fingerprints of content, and what they are of. Runs of earlier versions have none.
CONTENT = {
    "tokens_content": "tokens",
    "eval_tokens_content": "tokens to evaluate on",
    "weights": "weights to begin with",
    "splits": "splits",
    "data": "labels or splits",
    "search": "search",
}
#: Which cells were selected, in plain values. Fingerprints hold them too, so that runs of earlier versions need no such
#: entry.
SELECTION = "selection"


def identity_of_run(
    model: nn.Module,
    recipe: Recipe,
    tokens: TokenFolder,
    eval_tokens: TokenFolder,
    train_cells: np.ndarray,
    eval_cells: np.ndarray,
    weights: str | None = None,
) -> dict[str, Any]:
    """What decides a run's numbers, in plain values.

    ``weights`` stands for what the model began with; None takes the fingerprint of what is in it now.
    """
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
        "tokens_content": tokens.content_fingerprint,
        "eval_tokens_content": None if eval_tokens is tokens else eval_tokens.content_fingerprint,
        "train_cells": {"n": len(train_cells), "sha256": _digest(train_cells)},
        "eval_cells": {"n": len(eval_cells), "sha256": _digest(eval_cells)},
        "weights": fingerprint_of_tensors(model.state_dict()) if weights is None else weights,
    }


def check_same(folder: Path, there: Mapping[str, Any], asked: Mapping[str, Any], *, what: str) -> None:
    """Refuse to continue another run, naming the first thing that differs.

    What the machine may choose (:data:`~geneformer_fast.training.recipe.MACHINE`) may differ. Of a run of an earlier
    version, old names of fields are read as the new ones, and fingerprints that it lacks are taken on trust, with a
    warning.

    Parameters
    ----------
    folder
        Of the run.
    there, asked
        What it was begun with, and what is to go on.
    what
        What the run is called, such as ``"run"``.

    Raises
    ------
    OutputError
        They differ.
    """
    unknown = []
    for key, value in asked.items():
        if key in CONTENT and key not in there:
            unknown += [] if value is None else [CONTENT[key]]
            continue
        if key == SELECTION and key not in there:
            continue
        old, value = current_names(there.get(key)), json.loads(json.dumps(value))  # a list in a file was a tuple
        if key == "recipe" and isinstance(old, dict):
            for name in value:
                if name not in MACHINE and old.get(name) != value[name]:
                    raise OutputError(
                        f"{folder} holds a {what} with {name} {old.get(name)!r}, not {value[name]!r}: continue it with "
                        "the same recipe, or name another folder"
                    )
        elif old != value and key == "data" and "splits" in asked and "splits" not in there:
            raise OutputError(
                f"{folder} holds a {what} of an earlier version, with other labels or splits: it divided groups "
                "otherwise. Go on with that version, or name another folder"
            )
        elif old != value:
            raise OutputError(_differing(folder, what, key, old, value))
    if unknown:
        warnings.warn(
            f"{folder} holds a {what} of an earlier version, which did not write down what its {' and '.join(unknown)} "
            "held: it goes on in the belief that they are the same",
            stacklevel=2,
        )


def current_names(values: Any) -> Any:
    """What an earlier version wrote down of a recipe or a search, by the names that its fields have now."""
    if not isinstance(values, dict):
        return values
    return {RENAMED.get(name, name): current_names(value) for name, value in values.items()}


def _differing(folder: Path, what: str, key: str, old: Any, value: Any) -> str:
    """What to say of two values: both, where they can be read."""
    ending = "continue it with the same, or name another folder"
    named = CONTENT.get(key, key.replace("_", " "))
    if key in CONTENT and all(entry is None or isinstance(entry, str) for entry in (old, value)):
        return f"{folder} holds a {what} of other {named}, however alike they look: {ending}"
    if isinstance(old, str | int | float | None) and isinstance(value, str | int | float | None):
        return f"{folder} holds a {what} with {named} {_short(old)}, not {_short(value)}: {ending}"
    if isinstance(old, dict) and isinstance(value, dict) and not {"sha256", "n_cells"} & old.keys():
        odd = {name for name in old.keys() | value.keys() if old.get(name) != value.get(name)}
        old, value = ({name: entry[name] for name in sorted(odd) if name in entry} for entry in (old, value))
        return f"{folder} holds a {what} with {named} {_short(old)}, not {_short(value)}: {ending}"
    return f"{folder} holds a {what} of other {named}: {ending}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _digest(cells: np.ndarray) -> str:
    return sha256(np.ascontiguousarray(cells, dtype="<i8").tobytes()).hexdigest()
