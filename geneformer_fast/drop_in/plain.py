"""Whether a module still is what transformers built, so that its parameters may be handed to a fused operation.

Whatever somebody has wrapped, hooked, quantized or replaced is called as the module it now is. The question is asked in
every forward pass, because adapters and hooks come and go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from geneformer_fast.layers import QuantizedLinear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
# Sharding, pruning, counters and collectors of outputs: their hooks look at no shape, so packed tensors do for them.
# Hooks of PEFT are not among them: they hand out one adapter for each row of a padded batch.
_MACHINERY = ("torch.", "transformers.", "accelerate.", "geneformer_fast.profiling.")
# Observers of quantization do look: at the largest value there is, padding included.
_OBSERVERS = ("torch.ao.",)


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling a module runs its class's ``forward`` and nothing else."""
    return "forward" not in vars(module) and not any(getattr(module, name, None) for name in _HOOKS)


def has_global_hooks() -> bool:
    """Whether hooks for all modules are set (profilers and counters do that): then every module has to be called."""
    # Private in torch, where Module.__call__ asks the same; without it hooks are taken to be absent.
    ask = getattr(torch_module, "_has_any_global_hook", None)
    return ask is not None and bool(ask())


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether somebody's own hooks are on a module: written for padded batches, they are shown nothing else."""
    known = module.__dict__
    if not (
        known["_forward_hooks"]
        or known["_forward_pre_hooks"]
        or known["_backward_hooks"]
        or known["_backward_pre_hooks"]
    ):
        return False
    return _is_any_foreign(known[name] for name in _HOOKS)


def has_foreign_global_hooks() -> bool:
    """The same for hooks that are set for all modules."""
    return has_global_hooks() and _is_any_foreign(getattr(torch_module, name, None) for name in _GLOBAL_HOOKS)


def _is_any_foreign(groups: Iterable[dict[int, Any] | None]) -> bool:
    origins = (origin(hook) for hook in _hooks_in(groups))
    return any(not each.startswith(_MACHINERY) or each.startswith(_OBSERVERS) for each in origins)


def _hooks_in(groups: Iterable[dict[int, Any] | None]) -> Iterator[Any]:
    for group in groups:
        if group:
            yield from group.values()


def origin(function: Any) -> str:
    """The module a hook or another function was written in, with a dot behind it."""
    while hasattr(function, "func"):
        function = function.func
    return f"{getattr(function, '__module__', None) or type(function).__module__}."


def packed_forward_of(module: nn.Module) -> Any:
    """What :func:`accelerate` has put into a module, be it inside of other tools' wrappers; None where nothing is."""
    forward = vars(module).get("forward")
    # The type is asked, for a bound method answers for what it is bound to.
    while forward is not None and not getattr(type(forward), "is_packed", False):
        forward = getattr(forward, "__func__", None) or getattr(forward, "__wrapped__", None)
    return forward


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of exactly this class, unhooked, and its parameters are ordinary tensors."""
    return type(module) is kind and is_unhooked(module) and all(map(_is_ordinary, module._parameters.values()))


def is_plain_linear(*modules: nn.Module) -> bool:
    """:func:`is_plain` for linear layers."""
    return all(is_plain(module, nn.Linear) for module in modules)


def is_ours(*modules: nn.Module) -> bool:
    """Whether linear layers have weights of eight bits in a way that our operations know, and are unhooked."""
    return all(isinstance(module, QuantizedLinear) and is_unhooked(module) for module in modules)


def is_plain_norm(norm: nn.Module, dropout: nn.Module) -> bool:
    """:func:`is_plain` for a LayerNorm with scale and shift, and the dropout in front of it."""
    return bool(
        is_plain(norm, nn.LayerNorm)
        and is_plain(dropout, nn.Dropout)
        and norm.weight is not None
        and norm.bias is not None
        and vars(norm)["eps"] > 0  # operations of ours want one
    )


def _is_ordinary(parameter: Any) -> bool:
    # Quantized and distributed tensors are subclasses, which concatenation and operations of ours do not know.
    return parameter is None or type(parameter) in (nn.Parameter, torch.Tensor)
