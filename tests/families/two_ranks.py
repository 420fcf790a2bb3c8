"""One of two processes that save tensors in shards of unequal size, as torch plans and writes them."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

SIZES = {
    "module.embedding.word_embeddings.weight": ((33, 6), 0),
    "module.encoder.layers.mlp.linear_fc2.weight": ((2, 6, 9), 2),
    "module.lm_head.dense.bias": ((6,), None),
}


def tensors() -> dict[str, torch.Tensor]:
    """The same in every process."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator) for name, (size, _) in SIZES.items()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    state = {}
    for key, whole in tensors().items():
        axis = SIZES[key][1]
        state[key] = distribute_tensor(whole, mesh, [Replicate() if axis is None else Shard(axis)])
    save(state, storage_writer=FileSystemWriter(sys.argv[1]))
    dist.destroy_process_group()
