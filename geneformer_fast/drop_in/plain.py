"""Whether a module still is what transformers built, so that its parameters may be handed to a fused operation.

Whatever somebody has wrapped, hooked, quantized or replaced is called as the module it now is. The question is asked in
every forward pass, because adapters and hooks come and go.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling a module runs its class's ``forward`` and nothing else."""
    return "forward" not in vars(module) and not any(getattr(module, name, None) for name in _HOOKS)


def has_global_hooks() -> bool:
    """Whether hooks for all modules are set (profilers and counters do that): then every module has to be called."""
    # Private in torch, where Module.__call__ asks the same; without it hooks are taken to be absent.
    ask = getattr(torch_module, "_has_any_global_hook", None)
    return ask is not None and bool(ask())


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of exactly this class, unhooked, and its parameters are ordinary tensors."""
    return type(module) is kind and is_unhooked(module) and all(map(_is_ordinary, module._parameters.values()))


def is_plain_linear(*modules: nn.Module) -> bool:
    """:func:`is_plain` for linear layers."""
    return all(is_plain(module, nn.Linear) for module in modules)


def is_plain_norm(norm: nn.Module, dropout: nn.Module) -> bool:
    """:func:`is_plain` for a LayerNorm with scale and shift, and the dropout in front of it."""
    return (
        is_plain(norm, nn.LayerNorm)
        and is_plain(dropout, nn.Dropout)
        and norm.weight is not None
        and norm.bias is not None
    )


def _is_ordinary(parameter: Any) -> bool:
    # Quantized and distributed tensors are subclasses, which concatenation and operations of ours do not know.
    return parameter is None or type(parameter) in (nn.Parameter, torch.Tensor)
