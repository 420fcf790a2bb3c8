"""Parameters as numpy arrays, for compiled loops."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch


def copied(parameter: torch.Tensor) -> np.ndarray:
    """A parameter's numbers in memory of their own, one after another.

    numpy's view of a storage keeps torch from ever resizing it, and FSDP frees and fills the storages of parameters.
    """
    return cast(np.ndarray, parameter.detach().clone(memory_format=torch.contiguous_format).numpy())
