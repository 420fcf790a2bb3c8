"""Tensors that BERT checkpoints spell out though another one holds the same, and those that nothing computes with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from geneformer_fast.checkpoints.mapping import BERT_BIAS
from geneformer_fast.checkpoints.stored import Stored
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import CheckpointError

DECODER_WEIGHT, DECODER_BIAS = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"


def bias_in(tensors: Mapping[str, torch.Tensor]) -> str:
    """Which tensor is added to the logits of masked genes: that of the decoder, where it has one of its own.

    From transformers 5 on both are saved of a decoder that is not tied, and the other one takes no part.
    """
    read: Callable[[str], torch.Tensor] = tensors.read if isinstance(tensors, Stored) else tensors.__getitem__
    if DECODER_BIAS not in tensors:
        return BERT_BIAS
    is_same = BERT_BIAS in tensors and torch.equal(read(BERT_BIAS), read(DECODER_BIAS))
    return BERT_BIAS if is_same else DECODER_BIAS


def sort_leftovers(
    tensors: Mapping[str, torch.Tensor],
    used: set[str],
    encoder: Encoder,
    folder: Path,
    read: Callable[[str], torch.Tensor],
) -> None:
    """Keep known buffers and tied copies for saving; refuse tensors that would be lost."""
    aliases, source = [], encoder.source
    table = f"{source.prefix}embeddings.word_embeddings.weight"
    tied_to = {
        DECODER_WEIGHT: table,
        f"{DECODER_WEIGHT}_scale": f"{table}_scale",
        DECODER_BIAS: BERT_BIAS,
    }
    for name in sorted(set(tensors) - used):
        if tied_to.get(name) in tensors:
            if not torch.equal(read(name), read(tied_to[name])):
                raise CheckpointError(
                    f"{folder}: {name!r} differs from {tied_to[name]!r} although config.json ties them; "
                    "set tie_word_embeddings to false there if the decoder has weights of its own"
                )
            aliases.append(name)
        elif name == BERT_BIAS and source.bias == DECODER_BIAS:
            source.extras[name] = read(name)
            if encoder.config.tied_decoder:
                warnings.warn(
                    f"{folder}: {DECODER_BIAS!r} differs from {BERT_BIAS!r} although config.json ties them; the former "
                    "is added to logits, as in transformers 5. If that is not meant, remove one of the two",
                    stacklevel=4,
                )
        elif name.endswith("embeddings.position_ids") or name.endswith("embeddings.token_type_ids"):
            source.extras[name] = read(name)
        else:
            raise CheckpointError(
                f"{folder}: tensor {name!r} of shape {list(tensors[name].shape)} has no place in a "
                f"{source.architecture} of {encoder.config.n_layers} layers"
            )
    source.aliases = tuple(aliases)
