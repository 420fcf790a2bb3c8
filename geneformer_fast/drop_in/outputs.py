"""An output of BertForMaskedLM whose logits are computed when somebody reads them.

The head over all positions is about half the work of a small Geneformer, and its logits are most of the memory of a
training step; a training loop looks at the loss only, an extractor of embeddings at the hidden states only.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from geneformer_kernels.on_device import plainly_on
from transformers.modeling_outputs import MaskedLMOutput

from geneformer_fast.drop_in.head import Head
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.layers import DECODED_ROWS

# A tensor at one moment: its version, its fingerprint, and how far that is exact.
_State = tuple[int, torch.Tensor, float]


class LogitsOnDemand:
    """Stands in an output for logits that nobody has asked for.

    It remembers how the forward pass ran, and with which weights: the value is the same as if it had been computed
    there, whatever has been exchanged in the model or hooked since. ``dtype`` and ``float()`` are what accelerate looks
    for when it turns outputs into float32.

    Parameters
    ----------
    head
        What makes logits of hidden states.
    hidden
        [B, L, C], padded.
    is_quiet
        Whether going through an output's items leaves this in its place (a training step, whose outputs are walked
        through by whatever wraps the model), rather than computing the logits.
    """

    def __init__(self, head: Head, hidden: torch.Tensor, *, is_quiet: bool) -> None:
        kind = hidden.device.type
        self.is_quiet = is_quiet
        self._head, self._hidden = head, hidden
        self._has_grad, self._is_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        dtype = head.decoder[0].dtype
        self.dtype = self._autocast or (dtype if dtype.is_floating_point else hidden.dtype)
        self._read = (hidden, *head.tensors())
        self._made = self._state()
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
            The head's weights or the hidden states have been written to since the forward pass.
        """
        if self._value is None:
            self._check()
            dtype = self._autocast or torch.float32
            with (
                # Who reads without gradients may be followed by who wants them.
                torch.inference_mode(self._is_inference and torch.is_inference_mode_enabled()),
                torch.set_grad_enabled(self._has_grad),
                torch.autocast(self._hidden.device.type, dtype, enabled=self._autocast is not None),
            ):
                self._value = self._head.logits(self._hidden).to(self.dtype)
        return self._value

    def _check(self) -> None:
        is_there = all(not each.numel() or each.untyped_storage().size() for each in self._read)
        if is_there and all(map(_is_same, self._made, self._state())):
            return
        raise UnsupportedError(
            "the model's weights or the hidden states have changed since this output was made, so its logits cannot be "
            "computed any more; read outputs.logits before the optimizer's step"
        )

    @torch.no_grad()
    def _state(self) -> list[_State]:
        """Versions and fingerprints: what is written through ``.data`` or another library's view has no version."""
        with plainly_on(self._hidden):
            return [(0 if each.is_inference() else each._version, *_fingerprint(each)) for each in self._read]


def _fingerprint(x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """[C] -> a copy; [..., C] -> [...] sums of rows, every column with a factor of its own; and how far that is exact.

    Rows or columns that change places, and changes that cancel each other in a sum, change it as well. It takes as long
    as one more token takes in the head.
    """
    if x.ndim == 1:
        return x.detach().clone(), 0.0
    x, dtype = x.detach(), torch.promote_types(x.dtype, torch.float32)
    factors = torch.arange(1, x.shape[-1] + 1, device=x.device).to(dtype).sin()
    # A table of eight bits is not widened as a whole.
    parts = [x] if x.is_floating_point() else x.split(DECODED_ROWS)
    sums = torch.cat([part.to(dtype) @ factors for part in parts]) if len(parts) > 1 else parts[0].to(dtype) @ factors
    # Another number of threads adds in another order.
    return sums, 64 * torch.finfo(dtype).eps


def _is_same(before: _State, after: _State) -> bool:
    (version, was, rounding), (version_now, now, _) = before, after
    if version != version_now or (was.shape, was.dtype, was.device) != (now.shape, now.dtype, now.device):
        return False
    if not was.numel() or not bool((was.isfinite() == now.isfinite()).all()):
        return not was.numel()
    was, now = was.nan_to_num(0.0, 0.0, 0.0), now.nan_to_num(0.0, 0.0, 0.0)
    return bool(((was - now).abs() <= rounding * was.abs().amax()).all())


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
