"""AIDO.Cell: a pre-norm encoder over the values of a fixed list of genes (GenBio CellFoundation)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_fast.config import EncoderConfig
from geneformer_fast.families.family import Family, Reading
from geneformer_fast.families.settings import said_in

if TYPE_CHECKING:
    from torch import nn

    from geneformer_fast.checkpoints.mapping import Entry
    from geneformer_fast.encoder import Encoder

# What a config.json of its class is told by: ``model_type``, and how names of the classes begin.
_MODEL_TYPE, _CLASS = "cellfoundation", "CellFoundation"


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


def preparation() -> Any:
    """The rule from counts to values."""
    from geneformer_fast.families.preparations.aido_cell import PREPARATION

    return PREPARATION


def entries(config: EncoderConfig, head: str | None = "mlm") -> list[Entry]:
    """The table for AIDO.Cell's CellFoundation models; ``decoder.bias`` there is ``cls.predictions.bias``."""
    from geneformer_fast.families import cell_foundation

    return cell_foundation.entries(config, head)


def classifier(config: EncoderConfig, n_classes: int) -> nn.Module:
    """Classes of cells from the mean of a cell's hidden states, as its authors fine-tune it."""
    from geneformer_fast.heads import MeanClassifier

    return MeanClassifier(config, n_classes)


def recognise(folder: Path) -> bool:
    """Whether a folder's config.json is one of CellFoundation."""
    said = said_in(folder / "config.json")
    named = said.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return said.get("model_type") == _MODEL_TYPE or (isinstance(first, str) and first.startswith(_CLASS))


def load(folder: Path, **options: Any) -> Encoder:
    """A folder of theirs as an encoder."""
    from geneformer_fast.families import cell_foundation

    return cell_foundation.load(folder, **options)


def save(encoder: Encoder, folder: Path, *, overwrite: bool = False) -> Path:
    """An encoder as a folder of theirs."""
    from geneformer_fast.families import cell_foundation

    return cell_foundation.save(encoder, folder, overwrite=overwrite)


def is_saved(encoder: Encoder) -> bool:
    """Whether a class of theirs can be an encoder: classifiers and weights of eight bits are not."""
    from geneformer_fast.families import cell_foundation

    return cell_foundation.is_expressible(encoder)


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
        "aido-cell-650m": _preset(32, 1280, 20, 3392),
    },
    preparation=preparation,
    recognise=recognise,
    load=load,
    save=save,
    is_saved=is_saved,
    entries=entries,
    heads={"cells": classifier},
    reading=Reading(
        layer="last",
        pool="mean-all",
        pools={
            "mean-all": "the mean over all positions, the two depth tokens among them, as its embed.py has it",
            "mean": "the mean over the 19,264 genes, without the depth tokens, which ModelGenerator cuts off",
        },
        n_behind=2,
    ),
    refused={
        "perturb": "a gene of AIDO.Cell cannot be taken out of a cell: it has a place of its own whatever its count, "
        "and its value changes those of all others through the total; change the counts, prepare and embed them again",
        "pretrain": "AIDO.Cell learns to tell counts of a deeper sequencing of the same cell, and that objective is "
        "not here; fine-tune it, or pretrain a family over tokens",
    },
)
