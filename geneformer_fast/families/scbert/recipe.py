"""Ways of scBERT's authors that are no part of a checkpoint."""

from __future__ import annotations

from typing import cast

from geneformer_kernels.ops.favor_attention.plan import STABILISERS

from geneformer_fast.block import Block
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError


def use_stabiliser(encoder: Encoder, stabiliser: str) -> Encoder:
    """:func:`geneformer_fast.families.scbert.use_stabiliser`."""
    if encoder.config.attention != "favor":
        raise UnsupportedError("a stabiliser belongs to linear attention, and this encoder has attention by softmax")
    if stabiliser not in STABILISERS:
        raise UnsupportedError(f"stabiliser must be one of {', '.join(STABILISERS)}, not {stabiliser!r}")
    for block in encoder.blocks:
        cast(Block, block).stabiliser = stabiliser
    return encoder


def freeze_as_published(encoder: Encoder) -> Encoder:
    """:func:`geneformer_fast.families.scbert.freeze_as_published`."""
    if encoder.config.n_layers < 2 or encoder.final_norm is None:
        raise UnsupportedError("the published fine-tuning trains the last but one block: the model needs two at least")
    encoder.requires_grad_(False)
    for module in (encoder.blocks[-2], encoder.final_norm, encoder.head):
        if module is not None:
            module.requires_grad_(True)
    return encoder
