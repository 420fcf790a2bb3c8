"""What damaged inputs are made from, and everything that a pass over counts does with one."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from hypothesis import HealthCheck, settings

from geneformer_fast.counts import open_source

N_CELLS, N_GENES = 40, 30
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def small_adata() -> anndata.AnnData:
    rng = np.random.default_rng(1)
    obs = pd.DataFrame({"kind": pd.Categorical(["a", "b"] * (N_CELLS // 2))}, index=[f"c{i}" for i in range(N_CELLS)])
    var = pd.DataFrame(
        {"ensembl_id": [f"ENSG{i:011d}" for i in range(N_GENES)]}, index=[f"g{i}" for i in range(N_GENES)]
    )
    return anndata.AnnData(sp.csr_matrix(rng.poisson(1.5, (N_CELLS, N_GENES)).astype(np.float32)), obs=obs, var=var)


def use(data, **options):
    """Everything a pass over counts does with an input."""
    with open_source(data, **options) as source:
        n_cells = sum(block.n_cells for block in source.blocks(rows=16))
        assert n_cells == source.n_cells
        for column in source.obs_columns:
            assert len(source.obs(column)) == n_cells
        assert len(source.gene_ids()) == source.n_genes
        source.fingerprint()


def replace(file, key, values, **options):
    attributes = dict(file[key].attrs)
    del file[key]
    dataset = file.create_dataset(key, data=values, **options)
    dataset.attrs.update(attributes)
