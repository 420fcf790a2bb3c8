"""Files of scGPT's folders, its special tokens, and which of our parameters is which of its tensors."""

from __future__ import annotations

from geneformer_fast.checkpoints.mapping import Entry, affine
from geneformer_fast.config import EncoderConfig

ARGS, VOCAB, CONFIG = "args.json", "vocab.json", "config.json"
#: Special tokens by name; the original appends those that a vocabulary lacks, in this order.
SPECIAL = {"pad": "<pad>", "cls": "<cls>", "eoc": "<eoc>"}
# Stacked [q | k | v] in every spelling.
_QKV = "self_attn.in_proj_"


def entries(config: EncoderConfig, head: str | None = None, *, n_cls_layers: int = 3) -> list[Entry]:
    """The table of tensors, with attention named as ``torch.nn.TransformerEncoder`` does.

    ``head`` is ``"cells"`` (of ``n_cls_layers`` linear layers), one of ``"expression..."``, or None.
    """
    table = [
        Entry("embeddings.token.weight", ("encoder.embedding.weight",)),
        *affine("embeddings.token_norm", "encoder.enc_norm"),
    ]
    if config.inputs == "pairs-category":
        table.append(Entry("embeddings.value_table.weight", ("value_encoder.embedding.weight",)))
        table += affine("embeddings.value_norm", "value_encoder.enc_norm")
    else:
        for ours, theirs in (("value1", "linear1"), ("value2", "linear2"), ("value_norm", "norm")):
            table += affine(f"embeddings.{ours}", f"value_encoder.{theirs}")
    for i in range(config.n_layers):
        theirs, ours = f"transformer_encoder.layers.{i}.", f"blocks.{i}."
        table += [Entry(f"{ours}qkv.{kind}", (f"{theirs}{_QKV}{kind}",)) for kind in ("weight", "bias")]
        table += affine(f"{ours}out", f"{theirs}self_attn.out_proj")
        table += affine(f"{ours}attention_norm", f"{theirs}norm1")
        table += affine(f"{ours}up", f"{theirs}linear1")
        table += affine(f"{ours}down", f"{theirs}linear2")
        table += affine(f"{ours}ff_norm", f"{theirs}norm2")
    return table + _head_entries(head, n_cls_layers)


def _head_entries(head: str | None, n_cls_layers: int) -> list[Entry]:
    table: list[Entry] = []
    if head == "cells":
        for i in range(n_cls_layers - 1):  # linear, ReLU, LayerNorm
            table += affine(f"head.hidden.{i}", f"cls_decoder._decoder.{3 * i}")
            table += affine(f"head.norms.{i}", f"cls_decoder._decoder.{3 * i + 2}")
        return [*table, *affine("head.classifier", "cls_decoder.out_layer")]
    if head is None or not head.startswith("expression"):
        return table
    for i in range(3):
        table += affine(f"head.layers.{i}", f"decoder.fc.{2 * i}")
        if head.endswith("-zeros"):
            table += affine(f"head.zeros.{i}", f"decoder.zero_logit.{2 * i}")
    if "-mvc" in head:
        table += affine("head.cells.gene2query", "mvc_decoder.gene2query")
        table.append(Entry("head.cells.project.weight", ("mvc_decoder.W.weight",)))
        if head.endswith("-zeros"):
            table += affine("head.cells.project_zeros", "mvc_decoder.W_zero_logit")
    return table
