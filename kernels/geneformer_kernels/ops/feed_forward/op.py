"""The feed-forward half of a block: the public functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from geneformer_kernels.arguments import FLOATS, check_choice, check_optional, check_tensor
from geneformer_kernels.cpu import onednn
from geneformer_kernels.cpu.onednn import is_for_onednn, onednn_linear
from geneformer_kernels.dispatch import Impl
from geneformer_kernels.dropout import dropout
from geneformer_kernels.layernorm import added_and_normalised, check_norm
from geneformer_kernels.on_device import (
    DTYPE_NAMES,
    choose_for,
    draw_seed,
    is_one_pass,
    needs_gradient,
    why_float32_loops_are_slow,
    why_not_float32_loops,
)
from geneformer_kernels.ops.feed_forward import reference
from geneformer_kernels.ops.feed_forward.device import (
    can_be_fused,
    feed_forward_fwd,
    feed_forward_layernorm_fwd,
    should_be_fused,
)
from geneformer_kernels.ops.feed_forward.plan import ACTIVATIONS
from geneformer_kernels.ranges import ranged
from geneformer_kernels.workspace import Workspace, one_by_one

# Rows of hidden units that torch has at one time, in units of F: GELU and SwiGLU are computed out of place.
_HIDDEN = {"relu": 1, "gelu": 2, "gelu_tanh": 2, "swiglu": 4}


@ranged("feed_forward")
def feed_forward(
    x: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    *,
    activation: str,
    impl: Impl | str | None = None,
) -> torch.Tensor:
    """``linear(activation(linear(x, up)), down)``.

    Parameters
    ----------
    x
        [T, C] in the compute dtype; more leading axes are allowed.
    up_weight, up_bias
        [F, C] and [F]; for ``"swiglu"`` [2 F, C] and [2 F], gate rows first. A bias may be None. Parameters of another
        dtype are cast to that of ``x``; their gradients keep their own.
    down_weight, down_bias
        [C, F] and [C].
    activation
        ``"relu"``, ``"gelu"`` (error function), ``"gelu_tanh"`` or ``"swiglu"`` (``silu(gate) * up``).
    impl
        ``"triton"``, ``"numba"`` (compiled loops of float32 on a CPU with AVX2, without a gradient), ``"torch"`` or
        ``"reference"``; None chooses.

    Returns
    -------
    torch.Tensor
        Shape of ``x`` in the compute dtype.

    Raises
    ------
    TypeError
        Something is no tensor, or no number.
    ValueError
        The activation is unknown, or shapes, dtypes or devices do not fit.
    ImplUnavailableError
        An implementation asked for by name cannot run here.

    Notes
    -----
    The Triton implementation keeps ``x`` and the weights for the backward pass, and computes the hidden units again. On
    Hopper the first layer with ReLU is cuBLAS's, which takes NaN for 0: NaN in ``x`` does not reach the result there.
    In an encoder it does all the same, through the residual stream.

    References
    ----------
    Hendrycks and Gimpel, arXiv:1606.08415 (GELU); Shazeer, arXiv:2002.05202 (SwiGLU).
    """
    _check(x, up_weight, up_bias, down_weight, down_bias, activation)
    x = _computed_in(x)
    up_weight, down_weight = up_weight.to(x.dtype), down_weight.to(x.dtype)
    parameters = up_weight, up_bias, down_weight, down_bias
    chosen = _chosen(x, parameters, impl)
    if chosen == Impl.TRITON:
        rows = x.reshape(-1, x.shape[-1])
        return feed_forward_fwd(rows, up_weight, up_bias, down_weight, down_bias, activation).view(x.shape)
    up_bias, down_bias = (None if bias is None else bias.to(x.dtype) for bias in (up_bias, down_bias))
    if chosen == Impl.NUMBA:
        # Imported late: numba is needed on this branch only.
        from geneformer_kernels.cpu import float32_products

        rows = x.reshape(-1, x.shape[-1])
        layers = (up_weight, up_bias), (down_weight, down_bias)
        return float32_products.feed_forward(rows, *layers, activation).view(x.shape)
    if chosen == Impl.REFERENCE:
        return reference.feed_forward(x, up_weight, up_bias, down_weight, down_bias, activation)
    if activation == "relu" and is_for_onednn(x, up_weight, up_bias) and is_for_onednn(x, down_weight, down_bias):
        return onednn_linear(onednn_linear(x, up_weight, up_bias, "relu"), down_weight, down_bias)
    hidden = F.linear(x, up_weight, up_bias)
    if activation == "relu":
        # In place where nothing has to remember the input: a third of the memory traffic.
        hidden = F.relu(hidden, inplace=not hidden.requires_grad)
    elif activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate) * up
    else:
        hidden = F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
    return F.linear(hidden, down_weight, down_bias)


def feed_forward_workspace(
    x: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    *,
    activation: str,
) -> Workspace:
    """Of :func:`feed_forward` of rows such as ``x``, of which none need be there, in inference.

    By torch, hidden units of all rows: ReLU is computed in place, others beside what they are computed from. On a card
    as much is said as torch takes.
    """
    if x.device.type == "cpu" and _chosen(x, (up_weight, up_bias, down_weight, down_bias), None) == Impl.NUMBA:
        from geneformer_kernels.cpu import float32_products

        shapes = [(each.shape[0], each.shape[1]) for each in (up_weight, down_weight)]
        return float32_products.workspace(shapes, near=len(up_weight))
    width, hidden = x.dtype.itemsize * down_weight.shape[0], x.dtype.itemsize * down_weight.shape[1]
    row = max(hidden, _HIDDEN[activation] * hidden - width)  # the result comes when only the last of them are there
    return (
        Workspace(row)
        if x.device.type != "cpu"
        else one_by_one(Workspace(row), *map(onednn.workspace, (up_weight, down_weight)))
    )


def has_layernorm_inside(x: torch.Tensor, ff_width: int, *, activation: str, impl: Impl | str | None = None) -> bool:
    """Whether :func:`feed_forward_layernorm` is one kernel for rows such as ``x``, and the fastest way.

    Where it is not, :func:`feed_forward` followed by :func:`geneformer_kernels.residual_layernorm` is the better way:
    the second has a kernel of its own on every card, which this operation, that imports no other one, cannot use. With
    ``impl="triton"`` the answer is whether one kernel can do it.

    Parameters
    ----------
    x
        [..., C], on the device and in the dtype of the rows.
    ff_width
        Hidden units.
    activation, impl
        As in :func:`feed_forward_layernorm`.
    """
    x = _computed_in(x)
    chosen = _choose(x, ff_width, impl, has_layernorm=True)
    if impl is None and chosen == Impl.TRITON:
        return should_be_fused(DTYPE_NAMES[x.dtype], x.shape[-1], ff_width, activation, x.device.type, x.device.index)
    return _is_fused(x, ff_width, activation, chosen)


def _chosen(
    x: torch.Tensor,
    parameters: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None],
    impl: Impl | str | None,
) -> str:
    """What computes both layers, without a LayerNorm."""
    down_shape = parameters[2].shape
    cannot = _why_not_loops(x, *parameters) or why_float32_loops_are_slow("feed_forward", impl, max(down_shape))
    return _choose(x, down_shape[1], impl, has_layernorm=False, numba_cannot=cannot)


def _choose(
    x: torch.Tensor, ff_width: int, impl: Impl | str | None, *, has_layernorm: bool, numba_cannot: str = ""
) -> str:
    sizes = {"width": x.shape[-1], "ff_width": ff_width}
    flags = {"needs_grad": needs_gradient(x), "has_layernorm": has_layernorm}
    return choose_for("feed_forward", x, impl, shape=sizes | flags, numba_cannot=numba_cannot)


def _why_not_loops(
    x: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
) -> str:
    if any(size % 16 or not size for size in down_weight.shape):
        return "the compiled loops make multiples of 16 columns"
    return why_not_float32_loops(x, up_weight, up_bias, down_weight, down_bias)


def _is_fused(x: torch.Tensor, ff_width: int, activation: str, chosen: str) -> bool:
    place = x.device.type, x.device.index
    return chosen == Impl.TRITON and can_be_fused(DTYPE_NAMES[x.dtype], x.shape[-1], ff_width, activation, *place)


@ranged("feed_forward")
def feed_forward_layernorm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    activation: str,
    eps: float,
    norm: str,
    out_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    impl: Impl | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``total = dropout(feed_forward(x)) + residual; normed = layer_norm(total)``, the stream kept in float32.

    Parameters
    ----------
    x, up_weight, up_bias, down_weight, down_bias, activation
        As in :func:`feed_forward`.
    residual
        Shape of ``x``, float32 (float64 for float64 ``x``), the residual stream; None stands for zeros.
    weight, bias
        [C], scale and shift of the LayerNorm.
    eps
        Added to the variance.
    norm
        ``"post"``: the stream goes on normalised (BERT). ``"pre"``: it goes on as the plain sum (AIDO.Cell, Megatron).
    out_dtype
        Dtype of ``out``; None is the dtype of ``x``.
    dropout_p
        Probability of dropping an element (training only); what stays is scaled by ``1 / (1 - dropout_p)``. The fused
        kernel rounds the probability, not the scale, to a multiple of 2**-16.
    seed
        [1] int64 on the device of ``x``: determines the mask of the fused kernel; None draws one from torch's
        generator. Everything else draws its mask from that generator itself.
    impl
        ``"triton"``, ``"torch"`` or ``"reference"``; None chooses.

    Returns
    -------
    stream, out
        Shape of ``x`` each: the float32 residual stream to carry on, and the normalised value in ``out_dtype`` to
        compute on. They may be one tensor where the values are equal.

    Raises
    ------
    TypeError
        Something is no tensor, or no number.
    ValueError
        The activation or ``norm`` is unknown, shapes, dtypes or devices do not fit, ``eps`` is not positive, or
        ``dropout_p`` is no probability.
    ImplUnavailableError
        An implementation asked for by name cannot run here.

    Notes
    -----
    One kernel for C = 128, 256 and, before Hopper, 512 in float16 and bfloat16, if Triton is chosen and F is a multiple
    of a block: 64 hidden units, 32 or 16 where shared memory holds no more, as the plan of the card says. Otherwise
    :func:`feed_forward` followed by torch's dropout, addition and LayerNorm. :func:`has_layernorm_inside` tells whether
    this or :func:`feed_forward` followed by :func:`geneformer_kernels.residual_layernorm` is faster.

    References
    ----------
    Ba et al., "Layer normalization", arXiv:1607.06450; Xiong et al., "On layer normalization in the transformer
    architecture", arXiv:2002.04745 (post and pre).
    """
    _check(x, up_weight, up_bias, down_weight, down_bias, activation)
    check_norm(x, residual, weight, bias, eps=eps, norm=norm, dropout_p=dropout_p, out_dtype=out_dtype, seed=seed)
    out_dtype = out_dtype or x.dtype
    x = _computed_in(x)
    width, ff_width = x.shape[-1], down_weight.shape[1]
    why_not = _why_not_loops(x, up_weight, up_bias, down_weight, down_bias)
    chosen = _choose(x, ff_width, impl, has_layernorm=True, numba_cannot=why_not)
    if _is_fused(x, ff_width, activation, chosen):
        seed = None if not dropout_p else draw_seed(x.device) if seed is None else seed
        needs_grad = needs_gradient(x, residual, up_weight, up_bias, down_weight, down_bias, weight, bias)
        stream, out, *_ = feed_forward_layernorm_fwd(
            x.reshape(-1, width),
            None if residual is None else residual.reshape(-1, width),
            up_weight.to(x.dtype),
            up_bias,
            down_weight.to(x.dtype),
            down_bias,
            weight,
            bias,
            seed,
            activation,
            eps,
            norm == "post",
            dropout_p,
            out_dtype,
            needs_grad,
        )
        stream = stream.view(x.shape)
        return stream, out.view(x.shape) if out.ndim == 2 else stream
    if chosen == Impl.REFERENCE:
        keep = F.dropout(torch.ones_like(x), dropout_p) if dropout_p else None
        up_bias, down_bias = (None if each is None else each.to(x.dtype) for each in (up_bias, down_bias))
        up_weight, down_weight = up_weight.to(x.dtype), down_weight.to(x.dtype)
        return reference.feed_forward_layernorm(
            x, residual, up_weight, up_bias, down_weight, down_bias, weight, bias,
            activation, eps, norm, out_dtype, keep,
        )  # fmt: skip
    total = feed_forward(x, up_weight, up_bias, down_weight, down_bias, activation=activation, impl=chosen)
    if not dropout_p and is_one_pass(total, out_dtype, residual, weight, bias):
        # Imported late: numba is needed on this branch only.
        from geneformer_kernels.cpu.norm_rows import add_layer_norm

        return add_layer_norm(total, residual, weight, bias, eps, norm)
    total, normed = added_and_normalised(dropout(total, dropout_p), residual, weight, bias, eps)
    return normed if norm == "post" else total, normed.to(out_dtype)


def _check(
    x: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    activation: str,
) -> None:
    check_tensor("x", x, FLOATS)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be rows of at least one column, not {[*x.shape]}")
    check_tensor("up_weight", up_weight, FLOATS, n_axes=2, device=x.device)
    check_tensor("down_weight", down_weight, FLOATS, n_axes=2, device=x.device)
    check_choice("activation", activation, ACTIVATIONS)
    hidden_width = down_weight.shape[1] * (2 if activation == "swiglu" else 1)
    if up_weight.shape != (hidden_width, x.shape[-1]) or down_weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"x {[*x.shape]}, up_weight {[*up_weight.shape]} and down_weight {[*down_weight.shape]} do not fit for "
            f"{activation}"
        )
    for name, bias, size in (("up_bias", up_bias, hidden_width), ("down_bias", down_bias, x.shape[-1])):
        check_optional(name, bias, FLOATS, device=x.device)
        if bias is not None and bias.shape != (size,):
            raise ValueError(f"{name} {[*bias.shape]} must be [{size}]")


def _computed_in(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype that autocast multiplies in, where it is on: operators of our own are unknown to it."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x
