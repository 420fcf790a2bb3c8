"""Checkpoints of a run: written under a hidden name and renamed, so that each is there whole or not at all.

``model.safetensors`` and ``optimizer.safetensors`` hold whole tensors under their names, however they are sharded in
memory, so that a run may continue on another number of processes; ``random.safetensors`` holds every process's random
states; ``state.json`` the rest, ``SHA256SUMS`` the checksums. Nothing is pickled.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from geneformer_fast.errors import CheckpointError
from geneformer_fast.files.checksums import (
    check_digest,
    fingerprint_of_tensors,
    is_verifying,
    read_sums,
    with_digest,
    write_sums,
)
from geneformer_fast.files.schema import check, read_json, whole
from geneformer_fast.files.tensors import metadata_of, read_tensors
from geneformer_fast.files.writing import system_errors, whole_folder, write_json, write_tensors
from geneformer_fast.training.distributed import Ranks
from geneformer_fast.training.randomness import random_states, read_random

MODEL, OPTIMIZER, RANDOM, STATE = "model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_ADVICE = "remove this checkpoint's folder to continue from the one before"
_FINGERPRINT = "fingerprint"
# What AdamW keeps of a parameter, and whether that is one number.
_MOMENTS = {"step": True, "exp_avg": False, "exp_avg_sq": False}
_NAME = re.compile(r"step-(\d{8,})")


@dataclass
class _Step:
    """What every ``state.json`` says."""

    step: whole(0)  # type: ignore[valid-type]
    world_size: whole(1)  # type: ignore[valid-type]


def checkpoints_in(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    ranks: Ranks,
    *,
    keep: int,
) -> Path:
    """Write a checkpoint, then remove all but the last ``keep``. Every process calls this; the first one writes.

    Parameters
    ----------
    folder
        Where the checkpoints of a run are.
    step
        Steps done.
    model, optimizer
        Sharded or not.
    state
        Plain values to find again.
    ranks
        Of this process.
    keep
        How many checkpoints stay.

    Returns
    -------
    Path
        The checkpoint's folder.
    """
    path = folder / name_of(step)
    weights = whole_weights(model)
    moments = _flat(get_optimizer_state_dict(model, optimizer, options=_WHOLE))
    randomness = random_states(ranks)
    if ranks.is_first:
        with whole_folder(path) as made:
            for name, tensors in {MODEL: weights, OPTIMIZER: moments, RANDOM: randomness}.items():
                write_tensors(made / name, tensors)
            write_sums(made, (MODEL, OPTIMIZER, RANDOM))
            write_json(made / STATE, with_digest({"step": step, "world_size": ranks.world_size, **state}))
        for old in checkpoints_in(folder)[:-keep]:
            with system_errors(old):
                shutil.rmtree(old)
    ranks.barrier()
    return path


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, schema: Any = None
) -> dict[str, Any]:
    """Put model, optimizer and random states where a checkpoint left them.

    Parameters
    ----------
    path
        From :func:`save_checkpoint`.
    model, optimizer
        Sharded or not.
    ranks
        Of this process.
    schema
        What ``state`` must hold, see :mod:`geneformer_fast.files.schema`; None looks at nothing but the step.

    Returns
    -------
    dict
        What ``save_checkpoint`` was given as ``state``, and ``step``.

    Raises
    ------
    CheckpointError
        Files are damaged, or belong to another model.
    """
    state = _read_state(path, schema)
    sums = read_sums(path, CheckpointError) if is_verifying() else {}
    _put_weights(path / MODEL, read_tensors(path / MODEL, CheckpointError, _ADVICE, sha256=sums.get(MODEL)), model)
    moments = read_tensors(path / OPTIMIZER, CheckpointError, _ADVICE, sha256=sums.get(OPTIMIZER))
    content: dict[str, Any] = get_optimizer_state_dict(model, optimizer)  # for its groups, named as the file's state
    learning = {name for group in content["param_groups"] for name in group["params"]}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name in learning}
    content["state"] = _by_parameter(moments, shapes, path / OPTIMIZER)
    states = read_tensors(path / RANDOM, CheckpointError, _ADVICE, sha256=sums.get(RANDOM))
    randomness = read_random(states, ranks, state["world_size"], path / RANDOM)
    set_optimizer_state_dict(model, optimizer, content, options=_WHOLE)
    if randomness is not None:
        randomness.restore()
    return state


def load_weights(path: Path, model: nn.Module) -> None:
    """Load a file of :func:`save_weights` into a model, sharded or not.

    Raises
    ------
    CheckpointError
        The file is damaged, or belongs to another model.
    """
    advice = "begin the run again in another folder"
    weights = read_tensors(path, CheckpointError, advice)
    expected = metadata_of(path).get(_FINGERPRINT) if is_verifying() else None
    if expected is not None and fingerprint_of_tensors(weights) != expected:
        raise CheckpointError(f"{path} is damaged: its tensors do not fit the fingerprint in it; {advice}")
    _put_weights(path, weights, model)


def _put_weights(path: Path, weights: dict[str, Any], model: nn.Module) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(shapes.keys() | weights.keys()):
        found = tuple(weights[name].shape) if name in weights else None
        if found != shapes.get(name):
            raise CheckpointError(f"{path}: {name!r} has shape {found}, but in the model it is {shapes.get(name)}")
    set_model_state_dict(model, weights, options=_WHOLE)


def save_weights(path: Path, model: nn.Module, ranks: Ranks) -> None:
    """Write a model's weights to one file, whole or not at all. Every process calls this; the first one writes."""
    weights = whole_weights(model)
    if ranks.is_first:
        write_tensors(path, weights, {_FINGERPRINT: fingerprint_of_tensors(weights)})
    ranks.barrier()


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights on the CPU, gathered; every process calls this, the first one gets them."""
    weights: Any = get_model_state_dict(model, options=_WHOLE)
    return weights


def _read_state(path: Path, schema: Any) -> dict[str, Any]:
    try:
        state = read_json(path / STATE, CheckpointError, _Step)
        if schema is not None:
            check(schema, state, path / STATE, CheckpointError)
        if path.name != (name := name_of(state["step"])):
            raise CheckpointError(f"{path / STATE}: it is the state of {name}, not of {path.name}")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_ADVICE}") from None
    check_digest(state, path / STATE, CheckpointError, _ADVICE)
    return state


def name_of(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def _by_parameter(
    moments: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, dict[str, torch.Tensor]]:
    """The inverse of :func:`_flat`, for parameters of these shapes."""
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in moments.items():
        name, _, kind = key.rpartition(".")
        by_name.setdefault(name, {})[kind] = tensor
    if odd := sorted(by_name.keys() ^ shapes.keys()):
        raise CheckpointError(f"{path}: belongs to another model or other frozen layers (see {odd[0]!r})")
    for name, kinds in by_name.items():
        for kind in sorted(_MOMENTS.keys() | kinds.keys()):
            wanted = None if kind not in _MOMENTS else [] if _MOMENTS[kind] else list(shapes[name])
            found = list(kinds[kind].shape) if kind in kinds and kinds[kind].is_floating_point() else None
            if found is None or found != wanted:
                raise CheckpointError(f"{path}: {name}.{kind} is not what AdamW keeps of {name}; {_ADVICE}")
    return by_name


def _flat(optimizer_state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """``{parameter}.{moment}`` to tensor; the groups' settings come from the recipe and are not kept."""
    return {
        f"{name}.{kind}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for name, moments in optimizer_state.get("state", {}).items()  # all but the first process get nothing
        for kind, value in moments.items()
    }
