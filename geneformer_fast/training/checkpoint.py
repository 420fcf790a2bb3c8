"""Checkpoints of a run: written under a hidden name and renamed, so that each is there whole or not at all.

``model.safetensors`` and ``optimizer.safetensors`` hold whole tensors under their names, however they are sharded in
memory, so that a run may continue on another number of processes; ``random.safetensors`` holds every process's random
states; ``state.json`` the rest, ``SHA256SUMS`` the checksums. Nothing is pickled.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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

MODEL, OPTIMIZER, RANDOM, STATE = "model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_ADVICE = "remove this checkpoint's folder to continue from the one before"
_FINGERPRINT = "fingerprint"
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
    path = folder / f"step-{step:08d}"
    weights = whole_weights(model)
    moments = _flat(get_optimizer_state_dict(model, optimizer, options=_WHOLE))
    randomness = _random_states(ranks)
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
    by_name: dict[str, dict[str, Any]] = {}
    for key, tensor in moments.items():
        name, _, kind = key.rpartition(".")
        by_name.setdefault(name, {})[kind] = tensor
    expected = {name for group in content["param_groups"] for name in group["params"]}
    if by_name.keys() != expected:
        odd = sorted(by_name.keys() ^ expected)[0]
        raise CheckpointError(f"{path / OPTIMIZER}: belongs to another model or other frozen layers (see {odd!r})")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, kinds in by_name.items():
        if any(tensor.ndim and tuple(tensor.shape) != shapes[name] for tensor in kinds.values()):
            raise CheckpointError(f"{path / OPTIMIZER}: {name!r} has another shape than in the model; {_ADVICE}")
    content["state"] = by_name
    states = read_tensors(path / RANDOM, CheckpointError, _ADVICE, sha256=sums.get(RANDOM))
    try:
        set_optimizer_state_dict(model, optimizer, content, options=_WHOLE)
        _restore_random(states, ranks, state["world_size"])
    except torch.OutOfMemoryError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be continued from ({error}); {_ADVICE}") from None
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
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_ADVICE}") from None
    check_digest(state, path / STATE, CheckpointError, _ADVICE)
    return state


def _flat(optimizer_state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """``{parameter}.{moment}`` to tensor; the groups' settings come from the recipe and are not kept."""
    return {
        f"{name}.{kind}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for name, moments in optimizer_state.get("state", {}).items()  # all but the first process get nothing
        for kind, value in moments.items()
    }


def _random_states(ranks: Ranks) -> dict[str, torch.Tensor]:
    """The random states of every process."""
    python = random.getstate()
    numpy: Any = np.random.get_state()  # noqa: NPY002 - whoever uses it goes on where it was
    _, keys, position, has_gauss, gauss = numpy
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python[1], dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if python[2] is None else python[2]], dtype=torch.float64),
        "numpy": torch.from_numpy(np.append(keys.astype(np.int64), [position, has_gauss])),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    device = "cuda" if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl" else "cpu"
    return {
        f"{name}.{rank}": tensor.cpu()
        for name, state in states.items()
        for rank, tensor in enumerate(ranks.gather(state.to(device)))
    }


def _restore_random(states: Mapping[str, torch.Tensor], ranks: Ranks, world_size: int) -> None:
    """Random states of this process; of another number of processes they mean nothing, and the fresh ones stay."""
    if ranks.world_size != world_size:
        return
    own = {name.rpartition(".")[0]: state for name, state in states.items() if name.endswith(f".{ranks.rank}")}
    torch.set_rng_state(own["torch"])
    gauss = float(own["python_gauss"])
    random.setstate((3, tuple(own["python"].tolist()), None if np.isnan(gauss) else gauss))
    *keys, position, has_gauss = own["numpy"].tolist()
    legacy = ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, float(own["numpy_gauss"]))
    np.random.set_state(legacy)  # noqa: NPY002
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])
