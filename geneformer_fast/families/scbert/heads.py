"""scBERT's heads: bins of masked values, and classes of cells from one number per gene."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from geneformer_fast.config import EncoderConfig
from geneformer_fast.errors import InputError
from geneformer_fast.heads import CellClassifier
from geneformer_fast.layers import EightBits
from geneformer_fast.ragged import Ragged

#: Hidden units of the classifier.
N_FIRST, N_SECOND = 512, 128


class BinDecoder(nn.Module):
    """Bin of a value from its hidden state: one linear layer, without a transform before it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.decoder = nn.Linear(config.width, config.vocab_size)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, C] hidden rows -> [R, V] logits of the bins and of the mask."""
        return self.decoder(_as_input(self.decoder, rows))

    def linears(self) -> list[nn.Module]:
        """The layers that a row passes one after another."""
        return [self.decoder]


class GeneConvolution(CellClassifier):
    """Class of a cell: every position's hidden state to one number, then three linear layers over all positions.

    The original calls the first layer a convolution with a kernel as wide as the hidden state.

    Parameters
    ----------
    config
        Of the encoder, whose ``max_len`` is the number of positions that a cell has.
    n_classes
        What the last layer tells apart.
    """

    reads = "cells"

    def __init__(self, config: EncoderConfig, n_classes: int) -> None:
        nn.Module.__init__(self)
        self.n_positions = config.max_len
        self.genes = nn.Linear(config.width, 1)
        self.first = nn.Linear(config.max_len, N_FIRST)
        self.second = nn.Linear(N_FIRST, N_SECOND)
        self.classifier = nn.Linear(N_SECOND, n_classes)

    def forward(self, hidden: Ragged) -> torch.Tensor:  # type: ignore[override]  # it says so by ``reads``
        """Hidden states [T, C] of whole cells -> [B, n_classes] logits.

        Raises
        ------
        InputError
            A cell has not the model's number of positions.
        """
        n_cells, n_positions = hidden.n_cells, self.n_positions
        # As many tokens as there would be and none longer: then all are equally long, and no device is asked.
        if hidden.n_tokens != n_cells * n_positions or (n_cells and hidden.max_len > n_positions):
            raise InputError(
                f"scBERT's classifier reads cells of {n_positions:,} values, and a cell has others "
                f"({hidden.n_tokens:,} values in {n_cells:,} cells); prepare them with the model's list of genes"
            )
        rows = F.relu(self.genes(_as_input(self.genes, hidden.values))).view(n_cells, n_positions)
        for layer in (self.first, self.second):
            rows = F.relu(layer(_as_input(layer, rows)))
        return self.classifier(_as_input(self.classifier, rows))

    def linears(self) -> list[nn.Module]:
        """The layers that a cell passes one after another."""
        return [self.genes, self.first, self.second, self.classifier]

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights as the original's: uniform within ``1 / sqrt(inputs)``, biases too.

        Those of an encoder are so small that three layers of them leave nothing of a cell.
        """
        for layer in (self.genes, self.first, self.second, self.classifier):
            bound = layer.in_features**-0.5
            for parameter in (layer.weight, layer.bias):
                parameter.uniform_(-bound, bound, generator=generator)


def _as_input(layer: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    return rows if isinstance(layer, EightBits) else rows.to(layer.weight.dtype)
