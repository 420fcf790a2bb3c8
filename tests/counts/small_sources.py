"""A small matrix in every layout, its tables, and what must come back of them."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from geneformer_fast.errors import InputError

N_CELLS, N_GENES = 53, 37


def counts() -> np.ndarray:
    rng = np.random.default_rng(0)
    dense = rng.poisson(1.2, (N_CELLS, N_GENES)).astype(np.float32)
    dense[7] = 0  # an empty cell
    dense[11] = rng.integers(1, 5000, N_GENES)  # a cell with every gene
    dense[:, 5] = 0  # a gene nobody expresses
    return dense


DENSE = counts()


def make(values) -> anndata.AnnData:
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical(["T", "B", "NK"] * 17 + ["T", None]),
            "batch": pd.Categorical([1, 2] * 26 + [1]),
            "n_counts": DENSE.sum(axis=1).astype(np.float64),
            "donor": [f"d{i % 4}" for i in range(N_CELLS)],
            "age": pd.array([None if i % 5 == 0 else i for i in range(N_CELLS)], dtype="Int64"),
            "is_doublet": [i % 7 == 0 for i in range(N_CELLS)],
        },
        index=[f"cell-{i}" for i in range(N_CELLS)],
    )
    var = pd.DataFrame(
        {"ensembl_id": [f"ENSG{i:011d}" for i in range(N_GENES)]}, index=[f"G{i}" for i in range(N_GENES)]
    )
    return anndata.AnnData(values, obs=obs, var=var)


LAYOUTS = {
    "csr": lambda: sp.csr_matrix(DENSE),
    "csr_int64": lambda: sp.csr_matrix(DENSE.astype(np.int64)),
    "csr_uint16": lambda: sp.csr_matrix(DENSE.astype(np.uint16)),
    "csr_float64": lambda: sp.csr_matrix(DENSE.astype(np.float64)),
    "csr_array": lambda: sp.csr_array(DENSE),
    "csc": lambda: sp.csc_matrix(DENSE),
    "dense": lambda: DENSE.copy(),
    "dense_int32": lambda: DENSE.astype(np.int32),
}


def read_back(source, **options) -> np.ndarray:
    rows, start = [], options.get("start", 0)
    for block in source.blocks(**options):
        assert block.start == start
        assert block.indptr.dtype == np.int64
        assert block.indices.dtype == np.int32
        assert block.data.dtype == source.value_dtype
        assert block.n_cells <= options.get("rows", 4096)
        start += block.n_cells
        matrix = sp.csr_matrix((block.data, block.indices, block.indptr), shape=(block.n_cells, source.n_genes))
        rows.append(matrix.toarray())
        block.release()
    return np.concatenate(rows)


def check(source, dense=DENSE) -> None:
    assert (source.n_cells, source.n_genes) == dense.shape
    for rows in (4096, 10, 1):
        np.testing.assert_array_equal(read_back(source, rows=rows), dense)
    np.testing.assert_array_equal(read_back(source, start=9, stop=31, rows=4), dense[9:31])
    assert list(source.blocks(start=5, stop=5)) == []


def check_tables(source) -> None:
    adata = make(DENSE)
    assert source.gene_ids_from == "ensembl_id"
    assert source.gene_ids().tolist() == adata.var["ensembl_id"].tolist()
    assert source.cell_names().tolist() == adata.obs_names.tolist()
    assert source.obs_columns == list(adata.obs.columns)
    assert source.obs("kind").to_pylist() == ["T", "B", "NK"] * 17 + ["T", None]
    assert source.obs("batch").tolist() == [1, 2] * 26 + [1]
    assert source.obs("n_counts").dtype == np.float64
    np.testing.assert_array_equal(source.obs("n_counts"), DENSE.sum(axis=1))
    assert source.obs("donor").to_pylist() == adata.obs["donor"].tolist()
    assert source.obs("age").to_pylist() == [None if i % 5 == 0 else i for i in range(N_CELLS)]
    assert source.obs("is_doublet").tolist() == adata.obs["is_doublet"].tolist()
    with pytest.raises(InputError, match="no column 'absent'; there are kind, batch"):
        source.obs("absent")
