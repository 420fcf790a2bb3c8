"""Attention over packed cells: the public functions."""

from __future__ import annotations

import itertools
import math

import torch

from geneformer_kernels.dispatch import Choice, Impl, is_forced, tell_once
from geneformer_kernels.on_device import DTYPE_NAMES, choose_for, draw_seed, needs_gradient, target_for
from geneformer_kernels.ops.varlen_attention import reference, sdpa
from geneformer_kernels.ops.varlen_attention.plan import MAX_HEAD_DIM, OP, is_for_cudnn

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_kinds(q: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """ValueError where dtypes or dimensions are none that any implementation takes."""
    if q.dtype not in _DTYPES:
        raise ValueError(f"attention takes float16, bfloat16, float32 and float64, not {q.dtype}")
    if q.shape[-1] == 0:
        raise ValueError(f"heads must have elements: the shape is {[*q.shape]}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens must be [B + 1], not {[*cu_seqlens.shape]}")
    if cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.dtype == torch.bool:
        raise ValueError(f"cu_seqlens must be integers, not {cu_seqlens.dtype}")


def _check(q: torch.Tensor, cu_seqlens: torch.Tensor, scale: float | None, dropout_p: float) -> float:
    """The scale; ValueError where arguments do not fit together."""
    _check_kinds(q, cu_seqlens)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), not {dropout_p}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, not {scale}")
    if len(cu_seqlens) == 1 and len(q) > 0:  # on a card no program would run, and the result be whatever was there
        raise ValueError(f"cu_seqlens must run from 0 to {len(q)} (the tokens), and has one number")
    # By value on the CPU only: on a card that would wait for the device, and it would break a compiled graph.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != len(q):
            raise ValueError(f"cu_seqlens must run from 0 to {len(q)} (the tokens), not {bounds[0]}..{bounds[-1]}")
        if any(start > stop for start, stop in itertools.pairwise(bounds)):
            raise ValueError("cu_seqlens must not decrease")
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _choose(
    q: torch.Tensor, impl: Impl | str | None, dropout_p: float, cu_seqlens: torch.Tensor, needs_grad: bool
) -> str:
    is_wide = q.shape[-1] > MAX_HEAD_DIM
    cannot = f"the Triton kernels serve head dimensions up to {MAX_HEAD_DIM}, not {q.shape[-1]}" if is_wide else ""
    shape = {"head_dim": q.shape[-1], "needs_grad": needs_grad, "has_dropout": dropout_p > 0}
    if not torch.compiler.is_compiling():  # a compiled function serves batches of any number of tokens
        shape["length"] = q.shape[0] // max(len(cu_seqlens) - 1, 1)
    choice = choose_for(OP, q, impl, shape=shape, triton_cannot=cannot)
    if choice == Impl.REFERENCE and dropout_p > 0:
        raise ValueError("the reference of varlen_attention has no dropout")
    return choice


def _length_for_cudnn(
    q: torch.Tensor, impl: Impl | str | None, dropout_p: float, cu_seqlens: torch.Tensor, needs_grad: bool
) -> int:
    """The length of every cell where cuDNN is the faster way, which was asked for by nobody else; otherwise 0."""
    if impl is not None or needs_grad or dropout_p > 0 or not q.is_cuda or torch.compiler.is_compiling():
        return 0
    if torch.cuda.is_current_stream_capturing():  # the graph will be replayed on cells of other lengths
        return 0
    length, dtype, target = sdpa.equal_length(cu_seqlens, len(q)), DTYPE_NAMES[q.dtype], target_for(q)
    if not is_for_cudnn(dtype, q.shape[-1], length, target) or is_forced(OP):
        return 0
    tell_once(Choice(OP, Impl.TORCH, "cuDNN is faster where all cells are equally long"), dtype, target)
    return length


def _seed_for(q: torch.Tensor, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor | None:
    if dropout_p == 0:
        return None
    return draw_seed(q.device) if seed is None else seed


def _narrowed(out: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The first columns of every head, without those that were added for the kernels."""
    return out if out.shape[-1] == head_dim else out[..., :head_dim].contiguous()


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    impl: Impl | str | None = None,
) -> torch.Tensor:
    """``dropout(softmax(q @ k.T * scale)) @ v`` within each cell and head, with no padding.

    Parameters
    ----------
    q, k, v
        [T, H, D] each, float16, bfloat16, float32 or float64, of one dtype and device; may be strided views of a fused
        projection, for which :func:`varlen_attention_qkv` saves the backward pass a copy.
    cu_seqlens
        [B + 1] integers, cumulative cell lengths, starting at 0 and ending at T. Empty cells are allowed. Its values
        are checked on the CPU; on a card that would wait for the device, and wrong values give wrong numbers.
    scale
        Positive factor on the scores; None is ``1 / sqrt(D)``.
    dropout_p
        Probability of dropping an attention weight (training only), in [0, 1).
    seed
        [1] int64 on the device of ``q``, which decides the mask; None draws one from torch's generator. Torch's kernels
        on a card draw their own: there it has no effect.
    impl
        ``"triton"``, ``"torch"`` or ``"reference"``; None chooses. The reference has no dropout. Triton serves head
        dimensions up to 128, those that are no multiple of 16 in a padded copy; wider ones go to torch.

    Returns
    -------
    torch.Tensor
        [T, H, D] in the dtype of ``q``; a token attends to every token of its own cell and to none of another. The
        gradients are deterministic.

    Raises
    ------
    ValueError
        Shapes, dtypes, ``scale``, ``dropout_p`` or ``cu_seqlens`` do not fit together.
    ImplUnavailableError
        An implementation asked for by name cannot run here.

    References
    ----------
    Vaswani et al., "Attention is all you need", arXiv:1706.03762; Dao, "FlashAttention-2", arXiv:2307.08691.
    """
    if q.ndim != 3 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(f"q, k and v must be [T, H, D] of one shape, not {[*q.shape]}, {[*k.shape]}, {[*v.shape]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    scale = _check(q, cu_seqlens, scale, dropout_p)
    choice = _choose(q, impl, dropout_p, cu_seqlens, needs_gradient(q, k, v))
    if choice == Impl.REFERENCE:
        return reference.varlen_attention(q, k, v, cu_seqlens, scale)
    if length := _length_for_cudnn(q, impl, dropout_p, cu_seqlens, needs_gradient(q, k, v)):
        return sdpa.attend_equal(q, k, v, length, scale)
    cu_seqlens = cu_seqlens.to(q.device)
    if choice == Impl.TORCH:
        return sdpa.attend(q, k, v, cu_seqlens, scale, dropout_p, seed)
    # Imported late: it registers operators.
    from geneformer_kernels.ops.varlen_attention import launches

    head_dim = q.shape[-1]
    q, k, v = (launches.rows_of(x) for x in (q, k, v))
    seed = _seed_for(q, dropout_p, seed)
    out = launches.varlen_attention_fwd(q, k, v, cu_seqlens.contiguous(), scale, dropout_p, seed)[0]
    return _narrowed(out, head_dim)


def varlen_attention_qkv(
    qkv: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    impl: Impl | str | None = None,
) -> torch.Tensor:
    """``varlen_attention(*qkv.unbind(1), ...)`` for a fused projection, whose gradient comes back as one tensor.

    Parameters
    ----------
    qkv
        [T, 3, H, D]: queries, keys and values.
    cu_seqlens, scale, dropout_p, seed, impl
        As in :func:`varlen_attention`.

    Returns
    -------
    torch.Tensor
        [T, H, D] in the dtype of ``qkv``.

    Raises
    ------
    ValueError, ImplUnavailableError
        As :func:`varlen_attention` does.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be [T, 3, H, D], not {[*qkv.shape]}")
    q, k, v = qkv.unbind(1)
    _check_kinds(q, cu_seqlens)
    # Asked with ``==``: torch 2.11's compiler does not know ``!=`` of a member of an enumeration.
    is_triton = _choose(q, impl, dropout_p, cu_seqlens, needs_gradient(qkv)) == Impl.TRITON
    if not is_triton or _length_for_cudnn(q, impl, dropout_p, cu_seqlens, needs_gradient(qkv)):
        return varlen_attention(q, k, v, cu_seqlens=cu_seqlens, scale=scale, dropout_p=dropout_p, seed=seed, impl=impl)
    scale = _check(q, cu_seqlens, scale, dropout_p)
    from geneformer_kernels.ops.varlen_attention import launches

    head_dim = qkv.shape[-1]
    qkv, seed = launches.rows_of(qkv), _seed_for(qkv, dropout_p, seed)
    cu_seqlens = cu_seqlens.to(qkv.device).contiguous()
    return _narrowed(launches.varlen_attention_qkv_fwd(qkv, cu_seqlens, scale, dropout_p, seed)[0], head_dim)


def attention_scores(
    q: torch.Tensor, k: torch.Tensor, *, cu_seqlens: torch.Tensor, scale: float | None = None
) -> list[torch.Tensor]:
    """``softmax(q @ k.T * scale)`` of every cell and head: the attention weights themselves, for small inputs.

    Parameters
    ----------
    q, k
        [T, H, D] each.
    cu_seqlens, scale
        As in :func:`varlen_attention`.

    Returns
    -------
    list of torch.Tensor
        One [H, L, L] per cell, L being its length. Memory grows with the square of the length: 4 heads of 2,048 tokens
        take 67 MB per cell and layer in float32.

    Raises
    ------
    ValueError
        As :func:`varlen_attention` does.
    """
    if q.ndim != 3 or q.shape != k.shape:
        raise ValueError(f"q and k must be [T, H, D] of one shape, not {[*q.shape]}, {[*k.shape]}")
    return reference.attention_scores(q, k, cu_seqlens, _check(q, cu_seqlens, scale, 0.0))
