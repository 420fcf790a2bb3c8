"""Weights by a formula: what the numeric references in shared/fixtures were made with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch


def formula_weights(
    names: Sequence[str], shapes: Mapping[str, Sequence[int]], is_norm_weight: Callable[[str], bool]
) -> dict[str, torch.Tensor]:
    """float64 tensors 0.35 sin(1 + 0.7 j + 0.13 i) for the j-th name in ascending order and flat index i."""
    tensors = {}
    for j, name in enumerate(sorted(names)):
        size = torch.Size(shapes[name]).numel()
        flat = 0.35 * torch.sin(1.0 + 0.7 * j + 0.13 * torch.arange(size, dtype=torch.float64))
        tensors[name] = (flat + 1.0 if is_norm_weight(name) else flat).reshape(tuple(shapes[name]))
    return tensors
