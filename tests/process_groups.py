"""A process group of one process, for torch's wrappers of models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

#: Groups that were left. Destroying gloo's waits for its threads and holds the GIL meanwhile, and a thread that has
#: reduced gradients takes the GIL to free what their backward pass had pinned (``torch.autograd.graph``): where one
#: follows the other within milliseconds both wait for good. Here they follow each other when Python ends.
_LEFT: list[dist.ProcessGroup] = []


@contextmanager
def group_of_one(folder: Path, backend: str = "gloo") -> Iterator[None]:
    """Within the block this process is a process group; processes meet in the folder."""
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
    if backend == "gloo":
        _LEFT.append(dist.group.WORLD)
    try:
        yield
    finally:
        dist.destroy_process_group()
