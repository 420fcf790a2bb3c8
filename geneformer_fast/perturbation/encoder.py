"""Hidden states of variants of cells: what of a forward pass they need, and no more."""

from __future__ import annotations

import torch

from geneformer_fast.encoder import Encoder
from geneformer_fast.ragged import Ragged


class VariantEncoder:
    """Reads hidden states after a layer; neither the head nor blocks beyond the layer are computed.

    Parameters
    ----------
    encoder
        The model.
    layer
        As in :meth:`Encoder.forward`.
    reads
        ``"cls"``: the first token of every cell; ``"all"``: every token.
    """

    def __init__(self, encoder: Encoder, layer: str | int, reads: str) -> None:
        self.encoder, self.layer, self.reads = encoder, layer, reads
        self.n_blocks = encoder.config.layer_index(layer)

    def __call__(self, tokens: Ragged) -> torch.Tensor:
        """[B, C], or [T, C]."""
        if self.reads == "cls":
            return self.encoder.first_tokens(tokens, layer=self.layer, is_repetitive=True)
        return self.encoder(tokens, layer=self.layer, is_repetitive=True).values
