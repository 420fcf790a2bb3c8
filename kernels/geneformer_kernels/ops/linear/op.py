"""A linear layer: the public function."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from geneformer_kernels.dispatch import Impl
from geneformer_kernels.on_device import choose_for
from geneformer_kernels.onednn import is_for_onednn, onednn_linear
from geneformer_kernels.ops.linear import reference


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, impl: Impl | str | None = None
) -> torch.Tensor:
    """``x @ weight.T + bias``.

    Parameters
    ----------
    x
        [T, C].
    weight, bias
        [N, C] and [N] or None.
    impl
        ``"torch"`` or ``"reference"``; None chooses.

    Returns
    -------
    torch.Tensor
        [T, N] in the dtype of ``x`` (of autocast, where that is on).

    Raises
    ------
    ValueError
        Shapes do not fit.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {[*x.shape]} and weight {[*weight.shape]} do not fit: [T, C] and [N, C] are needed")
    if choose_for("linear", x, impl) == Impl.REFERENCE:
        return reference.linear(x, weight, bias)
    if is_for_onednn(x, weight, bias):
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)
