"""scBERT: a Performer over the binned values of a fixed list of genes (Yang et al., Nature Machine Intelligence 2022).

Its authors' tools write ``torch.save`` files; :mod:`.files` reads and writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_fast.families.family import Family, Reading
from geneformer_fast.families.scbert.published import PUBLISHED

if TYPE_CHECKING:
    from torch import nn

    from geneformer_fast.checkpoints.mapping import Entry
    from geneformer_fast.config import EncoderConfig
    from geneformer_fast.encoder import Encoder


def preparation() -> Any:
    """The rule from counts to bins."""
    from geneformer_fast.families.preparations.scbert import PREPARATION

    return PREPARATION


def entries(config: EncoderConfig, head: str | None = "mlm") -> list[Entry]:
    """The table of a PerformerLM's tensors; ``head`` is ``"mlm"`` (bins), ``"cells"`` (the classifier), or None."""
    from geneformer_fast.families.scbert import table

    return table.entries(config, head)


def recognise(folder: Path) -> bool:
    """A file of ``torch.save`` that names a Performer's features, or a folder of such files and no other model."""
    from geneformer_fast.families.scbert.names import files_in

    return bool(files_in(folder))


def load(folder: Path, **options: Any) -> Encoder:
    """Load a file of scBERT's tools, or a folder with one, see :func:`geneformer_fast.load`."""
    from geneformer_fast.families.scbert import files

    return files.load(folder, **options)


def save(encoder: Encoder, folder: Path, *, overwrite: bool = False) -> Path:
    """Save as scBERT's tools do, see :func:`geneformer_fast.save`."""
    from geneformer_fast.families.scbert import files

    return files.save(encoder, folder, overwrite=overwrite)


def is_saved(encoder: Encoder) -> bool:
    """Whether scBERT's format can hold an encoder: one in floating point with one of its heads."""
    from geneformer_fast.families.scbert.heads import BinDecoder, GeneConvolution

    return encoder.quantization is None and isinstance(encoder.head, BinDecoder | GeneConvolution)


def use_stabiliser(encoder: Encoder, stabiliser: str) -> Encoder:
    """Set in place what keys are counted from: ``"cell"``, or ``"batch"`` as the original does.

    Parameters
    ----------
    encoder
        Of this family.
    stabiliser
        ``"cell"``: the largest projection of a cell's keys, so that what comes out for a cell depends on no other.
        ``"batch"``: the largest of all keys of a batch, for numbers equal to the original's; with it results change
        with the cells that share a batch (by 3e-3 in a small model).

    Raises
    ------
    UnsupportedError
        The encoder has no linear attention, or there is no such stabiliser.
    """
    from geneformer_fast.families.scbert import recipe

    return recipe.use_stabiliser(encoder, stabiliser)


def freeze_as_published(encoder: Encoder) -> Encoder:
    """Leave to learn, in place, what the published fine-tuning does: the last but one block, the last norm, the head.

    Everything else is frozen, embeddings included.
    """
    from geneformer_fast.families.scbert import recipe

    return recipe.freeze_as_published(encoder)


def _bins(config: EncoderConfig, _: int) -> nn.Module:
    from geneformer_fast.families.scbert.heads import BinDecoder

    return BinDecoder(config)


def _classes(config: EncoderConfig, n_classes: int) -> nn.Module:
    from geneformer_fast.families.scbert.heads import GeneConvolution

    return GeneConvolution(config, n_classes)


FAMILY = Family(
    name="scbert",
    title="scBERT",
    paper="Yang et al., scBERT as a large-scale pretrained deep language model for cell type annotation of single-cell "
    "RNA-seq data, Nature Machine Intelligence 4 (2022)",
    licence="GPL-3.0",
    presets={"scbert": PUBLISHED},
    preparation=preparation,
    recipes={
        # Of classes of cells: Adam without weight decay, 3 cells 60 times per step (gradients are not divided by 60,
        # which Adam does not see), the best epoch kept. The rate falls once; the original's rises again and again.
        "scbert-cells": {
            "epochs": 100.0,
            "patience": 10,
            "batch_cells": 180,
            "token_budget": 3 * PUBLISHED.max_len,
            "learning_rate": 1e-4,
            "schedule": "cosine",
            "warmup_share": 0.05,
            "floor": 0.01,
            "weight_decay": 0.0,
            "clip": 1e6,
            "monitor": "accuracy",
            "is_greater_better": True,
            "is_best_restored": True,
        }
    },
    recognise=recognise,
    load=load,
    save=save,
    is_saved=is_saved,
    entries=entries,
    heads={"mlm": _bins, "cells": _classes},
    reading=Reading(layer="last", pool="mean", n_behind=1),
    refused={
        "perturb": "scBERT reads a value at every gene's place, so no gene can be deleted or moved as in a rank; set a "
        "gene's counts to 0 and embed again",
        "pretrain": "scBERT's pretraining predicts bins of expressed genes alone, which is not computed here; "
        "fine-tune a published model instead",
        "accelerate": "scBERT is no model of transformers, so there is none to accelerate; load its file with "
        "geneformer_fast.load",
        "finetune-genes": "scBERT has no published head for classes of genes; fine-tune on classes of cells",
    },
)
