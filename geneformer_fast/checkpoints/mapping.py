"""Which of our parameters is which tensor of a published checkpoint, and back.

A table is a list of :class:`Entry`; the same table reads and writes, so that the two can never drift apart. BERT's is
here; those of other architectures stand with their families.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from geneformer_fast.config import EncoderConfig
from geneformer_fast.errors import CheckpointError

#: The bias of a decoder in BERT, where that has none of its own beside it.
BERT_BIAS = "cls.predictions.bias"


@dataclass(frozen=True)
class Entry:
    """One of our parameters and the tensors it is made of.

    Attributes
    ----------
    ours
        Name in ``Encoder.state_dict()``.
    theirs
        Names in the checkpoint; several are stacked along the first axis in this order.
    n_heads
        0, or the number of heads when theirs is one fused projection whose rows are interleaved per head,
        [heads, 3, head dim] (Megatron), while ours are stacked [3, heads, head dim].
    """

    ours: str
    theirs: tuple[str, ...]
    n_heads: int = 0

    def read(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Our parameter, made from their tensors."""
        if self.n_heads:
            fused = tensors[self.theirs[0]]
            per_head = fused.reshape(self.n_heads, 3, -1, *fused.shape[1:])
            return per_head.transpose(0, 1).reshape(fused.shape)
        parts = [tensors[name] for name in self.theirs]
        if len(parts) > 1 and parts[0].is_meta:  # torch's own way of joining these loads its compiler, 160 MB
            return parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def write(self, ours: torch.Tensor) -> dict[str, torch.Tensor]:
        """Their tensors, made from our parameter."""
        if self.n_heads:
            stacked = ours.reshape(3, self.n_heads, -1, *ours.shape[1:])
            return {self.theirs[0]: stacked.transpose(0, 1).reshape(ours.shape).contiguous()}
        return dict(zip(self.theirs, ours.chunk(len(self.theirs)), strict=True))

    def their_shape(self, ours: torch.Size) -> list[int]:
        """Shape each of their tensors must have, given ours."""
        return [ours[0] // len(self.theirs), *ours[1:]]


def affine(ours: str, *theirs: str, n_heads: int = 0) -> list[Entry]:
    """The two entries of a layer with weight and bias; ``n_heads`` as in :class:`Entry`."""
    return [Entry(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), n_heads) for kind in ("weight", "bias")]


def bert_entries(
    config: EncoderConfig, head: str | None, prefix: str = "bert.", *, bias: str = BERT_BIAS
) -> list[Entry]:
    """The table for transformers' BertModel (``prefix=""``) and BertFor... (``"bert."``) checkpoints.

    The tied decoder is not part of it: it is another name of the token table. ``bias`` is the tensor that is added to
    logits.
    """
    embeddings = f"{prefix}embeddings."
    table = [
        Entry("embeddings.token.weight", (f"{embeddings}word_embeddings.weight",)),
        Entry("embeddings.position.weight", (f"{embeddings}position_embeddings.weight",)),
        Entry("embeddings.token_type.weight", (f"{embeddings}token_type_embeddings.weight",)),
        *affine("embedding_norm", f"{embeddings}LayerNorm"),
    ]
    for i in range(config.n_layers):
        theirs, ours = f"{prefix}encoder.layer.{i}.", f"blocks.{i}."
        projections = (f"{theirs}attention.self.{part}" for part in ("query", "key", "value"))
        table += affine(f"{ours}qkv", *projections)
        table += affine(f"{ours}out", f"{theirs}attention.output.dense")
        table += affine(f"{ours}attention_norm", f"{theirs}attention.output.LayerNorm")
        table += affine(f"{ours}up", f"{theirs}intermediate.dense")
        table += affine(f"{ours}down", f"{theirs}output.dense")
        table += affine(f"{ours}ff_norm", f"{theirs}output.LayerNorm")
    if head == "mlm":
        table += affine("head.dense", "cls.predictions.transform.dense")
        table += affine("head.norm", "cls.predictions.transform.LayerNorm")
        table.append(Entry("head.bias", (bias,)))
        if not config.tied_decoder:
            table.append(Entry("head.decoder.weight", ("cls.predictions.decoder.weight",)))
    elif head == "pooler":
        table += affine("head.dense", f"{prefix}pooler.dense")
    elif head == "cells":
        table += affine("head.pooler.dense", f"{prefix}pooler.dense")
    if head in ("cells", "genes"):
        table += affine("head.classifier", "classifier")
    return table


def to_ours(
    tensors: Mapping[str, torch.Tensor],
    table: Iterable[Entry],
    shapes: Mapping[str, torch.Size],
    *,
    source: str,
    settings: str = "config.json",
) -> dict[str, torch.Tensor]:
    """Our state dict from their tensors.

    Parameters
    ----------
    tensors
        The checkpoint.
    table
        Entries of a table.
    shapes
        Our parameter shapes by name, from an encoder with the checkpoint's configuration.
    source, settings
        The file or folder, and the file of its configuration, to name in errors.

    Raises
    ------
    CheckpointError
        A tensor is missing or has another shape; names it and both shapes.
    """
    state = {}
    for entry in table:
        for name in entry.theirs:
            wanted = entry.their_shape(shapes[entry.ours])
            if name not in tensors:
                raise CheckpointError(f"{source}: tensor {name!r} of shape {wanted} is missing")
            if list(tensors[name].shape) != wanted:
                raise CheckpointError(
                    f"{source}: tensor {name!r} has shape {list(tensors[name].shape)} but the configuration asks for "
                    f"{wanted}; {settings} and the weights do not belong together"
                )
        state[entry.ours] = entry.read(tensors)
    return state


def to_theirs(state: Mapping[str, torch.Tensor], table: Iterable[Entry]) -> dict[str, torch.Tensor]:
    """Their tensors from our state dict: the inverse of :func:`to_ours`, bit for bit."""
    tensors: dict[str, torch.Tensor] = {}
    for entry in table:
        tensors.update(entry.write(state[entry.ours]))
    return tensors
