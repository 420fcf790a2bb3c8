"""A linear layer: the public function."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from geneformer_kernels.arguments import FLOATS, check_optional, check_tensor
from geneformer_kernels.cpu import onednn
from geneformer_kernels.cpu.onednn import is_for_onednn, onednn_linear
from geneformer_kernels.dispatch import Impl
from geneformer_kernels.on_device import choose_for, why_float32_loops_are_slow, why_not_float32_loops
from geneformer_kernels.ops.linear import reference
from geneformer_kernels.ranges import ranged
from geneformer_kernels.workspace import Workspace


@ranged("linear")
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
        ``"numba"`` (compiled loops of float32 on a CPU with AVX2, without a gradient), ``"torch"`` or ``"reference"``;
        None chooses.

    Returns
    -------
    torch.Tensor
        [T, N] in the dtype of ``x`` (of autocast, where that is on).

    Raises
    ------
    TypeError
        Something is no tensor.
    ValueError
        Shapes, dtypes or devices do not fit.
    """
    check_tensor("x", x, FLOATS)
    check_tensor("weight", weight, FLOATS, device=x.device)
    check_optional("bias", bias, FLOATS, device=x.device)
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {[*x.shape]} and weight {[*weight.shape]} do not fit: [T, C] and [N, C] are needed")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {[*bias.shape]} must be [{weight.shape[0]}]")
    for name, each in (("weight", weight), ("bias", bias)):
        # Autocast makes one dtype of them.
        if each is not None and each.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{name} must be {x.dtype} as x is, not {each.dtype}")
    chosen = _chosen(x, weight, bias, impl)
    if chosen == Impl.REFERENCE:
        return reference.linear(x, weight, bias)
    if chosen == Impl.NUMBA:
        # Imported late: numba is needed on this branch only.
        from geneformer_kernels.cpu import float32_products

        return float32_products.linear(x, weight, bias)
    if is_for_onednn(x, weight, bias):
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_workspace(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Workspace:
    """Of :func:`linear` of rows such as ``x``, of which none need be there, in inference on a CPU; else nothing."""
    if x.device.type != "cpu":
        return Workspace()
    if _chosen(x, weight, bias, None) == Impl.NUMBA:
        from geneformer_kernels.cpu import float32_products

        return float32_products.workspace([(weight.shape[0], weight.shape[1])])
    return onednn.workspace(weight)


def _chosen(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, impl: Impl | str | None) -> str:
    cannot = _why_not_loops(x, weight, bias) or why_float32_loops_are_slow("linear", impl, x.shape[1])
    return choose_for("linear", x, impl, numba_cannot=cannot)


def _why_not_loops(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str:
    if weight.shape[0] % 16 or not weight.numel():
        return "the compiled loops make multiples of 16 columns"
    return why_not_float32_loops(x, weight, bias)
