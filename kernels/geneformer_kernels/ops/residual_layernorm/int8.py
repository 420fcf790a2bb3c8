"""Residual addition and layer normalisation whose value to compute on leaves as int8 rows."""

from __future__ import annotations

import torch

from geneformer_kernels import int8_rows
from geneformer_kernels.arguments import check_smooth
from geneformer_kernels.dispatch import Impl
from geneformer_kernels.launch import too_wide
from geneformer_kernels.layernorm import added_and_normalised, check_norm
from geneformer_kernels.on_device import choose_for, launching_on, needs_gradient, plainly_on, target_for
from geneformer_kernels.operators import operator
from geneformer_kernels.ops.residual_layernorm import reference
from geneformer_kernels.ops.residual_layernorm.plan import int8_launch, plan
from geneformer_kernels.ranges import ranged


@operator("residual_layernorm_int8")
def residual_layernorm_int8_op(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    smooth: torch.Tensor | None,
    eps: float,
    is_post: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(stream, q, scale) of rows [N, C] by one implementation."""
    x = x.contiguous()  # as the results are
    if impl == Impl.TRITON:
        return _by_kernel(x, residual, weight, bias, smooth, eps, is_post)
    if impl == Impl.NUMBA:
        from geneformer_kernels.cpu.int8_norm import add_layer_norm_int8

        return add_layer_norm_int8(x, residual, weight, bias, smooth, eps, is_post)
    with plainly_on(x):
        if impl == Impl.REFERENCE:
            norm = "post" if is_post else "pre"
            stream, q, scale = reference.residual_layernorm_int8(x, residual, weight, bias, eps, norm, smooth)
        else:
            total, normed = added_and_normalised(x, residual, weight, bias, eps)
            stream, (q, scale) = normed if is_post else total, int8_rows.quantize_rows(normed, smooth)
    # What goes on may be x itself, which an operator must not return.
    return stream.clone() if stream is x else stream, q, scale


@residual_layernorm_int8_op.register_fake
def _(x, residual, weight, bias, smooth, eps, is_post, impl):
    return _empty_outputs(x)


def _empty_outputs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        torch.empty(x.shape, dtype=wide, device=x.device),
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(x.shape[:1], dtype=torch.float32, device=x.device),
    )


def _by_kernel(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    smooth: torch.Tensor | None,
    eps: float,
    is_post: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from geneformer_kernels.ops.residual_layernorm.kernel_int8 import residual_layernorm_int8_kernel

    stream, q, scale = _empty_outputs(x)
    if x.numel():
        chosen = plan(x.shape[0], x.shape[1], target_for(x))
        with launching_on(x):
            residual_layernorm_int8_kernel[(-(-x.shape[0] // chosen.fwd_block_rows),)](
                x_ptr=x,
                residual_ptr=None if residual is None else residual.contiguous(),
                weight_ptr=weight.contiguous(),
                bias_ptr=bias.contiguous(),
                smooth_ptr=None if smooth is None else smooth.float().contiguous(),
                stream_ptr=stream,
                q_ptr=q,
                scale_ptr=scale,
                n_rows=x.shape[0],
                width=x.shape[1],
                eps=eps,
                tiny=int8_rows.TINY,
                IS_POST=is_post,
                BLOCK_ROWS=chosen.fwd_block_rows,
                BLOCK_C=chosen.block_c,
                **int8_launch(chosen).options,
            )
    return stream, q, scale


@ranged("residual_layernorm_int8")
def residual_layernorm_int8(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
    norm: str,
    smooth: torch.Tensor | None = None,
    impl: Impl | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``stream, out = residual_layernorm(x, ...); q, scale = quantize_rows(out * smooth)``, for inference.

    ``out`` is float32 and never in memory where a kernel computes this.

    Parameters
    ----------
    x
        [T, C], what the sublayer computed, any floating dtype. More leading axes are allowed.
    residual
        Shape of ``x``, float32 (float64 for float64 ``x``), the residual stream; None stands for zeros.
    weight, bias
        [C], scale and shift.
    eps
        Added to the variance.
    norm
        ``"post"``: the stream goes on normalised (BERT). ``"pre"``: it goes on as the plain sum (AIDO.Cell, Megatron).
    smooth
        [C] or None: what the rows are multiplied by before they are rounded; the stream is not.
    impl
        ``"triton"`` (C up to 4,096), ``"numba"`` (compiled loops of a CPU), ``"torch"`` or ``"reference"``; None
        chooses.

    Returns
    -------
    stream, q, scale
        The float32 residual stream to carry on, in the shape of ``x``; int8 in that shape; float32 [T]. A row of zeros
        has scale 1, a row with NaN or infinity has scale NaN.

    Raises
    ------
    TypeError
        Something is no tensor, or no number.
    ValueError
        Shapes, dtypes or devices do not fit, ``norm`` is unknown, or ``eps`` is not positive.
    RuntimeError
        A gradient is wanted: :func:`geneformer_kernels.residual_layernorm` has one.
    ImplUnavailableError
        An implementation asked for by name cannot run here.

    References
    ----------
    Ba et al., "Layer normalization", arXiv:1607.06450; Xiao et al., "SmoothQuant", arXiv:2211.10438.
    """
    check_norm(x, residual, weight, bias, eps=eps, norm=norm, dropout_p=0.0, out_dtype=None, seed=None)
    check_smooth("smooth", smooth, x)
    if needs_gradient(x, residual, weight, bias):
        raise RuntimeError("residual_layernorm_int8 has no gradient: use residual_layernorm, or torch.no_grad()")
    width = weight.shape[0]
    chosen = choose_for("residual_layernorm_int8", x, impl, shape={"width": width}, triton_cannot=too_wide(width))
    rows = x.reshape(-1, x.shape[-1])
    stream = None if residual is None else residual.reshape(rows.shape)
    new_stream, q, scale = residual_layernorm_int8_op(rows, stream, weight, bias, smooth, eps, norm == "post", chosen)
    return new_stream.view(x.shape), q.view(x.shape), scale.view(x.shape[:-1])
