"""Linear attention over packed cells by random features: the operator through torch, and the public function."""

from __future__ import annotations

from typing import Any

import torch

from geneformer_kernels.arguments import FLOATS, check_bounds, check_choice, check_positive, check_tensor, check_whole
from geneformer_kernels.dispatch import Impl
from geneformer_kernels.on_device import DTYPE_NAMES, choose_for, is_capturing, needs_gradient, plainly_on, target_for
from geneformer_kernels.operators import operator
from geneformer_kernels.ops.favor_attention import host, reference
from geneformer_kernels.ops.favor_attention.largest import add_flow_through_largest
from geneformer_kernels.ops.favor_attention.plan import OP, STABILISERS, rows_per_chunk, why_not_triton
from geneformer_kernels.ranges import ranged
from geneformer_kernels.workspace import Workspace


def _wide_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunk_rows(q: torch.Tensor, n_features: int) -> int:
    return rows_per_chunk(q.shape[1], n_features, _wide_dtype(q).itemsize, target_for(q))


def _features(q: torch.Tensor, projection: torch.Tensor, eps: float) -> host.Features:
    return host.Features(projection.to(_wide_dtype(q)).contiguous(), eps, _chunk_rows(q, len(projection)))


@operator("favor_attention_chunks")
def favor_attention_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    projection: torch.Tensor,
    cu_seqlens: torch.Tensor,
    is_batch: bool,
    eps: float,
    keeps: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [T, H, D]; contexts [B, H, m, D + 1], of no elements unless ``keeps``; largest [B]; top [H, T]."""
    with plainly_on(q), torch.no_grad():
        features, cells = _features(q, projection, eps), host.cells_of(cu_seqlens)
        return host.forward(q, k, v, features, cells, len(cu_seqlens) - 1, is_batch, keeps)


@favor_attention_chunks.register_fake
def _(q, k, v, projection, cu_seqlens, is_batch, eps, keeps):  # type: ignore[no-untyped-def]
    (n_tokens, n_heads, head_dim), n_cells = q.shape, cu_seqlens.shape[0] - 1
    shapes = (n_cells if keeps else 0, n_heads, projection.shape[0], head_dim + 1), (n_cells,), (n_heads, n_tokens)
    return q.new_empty(q.shape), *(q.new_empty(shape, dtype=_wide_dtype(q)) for shape in shapes)


@operator("favor_attention_chunks_bwd")
def favor_attention_chunks_bwd(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    projection: torch.Tensor,
    cu_seqlens: torch.Tensor,
    out: torch.Tensor,
    contexts: torch.Tensor,
    largest: torch.Tensor,
    top: torch.Tensor,
    is_batch: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    with plainly_on(q), torch.no_grad():
        features, cells = _features(q, projection, eps), host.cells_of(cu_seqlens)
        dq, dk, dv, flow = host.backward(d_out, q, k, v, out, contexts, largest, features, cells)
        if q.numel():
            add_flow_through_largest(dk, k, projection, top, largest, flow, cu_seqlens, is_batch=is_batch)
        return dq, dk, dv


@favor_attention_chunks_bwd.register_fake
def _(d_out, q, k, v, *rest):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.is_batch, ctx.eps, keeps = inputs
    if keeps:
        ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, d_out: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = favor_attention_chunks_bwd(d_out, *ctx.saved_tensors, ctx.is_batch, ctx.eps)
    return *gradients, None, None, None, None, None


favor_attention_chunks.register_autograd(_backward, setup_context=_save)


def favor_workspace(q: torch.Tensor, n_features: int) -> Workspace:
    """Of :func:`favor_attention` of rows such as ``q`` [T, H, D] in inference; T may be 0.

    On a card as much is said as the kernels take beside their result, where no cell is short.
    """
    n_heads, head_dim = q.shape[-2:]
    if q.device.type == "cpu":
        itemsize = _wide_dtype(q).itemsize
        return host.workspace(n_heads, head_dim, n_features, itemsize, _chunk_rows(q, n_features))
    return Workspace(row=q.dtype.itemsize * n_heads * head_dim)


def _check(
    tensors: dict[str, torch.Tensor], projection: torch.Tensor, cu_seqlens: torch.Tensor, stabiliser: str, eps: float,
    longest: int | None,
) -> None:  # fmt: skip
    first: Any = next(iter(tensors.values()))
    for name, x in tensors.items():
        check_tensor(name, x, FLOATS, n_axes=3, device=getattr(first, "device", None))
    if any(x.shape != first.shape for x in tensors.values()):
        raise ValueError(f"q, k, v must have one shape, not {', '.join(str([*x.shape]) for x in tensors.values())}")
    if any(x.dtype != first.dtype for x in tensors.values()):
        raise ValueError(f"q, k, v must have one dtype, not {', '.join(str(x.dtype) for x in tensors.values())}")
    if first.shape[-1] == 0 or first.shape[-2] == 0:
        raise ValueError(f"q, k, v must have heads, and heads must have elements: the shape is {[*first.shape]}")
    check_tensor("projection", projection, FLOATS, n_axes=2, device=first.device)
    if projection.shape[1] != first.shape[-1] or len(projection) == 0:
        raise ValueError(f"projection {[*projection.shape]} must be [features, {first.shape[-1]}]")
    least = check_bounds("cu_seqlens", cu_seqlens, len(first))
    if cu_seqlens.device != first.device:
        raise ValueError(f"cu_seqlens must be on {first.device}, where the others are, not on {cu_seqlens.device}")
    check_choice("stabiliser", stabiliser, STABILISERS)
    check_positive("eps", eps)
    if longest is not None:
        check_whole("longest", longest, least)


def _bound(cu_seqlens: torch.Tensor, n_tokens: int) -> int:
    """No cell has more tokens; all of them where nobody may ask the device."""
    if torch.compiler.is_compiling() or is_capturing(cu_seqlens) or len(cu_seqlens) < 2:
        return n_tokens
    return int(cu_seqlens.diff().max())


@ranged("favor_attention")
def favor_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    projection: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    stabiliser: str = "cell",
    eps: float = 1e-4,
    longest: int | None = None,
    impl: Impl | str | None = None,
) -> torch.Tensor:
    """``phi(q) @ (phi(k).T @ v) / (phi(q) @ phi(k).sum(0))`` within each cell and head: memory linear in the length.

    ``phi(x) = exp(x @ projection.T - |x|^2 / 2 - largest) + eps`` with x scaled by ``D ** -0.25``, in float32 (float64
    for float64 tensors). ``largest`` is of ``x @ projection.T``: for a query of its own, for keys as ``stabiliser``
    says. Both cancel but for eps, and so does the factor ``1 / sqrt(m)`` of the published features.

    Parameters
    ----------
    q, k, v
        [T, H, D] each, float16, bfloat16, float32 or float64, of one dtype and device; may be strided views.
    projection
        [m, D] of any floating dtype: the random features, the same for all heads. It gets no gradient.
    cu_seqlens
        [B + 1] integers on the same device, cumulative cell lengths, starting at 0 and ending at T. Empty cells are
        allowed. Its values are checked on the CPU only.
    stabiliser
        ``"cell"``: the largest projection of a cell's keys, over its tokens and heads, so that no cell's result depends
        on the others. ``"batch"``: the largest of all keys of the call, as scBERT has it.
    eps
        Positive, added to every feature. In float16 the Triton kernels take it from 3e-5 on.
    longest
        Tokens of the longest cell, or more, if the host knows; otherwise Triton's launch asks the device.
    impl
        ``"triton"``, ``"torch"`` (chunks of tokens, any device) or ``"reference"``; None chooses. Triton serves head
        dimensions up to 128, those that are not 32, 64 or 128 in a padded copy.

    Returns
    -------
    torch.Tensor
        [T, H, D] in the dtype of ``q``. Gradients of ``q``, ``k`` and ``v`` are those of this formula, ``largest``
        included, and deterministic.

    Raises
    ------
    TypeError
        Something is no tensor, or no number.
    ValueError
        Shapes, dtypes, devices, ``cu_seqlens``, ``stabiliser`` or ``eps`` do not fit together.
    ImplUnavailableError
        An implementation asked for by name cannot run here.

    Notes
    -----
    The backward pass keeps ``m * (D + 1)`` numbers per cell and head beside what the forward pass was given.

    References
    ----------
    Choromanski et al., "Rethinking attention with Performers", arXiv:2009.14794; Yang et al., "scBERT", Nature Machine
    Intelligence 4 (2022).
    """
    _check({"q": q, "k": k, "v": v}, projection, cu_seqlens, stabiliser, eps, longest)
    eps, projection = float(eps), projection.detach()
    needs_grad = needs_gradient(q, k, v)
    shape = {"head_dim": q.shape[-1], "n_features": len(projection), "needs_grad": needs_grad}
    cannot = why_not_triton(DTYPE_NAMES[q.dtype], q.shape[-1], eps)
    choice = choose_for(OP, q, impl, shape=shape, triton_cannot=cannot)
    if choice == Impl.REFERENCE:
        return reference.favor_attention(q, k, v, projection, cu_seqlens, stabiliser, eps)
    is_batch = stabiliser == "batch"
    if choice == Impl.TORCH:
        return favor_attention_chunks(q, k, v, projection, cu_seqlens, is_batch, eps, needs_grad)[0]
    # Imported late: it registers operators.
    from geneformer_kernels.ops.favor_attention import launches

    longest = _bound(cu_seqlens, len(q)) if longest is None else int(longest)
    return launches.favor_attention_fwd(q, k, v, projection, cu_seqlens, longest, is_batch, eps, needs_grad)[0]
