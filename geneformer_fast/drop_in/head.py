"""The head of a BertForMaskedLM: as it was at one moment, and its loss over the rows that have a label."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from geneformer_kernels import mlm_cross_entropy
from geneformer_kernels.int8_rows import widened_weight
from torch import nn
from transformers.models.bert import modeling_bert

from geneformer_fast.drop_in.plain import has_global_hooks, is_ours, is_plain, is_plain_linear, is_unhooked
from geneformer_fast.layers import decoded

# What torch.nn.CrossEntropyLoss leaves out, as transformers calls it.
IGNORED = -100


@dataclass(frozen=True)
class Head:
    """Transform and decoder of a head that nobody has wrapped or hooked, with the tensors that were its weights.

    What is exchanged in the model later, or hooked, or put there by ``torch.func.functional_call`` and taken out again,
    changes nothing here.
    """

    dense: tuple[torch.Tensor, torch.Tensor | None]
    activation: Callable[[torch.Tensor], torch.Tensor]
    norm: tuple[torch.Tensor, torch.Tensor]
    eps: float
    decoder: tuple[torch.Tensor, torch.Tensor]
    #: [V] where the decoder's weight has eight bits: what its rows are multiplied by.
    decoder_scale: torch.Tensor | None = None

    @classmethod
    def of(cls, head: Any) -> Head | None:
        """What a model's ``cls`` is now; None where it has to be called."""
        if type(head) is not modeling_bert.BertOnlyMLMHead or has_global_hooks():
            return None
        predictions = head.predictions
        if type(predictions) is not modeling_bert.BertLMPredictionHead:
            return None
        transform: Any = predictions.transform
        decoder: Any = predictions.decoder
        if type(transform) is not modeling_bert.BertPredictionHeadTransform:
            return None
        dense, norm, activation = transform.dense, transform.LayerNorm, transform.transform_act_fn
        is_whole = all(map(is_unhooked, (head, predictions, transform))) and is_plain_linear(dense)
        is_quantized = is_ours(decoder) and decoder.scheme == "int8-weights" and decoder.smooth is None
        is_whole = is_whole and (is_quantized or is_plain_linear(decoder))
        is_whole = is_whole and is_plain(norm, nn.LayerNorm)
        if not is_whole or any(each is None for each in (norm.weight, norm.bias, decoder.bias)):
            return None
        if isinstance(activation, nn.Module):
            if not is_unhooked(activation) or next(_tensors_of(activation), None) is not None:
                return None
            # A copy keeps its options, and whether it is training.
            activation = copy.copy(activation).forward
        weight = decoder.weight_q if is_quantized else decoder.weight
        scale = decoder.row_scale if is_quantized else None
        return cls(
            (dense.weight, dense.bias), activation, (norm.weight, norm.bias), norm.eps, (weight, decoder.bias), scale
        )

    def transformed(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C], what the decoder reads."""
        scale, shift = self.norm
        hidden = self.activation(F.linear(hidden, *self.dense))
        return F.layer_norm(hidden, scale.shape, scale, shift, self.eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., V]."""
        read = self.transformed(hidden)
        if self.decoder_scale is None:
            return F.linear(read, *self.decoder)
        logits = decoded(read.flatten(0, -2), self.decoder[0], self.decoder_scale, self.decoder[1])
        return logits.view(*read.shape[:-1], -1)

    def wide_decoder(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the decoder in floating point; those of eight bits in ``dtype``."""
        weight, bias = self.decoder
        return (
            (weight, bias) if self.decoder_scale is None else (widened_weight(weight, self.decoder_scale, dtype), bias)
        )

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that logits depend on besides the hidden states."""
        return tuple(each for each in self._tensors() if each is not None)

    def _tensors(self) -> tuple[torch.Tensor | None, ...]:
        return *self.dense, *self.norm, *self.decoder, self.decoder_scale


def _tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def loss_of_rows(module: Any, head: Head | None, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the places that have a label; nothing is computed for the others.

    ``head`` is None where ``module``, the model's ``cls``, has to be called.
    """
    targets = labels.to(hidden.device).flatten()
    places = _places_of(targets)
    rows, targets = hidden.flatten(0, 1).index_select(0, places), targets.index_select(0, places)
    if head is None:
        return loss_of_logits(module(rows), targets)
    read = head.transformed(rows)
    if read.dtype != torch.float64 and torch.is_autocast_enabled(read.device.type):
        read = read.to(torch.get_autocast_dtype(read.device.type))
    return mlm_cross_entropy(read, *head.wide_decoder(read.dtype), targets, ignore_index=IGNORED)


def loss_of_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of [..., V] in float32 sums, and 0 rather than NaN over no rows, as over rows alone."""
    targets = labels.to(logits.device).flatten()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(wide.view(-1, wide.shape[-1]), targets, reduction="sum", ignore_index=IGNORED)
    return losses / (targets != IGNORED).sum().clamp(min=1)


@torch.compiler.disable
def _places_of(targets: torch.Tensor) -> torch.Tensor:
    return (targets != IGNORED).nonzero().squeeze(1)


def why_not_labels(model: Any, labels: Any, n_places: int) -> str | None:
    """Why labels go to the stock forward pass, which then says what is wrong with them; None where they are right."""
    decoder = getattr(getattr(model.cls, "predictions", None), "decoder", None)
    n_tokens = getattr(decoder, "out_features", None)
    if n_tokens is not None and n_tokens != model.config.vocab_size:
        return f"its decoder has {n_tokens} outputs and config.vocab_size is {model.config.vocab_size}"
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        return f"labels are {getattr(labels, 'dtype', type(labels).__name__)}, not int64"
    if labels.numel() != n_places:
        return f"there are {labels.numel()} labels for {n_places} places"
    if labels.ndim != 1 and not labels.is_contiguous():
        return "labels that are not contiguous cannot be viewed as one row"
    # On a card nobody waits to look; the operation makes the loss NaN there.
    if n_tokens is None or labels.device.type != "cpu" or not labels.numel():
        return None
    counted = torch.where(labels == IGNORED, 0, labels)
    low, high = (int(value) for value in counted.aminmax())
    if low < 0 or high >= n_tokens:
        return f"label {low if low < 0 else high} is outside the model's {n_tokens} tokens"
    return None
