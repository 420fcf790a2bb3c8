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


@torch.no_grad()
def sharpen(readers: Sequence[nn.Linear], spread: float) -> None:
    """Weights of queries and keys so large that scores of attention have about that spread, for rows of LayerNorm.

    With fresh weights a token averages all others alike, and one gene of hundreds less changes it by next to nothing:
    less than rounding to 16 bits does.
    """
    for linear in readers:
        linear.weight *= (spread / linear.in_features) ** 0.5 / linear.weight.std()
