"""How scGPT and scBERT are pretrained, small: values that are hidden, and bins that are hidden."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from geneformer_fast.data.masking import MaskedBatch
from geneformer_fast.data.random import CellRandom
from geneformer_fast.encoder import Encoder
from geneformer_fast.families.scbert.published import MASK
from geneformer_fast.ragged import Ragged

#: Share of values that scGPT hides, and what stands in their place.
HIDDEN_VALUES, MASKED_VALUE = 0.4, -1.0
#: Share of expressed genes whose bin scBERT hides.
HIDDEN_BINS = 0.15


class _Hidden:
    """What both have in common (an :class:`~geneformer_fast.training.objective.Objective`)."""

    def loss(self, model: nn.Module, batch: MaskedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum over hidden genes, their number)."""
        encoder = cast(Any, model)
        found = encoder.head(encoder(batch.tokens).values[batch.rows])
        return self.error(found, batch.targets), torch.full((), float(len(batch.rows)), device=found.device)

    def metrics(self, model: nn.Module, batches: Iterable[MaskedBatch]) -> dict[str, float]:
        """``loss``, the mean."""
        terms = [[float(value) for value in self.loss(model, batch)] for batch in batches]
        return {"loss": sum(total for total, _ in terms) / max(1.0, sum(weight for _, weight in terms))}

    def error(self, found: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of what a head's outputs are off by."""
        raise NotImplementedError


class MaskedValues(_Hidden):
    """scGPT: the mean squared error of the hidden values of a cell's genes, in bins; CLS is never hidden."""

    def collate(self, tokens: Ragged, cells: np.ndarray, rng: CellRandom) -> MaskedBatch:
        """Hide values of pairs [T, 2]."""
        bounds = tokens.cu_seqlens.numpy()
        is_hidden = rng.uniform(bounds) < HIDDEN_VALUES
        is_hidden[bounds[:-1]] = False
        rows, pairs = torch.from_numpy(np.flatnonzero(is_hidden)), tokens.values.clone()
        targets = pairs[rows, 1].float()
        pairs[rows, 1] = MASKED_VALUE
        return MaskedBatch(tokens.with_values(pairs), rows, targets)

    def error(self, found: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Squares."""
        return F.mse_loss(found.float(), targets, reduction="sum")

    @staticmethod
    def begin(encoder: Encoder) -> None:
        """The last bias at the middle bin, which a rate fit for the rest would need long to reach."""
        cast(Any, encoder.head).layers[-1].bias.data.fill_(encoder.config.n_bins / 2)


class MaskedBins(_Hidden):
    """scBERT: the cross entropy of the bins of expressed genes that the mask stands for."""

    def collate(self, tokens: Ragged, cells: np.ndarray, rng: CellRandom) -> MaskedBatch:
        """Hide bins [T]."""
        is_hidden = (rng.uniform(tokens.cu_seqlens.numpy()) < HIDDEN_BINS) & (tokens.values.numpy() > 0)
        rows, bins = torch.from_numpy(np.flatnonzero(is_hidden)), tokens.values.clone()
        targets = bins[rows].long()
        bins[rows] = MASK
        return MaskedBatch(tokens.with_values(bins), rows, targets)

    def error(self, found: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Nats."""
        return F.cross_entropy(found.float(), targets, reduction="sum")

    @staticmethod
    def begin(encoder: Encoder) -> None:
        """As it is."""
