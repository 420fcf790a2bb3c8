"""An output of BertForMaskedLM whose logits are computed when somebody reads them.

The head over all positions is about half the work of a small Geneformer, and its logits are most of the memory of a
training step; a training loop looks at the loss only, an extractor of embeddings at the hidden states only.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput

from geneformer_fast.errors import UnsupportedError


class LogitsOnDemand:
    """Stands in an output for logits that nobody has asked for.

    It remembers how the forward pass ran: the value is the same as if it had been computed there. ``dtype`` and
    ``float()`` are what accelerate looks for when it turns outputs into float32.

    Parameters
    ----------
    head
        What makes logits of hidden states.
    hidden
        [B, L, C], padded.
    dtype
        Of the head's weights.
    is_quiet
        Whether going through an output's items leaves this in its place (a training step, whose outputs are walked
        through by whatever wraps the model), rather than computing the logits.
    """

    def __init__(self, head: nn.Module, hidden: torch.Tensor, dtype: torch.dtype, *, is_quiet: bool) -> None:
        kind = hidden.device.type
        self.is_quiet = is_quiet
        self._head, self._hidden = head, hidden
        self._has_grad = torch.is_grad_enabled()
        self._autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.dtype = self._autocast or (dtype if dtype.is_floating_point else hidden.dtype)
        self._made = self._versions()
        self._value: torch.Tensor | None = None

    def float(self) -> LogitsOnDemand:
        """The same logits as float32, still not computed."""
        other = copy.copy(self)
        other.dtype, other._value = torch.float32, None
        return other

    def tensor(self) -> torch.Tensor:
        """[B, L, V], computed at the first call.

        Raises
        ------
        UnsupportedError
            The head's weights have changed since the forward pass.
        """
        if self._value is None:
            now = self._versions()
            # Parameters may have been exchanged for others of the same values (sharding does so): those are not judged.
            if any(now[key] != version for key, version in self._made.items() if key in now):
                raise UnsupportedError(
                    "the model's weights have changed since this output was made, so its logits cannot be computed "
                    "any more; read outputs.logits before the optimizer's step"
                )
            dtype = self._autocast or torch.float32
            with (
                torch.set_grad_enabled(self._has_grad),
                torch.autocast(self._hidden.device.type, dtype, enabled=self._autocast is not None),
            ):
                self._value = self._head(self._hidden).to(self.dtype)
        return self._value

    def _versions(self) -> dict[int, int]:
        parameters = (p for p in self._head.parameters() if not p.is_inference())
        return {id(parameter): parameter._version for parameter in parameters}


class MaskedOutput(MaskedLMOutput):
    """transformers' MaskedLMOutput with logits that may be a :class:`LogitsOnDemand` inside.

    Every way of reading the logits gives a tensor: the attribute, the key, the index, ``to_tuple()``. Reading the loss
    or the hidden states computes nothing.
    """

    def __post_init__(self) -> None:
        # Some releases read every field here.
        vars(self)["_is_ready"] = False
        super().__post_init__()
        vars(self)["_is_ready"] = True

    @property
    def logits(self) -> torch.Tensor | None:  # type: ignore[override]
        """[B, L, V], or None."""
        value = vars(self).get("logits")
        if isinstance(value, LogitsOnDemand) and vars(self)["_is_ready"]:
            value = value.tensor()
            self["logits"] = value
        return value  # type: ignore[return-value]

    @logits.setter
    def logits(self, value: Any) -> None:
        vars(self)["logits"] = value

    def __getitem__(self, key: Any) -> Any:
        if key == "logits":
            if key not in self:
                raise KeyError(key)
            return self.logits
        if isinstance(key, str):
            return OrderedDict.__getitem__(self, key)
        names = tuple(self.keys())[key]
        return self[names] if isinstance(names, str) else tuple(self[name] for name in names)

    def get(self, key: Any, default: Any = None) -> Any:
        """As of a dictionary."""
        try:
            return self[key]
        except KeyError:
            return default

    def items(self) -> Any:
        """As of a dictionary; the logits of a training step are not computed by this."""
        self._settle()
        return super().items()

    def values(self) -> Any:
        """As of a dictionary; the logits of a training step are not computed by this."""
        self._settle()
        return super().values()

    def __reduce__(self) -> Any:
        _ = self.logits
        return super().__reduce__()

    def _settle(self) -> None:
        value = vars(self).get("logits")
        if isinstance(value, LogitsOnDemand) and not value.is_quiet:
            _ = self.logits
