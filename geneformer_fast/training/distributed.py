"""Several processes: who we are, sums over all of us, and models wrapped by torch's DDP or FSDP2.

Processes come from ``torchrun``; collectives, replication and sharding are torch's (Li et al., "PyTorch Distributed",
arXiv:2006.15704; Zhao et al., "PyTorch FSDP", arXiv:2304.11277).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from geneformer_fast.config import device_named, usable_device
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.ragged import Ragged

LossFunction = Callable[[nn.Module, Any], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is.

    Attributes
    ----------
    rank, world_size
        0 and 1 where there is one process only.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Those of the default process group, or a single one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of everybody's tensor, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Everybody's tensor; they all have one shape."""
        if self.world_size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return gathered

    def first(self, value: float, device: torch.device) -> float:
        """The first process's value."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=device)
        dist.broadcast(tensor, 0)
        return float(tensor)

    def whole_numbers_of_first(self, values: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """The first process's [N, k] int64, on the host; all others give None."""
        if self.world_size == 1:
            assert values is not None
            return values
        given = torch.zeros((0, 0), dtype=torch.int64) if values is None else values
        shape = torch.tensor(given.shape, dtype=torch.int64, device=device)
        dist.broadcast(shape, 0)
        found = given.to(device) if self.is_first else torch.zeros(shape.tolist(), dtype=torch.int64, device=device)
        dist.broadcast(found, 0)
        return found.cpu()

    def barrier(self) -> None:
        """Wait for everybody."""
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[Ranks]:
    """Join the others where torchrun started us, and leave them at the end; without torchrun we are alone."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield Ranks.current()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks.current()
    finally:
        # gloo's threads take the GIL to free what a backward pass had pinned (torch.autograd.graph), and whoever
        # destroys their group holds the GIL and waits for them: for good, where an error leads here right after a
        # backward pass. While we sleep the GIL is theirs.
        time.sleep(0.1)
        dist.destroy_process_group()


def local_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; by default a GPU if there is one, under torchrun this process's own."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = device_named(device)
    if device.type == "cuda" and device.index is None:
        is_there = torch.cuda.is_available()
        index = os.environ.get("LOCAL_RANK", torch.cuda.current_device() if is_there else 0)
        device = torch.device("cuda", int(index))
    device = usable_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


class Step(nn.Module):
    """A model and its objective as one module, so that whatever wraps it sees everything the loss uses."""

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch -> (sum of its losses, their number or weight)."""
        return self._loss(self.model, batch)


def wrapped(model: nn.Module, loss: LossFunction, parallel: str, ranks: Ranks) -> nn.Module:
    """A model ready for its part of every step.

    Parameters
    ----------
    model
        Shared in place where it is sharded.
    loss
        The objective's.
    parallel
        ``"ddp"`` or ``"fsdp"``; a single process needs neither.
    ranks
        Of this process.

    Returns
    -------
    torch.nn.Module
        Called with a batch; its gradients come out as the mean over ranks.
    """
    step = Step(model, loss)
    if ranks.world_size == 1:
        return step
    if parallel == "ddp":
        device = next(model.parameters()).device
        return nn.parallel.DistributedDataParallel(step, device_ids=[device] if device.type == "cuda" else None)
    shard(model)
    return step


def shard(model: nn.Module) -> None:
    """Shard a model's parameters over all processes, block by block (``torch.distributed.fsdp.fully_shard``).

    Pre-norm blocks read the LayerNorm of the block after them, so that those models are gathered as a whole.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.utils import _pytree

    if Ragged not in _pytree.SUPPORTED_NODES:
        # FSDP looks for the tensors that leave a module, to know where the backward pass comes in.
        _pytree.register_pytree_node(
            Ragged,
            lambda cells: ([cells.values, cells.cu_seqlens], cells.max_len),
            _ragged_of,
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedError("a model on the meta device has no weights to shard")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, 0)  # as DDP does: all start from the first process's weights
    for encoder in (module for module in model.modules() if isinstance(module, Encoder)):
        if encoder.config.norm == "post":
            for block in encoder.blocks:
                fully_shard(block)
    fully_shard(model)


def _ragged_of(tensors: Iterable[Any], max_len: Any) -> Ragged:
    values, cu_seqlens = tensors
    return Ragged(values, cu_seqlens, max_len)


@contextlib.contextmanager
def accumulating(step: nn.Module, is_last: bool) -> Iterator[None]:
    """Leave the exchange of gradients to a step's last piece."""
    if isinstance(step, nn.parallel.DistributedDataParallel) and not is_last:
        with step.no_sync():
            yield
    else:
        yield


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor, or the tensor."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered, or the tensor."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
