"""One optimizer step: pieces in, one update out, without waiting for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from geneformer_fast.config import matmul_dtype, warn_if_emulated
from geneformer_fast.data.batches import Piece
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.training import distributed
from geneformer_fast.training.optimizer import make_optimizer
from geneformer_fast.training.recipe import Recipe


@dataclass
class PendingStep:
    """A step whose numbers are still on the device."""

    step: int
    totals: torch.Tensor
    grad_norm: torch.Tensor
    learning_rate: float
    pieces: list[Piece]


class Engine:
    """Model, optimizer and loss scaling, wrapped for as many processes as there are.

    Parameters
    ----------
    model
        With float32 parameters; sharded in place under ``parallel="fsdp"``.
    loss
        ``Objective.loss``.
    recipe
        Optimizer, precision, clipping, way of sharing.
    ranks
        Of this process.

    Attributes
    ----------
    step
        What is called with a batch: model and loss, wrapped.
    optimizer, scaler
        To save and restore.
    """

    def __init__(
        self, model: nn.Module, loss: distributed.LossFunction, recipe: Recipe, ranks: distributed.Ranks
    ) -> None:
        self.model, self.recipe, self.ranks = model, recipe, ranks
        self.device = next(model.parameters()).device
        self.dtype = matmul_dtype(recipe.precision, self.device) or torch.float32
        if self.dtype != torch.float32 and not torch.amp.is_autocast_available(self.device.type):
            raise UnsupportedError(f"{self.device.type} has no autocast: use precision 'float32'")
        if ranks.is_first:
            warn_if_emulated(self.dtype, self.device, option="precision")
        self.step = distributed.wrapped(model, loss, recipe.parallel, ranks)
        self.optimizer = make_optimizer(model, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Matrix products in the recipe's precision."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield

    def gradients(self, batches: Iterable[tuple[Piece, Any]]) -> torch.Tensor:
        """Accumulate the gradients of this rank's pieces of one step.

        Returns
        -------
        torch.Tensor
            [2] float64 on the device: the loss and the weight summed over all pieces and ranks. Nobody has looked at
            them yet.
        """
        self.optimizer.zero_grad(set_to_none=True)
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for piece, batch in batches:
            batch = self._moved(batch)
            with distributed.accumulating(self.step, piece.index + 1 == piece.n_pieces), self.autocast():
                loss, weight = self.step(batch)
                if piece.is_filler:
                    loss, weight = loss * 0.0, torch.zeros((), device=self.device)
                # The number of tokens is known before the weights are: it keeps sums small enough for float16
                # gradients. The mean over ranks, which wrappers make of gradients, is undone.
                scaled = loss * (self.ranks.world_size / max(1, piece.n_step_tokens))
            self.scaler.scale(scaled).backward()
            totals += torch.stack([loss.detach().double(), torch.as_tensor(weight, device=self.device).double()])
        return self.ranks.sum(totals)

    def normalize(self, n_step_tokens: int, totals: torch.Tensor) -> torch.Tensor:
        """Make the gradients those of the mean loss, clip them, and return their norm before clipping (a scalar)."""
        self.scaler.unscale_(self.optimizer)
        factor = (max(1, n_step_tokens) / totals[1].clamp(min=torch.finfo(torch.float32).tiny)).float()
        gradients = [distributed.local(p.grad) for p in self._parameters if p.grad is not None]
        torch._foreach_mul_(gradients, torch.where(totals[1] > 0, factor, 0.0))
        limit = float("inf") if self.recipe.clip is None else self.recipe.clip
        norm = nn.utils.clip_grad_norm_([p for p in self._parameters if p.grad is not None], limit)
        return distributed.whole(norm)

    def update(self, learning_rate: float) -> None:
        """Let the optimizer step; float16 steps with overflown gradients are left out."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def reshard(self) -> None:
        """Let go of what a forward pass without a backward pass gathered of a sharded model."""
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _moved(self, batch: Any) -> Any:
        if self.device.type == "cuda" and hasattr(batch, "pin_memory"):
            return batch.to(self.device, non_blocking=True)
        return batch.to(self.device)
