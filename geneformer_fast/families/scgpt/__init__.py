"""scGPT: a post-norm encoder over pairs of a gene and its binned value, without positions (Cui et al., 2024).

Published folders hold ``args.json``, ``vocab.json`` and ``best_model.pt``; :mod:`.folder` reads and writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_fast.config import EncoderConfig
from geneformer_fast.families.family import Family, Reading

if TYPE_CHECKING:
    import torch
    from torch import nn

    from geneformer_fast.checkpoints.mapping import Entry
    from geneformer_fast.encoder import Encoder
    from geneformer_fast.ragged import Ragged

ARGS, VOCAB, CONFIG = "args.json", "vocab.json", "config.json"


def entries(config: EncoderConfig, head: str | None = None) -> list[Entry]:
    """The table of tensors, see :func:`.table.entries`."""
    from geneformer_fast.families.scgpt import table

    return table.entries(config, head)


def recognise(folder: Path) -> bool:
    """Whether a folder is as scGPT's tools leave them; one of ours has a ``config.json`` too."""
    return (folder / ARGS).is_file() and (folder / VOCAB).is_file() and not (folder / CONFIG).exists()


def load(folder: Path, **options: Any) -> Encoder:
    """Load a folder of scGPT's, see :func:`geneformer_fast.load`."""
    from geneformer_fast.families.scgpt import folder as files

    return files.load(folder, **options)


def save(encoder: Encoder, folder: Path, *, overwrite: bool = False) -> Path:
    """Save as scGPT's tools do, see :func:`geneformer_fast.save`."""
    from geneformer_fast.families.scgpt import folder as files

    return files.save(encoder, folder, overwrite=overwrite)


def is_saved(encoder: Encoder) -> bool:
    """Whether scGPT's format holds an encoder: in floating point, of a known vocabulary, with no head but its own."""
    from geneformer_fast.families.scgpt import folder as files

    has_place = encoder.head is None or files.head_name(encoder.head) is not None
    return isinstance(encoder.source, files.Source) and encoder.quantization is None and has_place


def cell_embeddings(encoder: Encoder, cells: Ragged) -> torch.Tensor:
    """scGPT's embedding of cells: CLS after the last layer, divided by its length.

    Parameters
    ----------
    encoder
        Of this family, in evaluation mode.
    cells
        Pairs [T, 2] whose first one in every cell is ``<cls>``.

    Returns
    -------
    torch.Tensor
        [B, C] float32.
    """
    import torch
    from torch.nn import functional

    with torch.inference_mode():
        return functional.normalize(encoder.first_tokens(cells).float(), dim=1)


def gene_embeddings(encoder: Encoder, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Embeddings of genes, whatever cell they are in: rows of the gene table after its LayerNorm.

    Parameters
    ----------
    encoder
        Of this family.
    ids
        [n] ids in the vocabulary; None for all.

    Returns
    -------
    torch.Tensor
        [n, C] float32.
    """
    import torch

    from geneformer_fast.embeddings import GenesAndValues

    inputs = encoder.embeddings
    if not isinstance(inputs, GenesAndValues):
        raise TypeError("gene embeddings are of an encoder of scGPT, whose genes have embeddings by themselves")
    if ids is None:
        ids = torch.arange(encoder.config.vocab_size, device=encoder.device)
    return inputs.of_genes(ids)


def expression_of_cells(encoder: Encoder, cells: Ragged, genes: Ragged | None = None) -> Ragged:
    """Expression that the embedding of a cell alone lets expect (MVC), in the model's bins.

    Parameters
    ----------
    encoder
        With a head ``"expression-mvc"`` (:func:`use_head`).
    cells
        Pairs [T, 2], ``<cls>`` first.
    genes
        Ids [T] of the genes asked for, as many cells; None for those that are there, ``<cls>`` included.

    Returns
    -------
    Ragged
        [T] values.
    """
    from geneformer_fast.decoders import ExpressionDecoder

    head = encoder.head
    if not isinstance(head, ExpressionDecoder) or head.cells is None:
        raise ValueError(
            'this encoder has no decoder of cells; use_head(encoder, "expression") takes it where there is one'
        )
    asked = cells.with_values(cells.values[:, 0].long()) if genes is None else genes
    if asked.n_cells != cells.n_cells:
        raise ValueError(f"genes are asked for in {asked.n_cells} cells, of {cells.n_cells}")
    first = encoder(cells).values[cells.starts.long()]
    return asked.with_values(head.cells(first, asked.with_values(gene_embeddings(encoder, asked.values))))


def use_head(encoder: Encoder, name: str) -> Encoder:
    """Put another head of the checkpoint on an encoder: ``"cells"``, ``"expression"``; see :func:`.folder.use_head`."""
    from geneformer_fast.families.scgpt import folder as files

    return files.use_head(encoder, name)


def _classifier(config: EncoderConfig, n_classes: int) -> nn.Module:
    from geneformer_fast.decoders import LayeredClassifier

    return LayeredClassifier(config, n_classes)


def _expression(*, of_cells: bool, has_zeros: bool) -> Any:
    def make(config: EncoderConfig, _: int) -> nn.Module:
        from geneformer_fast.decoders import ExpressionDecoder

        return ExpressionDecoder(config, of_cells=of_cells, has_zeros=has_zeros)

    return make


def preparation() -> Any:
    """The rule from counts to values."""
    from geneformer_fast.families.preparations.scgpt import PREPARATION

    return PREPARATION


FAMILY = Family(
    name="scgpt",
    title="scGPT",
    paper="Cui et al., scGPT: toward building a foundation model for single-cell multi-omics using generative AI, "
    "Nature Methods 21 (2024)",
    licence="MIT",
    presets={
        "scgpt-whole-human": EncoderConfig(
            n_layers=12,
            width=512,
            n_heads=8,
            ff_width=512,
            vocab_size=60_697,
            max_len=60_697,
            activation="relu",
            eps=1e-5,
            embedding_norm=False,
            n_token_types=0,
            inputs="pairs",
            n_bins=51,
            dropout=0.2,
            attention_dropout=0.2,
            pad_id=60_694,
            tied_decoder=False,
            vocabulary="scgpt",
            family="scgpt",
        )
    },
    preparation=preparation,
    recipes={
        # Of classes of cells, as its annotation tutorial has it: Adam without weight decay, the rate a tenth less after
        # every epoch, the best epoch by its loss.
        "scgpt-cells": {
            "epochs": 10.0,
            "batch_cells": 32,
            "learning_rate": 1e-4,
            "schedule": "step",
            "decay": 0.9,
            "warmup_share": 0.0,
            "weight_decay": 0.0,
            "is_best_restored": True,
        }
    },
    recognise=recognise,
    load=load,
    save=save,
    is_saved=is_saved,
    entries=entries,
    heads={
        "cells": _classifier,
        **{
            f"expression{'-mvc' * mvc}{'-zeros' * zeros}": _expression(of_cells=mvc, has_zeros=zeros)
            for mvc in (False, True)
            for zeros in (False, True)
        },
    },
    reading=Reading(
        layer="last",
        pool="cls",
        normalise=True,
        pools={"cls": "the hidden state of <cls> after the last layer, divided by its length (scGPT's embed_data)"},
    ),
    refused={
        "perturb": "scGPT reads values, and deleting a gene from a rank is not defined for it; its own perturbation "
        "models are trained for that and are not read here",
        "pretrain": "scGPT's generative pretraining is not computed here; fine-tune a published model instead",
        "accelerate": "scGPT is no model of transformers, so there is none to accelerate; load its folder with "
        "geneformer_fast.load",
    },
)
