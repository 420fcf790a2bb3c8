"""Makes the cells that come with the package: ``python tools/example_cells.py PBMC_FACS.h5ad``.

From the sorted blood cells of Zheng et al. (2017) it draws equally many of each sort gate, by a fixed seed, leaves out
the genes that none of them expresses, and writes ``geneformer_fast/quickstart/data/pbmc_facs.h5ad``. The same input
gives the same cells; ``tests/test_example_cells.py`` compares them where the input is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata.utils import make_index_unique
from scipy import sparse

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "geneformer_fast" / "quickstart" / "data" / "pbmc_facs.h5ad"
CELLS_PER_GATE = 50
SEED = 0


def drawn(source: anndata.AnnData) -> anndata.AnnData:
    """The example. Its cells stand in turns, one of each gate: any beginning holds equally many of each."""
    gates = source.obs["celltype"].astype(str).to_numpy()
    rng = np.random.default_rng(SEED)
    of_gate = [rng.permutation(np.flatnonzero(gates == gate))[:CELLS_PER_GATE] for gate in np.unique(gates)]
    rows = np.stack(of_gate, axis=1).ravel()
    counts = sparse.csr_matrix(source.X[rows], dtype=np.float32)
    is_expressed = np.asarray((counts > 0).sum(0)).ravel() > 0
    counts = sparse.csr_matrix(counts[:, is_expressed])
    counts.sort_indices()
    var = source.var[is_expressed]
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(gates[rows]),
            "lineage": pd.Categorical(source.obs["subpop"].astype(str).to_numpy()[rows]),
            "n_counts": np.asarray(counts.sum(1, dtype=np.float64)).ravel(),
        },
        index=pd.Index(source.obs_names[rows].astype(str)),
    )
    names = make_index_unique(pd.Index(var["gene_symbol"].astype(str).to_numpy(dtype=object)))
    ids = var["ensembl_id"].astype(str).to_numpy(dtype=object)
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame({"ensembl_id": ids}, index=names))


def main() -> None:
    """Write the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="the sorted cells, as shared/data/README.md describes them")
    example = drawn(anndata.read_h5ad(parser.parse_args().source))
    TARGET.parent.mkdir(exist_ok=True)
    with h5py.File(TARGET, "w") as file:
        packed = {"compression": "gzip", "compression_opts": 9, "shuffle": True}
        anndata.io.write_elem(file, "/", example, dataset_kwargs=packed)
    print(f"{TARGET}: {example.n_obs} cells, {example.n_vars:,} genes, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
