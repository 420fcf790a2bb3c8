"""Residual addition with layer normalisation: the public function."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from geneformer_kernels.dispatch import Impl, choose
from geneformer_kernels.ops.residual_layernorm import reference
from geneformer_kernels.target import target_of

NORMS = ("post", "pre")


def residual_layernorm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
    norm: str,
    out_dtype: torch.dtype | None = None,
    impl: Impl | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``total = x + residual; normed = layer_norm(total)``, the stream kept in float32.

    Parameters
    ----------
    x
        [T, C], what the sublayer computed, any floating dtype.
    residual
        [T, C] float32 (float64 for float64 ``x``), the residual stream; None stands for zeros.
    weight, bias
        [C], scale and shift.
    eps
        Added to the variance. 1e-12 vanishes in half precision, one reason why statistics are float32.
    norm
        ``"post"``: the stream goes on normalised (BERT). ``"pre"``: it goes on as the plain sum (AIDO.Cell, Megatron).
    out_dtype
        Dtype of ``out``; None is the dtype of ``x``.
    impl
        ``"torch"`` or ``"reference"``; None chooses.

    Returns
    -------
    stream, out
        [T, C] each: the float32 residual stream to carry on, and the normalised value in ``out_dtype`` to compute on.

    Raises
    ------
    ValueError
        Shapes do not fit or ``norm`` is unknown.

    References
    ----------
    Ba et al., "Layer normalization", arXiv:1607.06450; Xiong et al., "On layer normalization in the transformer
    architecture", arXiv:2002.04745 (post and pre).
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, not {norm!r}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"x {[*x.shape]} and residual {[*residual.shape]} must have one shape")
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(f"weight {[*weight.shape]} and bias {[*bias.shape]} must be [{x.shape[-1]}]")
    out_dtype = out_dtype or x.dtype
    choice = choose("residual_layernorm", str(out_dtype).removeprefix("torch."), target_of(x.device), impl)
    if choice.impl == Impl.REFERENCE:
        return reference.residual_layernorm(x, residual, weight, bias, eps, norm, out_dtype)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.to(wide) if residual is None else residual.to(wide) + x
    normed = F.layer_norm(total, x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return normed if norm == "post" else total, normed.to(out_dtype)
