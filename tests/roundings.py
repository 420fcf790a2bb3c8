"""Torch as it may round on any processor: its operations one by one, with roundings drawn at random.

How far plain torch is from float64 depends on the instructions of the machine, and on luck. What the arithmetic allows
does not: it follows from the number of terms in a sum, the size of what is added, and the dtype of what is stored.
Inside of :class:`DrawnRoundings` every operation, those of backward passes too, is computed in float64 and moved by an
error that its kind may have (Monte Carlo arithmetic; Parker, UCLA CSD-970002, 1997):

=================  ===================================================================================================
stored result      half the distance to its neighbour in its dtype, u * abs(x); nothing where the dtype holds it
                   exactly, so that copies, slices and masks stay exact (:func:`stored`)
sum, mean,         u * sqrt(n) * (sum of the n terms' absolute values), with float32's u if terms are narrower: so grow
matrix product     n roundings that do not know of each other, in whatever order the terms are added (Higham and Mary,
                   doi:10.1137/18M1226312) (:func:`summed`)
softmax, its sums  the steps that torch itself takes them apart into: a subtraction, powers, a sum, a division; large
                   scores lose digits in the first of them (:data:`STEPS`)
LayerNorm          likewise: a mean, differences from it, the mean of their squares, a product; a mean that is large
                   beside the differences costs digits (:data:`STEPS`)
attention          two products and a softmax, since torch's fused kernel is switched off (:func:`drawn`)
gradients          the operations of the backward pass, each of them one of the above
=================  ===================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import get_decompositions
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_flatten, tree_map

# One rounding band per dtype: the half distance between neighbours, relative.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

_ATEN = torch.ops.aten


def _var_mean(
    x: torch.Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    dim = list(range(x.ndim)) if dim is None else dim
    mean = x.mean(dim, keepdim=True)
    n = x.numel() / max(mean.numel(), 1)
    variance = (x - mean).square().sum(dim, keepdim=keepdim) / max(n - (1 if correction is None else correction), 0)
    return variance, mean if keepdim else mean.squeeze(dim)


#: Operations of several steps, and how they are taken apart; all but one by torch's own account of them.
STEPS: dict[Any, Callable] = {
    **get_decompositions(
        [
            _ATEN._softmax,
            _ATEN._log_softmax,
            _ATEN._softmax_backward_data,
            _ATEN._log_softmax_backward_data,
            _ATEN.logsumexp,
            _ATEN.native_layer_norm,
            _ATEN.native_layer_norm_backward,
            _ATEN.nll_loss_forward,
            _ATEN.nll_loss_backward,
        ]
    ),
    _ATEN.var_mean.correction: _var_mean,
}

#: Sums: how many terms a result has, given the arguments and the result. Where rows are added at indices, at most all.
TERMS: dict[Any, Callable[[Any, torch.Tensor], float]] = {
    **{op.default: lambda args, out: args[0].shape[-1] for op in (_ATEN.mm, _ATEN.bmm, _ATEN.mv, _ATEN.dot)},
    **{op.default: lambda args, out: args[1].shape[-1] for op in (_ATEN.addmm, _ATEN.baddbmm, _ATEN.addmv)},
    **{
        op: lambda args, out: args[0].numel() / max(out.numel(), 1) - 1
        for op in (_ATEN.sum.default, _ATEN.sum.dim_IntList, _ATEN.mean.default, _ATEN.mean.dim)
    },
    **{
        op.default: lambda args, out: args[3].shape[args[1]] if isinstance(args[1], int) else args[0].shape[0]
        for op in (_ATEN.index_add, _ATEN.index_add_, _ATEN.scatter_add, _ATEN.scatter_add_)
    },
    _ATEN.embedding_dense_backward.default: lambda args, out: args[1].numel(),
}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of this dtype are added up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class DrawnRoundings(TorchDispatchMode):
    """While it is entered, floating results below float64 carry errors drawn at random; the seed says which."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def between(self, x: torch.Tensor) -> torch.Tensor:
        """As many numbers between -1 and 1 as x has."""
        if x.device not in self._generators:
            self._generators[x.device] = torch.Generator(x.device).manual_seed(self._seed)
        return torch.rand(x.shape, dtype=torch.float64, device=x.device, generator=self._generators[x.device]) * 2 - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        is_exact = func.is_view or func in (_ATEN._to_copy.default, _ATEN.copy_.default, _ATEN.clone.default)
        if is_exact or torch.Tag.nondeterministic_seeded in func.tags or not tree_any(_is_narrow, (args, kwargs)):
            return func(*args, **kwargs)
        if func in STEPS:
            with self:
                return STEPS[func](*args, **kwargs)
        wide_args, wide_kwargs = tree_map(_widened, (args, kwargs))
        sizes = tree_map(_size, (args, kwargs)) if func in TERMS else None
        wide = func(*wide_args, **wide_kwargs)
        total = func(*sizes[0], **sizes[1]) if sizes else None
        # Of its own dtypes, and where it writes into an argument, that argument.
        out = func(*args, **kwargs)
        outs, structure = tree_flatten(out)
        found = []
        for one, exact in zip(outs, tree_flatten(wide)[0], strict=True):
            if not _is_narrow(one):
                found.append(one)
                continue
            if total is not None:
                exact = summed(exact, total, TERMS[func](args, one), one.dtype, self)
            rounded = stored(exact, one.dtype, self)
            found.append(one.copy_(rounded) if func._schema.is_mutable else rounded)
        return structure.unflatten(found)


def stored(exact: torch.Tensor, dtype: torch.dtype, roundings: DrawnRoundings) -> torch.Tensor:
    """A result in its dtype, off by up to one distance of neighbours where the dtype does not hold it exactly."""
    nearest = exact.to(dtype)
    half_step = (ROUNDING[dtype] * exact.abs()).clamp(min=torch.finfo(dtype).smallest_normal * ROUNDING[dtype])
    moved = (exact + half_step * roundings.between(exact)).to(dtype)
    return torch.where((nearest.double() == exact) | ~exact.isfinite(), nearest, moved)


def summed(
    exact: torch.Tensor, total: torch.Tensor, n_terms: float, dtype: torch.dtype, roundings: DrawnRoundings
) -> torch.Tensor:
    """A sum of ``n_terms`` terms, whose absolute values add up to ``total``, as an accumulator of ``dtype`` has it."""
    error = ROUNDING[accumulator(dtype)] * math.sqrt(max(n_terms, 0)) * total
    return torch.where(error.isfinite(), exact + error * roundings.between(exact), exact)


def drawn(function: Callable[[], Any], seed: int) -> Any:
    """What a function of torch's operations returns when their roundings are those of a seed."""
    with sdpa_kernel(SDPBackend.MATH), DrawnRoundings(seed):
        return function()


def _is_narrow(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64


def _widened(x: Any) -> Any:
    if isinstance(x, torch.dtype):
        return torch.float64 if x.is_floating_point else x
    return x.detach().to(torch.float64, copy=True) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _size(x: Any) -> Any:
    return _widened(x).abs_() if isinstance(x, torch.Tensor) and x.is_floating_point() else _widened(x)
