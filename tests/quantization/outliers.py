"""Models whose rows have a few columns far beyond the rest, as trained ones do: what they compute stays what it was."""

from __future__ import annotations

import torch

from geneformer_fast import Encoder

COLUMNS = (1, 7, 18)


@torch.no_grad()
def with_outliers(encoder: Encoder, factor: float) -> Encoder:
    """Make some columns ``factor`` times as large, and the weights that read them as much smaller; in place.

    Values (and with them what the projection after attention reads) and hidden units of ReLU or SwiGLU are scaled in
    any model; what a LayerNorm makes only in a pre-norm one, where it is not the residual too.
    """
    config, columns = encoder.config, list(COLUMNS)
    for block in encoder.blocks:
        values = [2 * config.width + column for column in columns]
        block.qkv.weight[values] *= factor
        block.qkv.bias[values] *= factor
        block.out.weight[:, columns] /= factor
        if config.activation in ("relu", "swiglu"):
            first = config.ff_width if config.activation == "swiglu" else 0
            block.up.weight[[first + column for column in columns]] *= factor
            block.up.bias[[first + column for column in columns]] *= factor
            block.down.weight[:, columns] /= factor
        if config.norm == "pre":
            for norm, reader in ((block.attention_norm, block.qkv), (block.ff_norm, block.up)):
                norm.weight[columns] *= factor
                norm.bias[columns] *= factor
                reader.weight[:, columns] /= factor
    return encoder
