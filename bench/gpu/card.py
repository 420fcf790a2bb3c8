"""What a result on a card says of it, and what the card reaches at most, as the profiler measures both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bench.gpu.sources import tree_digest
from bench.machine import provenance
from geneformer_fast.profiling.ceilings import copy_ceiling, product_ceiling
from geneformer_fast.profiling.figures import Missing
from geneformer_fast.profiling.machine import card

# What a result depends on; a number can be traced to a commit by this even where git was not there.
_SOURCES = ("kernels", "geneformer_fast", "bench")
# For each ceiling: of a case, of the case that measures nothing else, and where nothing is measured.
_SECONDS, _SECONDS_THOROUGH, _SECONDS_TINY = 0.5, 1.5, 0.005


def gpu_provenance(device: torch.device) -> dict[str, Any]:
    """As :func:`bench.machine.provenance`, with the card and a digest of the sources."""
    return {**provenance(), "source": source_digest(), "gpu": card(device)}


def source_digest(folders: Sequence[str] = _SOURCES) -> str:
    """12 hexadecimal digits over all Python files of the folders."""
    return tree_digest(folders)


def half_dtype(device: torch.device) -> torch.dtype:
    """The 16-bit dtype that the device multiplies fast; float32 on a CPU, where nothing is measured."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def ceilings(device: torch.device, *, is_tiny: bool = False, is_thorough: bool = False) -> dict[str, float]:
    """What the card reaches now: T operations/s of large matrix products, GB/s (read and written) of a large copy.

    They are the profiler's (:mod:`geneformer_fast.profiling.ceilings`). Every case measures them in its own process, so
    that a card that was slow that minute is not taken for a slow kernel.

    Raises
    ------
    RuntimeError
        One of them cannot be measured.
    """
    seconds = _SECONDS_TINY if is_tiny else _SECONDS_THOROUGH if is_thorough else _SECONDS
    dtype = str(half_dtype(device)).removeprefix("torch.")
    found = {
        "product_tflops": product_ceiling(device, dtype, seconds=seconds),
        "copy_gbps": copy_ceiling(device, seconds=seconds),
    }
    if device.type == "cuda":
        found["int8_product_tflops"] = product_ceiling(device, "int8", seconds=seconds)
    numbers = {name: float(f"{value:.5g}") for name, value in found.items() if not isinstance(value, Missing)}
    for name in ("product_tflops", "copy_gbps"):  # a card may have no product of int8
        if name not in numbers:
            raise RuntimeError(f"{name} of {device}: {found[name]}")
    return numbers
