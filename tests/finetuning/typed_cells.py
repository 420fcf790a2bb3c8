"""Cells of types that can be told apart, genes of classes that can, and a small model to teach them to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import toys

import geneformer_fast as gf
from geneformer_fast.finetuning.recipes import CELLS, GENES

TYPES = ("B", "NK", "T")
GROUPS = ("quiet", "loud")
# Enough for these cells, and no more: half a second rather than thirty.
SHORT = dataclasses.replace(
    CELLS, epochs=8, batch_cells=8, learning_rate=2e-2, token_budget=2048, eval_every=14, save_every=14, seed=1,
    progress=False,
)  # fmt: skip
SHORT_GENES = dataclasses.replace(
    GENES, epochs=4, batch_cells=16, learning_rate=5e-3, token_budget=2048, seed=1, progress=False
)


def typed_cells(n_cells: int = 90, *, seed: int = 0) -> anndata.AnnData:
    """Counts whose first 30 genes depend on the type; of the last 30 even ones are loud, odd ones quiet, everywhere."""
    rng = np.random.default_rng(seed)
    # Unequal classes: 5 : 3 : 2.
    sizes = [3 * n_cells // 10, 2 * n_cells // 10]
    types = rng.permutation(np.repeat([0, 1, 2], [*sizes, n_cells - sum(sizes)]))
    rates = np.full((n_cells, toys.N_GENES), 0.01)
    for code in range(3):
        rates[np.ix_(types == code, range(10 * code, 10 * code + 10))] = 8.0
    rates[:, 30:] = np.where(np.arange(30) % 2 == 0, 3.0, 0.3)
    counts = rng.poisson(rates).astype(np.float32)
    obs = pd.DataFrame(
        {
            "kind": np.array(TYPES)[types],
            "is_lymphoid": types != 1,
            "donor": [f"d{i % 6}" for i in range(n_cells)],
            "score": rng.normal(size=n_cells),
            "patchy": [None if i % 5 == 0 else TYPES[code] for i, code in enumerate(types)],
            "batch": (np.arange(n_cells) % 2).astype(np.int64),
            "same": "x",
        },
        index=[f"cell{i}" for i in range(n_cells)],
    )
    return anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=toys.gene_ids()))


COLUMNS = ["kind", "is_lymphoid", "donor", "score", "patchy", "batch", "same"]


def write_tokens(folder: Path, adata: anndata.AnnData | None = None, columns: list[str] = COLUMNS) -> Path:
    adata = typed_cells() if adata is None else adata
    file = folder / "cells.h5ad"
    adata.write_h5ad(file)
    gf.tokenize(file, folder / "tokens", dictionary=toys.vocabulary(), obs=columns, progress=False)
    return folder / "tokens"


def write_model(folder: Path, **changes: Any) -> Path:
    """A model folder as pretraining leaves it, with its vocabulary."""
    words = toys.vocabulary()
    import torch

    torch.manual_seed(3)
    values = dict(n_layers=2, width=32, n_heads=2, ff_width=48, dropout=0.0, attention_dropout=0.0, init_std=0.1)
    identity = dict(vocabulary=words.name, vocabulary_fingerprint=words.fingerprint)
    sizes = dict(vocab_size=words.n_tokens, max_len=words.max_len)
    gf.save(gf.Encoder(gf.EncoderConfig(**{**values, **sizes, **identity, **changes}), head="mlm"), folder / "model")
    words.save(folder / "model")
    return folder / "model"


def gene_classes() -> dict[str, str]:
    """The last thirty genes, loud or quiet."""
    return {gene: GROUPS[1 - place % 2] for place, gene in enumerate(toys.gene_ids()[30:])}
