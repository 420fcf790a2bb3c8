"""The objective of pretraining: name the genes that are hidden."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import numpy as np
import torch
from torch import nn

from geneformer_fast.data.kinds import TokenKinds
from geneformer_fast.data.masking import MaskedBatch, Masking, mask_genes
from geneformer_fast.data.random import CellRandom
from geneformer_fast.encoder import Encoder
from geneformer_fast.ragged import Ragged
from geneformer_fast.training.distributed import Ranks


class MaskedGenes:
    """Cross entropy of masked genes, computed for the masked rows only (an :class:`Objective`).

    Parameters
    ----------
    kinds
        What the token ids are.
    masking
        How much is masked, and how.
    """

    is_sharing_evaluation = True

    def __init__(self, kinds: TokenKinds, masking: Masking) -> None:
        self.kinds, self.masking = kinds, masking
        self.chance_loss = float(np.log(kinds.n_tokens))

    def collate(self, tokens: Ragged, cells: np.ndarray, rng: CellRandom) -> MaskedBatch:
        """Mask a batch."""
        return mask_genes(tokens, self.kinds, self.masking, rng)

    def loss(self, model: nn.Module, batch: MaskedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the cross entropies in nats, number of masked genes)."""
        encoder = cast(Encoder, model)
        loss = encoder.mlm_loss(encoder(batch.tokens), batch.rows, batch.targets, reduction="sum")
        return loss, torch.full((), len(batch.rows), device=loss.device)  # filled there, not sent

    def metrics(self, model: nn.Module, batches: Iterable[MaskedBatch]) -> dict[str, float]:
        """``loss``: the mean cross entropy in nats; ``perplexity``: its exponential."""
        totals = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)
        for batch in batches:
            totals += torch.stack([value.double() for value in self.loss(model, batch)])
        total, n_masked = Ranks.current().sum(totals).tolist()
        mean = total / max(1.0, n_masked)
        return {"loss": mean, "perplexity": float(np.exp(mean))}
