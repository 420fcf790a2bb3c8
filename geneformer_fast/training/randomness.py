"""The random states of a run's processes: as tensors for a checkpoint, and back."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geneformer_fast.errors import CheckpointError
from geneformer_fast.training.distributed import Ranks

_N_KEYS = 624  # of a Mersenne twister, each of 32 bits


def random_states(ranks: Ranks) -> dict[str, torch.Tensor]:
    """The random states of every process; every process calls this."""
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


@dataclass(frozen=True)
class RandomStates:
    """The random states of one process, seen to be such."""

    torch_state: torch.Tensor
    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    cuda: torch.Tensor | None

    def restore(self) -> None:
        """Go on from them."""
        torch.set_rng_state(self.torch_state)
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # type: ignore[arg-type]  # noqa: NPY002
        if self.cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.cuda)


def read_random(states: Mapping[str, torch.Tensor], ranks: Ranks, world_size: int, path: Path) -> RandomStates | None:
    """Random states of this process; None of another number of processes: they mean nothing, and the fresh ones stay.

    Raises
    ------
    CheckpointError
        One is missing or can be no such state. No generator has been touched.
    """
    if ranks.world_size != world_size:
        return None

    def state(name: str, dtype: torch.dtype, n: int | None) -> torch.Tensor:
        found = states.get(f"{name}.{ranks.rank}")
        if found is None or found.dtype != dtype or found.ndim != 1 or (n is not None and len(found) != n):
            what = "missing" if found is None else f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
            raise CheckpointError(f"{path}: the random state {name}.{ranks.rank} is {what}; {_ADVICE}")
        return found

    def refuse(name: str) -> CheckpointError:
        return CheckpointError(f"{path}: the random state {name}.{ranks.rank} is out of its range; {_ADVICE}")

    torch_state = state("torch", torch.uint8, None)
    try:
        torch.Generator().set_state(torch_state)
    except RuntimeError:
        raise refuse("torch") from None
    python = state("python", torch.int64, _N_KEYS + 1).tolist()
    if not _is_twister(python[:-1], python[-1]):
        raise refuse("python")
    gauss = float(state("python_gauss", torch.float64, 1))
    *keys, position, has_gauss = state("numpy", torch.int64, _N_KEYS + 2).tolist()
    if not _is_twister(keys, position) or has_gauss not in (0, 1):
        raise refuse("numpy")
    numpy_gauss = float(state("numpy_gauss", torch.float64, 1))
    if math.isinf(gauss) or not math.isfinite(numpy_gauss):
        raise refuse("python_gauss" if math.isinf(gauss) else "numpy_gauss")
    cuda = state("cuda", torch.uint8, 16) if f"cuda.{ranks.rank}" in states else None
    return RandomStates(
        torch_state,
        (3, tuple(python), None if math.isnan(gauss) else gauss),
        ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, numpy_gauss),
        cuda,
    )


_ADVICE = "remove this checkpoint's folder to continue from the one before"


def _is_twister(keys: list[int], position: int) -> bool:
    return all(0 <= key < 2**32 for key in keys) and 0 <= position <= _N_KEYS
