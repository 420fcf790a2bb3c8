"""AIDO.Cell: a pre-norm encoder over the values of a fixed list of genes (GenBio CellFoundation)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geneformer_fast.config import EncoderConfig
from geneformer_fast.families.family import Family, Reading

if TYPE_CHECKING:
    from geneformer_fast.checkpoints.mapping import Entry


def _preset(n_layers: int, width: int, n_heads: int, ff_width: int) -> EncoderConfig:
    return EncoderConfig(
        n_layers=n_layers,
        width=width,
        n_heads=n_heads,
        ff_width=ff_width,
        vocab_size=0,
        max_len=19_266,
        norm="pre",
        activation="swiglu",
        head_activation="gelu",
        eps=1e-5,
        embedding_norm=False,
        final_norm=True,
        n_token_types=0,
        inputs="values",
        dropout=0.0,
        attention_dropout=0.0,
        pad_id=-2,
        tied_decoder=False,
        vocabulary="aido-cell",
        family="aido-cell",
    )


def entries(config: EncoderConfig, head: str | None = "mlm") -> list[Entry]:
    """The table for AIDO.Cell's CellFoundation models; ``decoder.bias`` there is ``cls.predictions.bias``."""
    from geneformer_fast.checkpoints.mapping import Entry, affine

    source = "bert.gene_embedding."
    table = [
        *affine("embeddings.linear1", f"{source}linear1"),
        *affine("embeddings.linear2", f"{source}linear2"),
        *(
            Entry(f"embeddings.{name}.weight", (f"{source}{name}.weight",))
            for name in ("lookup_table", "mask_embedding", "pad_embedding")
        ),
        Entry("embeddings.position.weight", ("bert.position_embedding.weight",)),
    ]
    for i in range(config.n_layers):
        theirs, ours = f"bert.encoder.layer.{i}.", f"blocks.{i}."
        table += affine(f"{ours}attention_norm", f"{theirs}attention.ln")
        table += affine(f"{ours}qkv", *(f"{theirs}attention.self.{part}" for part in ("query", "key", "value")))
        table += affine(f"{ours}out", f"{theirs}attention.output.dense")
        table += affine(f"{ours}ff_norm", f"{theirs}ln")
        table += affine(f"{ours}up", f"{theirs}mlp.gate_proj", f"{theirs}mlp.up_proj")
        table += affine(f"{ours}down", f"{theirs}mlp.down_proj")
    table += affine("final_norm", "bert.encoder.ln")
    if head == "mlm":
        table += affine("head.dense", "cls.predictions.transform.dense")
        table += affine("head.norm", "cls.predictions.transform.LayerNorm")
        table.append(Entry("head.decoder.weight", ("cls.predictions.decoder.weight",)))
        table.append(Entry("head.bias", ("cls.predictions.bias",)))
    return table


FAMILY = Family(
    name="aido-cell",
    title="AIDO.Cell",
    paper="Ho et al., Scaling Dense Representations for Single Cell with Transcriptome-Scale Context (2024)",
    licence="GenBio AI Community License",
    presets={
        "aido-cell-3m": _preset(6, 128, 4, 320),
        "aido-cell-10m": _preset(8, 256, 8, 640),
        # The card says width 650, which 20 heads do not divide; 640 gives head dim 32 and the card's 100M parameters.
        "aido-cell-100m": _preset(18, 640, 20, 1664),
    },
    entries=entries,
    reading=Reading(layer="last"),
)
