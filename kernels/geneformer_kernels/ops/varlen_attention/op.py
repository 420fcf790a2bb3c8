"""Attention over packed cells: the public functions."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from geneformer_kernels.arguments import (
    FLOATS,
    check_bounds,
    check_out_dtype,
    check_positive,
    check_probability,
    check_seed,
    check_tensor,
    check_whole,
)
from geneformer_kernels.dispatch import Choice, Impl, candidates, is_forced, tell_once
from geneformer_kernels.on_device import (
    DTYPE_NAMES,
    choose_for,
    draw_seed,
    is_capturing,
    needs_gradient,
    target_for,
    why_not_float32_loops,
)
from geneformer_kernels.ops.varlen_attention import reference, sdpa
from geneformer_kernels.ops.varlen_attention.cells import AttentionCells
from geneformer_kernels.ops.varlen_attention.plan import MAX_HEAD_DIM, OP, is_for_cudnn, is_for_loops
from geneformer_kernels.ranges import ranged
from geneformer_kernels.workspace import Workspace, one_by_one


def _check(
    tensors: dict[str, torch.Tensor],
    cu_seqlens: torch.Tensor | AttentionCells,
    scale: float | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    *,
    n_axes: int = 3,
) -> tuple[AttentionCells, float]:
    """The cells, and the scale; TypeError or ValueError where arguments are none, or do not fit together."""
    names = ", ".join(tensors)
    first: Any = next(iter(tensors.values()))
    for name, x in tensors.items():
        check_tensor(name, x, FLOATS, n_axes=n_axes, device=getattr(first, "device", None))
    if any(x.shape != first.shape for x in tensors.values()):
        raise ValueError(f"{names} must have one shape, not {', '.join(str([*x.shape]) for x in tensors.values())}")
    if any(x.dtype != first.dtype for x in tensors.values()):
        raise ValueError(f"{names} must have one dtype, not {', '.join(str(x.dtype) for x in tensors.values())}")
    if n_axes == 4 and first.shape[1] != 3:
        raise ValueError(f"qkv must be [T, 3, H, D], not {[*first.shape]}")
    if first.shape[-1] == 0 or first.shape[-2] == 0:
        raise ValueError(f"{names} must have heads, and heads must have elements: the shape is {[*first.shape]}")
    cells = cu_seqlens if isinstance(cu_seqlens, AttentionCells) else AttentionCells(cu_seqlens, len(first))
    if cells.n_tokens != len(first):
        raise ValueError(f"cu_seqlens are cells of {cells.n_tokens} tokens, and {len(first)} are there")
    check_bounds("cu_seqlens", cells.cu_seqlens, len(first))
    check_probability("dropout_p", dropout_p, may_be_one=False)
    check_seed("seed", seed, first.device)
    if scale is None:
        return cells.to(first.device), first.shape[-1] ** -0.5
    check_positive("scale", scale)
    return cells.to(first.device), float(scale)


def _choose(
    x: torch.Tensor,
    head_dim: int,
    impl: Impl | str | None,
    dropout_p: float,
    cu_seqlens: torch.Tensor,
    needs_grad: bool,
    dtype: torch.dtype | None = None,
    numba_cannot: str = "",
) -> str:
    is_wide = head_dim > MAX_HEAD_DIM
    cannot = f"the Triton kernels serve head dimensions up to {MAX_HEAD_DIM}, not {head_dim}" if is_wide else ""
    shape = {"head_dim": head_dim, "needs_grad": needs_grad, "has_dropout": dropout_p > 0}
    if not torch.compiler.is_compiling():  # a compiled function serves batches of any number of tokens
        shape["length"] = x.shape[0] // max(len(cu_seqlens) - 1, 1)
    choice = choose_for(OP, x, impl, dtype=dtype, shape=shape, triton_cannot=cannot, numba_cannot=numba_cannot)
    if choice == Impl.TORCH and _is_left_to_loops(x, impl, dtype or x.dtype, cu_seqlens, numba_cannot):
        return Impl.NUMBA
    if choice == Impl.REFERENCE and dropout_p > 0:
        raise ValueError("the reference of varlen_attention has no dropout")
    return choice


def _is_left_to_loops(
    x: torch.Tensor, impl: Impl | str | None, dtype: torch.dtype, cu_seqlens: torch.Tensor, cannot: str
) -> bool:
    """Whether cells are so long that compiled loops are the faster way, which was asked for by nobody else."""
    if impl is not None or cannot or x.device.type != "cpu" or torch.compiler.is_compiling() or is_forced(OP):
        return False
    name, target = DTYPE_NAMES[dtype], target_for(x)
    length = int(cu_seqlens[-1]) // max(len(cu_seqlens) - 1, 1)
    if not is_for_loops(name, length, target):
        return False
    if not any(option.impl == Impl.NUMBA and option.can_run for option in candidates(OP, name, target)):
        return False
    tell_once(Choice(OP, Impl.NUMBA, "compiled loops are faster where cells are long"), name, target)
    return True


def _why_not_loops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float) -> str:
    if q.shape[-1] % 16:
        return "the compiled loops take head dimensions that are multiples of 16"
    if dropout_p > 0:
        return "the compiled loops have no dropout"
    return why_not_float32_loops(q, k, v)


def _length_for_cudnn(
    q: torch.Tensor, impl: Impl | str | None, dropout_p: float, cells: AttentionCells, needs_grad: bool
) -> int:
    """The length of every cell where cuDNN is the faster way, which was asked for by nobody else; otherwise 0."""
    if impl is not None or needs_grad or dropout_p > 0 or not q.is_cuda or torch.compiler.is_compiling():
        return 0
    if is_capturing(q):  # the graph will be replayed on cells of other lengths
        return 0
    length, dtype, target = cells.equal_length, DTYPE_NAMES[q.dtype], target_for(q)
    if not is_for_cudnn(dtype, q.shape[-1], length, target) or is_forced(OP):
        return 0
    tell_once(Choice(OP, Impl.TORCH, "cuDNN is faster where all cells are equally long"), dtype, target)
    return length


def _seed_for(q: torch.Tensor, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor | None:
    if dropout_p == 0:
        return None
    return draw_seed(q.device) if seed is None else seed


def attention_workspace(qkv: torch.Tensor, longest: int) -> Workspace:
    """Of :func:`varlen_attention_qkv` of rows such as ``qkv`` [T, 3, H, D] in inference, cells of up to ``longest``.

    T may be 0. On a card as much is said as torch's kernels take beside their result: as many bytes again.
    """
    _, _, n_heads, head_dim = qkv.shape
    cu_seqlens = torch.tensor([0, longest])
    q, k, v = qkv.unbind(1)
    why_not = _why_not_loops(q, k, v, 0.0)
    if qkv.device.type != "cpu":
        return Workspace(qkv.dtype.itemsize * n_heads * head_dim)
    if _choose(q, head_dim, None, 0.0, cu_seqlens, False, numba_cannot=why_not) == Impl.NUMBA:
        from geneformer_kernels.ops.varlen_attention import host_float32

        loops = host_float32.workspace(longest, head_dim)
        is_always = _choose(q, head_dim, None, 0.0, cu_seqlens[:1], False, numba_cannot=why_not) == Impl.NUMBA
        # Batches of shorter cells may be torch's.
        return loops if is_always else one_by_one(loops, sdpa.workspace(qkv.dtype, longest, n_heads, head_dim))
    return sdpa.workspace(qkv.dtype, longest, n_heads, head_dim)


def _narrowed(out: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The first columns of every head, without those that were added for the kernels."""
    return out if out.shape[-1] == head_dim else out[..., :head_dim].contiguous()


@ranged("attention_cells")
def attention_cells(
    cu_seqlens: torch.Tensor,
    x: torch.Tensor,
    *,
    head_dim: int,
    longest: int | None = None,
    dropout_p: float = 0.0,
    dtype: torch.dtype | None = None,
    impl: Impl | str | None = None,
) -> AttentionCells:
    """Cells prepared once for the attention of all layers: what to pass to it as ``cu_seqlens``.

    Make them at the beginning of every forward pass, within what is captured or compiled: they hold what was derived
    from ``cu_seqlens`` (for the Triton kernels a list of tiles, made on the device), and do not notice when these are
    overwritten. Attention that asks for other lists, of another dtype say, makes its own.

    Parameters
    ----------
    cu_seqlens
        [B + 1] integers, cumulative cell lengths, as for :func:`varlen_attention`.
    x
        [T, ...] on the device of the queries, such as the hidden states they are projected from.
    head_dim
        D.
    longest
        Tokens of the longest cell, or more, if the host knows; otherwise torch's kernels on a card have to ask the
        device, which is done here.
    dropout_p
        Of the attention weights.
    dtype
        Of the queries; None is that of ``x``.
    impl
        As for :func:`varlen_attention`.

    Returns
    -------
    AttentionCells
        On the device of ``x``.

    Raises
    ------
    TypeError, ValueError, ImplUnavailableError
        As :func:`varlen_attention` does.
    """
    check_tensor("x", x, FLOATS)
    if x.ndim == 0:
        raise ValueError("x must be rows, not a single number")
    check_out_dtype("dtype", dtype)
    dtype = x.dtype if dtype is None else dtype
    least = check_bounds("cu_seqlens", cu_seqlens, len(x))
    check_whole("head_dim", head_dim, 1)
    check_probability("dropout_p", dropout_p, may_be_one=False)
    if longest is not None:
        check_whole("longest", longest, least)
    cells = AttentionCells(cu_seqlens, len(x), longest).to(x.device)
    needs_grad = torch.is_grad_enabled()
    choice = _choose(x, head_dim, impl, dropout_p, cells.cu_seqlens, needs_grad, dtype)
    if choice == Impl.TRITON:
        return cells.with_tiles(dtype, head_dim, has_dropout=dropout_p > 0, needs_grad=needs_grad)
    if choice == Impl.TORCH and x.is_cuda and longest is None and len(x):
        return dataclasses.replace(cells, longest=cells.bound())
    return cells


@ranged("varlen_attention")
def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | AttentionCells,
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
        are checked on the CPU; on a card that would wait for the device, and wrong values give wrong numbers. Where
        several layers see the same cells, :func:`attention_cells` prepares them once.
    scale
        Positive factor on the scores; None is ``1 / sqrt(D)``.
    dropout_p
        Probability of dropping an attention weight (training only), in [0, 1).
    seed
        [1] int64 on the device of ``q``, which decides the mask; None draws one from torch's generator. Torch's kernels
        on a card draw their own: there it has no effect.
    impl
        ``"triton"``, ``"numba"``, ``"torch"`` or ``"reference"``; None chooses. The reference has no dropout. Triton
        serves head dimensions up to 128, those that are no multiple of 16 in a padded copy; wider ones go to torch.
        ``"numba"`` stands for compiled loops of float32 on a CPU with AVX2, for head dimensions that are multiples of
        16, without dropout and gradient.

    Returns
    -------
    torch.Tensor
        [T, H, D] in the dtype of ``q``; a token attends to every token of its own cell and to none of another. The
        gradients are deterministic.

    Raises
    ------
    TypeError
        Something is no tensor, or no number.
    ValueError
        Shapes, dtypes, devices, ``scale``, ``dropout_p`` or ``cu_seqlens`` do not fit together.
    ImplUnavailableError
        An implementation asked for by name cannot run here.

    References
    ----------
    Vaswani et al., "Attention is all you need", arXiv:1706.03762; Dao, "FlashAttention-2", arXiv:2307.08691.
    """
    cells, scale = _check({"q": q, "k": k, "v": v}, cu_seqlens, scale, dropout_p, seed)
    needs_grad = needs_gradient(q, k, v)
    why_not = _why_not_loops(q, k, v, dropout_p)
    choice = _choose(q, q.shape[-1], impl, dropout_p, cells.cu_seqlens, needs_grad, numba_cannot=why_not)
    if choice == Impl.REFERENCE:
        return reference.varlen_attention(q, k, v, cells.cu_seqlens, scale)
    if choice == Impl.NUMBA:
        return sdpa.attend_float32(q, k, v, cells, scale)
    if length := _length_for_cudnn(q, impl, dropout_p, cells, needs_grad):
        return sdpa.attend_equal(q, k, v, length, scale)
    if choice == Impl.TORCH:
        return sdpa.attend(q, k, v, cells, scale, dropout_p, seed)
    # Imported late: it registers operators.
    from geneformer_kernels.ops.varlen_attention import launches

    head_dim = q.shape[-1]
    q, k, v = (launches.rows_of(x) for x in (q, k, v))
    seed = _seed_for(q, dropout_p, seed)
    out = launches.varlen_attention_fwd(q, k, v, *cells.arguments, scale, dropout_p, seed)[0]
    return _narrowed(out, head_dim)


@ranged("varlen_attention")
def varlen_attention_qkv(
    qkv: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | AttentionCells,
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
    TypeError, ValueError, ImplUnavailableError
        As :func:`varlen_attention` does.
    """
    cells, scale = _check({"qkv": qkv}, cu_seqlens, scale, dropout_p, seed, n_axes=4)
    q, k, v = qkv.unbind(1)
    needs_grad = needs_gradient(qkv)
    # Asked with ``==``: torch 2.11's compiler does not know ``!=`` of a member of an enumeration.
    why_not = _why_not_loops(q, k, v, dropout_p)
    choice = _choose(q, q.shape[-1], impl, dropout_p, cells.cu_seqlens, needs_grad, numba_cannot=why_not)
    is_triton = choice == Impl.TRITON
    if not is_triton or _length_for_cudnn(q, impl, dropout_p, cells, needs_grad):
        return varlen_attention(q, k, v, cu_seqlens=cells, scale=scale, dropout_p=dropout_p, seed=seed, impl=impl)
    from geneformer_kernels.ops.varlen_attention import launches

    head_dim = qkv.shape[-1]
    qkv, seed = launches.rows_of(qkv), _seed_for(qkv, dropout_p, seed)
    return _narrowed(launches.varlen_attention_qkv_fwd(qkv, *cells.arguments, scale, dropout_p, seed)[0], head_dim)


@ranged("attention_scores")
def attention_scores(
    q: torch.Tensor, k: torch.Tensor, *, cu_seqlens: torch.Tensor | AttentionCells, scale: float | None = None
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
    TypeError, ValueError
        As :func:`varlen_attention` does.
    """
    cells, scale = _check({"q": q, "k": k}, cu_seqlens, scale, 0.0, None)
    return reference.attention_scores(q, k, cells.cu_seqlens, scale)
