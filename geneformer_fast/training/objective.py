"""What an objective offers to the loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from geneformer_fast.data.random import CellRandom
from geneformer_fast.ragged import Ragged


class Batch(Protocol):
    """What an objective makes of cells; may have ``pin_memory()``, and ``non_blocking=`` in ``to``."""

    @property
    def n_tokens(self) -> int:
        """Tokens in it."""

    def to(self, device: torch.device) -> Any:
        """The same on another device."""


class Objective(Protocol):
    """What is learned. One object serves training and evaluation.

    With an attribute ``is_sharing_evaluation`` that is True, ``metrics`` gets this process's part of the batches and
    adds up what all processes found (``Ranks.current().sum``); without, every process gets all of them. An attribute
    ``chance_loss`` is the loss of calling everything equally likely: far above it, the loop warns.
    """

    def collate(self, tokens: Ragged, cells: np.ndarray, rng: CellRandom) -> Any:
        """Packed int64 tokens of some cells -> a :class:`Batch`; called in loader threads.

        Parameters
        ----------
        tokens
            On the CPU.
        cells
            [B] indices into the token folder, to look labels up.
        rng
            The only randomness to use (``rng.uniform``, ``rng.generator()``): it makes runs reproducible for any number
            of workers, and evaluations equal to each other.
        """

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the loss over its terms, a differentiable scalar; their number or weight, a scalar).

        Under autocast, in training mode. The loop divides by the weights of the whole step. Both are on the model's
        device: make what is counted there with ``torch.full``, for a number that is sent makes a GPU wait.
        """

    def metrics(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """Metrics over all evaluation batches (on the model's device, in order); ``"loss"`` is always there.

        In evaluation mode, without gradients, under autocast.
        """
