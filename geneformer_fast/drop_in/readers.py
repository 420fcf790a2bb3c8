"""Whether anybody reads hidden states at padding, where they are zero unless the stock values are asked for.

Three readers are recognised: labels at padding, a loss whose gradient arrives there, and an attention pooling beside
the encoder that takes no mask, such as that of Geneformer's multi-task classifier.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

from geneformer_fast.drop_in.head import IGNORED
from geneformer_fast.ragged import Padding

#: How the stock values are asked for.
PAST_PADDING = 'padding="stock"'
# Modules of these are no users' models: they hand hidden states on.
_PASSING_ON = ("transformers.", "peft.", "torch.", "accelerate.")
_told: set[str] = set()


@dataclass
class Watch:
    """What is still to be looked for in an accelerated BertModel: each once, in the first batch with padding."""

    wants_caller: bool = True
    wants_gradient: bool = True
    wants_labels: bool = True

    def caller(self, bert: nn.Module, padding: Padding) -> None:
        """Warn where the module that calls a BertModel pools over all positions without a mask."""
        if not self.wants_caller or padding.index is None:
            return
        self.wants_caller = False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
            if isinstance(owner, nn.Module) and owner is not bert:
                pooling = unmasked_pooling(owner, bert)
                if pooling is not None:
                    _warn(f"{type(owner).__name__}.{pooling} pools over all positions, padding included")
                    return
            frame = frame.f_back

    def labels(self, labels: torch.Tensor | None, mask: torch.Tensor | None) -> None:
        """Warn where places [B, L] that the mask calls padding have labels; in evaluation no gradient tells."""
        if not self.wants_labels or labels is None or mask is None or labels.shape != mask.shape:
            return
        is_padding = mask == 0
        if not bool(is_padding.any()):
            return
        self.wants_labels = False
        if bool(((labels != IGNORED) & is_padding.to(labels.device)).any()):
            _warn("the loss reads hidden states at padding (there are labels)")

    def gradient(self, states: torch.Tensor, padding: Padding) -> None:
        """Warn in the backward pass where hidden states [B, L, C] get a gradient at padding."""
        if not self.wants_gradient or padding.index is None or not states.requires_grad:
            return
        self.wants_gradient = False
        index = padding.index

        def look(gradient: torch.Tensor) -> None:
            size = torch.nan_to_num(gradient.detach().flatten(0, 1).abs().amax(1), nan=0.0, posinf=0.0)
            # A reduced loss that overflowed makes NaN of zeros; only real gradients count.
            if bool(size.index_fill(0, index, 0.0).any()):
                _warn("the loss reads hidden states at padding (a gradient arrives there)")

        states.register_hook(look)


def unmasked_pooling(owner: nn.Module, bert: nn.Module) -> str | None:
    """The name of an attention pooling that a user's model has beside its encoder and gives no mask; else None."""
    if type(owner).__module__.startswith(_PASSING_ON) or not any(module is bert for module in owner.modules()):
        return None
    for name, child in owner.named_children():
        label = f"{name} {type(child).__name__}".lower()
        if "pool" in label and ("attention" in label or "attn" in label) and not _takes_mask(child):
            return name
    return None


def _takes_mask(module: Any) -> bool:
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any("mask" in each.name or "length" in each.name or each.kind is each.VAR_KEYWORD for each in parameters)


@torch.compiler.disable
def _warn(what: str) -> None:
    message = (
        f"{what}, where an accelerated model gives zeros and the stock model does not: results differ. Pass a mask, "
        f"label padding with -100, or use geneformer_fast.accelerate(model, {PAST_PADDING})"
    )
    if message not in _told:
        _told.add(message)
        warnings.warn(message, UserWarning, stacklevel=3)
