"""Which of our parameters is which tensor of scBERT's PerformerLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from geneformer_fast.checkpoints.mapping import Entry, affine
from geneformer_fast.config import EncoderConfig


@dataclass(frozen=True)
class Kernel(Entry):
    """A layer of one output that is stored as the kernel of a convolution, [1, 1, 1, C]."""

    def read(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[1, C]."""
        return tensors[self.theirs[0]].flatten(1)

    def write(self, ours: torch.Tensor) -> dict[str, torch.Tensor]:
        """[1, 1, 1, C]."""
        return {self.theirs[0]: ours[:, None, None]}

    def their_shape(self, ours: torch.Size) -> list[int]:
        """[1, 1, 1, C]."""
        return [ours[0], 1, 1, *ours[1:]]


def entries(config: EncoderConfig, head: str | None = "mlm") -> list[Entry]:
    """The table of a PerformerLM's tensors; ``head`` is ``"mlm"`` (bins), ``"cells"`` (the classifier), or None."""
    table = [
        Entry("embeddings.token.weight", ("token_emb.weight",)),
        Entry("embeddings.position.weight", ("pos_emb.emb.weight",)),
    ]
    for i in range(config.n_layers):
        ours, layer = f"blocks.{i}.", f"performer.net.layers.{i}."
        attention, feed_forward = f"{layer}0.", f"{layer}1."
        table += affine(f"{ours}attention_norm", f"{attention}norm")
        table.append(Entry(f"{ours}qkv.weight", tuple(f"{attention}fn.to_{part}.weight" for part in "qkv")))
        table.append(Entry(f"{ours}projection", (f"{attention}fn.fast_attention.projection_matrix",)))
        table += affine(f"{ours}out", f"{attention}fn.to_out")
        table += affine(f"{ours}ff_norm", f"{feed_forward}norm")
        table += affine(f"{ours}up", f"{feed_forward}fn.fn.w1")
        table += affine(f"{ours}down", f"{feed_forward}fn.fn.w2")
    table += affine("final_norm", "norm")
    if head == "mlm":
        table += affine("head.decoder", "to_out")
    elif head == "cells":
        table += [
            Kernel("head.genes.weight", ("to_out.conv1.weight",)),
            Entry("head.genes.bias", ("to_out.conv1.bias",)),
        ]
        for ours, theirs in (("first", "fc1"), ("second", "fc2"), ("classifier", "fc3")):
            table += affine(f"head.{ours}", f"to_out.{theirs}")
    return table
