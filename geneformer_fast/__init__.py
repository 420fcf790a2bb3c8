"""Fast, exact tokenization, encoding and embedding of single cells for Geneformer and related models.

Public names are loaded on first use, so that importing the package stays cheap, touches no device and needs no
optional dependency.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Who uses the library decides what of its log is seen; the command line shows it on standard error.
logging.getLogger(__name__).addHandler(logging.NullHandler())

_HOME = {
    "tokenize": "geneformer_fast.tokenization.run",
    "medians": "geneformer_fast.tokenization.medians",
    "open_tokens": "geneformer_fast.tokenization.arrow",
    "Vocabulary": "geneformer_fast.tokenization.vocabulary",
    "load": "geneformer_fast.checkpoints",
    "save": "geneformer_fast.checkpoints",
    "Encoder": "geneformer_fast.encoder",
    "EncoderConfig": "geneformer_fast.config",
    "Ragged": "geneformer_fast.ragged",
    "quantize": "geneformer_fast.quantization.quantize",
    "embed": "geneformer_fast.extract",
    "accelerate": "geneformer_fast.drop_in",
    "register_attention": "geneformer_fast.drop_in",
    "pretrain": "geneformer_fast.training.pretrain",
    "Recipe": "geneformer_fast.training.recipe",
    "finetune_cells": "geneformer_fast.finetuning.cells",
    "finetune_genes": "geneformer_fast.finetuning.genes",
    "predict": "geneformer_fast.finetuning.predict",
    "open_perturbations": "geneformer_fast.perturbation.reading",
    "Perturbations": "geneformer_fast.perturbation.reading",
    "perturb": "geneformer_fast.perturbation.perturb",
    "state_embeddings": "geneformer_fast.perturbation.states",
    "perturbation_stats": "geneformer_fast.perturbation.statistics.run",
    "profile": "geneformer_fast.profiling.run",
    "ProfilerCallback": "geneformer_fast.profiling.callback",
    "Report": "geneformer_fast.profiling.report",
    "example_cells": "geneformer_fast.quickstart.example",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from geneformer_fast.checkpoints import load, save
    from geneformer_fast.config import EncoderConfig
    from geneformer_fast.drop_in import accelerate, register_attention
    from geneformer_fast.encoder import Encoder
    from geneformer_fast.extract import embed
    from geneformer_fast.finetuning.cells import finetune_cells
    from geneformer_fast.finetuning.genes import finetune_genes
    from geneformer_fast.finetuning.predict import predict
    from geneformer_fast.perturbation.perturb import perturb
    from geneformer_fast.perturbation.reading import Perturbations, open_perturbations
    from geneformer_fast.perturbation.states import state_embeddings
    from geneformer_fast.perturbation.statistics.run import perturbation_stats
    from geneformer_fast.profiling.callback import ProfilerCallback
    from geneformer_fast.profiling.report import Report
    from geneformer_fast.profiling.run import profile
    from geneformer_fast.quantization.quantize import quantize
    from geneformer_fast.quickstart.example import example_cells
    from geneformer_fast.ragged import Ragged
    from geneformer_fast.tokenization.arrow import open_tokens
    from geneformer_fast.tokenization.medians import medians
    from geneformer_fast.tokenization.run import tokenize
    from geneformer_fast.tokenization.vocabulary import Vocabulary
    from geneformer_fast.training.pretrain import pretrain
    from geneformer_fast.training.recipe import Recipe


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
