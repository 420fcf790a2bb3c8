"""Small cells, a small vocabulary and small models, made by seeds."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from geneformer_fast import Encoder, EncoderConfig
from geneformer_fast.tokenization.vocabulary import Vocabulary

N_GENES = 60


def gene_ids(n: int = N_GENES) -> list[str]:
    return [f"ENSG{90_000_000_000 + i:011d}" for i in range(n)]


def vocabulary(family: str = "v2", name: str = "toy") -> Vocabulary:
    medians = np.random.default_rng(5).uniform(0.5, 4.0, N_GENES)
    return Vocabulary.from_medians(dict(zip(gene_ids(), medians.tolist(), strict=True)), family, name=name)


def cells(n_cells: int = 23, *, seed: int = 0, empty: tuple[int, ...] = (), prefix: str = "cell") -> anndata.AnnData:
    """Counts of cells that differ in length, every one with at least two genes except those named empty."""
    rng = np.random.default_rng(seed)
    rates = rng.uniform(0.05, 1.5, (n_cells, 1)) * rng.uniform(0.2, 2.0, (1, N_GENES))
    counts = rng.poisson(rates).astype(np.float32)
    counts[:, :2] += 1
    counts[list(empty)] = 0
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical(np.array(["a", "b", "c"])[rng.integers(3, size=n_cells)]),
            "score": rng.normal(size=n_cells),
        },
        index=[f"{prefix}{i}" for i in range(n_cells)],
    )
    return anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=gene_ids()))


def encoder(words: Vocabulary | None = None, *, family: str = "v2", seed: int = 1, **changes: object) -> Encoder:
    words = words or vocabulary(family)
    values = dict(n_layers=3, width=32, n_heads=2, ff_width=48, vocab_size=words.n_tokens, max_len=words.max_len)
    identity = dict(vocabulary=words.name, vocabulary_fingerprint=words.fingerprint)
    torch.manual_seed(seed)
    model = Encoder(EncoderConfig(**{**values, **identity, **changes}))
    with torch.no_grad():
        # Away from the trivial start: biases, norms, and hidden states whose mean is not zero.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2 + (0.1 if parameter.ndim == 1 else 0.0))
    return model.eval()


def draw_without_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of the first two columns: UMAP is compiled for 15 seconds in every process, and ``test_plot`` has it."""

    class FirstTwo:
        def __init__(self, **options: object) -> None:
            pass

        def fit_transform(self, embeddings: np.ndarray) -> np.ndarray:
            return np.asarray(embeddings)[:, :2]

    module = ModuleType("umap")
    module.UMAP = FirstTwo
    module.__spec__ = ModuleSpec("umap", None)  # who looks whether it is installed finds it
    monkeypatch.setitem(sys.modules, "umap", module)


def leftovers(folder: Path) -> list[str]:
    """Names of temporary files."""
    return [path.name for path in folder.rglob("*") if path.name.startswith(".") or "part" in path.name]
