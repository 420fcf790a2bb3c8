"""Small made-up corpora for the tests of the pass."""

from __future__ import annotations

import anndata
import numpy as np
import scipy.sparse as sp

from geneformer_fast.tokenization.vocabulary import Vocabulary

N_GENES = 120
GENES = [f"ENSG{i:011d}" for i in range(N_GENES)]


def small_vocabulary(family="v2", max_len=40):
    """120 genes whose medians repeat, so that scores tie."""
    medians = {gene: float(1 + i % 7) / 2 for i, gene in enumerate(GENES)}
    return Vocabulary.from_medians(medians, family, name="small", max_len=max_len)


def make_cells(n_cells, seed=0, *, dtype="float32", storage="csr"):
    """Cells x 120 genes with obs columns of every kind; cells 3 and 10 are empty."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.0, (n_cells, N_GENES)) * (rng.random((n_cells, N_GENES)) < rng.uniform(0.2, 1, (n_cells, 1)))
    counts[[row for row in (3, 10) if row < n_cells]] = 0
    counts = counts.astype(dtype)
    adata = anndata.AnnData({"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[storage](counts))
    adata.obs_names = [f"s{seed}c{i}" for i in range(n_cells)]
    adata.var_names = GENES
    adata.obs["cluster"] = np.arange(n_cells) % 5
    adata.obs["score"] = np.where(np.arange(n_cells) % 9 == 0, np.nan, rng.random(n_cells))
    adata.obs["donor"] = [f"D{seed}-{i % 3} é" for i in range(n_cells)]
    adata.obs["cell type"] = adata.obs["donor"].astype("category")
    adata.obs["is_good"] = np.arange(n_cells) % 2 == 0
    return adata


def folder_bytes(folder):
    """Name to content of every file in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
