"""Random weights on which a comparison in few bits means something."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


@torch.no_grad()
def tame(branches: Sequence[nn.Linear]) -> None:
    """Weights of the layers that end an encoder's branches, so that all branches together add what one of them added.

    As GPT-2 begins: divided by the square root of their number, two per block. Random weights without that amplify
    rounding more than trained ones do, the more the deeper, until nothing in few bits agrees with anything.
    """
    for linear in branches:
        linear.weight /= len(branches) ** 0.5
