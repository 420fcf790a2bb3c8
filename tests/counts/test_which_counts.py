"""Which matrix of a file holds counts, which column its genes; what are no counts is refused with values."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from small_sources import DENSE, N_GENES, check, make, read_back

from geneformer_fast.counts import open_source
from geneformer_fast.errors import InputError


def test_which_matrix_holds_the_counts(tmp_path):
    adata = make(sp.csr_matrix(DENSE))
    adata.raw = adata
    adata = adata[:, :20].copy()
    adata.layers["counts"] = adata.X.copy()
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    for data in (path, adata):
        with open_source(data) as source:
            assert (source.counts_from, source.n_genes) == ("raw/X", N_GENES)
            check(source)
        with open_source(data, layer="counts") as source:
            assert (source.counts_from, source.n_genes) == ("layers/counts", 20)
            check(source, DENSE[:, :20])
        with pytest.raises(InputError, match="no layer 'spliced'; there are X, raw/X, layers/counts"):
            open_source(data, layer="spliced")
    del adata.raw
    with pytest.raises(InputError, match=r"X does not hold counts.*log-transformed.*layers/counts holds counts"):
        open_source(adata)
    # raw.X that is no better than X leaves X the choice
    logged = make(sp.csr_matrix(np.log1p(DENSE)))
    logged.raw = logged
    logged.X = sp.csr_matrix(DENSE)
    with open_source(logged) as source:
        assert source.counts_from == "X"


def test_x_is_no_layer_without_a_name(monkeypatch):
    """AnnData 0.13 lists X among the layers, under None."""
    adata = make(sp.csr_matrix(DENSE))
    adata.layers["counts"] = adata.X
    layers = {None: adata.X, "counts": adata.X}
    if None not in adata.layers:
        monkeypatch.setattr(anndata.AnnData, "layers", property(lambda self: layers))
    with pytest.raises(InputError, match=r"no layer 'spliced'; there are X, layers/counts$"):
        open_source(adata, layer="spliced")


def scaled(values):
    return (values - values.mean(axis=0)) / (values.std(axis=0) + 1)


def normalised(values, target):
    return values / np.maximum(values.sum(axis=1, keepdims=True), 1) * target


@pytest.mark.parametrize(
    ("change", "allow_float", "message"),
    [
        (scaled, False, "negative values such as -.*scaled"),
        (scaled, True, "negative values such as -.*scaled"),
        (np.log1p, True, "log-transformed"),
        (lambda v: np.log1p(normalised(v, 1e4)), False, "log-transformed"),
        (lambda v: np.log1p(normalised(v, 1e4)), True, "log-transformed"),
        (lambda v: np.log2(normalised(v, 1e6) + 1), True, "log-transformed"),
        (lambda v: normalised(v, 1e6), False, "not whole numbers.*--allow-float"),
        (lambda v: np.where(v == 3, np.nan, v), True, "NaN"),
        (lambda v: np.where(v == 3, np.inf, v), True, "infinite"),
        (lambda v: -v.astype(np.int32), False, "negative values"),
    ],
)
def test_what_are_not_counts_is_refused_with_values(tmp_path, change, allow_float, message):
    path = tmp_path / "cells.h5ad"
    make(change(DENSE)).write_h5ad(path)
    with pytest.raises(InputError, match=message) as caught:
        open_source(path, allow_float=allow_float)
    assert "cells.h5ad: X does not hold counts" in str(caught.value)


def test_tpm_like_floats_pass_when_allowed():
    values = normalised(DENSE, 1e6)
    with open_source(make(values), allow_float=True) as source:
        check(source, values)


@pytest.mark.parametrize("bad", [np.nan, -2.0, np.inf, 2.5])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_a_single_bad_value_anywhere_is_found(tmp_path, layout, bad):
    # opening looks at a sample of cells only; cell 100 of 318 is not among them
    values = np.tile(DENSE, (6, 1))
    values[100, 8] = bad
    make_matrix = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[layout]
    adata = anndata.AnnData(make_matrix(values))
    adata.var["ensembl_id"] = [f"ENSG{i:011d}" for i in range(N_GENES)]
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    with pytest.raises(InputError, match=r"cells\.h5ad: X does not hold counts") as caught, open_source(path) as source:
        list(source.blocks(rows=50))
    if layout != "csc":
        assert f"cell 100 ('100'), gene 'ENSG00000000008' has {bad:.6g}" in str(caught.value)


def test_bad_values_far_from_the_sample_name_cell_and_gene():
    values = np.ones((400, N_GENES), dtype=np.float32)
    values[130, 8] = 2.5
    adata = anndata.AnnData(sp.csr_matrix(values))
    with open_source(adata) as source:
        blocks = source.blocks(rows=100)
        assert next(blocks).n_cells == 100
        with pytest.raises(InputError, match=r"cell 130 \('130'\), gene '8' has 2\.5; 1 such values.*--allow-float"):
            next(blocks)
    with open_source(adata, allow_float=True) as source:
        np.testing.assert_array_equal(read_back(source), values)


def test_gene_columns(tmp_path):
    adata = make(sp.csr_matrix(DENSE))
    adata.var = adata.var.rename(columns={"ensembl_id": "gene_ids"})
    adata.var["other"] = pd.Categorical([f"X{i % 5}" for i in range(N_GENES)])
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    expected = {None: "ENSG00000000006", "other": "X1", "var_names": "G6"}
    for column, sixth in expected.items():
        with open_source(path, gene_column=column) as source:
            assert source.gene_ids()[6] == sixth
            assert source.gene_ids_from == (column or "gene_ids")
    with pytest.raises(InputError, match=r"var has no column 'nope'; there are gene_ids, other \(and var_names\)"):
        open_source(path, gene_column="nope")
