"""Residual addition with dropout and layer normalisation: the public function, and the Triton kernels as operators."""

from __future__ import annotations

from typing import Any

import torch

from geneformer_kernels.dispatch import Impl
from geneformer_kernels.dropout import dropout, keep_scale
from geneformer_kernels.launch import too_wide
from geneformer_kernels.layernorm import added_and_normalised, check_norm
from geneformer_kernels.on_device import (
    choose_for,
    draw_seed,
    is_one_pass,
    launching_on,
    needs_gradient,
    target_for,
    why_not_float32_loops,
)
from geneformer_kernels.operators import operator
from geneformer_kernels.ops.residual_layernorm import reference
from geneformer_kernels.ops.residual_layernorm.plan import plan
from geneformer_kernels.ranges import ranged
from geneformer_kernels.workspace import Workspace


@operator("residual_layernorm_fwd")
def residual_layernorm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    seed: torch.Tensor | None,
    eps: float,
    is_post: bool,
    dropout_p: float,
    out_dtype: torch.dtype,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(stream, out, total, mean, rstd) of rows [N, C] by the Triton kernel; ``seed`` None: no dropout.

    What would equal another tensor, or is not needed, is empty: stream where it is ``x``, out where it is the stream,
    total where it is the stream or without ``needs_grad``, the statistics without ``needs_grad``.
    """
    from geneformer_kernels.ops.residual_layernorm.kernel import residual_layernorm_fwd_kernel

    outputs = _empty_outputs(x, residual, seed, is_post, out_dtype, needs_grad)
    if x.numel():
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        stream, out, total, mean, rstd = (each if each.numel() else None for each in outputs)
        chosen = plan(x.shape[0], x.shape[1], target_for(x))
        with launching_on(x):
            residual_layernorm_fwd_kernel[(-(-x.shape[0] // chosen.fwd_block_rows),)](
                x_ptr=x,
                residual_ptr=None if residual is None else residual.contiguous(),
                weight_ptr=weight,
                bias_ptr=bias,
                seed_ptr=seed,
                stream_ptr=stream,
                out_ptr=out,
                total_ptr=total,
                mean_ptr=mean,
                rstd_ptr=rstd,
                n_rows=x.shape[0],
                width=x.shape[1],
                eps=eps,
                threshold=round(dropout_p * 65536),
                keep_scale=keep_scale(dropout_p),
                IS_POST=is_post,
                BLOCK_ROWS=chosen.fwd_block_rows,
                BLOCK_C=chosen.block_c,
                **chosen.fwd_launch.options,
            )
    return outputs


@residual_layernorm_fwd.register_fake
def _(x, residual, weight, bias, seed, eps, is_post, dropout_p, out_dtype, needs_grad):
    return _empty_outputs(x, residual, seed, is_post, out_dtype, needs_grad)


def _empty_outputs(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
    is_post: bool,
    out_dtype: torch.dtype,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def empty(shape: tuple[int, ...], is_there: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape if is_there else (0,), dtype=dtype, device=x.device)

    is_passed = not is_post and residual is None and seed is None and x.dtype == torch.float32
    is_one = is_post and out_dtype == torch.float32
    n_rows, width = x.shape
    return (
        empty((n_rows, width), not is_passed),
        empty((n_rows, width), not is_one, out_dtype),
        empty((n_rows, width), is_post and needs_grad),
        empty((n_rows,), needs_grad),
        empty((n_rows,), needs_grad),
    )


@operator("residual_layernorm_bwd")
def residual_layernorm_bwd(
    d_stream: torch.Tensor | None,
    d_out: torch.Tensor | None,
    total: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    seed: torch.Tensor | None,
    is_post: bool,
    dropout_p: float,
    dx_dtype: torch.dtype,
    needs_x: bool,
    needs_residual: bool,
    needs_parameters: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, d_residual, [2, C] gradients of weight and bias); what nobody needs is empty."""
    from geneformer_kernels.ops.residual_layernorm.kernel import residual_layernorm_bwd_kernel

    dx, d_residual, d_parameters = _empty_gradients(total, dx_dtype, needs_x, needs_residual, needs_parameters)
    if not total.numel():
        return dx, d_residual, d_parameters.zero_()
    n_rows, width = total.shape
    chosen = plan(n_rows, width, target_for(total))
    partial = None
    if needs_parameters:
        partial = torch.empty(chosen.n_programs, 2, width, dtype=torch.float32, device=total.device)
    with launching_on(total):
        residual_layernorm_bwd_kernel[(chosen.n_programs,)](
            d_stream_ptr=None if d_stream is None else d_stream.contiguous(),
            d_out_ptr=None if d_out is None else d_out.contiguous(),
            total_ptr=total.contiguous(),  # x itself, with the strides it came with, where pre-norm adds nothing to it
            mean_ptr=mean,
            rstd_ptr=rstd,
            weight_ptr=weight.contiguous(),
            seed_ptr=seed,
            dx_ptr=dx if needs_x else None,
            d_residual_ptr=d_residual if needs_residual else None,
            partial_ptr=partial,
            n_rows=n_rows,
            width=width,
            threshold=round(dropout_p * 65536),
            keep_scale=keep_scale(dropout_p),
            IS_POST=is_post,
            BLOCK_ROWS=chosen.bwd_block_rows,
            BLOCK_C=chosen.block_c,
            **chosen.bwd_launch.options,
        )
    return dx, d_residual, d_parameters if partial is None else partial.sum(0)


@residual_layernorm_bwd.register_fake
def _(
    d_stream,
    d_out,
    total,
    mean,
    rstd,
    weight,
    seed,
    is_post,
    dropout_p,
    dx_dtype,
    needs_x,
    needs_residual,
    needs_parameters,
):
    return _empty_gradients(total, dx_dtype, needs_x, needs_residual, needs_parameters)


def _empty_gradients(
    total: torch.Tensor, dx_dtype: torch.dtype, needs_x: bool, needs_residual: bool, needs_parameters: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def empty(shape: tuple[int, ...], is_there: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape if is_there else (0,), dtype=dtype, device=total.device)

    return (
        empty(tuple(total.shape), needs_x, dx_dtype),
        empty(tuple(total.shape), needs_residual),
        empty((2, total.shape[1]), needs_parameters),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, residual, weight, bias, seed, _, ctx.is_post, ctx.dropout_p, _, _ = inputs
    stream, out, total, mean, rstd = output
    # In pre-norm what was normalised is the stream that goes on, or x itself: nothing more is kept.
    if not ctx.is_post:
        total = stream if stream.ndim == 2 else x
    ctx.save_for_backward(total, mean, rstd, weight, seed)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(each for each in (stream, out) if each.ndim == 1), output[2], mean, rstd)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, bias.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward(ctx: Any, d_stream: torch.Tensor | None, d_out: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if d_stream is None and d_out is None:
        return (None,) * 10
    total, mean, rstd, weight, seed = ctx.saved_tensors
    needs_x, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
    # Without dropout the gradients of x and of the residual have one value.
    is_one = seed is None and ctx.x_dtype == torch.float32
    dx, d_residual, d_parameters = residual_layernorm_bwd(
        d_stream,
        d_out,
        total,
        mean,
        rstd,
        weight,
        seed,
        ctx.is_post,
        ctx.dropout_p,
        ctx.x_dtype,
        needs_x and not is_one,
        needs_residual or (needs_x and is_one),
        needs_weight or needs_bias,
    )
    return (
        (d_residual if is_one else dx) if needs_x else None,
        d_residual.to(ctx.residual_dtype) if needs_residual else None,
        d_parameters[0].to(weight.dtype) if needs_weight else None,
        d_parameters[1].to(ctx.bias_dtype) if needs_bias else None,
        *(None,) * 6,
    )


residual_layernorm_fwd.register_autograd(_backward, setup_context=_setup_context)


@ranged("residual_layernorm")
def residual_layernorm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
    norm: str,
    out_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    impl: Impl | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``total = dropout(x) + residual; normed = layer_norm(total)``, the stream kept in float32.

    Parameters
    ----------
    x
        [T, C], what the sublayer computed, any floating dtype. More leading axes are allowed.
    residual
        Shape of ``x``, float32 (float64 for float64 ``x``), the residual stream; None stands for zeros.
    weight, bias
        [C], scale and shift.
    eps
        Added to the variance. 1e-12 vanishes in half precision, one reason why statistics are float32.
    norm
        ``"post"``: the stream goes on normalised (BERT). ``"pre"``: it goes on as the plain sum (AIDO.Cell, Megatron).
    out_dtype
        Dtype of ``out``; None is the dtype of ``x``.
    dropout_p
        Probability of dropping an element of ``x`` (training only); what stays is scaled by ``1 / (1 - dropout_p)``.
        The Triton kernel rounds the probability, not the scale, to a multiple of 2**-16.
    seed
        [1] int64 on the device of ``x``: determines the mask of the Triton kernel; None draws one from torch's
        generator. The other implementations draw their masks from that generator themselves.
    impl
        ``"triton"`` (C up to 4,096), ``"numba"`` (a compiled loop over float32 on a CPU with AVX2, without dropout and
        gradient), ``"torch"`` or ``"reference"``; None chooses.

    Returns
    -------
    stream, out
        Shape of ``x`` each: the float32 residual stream to carry on, and the normalised value in ``out_dtype`` to
        compute on. They may be one tensor, and the stream may be ``x`` itself, where the values are equal.

    Raises
    ------
    TypeError
        Something is no tensor, or no number.
    ValueError
        Shapes, dtypes or devices do not fit, ``norm`` is unknown, ``eps`` is not positive, or ``dropout_p`` is no
        probability.
    ImplUnavailableError
        An implementation asked for by name cannot run here.

    References
    ----------
    Ba et al., "Layer normalization", arXiv:1607.06450; Xiong et al., "On layer normalization in the transformer
    architecture", arXiv:2002.04745 (post and pre).
    """
    check_norm(x, residual, weight, bias, eps=eps, norm=norm, dropout_p=dropout_p, out_dtype=out_dtype, seed=seed)
    out_dtype = out_dtype or x.dtype
    # The narrower of both: a card without bfloat16 refuses it on either side.
    narrow = x.dtype if out_dtype == torch.float32 or x.dtype == torch.float64 else out_dtype
    shape = {"width": x.shape[-1], "needs_grad": needs_gradient(x, residual, weight, bias)}
    chosen = choose_for(
        "residual_layernorm", x, impl, dtype=narrow, shape=shape, triton_cannot=too_wide(x.shape[-1]),
        numba_cannot=_why_not_loops(x, residual, weight, bias, dropout_p, out_dtype),
    )  # fmt: skip
    if chosen == "triton":
        return _residual_layernorm_triton(x, residual, weight, bias, eps, norm, out_dtype, dropout_p, seed)
    if chosen == "numba":
        # Imported late: numba is needed on this branch only.
        from geneformer_kernels.cpu import float32_norm

        return float32_norm.add_layer_norm(x, residual, weight, bias, eps, norm == "post")
    if dropout_p:
        x = dropout(x, dropout_p)
    if chosen == "reference":
        return reference.residual_layernorm(x, residual, weight, bias, eps, norm, out_dtype)
    if is_one_pass(x, out_dtype, residual, weight, bias):
        # Imported late: numba is needed on this branch only.
        from geneformer_kernels.cpu.norm_rows import add_layer_norm

        return add_layer_norm(x, residual, weight, bias, eps, norm)
    total, normed = added_and_normalised(x, residual, weight, bias, eps)
    return normed if norm == "post" else total, normed.to(out_dtype)


def residual_layernorm_workspace(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, norm: str, out_dtype: torch.dtype
) -> Workspace:
    """Of :func:`residual_layernorm` of rows such as ``x``, of which none need be there, in inference.

    By torch, the sum where it is no result, or what is normalised where that is none. On a card as much is said.
    """
    if x.device.type == "cpu":
        cannot = _why_not_loops(x, None, weight, bias, 0.0, out_dtype)
        if choose_for("residual_layernorm", x, numba_cannot=cannot) == Impl.NUMBA:
            from geneformer_kernels.cpu import float32_norm

            return float32_norm.workspace(x.shape[-1])
        if is_one_pass(x, out_dtype, None, weight, bias):
            return Workspace(call=3 * 4 * x.shape[-1])
    wide = 8 if x.dtype == torch.float64 else 4
    return Workspace(wide * x.shape[-1] if norm == "post" or out_dtype.itemsize < wide else 0)


def _why_not_loops(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    dropout_p: float,
    out_dtype: torch.dtype,
) -> str:
    if x.shape[-1] % 16:
        return "the compiled loop takes rows of multiples of 16 numbers"
    if dropout_p:
        return "the compiled loop has no dropout"
    if out_dtype != torch.float32:
        return "the compiled loop writes float32"
    return why_not_float32_loops(x, residual, weight, bias)


def _residual_layernorm_triton(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    norm: str,
    out_dtype: torch.dtype,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    if not dropout_p:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    needs_grad = needs_gradient(x, residual, weight, bias)
    stream, out, *_ = residual_layernorm_fwd(
        x.reshape(-1, width),
        None if residual is None else residual.reshape(-1, width),
        weight,
        bias,
        seed,
        eps,
        norm == "post",
        dropout_p,
        out_dtype,
        needs_grad,
    )
    stream = stream.view(x.shape) if stream.ndim == 2 else x
    return stream, out.view(x.shape) if out.ndim == 2 else stream
