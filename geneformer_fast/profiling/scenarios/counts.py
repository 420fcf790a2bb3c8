"""Made-up counts of cells, as an .h5ad file, with a vocabulary for them: what tokenizing is measured on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from geneformer_fast import families
from geneformer_fast.profiling.lengths import Lengths
from geneformer_fast.tokenization.vocabulary import Vocabulary

#: A prime, so that any step through all genes meets each once.
N_GENES = 20_011
# Beyond all real human ids (which end at about ENSG00000310000).
_FIRST_ENSEMBL_NUMBER = 90_000_000_001


def made_up_vocabulary() -> Vocabulary:
    """Genes with medians, in the layout of Geneformer V2."""
    medians = np.random.default_rng(1).uniform(0.5, 4.0, N_GENES)
    return Vocabulary.from_medians(
        dict(zip(_gene_ids(), medians.tolist(), strict=True)), families.DEFAULT_LAYOUT, name="made-up"
    )


def write_made_up_counts(path: Path, n_cells: int, lengths: Lengths) -> None:
    """Write cells with as many genes as lengths say: CSR, uncompressed, float32, as scanpy writes counts.

    Parameters
    ----------
    path
        The .h5ad file.
    n_cells
        How many cells.
    lengths
        Genes of each, cut at all there are.
    """
    import anndata
    import pandas as pd
    from scipy import sparse

    rng = np.random.default_rng(0)
    n_genes = lengths.of(n_cells, N_GENES, what="genes there are")
    bounds = np.concatenate([[0], np.cumsum(n_genes)])
    within = np.arange(bounds[-1]) - np.repeat(bounds[:-1], n_genes)
    step, first = rng.integers(1, N_GENES, size=n_cells), rng.integers(0, N_GENES, size=n_cells)
    genes = (np.repeat(first, n_genes) + within * np.repeat(step, n_genes)) % N_GENES
    counts = rng.geometric(0.4, size=len(genes)).astype(np.float32)
    matrix = sparse.csr_matrix((counts, genes.astype(np.int32), bounds), shape=(n_cells, N_GENES))
    matrix.sort_indices()
    obs = pd.DataFrame(index=[f"cell{i:08d}" for i in range(n_cells)])
    anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=_gene_ids())).write_h5ad(path)


def _gene_ids() -> list[str]:
    return [f"ENSG{_FIRST_ENSEMBL_NUMBER + i:011d}" for i in range(N_GENES)]
