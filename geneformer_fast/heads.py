"""What is put on top of an encoder: masked genes, classes of cells, classes of genes, values.

Heads take rows of hidden states, so that nobody pays for rows nobody asked for: the MLM head over all positions is
41 to 58 % of a small Geneformer's work.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from geneformer_kernels import mlm_cross_entropy, residual_layernorm
from geneformer_kernels.arguments import check_whole
from geneformer_kernels.ops.feed_forward.reference import activate
from torch import nn

from geneformer_fast import families
from geneformer_fast.config import EncoderConfig
from geneformer_fast.layers import EightBits
from geneformer_fast.ragged import Ragged


class MLMHead(nn.Module):
    """Masked gene prediction: linear, activation, LayerNorm, decoder over the vocabulary plus a bias.

    With ``config.inputs == "values"`` the decoder has one output, the predicted value (AIDO.Cell). Decoder and table
    may have weights of eight bits.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.n_outputs = config.vocab_size if config.inputs == "tokens" else 1
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.decoder = None if config.tied_decoder else nn.Linear(config.width, self.n_outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(self.n_outputs))

    def forward(self, rows: torch.Tensor, token_table: torch.Tensor | EightBits | None = None) -> torch.Tensor:
        """[R, C] hidden rows -> [R, V] logits; ``token_table`` [V, C] is the decoder where it is tied."""
        hidden, decoder = self.transform(rows), self._decoder(token_table)
        if isinstance(decoder, EightBits):
            return decoder.decoded(hidden, self.bias)
        return F.linear(hidden, decoder.to(hidden.dtype), self.bias.to(hidden.dtype))

    def loss(
        self,
        rows: torch.Tensor,
        targets: torch.Tensor,
        token_table: torch.Tensor | EightBits | None = None,
        *,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """[R, C] hidden rows and [R] token ids -> cross entropy, a scalar unless ``reduction`` is ``"none"``.

        Rows of target -100 do not count. A decoder of eight bits is widened as a whole meanwhile.
        """
        hidden, decoder = self.transform(rows), self._decoder(token_table)
        weight = decoder.widened(hidden.dtype) if isinstance(decoder, EightBits) else decoder
        return mlm_cross_entropy(hidden, weight, self.bias, targets, reduction=reduction)

    def transform(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, C] -> [R, C], what the decoder reads."""
        hidden = self.dense(_as_input(self.dense, rows))
        if self.config.head_activation == "relu":
            hidden = F.relu(hidden)
        elif self.config.head_activation == "gelu":
            hidden = F.gelu(hidden)
        else:
            hidden = activate(hidden, self.config.head_activation)
        _, hidden = residual_layernorm(
            hidden, None, self.norm.weight, self.norm.bias, eps=self.norm.eps, norm="post", out_dtype=hidden.dtype
        )
        return hidden

    def _decoder(self, token_table: torch.Tensor | EightBits | None) -> torch.Tensor | EightBits:
        if self.decoder is not None:
            return self.decoder if isinstance(self.decoder, EightBits) else self.decoder.weight
        if token_table is None:
            raise ValueError("this head shares the encoder's token table: pass it as token_table")
        return token_table


class Pooler(nn.Module):
    """BERT's pooler: ``tanh(linear(first token))``. For Geneformer V1 the first token is the top-ranked gene."""

    reads = "first"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, C] first rows -> [B, C]."""
        return torch.tanh(self.dense(_as_input(self.dense, rows)))


class CellClassifier(nn.Module):
    """Class of a cell, from the pooled first token (BertForSequenceClassification)."""

    reads = "first"

    def __init__(self, config: EncoderConfig, n_classes: int) -> None:
        super().__init__()
        self.pooler = Pooler(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.width, n_classes)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, C] first rows -> [B, n_classes] logits."""
        return self.classifier(self.dropout(self.pooler(rows)))


class MeanClassifier(CellClassifier):
    """Class of a cell, from the mean over all its positions in place of the first token, which is a gene like others.

    Parameters as in :class:`CellClassifier`.
    """

    reads = "cells"

    def forward(self, hidden: Ragged) -> torch.Tensor:  # type: ignore[override]
        """Hidden states of whole cells -> [B, n_classes] logits."""
        return super().forward(torch.segment_reduce(hidden.values, "mean", lengths=hidden.lengths.long()))


class GeneClassifier(nn.Module):
    """Class of every gene of a cell (BertForTokenClassification)."""

    def __init__(self, config: EncoderConfig, n_classes: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.width, n_classes)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, C] hidden rows -> [R, n_classes] logits."""
        return self.classifier(self.dropout(_as_input(self.classifier, rows)))


def _as_input(layer: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    """Rows in the dtype that a layer takes; one with weights of eight bits rounds them itself."""
    return rows if isinstance(layer, EightBits) else rows.to(layer.weight.dtype)


#: Heads that any encoder may have, by name.
COMMON: dict[str, Callable[[EncoderConfig, int], nn.Module]] = {
    "mlm": lambda config, _: MLMHead(config),
    "pooler": lambda config, _: Pooler(config),
    "cells": CellClassifier,
    "genes": GeneClassifier,
}


def heads_of(config: EncoderConfig) -> dict[str, Callable[[EncoderConfig, int], nn.Module]]:
    """The heads that an encoder may have, by name: the common ones, and those of its family in place of them or beside.

    A head of a family says by its attribute ``reads`` what :meth:`Encoder.logits` gives it: ``"rows"`` of hidden states
    [R, C], as without it; ``"first"``, those of each cell's first token [B, C]; or ``"cells"``, all of them, a Ragged.
    """
    found = families.family_of(config)
    return COMMON if found is None else {**COMMON, **found.heads}


def reads_of(head: nn.Module) -> str:
    """What a head is given: ``"rows"``, ``"first"`` or ``"cells"`` (:func:`heads_of`)."""
    return getattr(head, "reads", "rows")


def make_head(name: str | None, config: EncoderConfig, n_classes: int = 2) -> nn.Module | None:
    """A head by name: ``"mlm"``, ``"cells"``, ``"genes"``, ``"pooler"``, one of the model's family, or None."""
    if name is None:
        return None
    makers = heads_of(config)
    if name in ("cells", "genes"):
        check_whole("n_classes", n_classes, 1)
    if name not in makers:
        raise ValueError(f"no head named {name!r}; there are {', '.join(makers)}")
    head = makers[name](config, n_classes)
    # Plain attributes: which one it is, for checkpoints.
    head.head_name = name  # type: ignore[assignment]
    return head
