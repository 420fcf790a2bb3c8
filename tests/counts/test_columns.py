"""Columns of obs and var in every encoding, and ids of raw's genes that stand in var alone."""

from __future__ import annotations

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp
from corpus import GENES, make_cells, small_vocabulary

from geneformer_fast.counts import open_source
from geneformer_fast.errors import InputError
from geneformer_fast.tokenization.arrow import open_tokens
from geneformer_fast.tokenization.run import tokenize

N = 12


def small(**columns) -> anndata.AnnData:
    adata = make_cells(N, 1)
    adata.obs = pd.DataFrame(columns, index=adata.obs_names)
    adata.X = sp.csr_matrix(adata.X.toarray() + np.eye(N, len(GENES), dtype=np.float32))  # no cell is empty
    return adata


COLUMNS = {
    "uint8": (np.arange(N, dtype=np.uint8), list(range(N))),
    "uint64": (np.arange(N, dtype=np.uint64), list(range(N))),
    "large": (np.arange(N, dtype=np.uint64) + np.uint64(2**63), [i + 2**63 for i in range(N)]),
    "float16": (np.arange(N, dtype=np.float16), [float(i) for i in range(N)]),
    "bool": (np.arange(N) % 2 == 0, [i % 2 == 0 for i in range(N)]),
    "Int64": (pd.array([None, *range(1, N)], dtype="Int64"), [None, *range(1, N)]),
    "UInt64": (pd.array([None, *range(1, N)], dtype="UInt64"), [None, *range(1, N)]),
    "Float32": (pd.array([None, *range(1, N)], dtype="Float32"), [None, *map(float, range(1, N))]),
    "boolean": (pd.array([None, True, False] * 4, dtype="boolean"), [None, True, False] * 4),
    "text": ([f"é{i}" for i in range(N)], [f"é{i}" for i in range(N)]),
    "string": (pd.array([None, *"bcdefghijkl"], dtype="string"), [None, *"bcdefghijkl"]),
    "category": (pd.Categorical([None, "a", "b"] * 4), [None, "a", "b"] * 4),
    "numbers": (pd.Categorical([1.5, 2.5, 1.5] * 4), [1.5, 2.5, 1.5] * 4),
    "flags": (pd.Categorical([True, False, True] * 4), [True, False, True] * 4),
    "strings": (pd.Categorical(pd.array(["a", "b", None] * 4, dtype="string")), ["a", "b", None] * 4),
}


def stored(adata, tmp_path, kind):
    if kind == "memory":
        return adata
    with anndata.settings.override(allow_write_nullable_strings=True):
        if kind == "h5ad":
            adata.write_h5ad(tmp_path / "cells.h5ad")
        else:
            pytest.importorskip("zarr", minversion="3.1.3")
            with anndata.settings.override(zarr_write_format=int(kind[-1])):
                adata.write_zarr(tmp_path / "cells.zarr")
    return tmp_path / ("cells.h5ad" if kind == "h5ad" else "cells.zarr")


@pytest.mark.filterwarnings("ignore:Writing zarr v2|zarr v3 autosharding|Consolidated metadata|.*mask of shape")
@pytest.mark.parametrize("kind", ["memory", "h5ad", "zarr 2", "zarr 3"])
def test_every_encoding_of_a_column_is_carried(tmp_path, kind):
    # anndata does not write nullable floats
    columns = {name: column for name, column in COLUMNS.items() if name != "Float32" or kind == "memory"}
    if kind.startswith("zarr"):  # a chunk of zeros is not stored, and reads as one that was lost
        columns["uint64"] = (columns["uint64"][0] + np.uint64(1), [i + 1 for i in range(N)])
    data = stored(small(**{name: values for name, (values, _) in columns.items()}), tmp_path, kind)
    tokenize(data, tmp_path / "out", dictionary=small_vocabulary(), obs=list(columns))
    with open_tokens(tmp_path / "out") as tokens:
        for name, (_, want) in columns.items():
            assert tokens.column(name).to_pylist() == want, name
        assert tokens.schema.field("uint64").type == pa.int64()
        assert tokens.schema.field("large").type == pa.uint64()


def test_a_column_that_does_not_fit_the_type_of_the_other_inputs(tmp_path):
    first, second = small(score=np.arange(N) + 0.5), small(score=np.full(N, 2**60 + 1))
    second.obs_names = [f"other{i}" for i in range(N)]
    for name, adata in (("a", first), ("b", second)):
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    inputs = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    with pytest.raises(InputError, match=r"b\.h5ad: obs column 'score' cannot be carried as double"):
        tokenize(inputs, tmp_path / "out", dictionary=small_vocabulary(), obs=["score"])


R_LOGICAL = h5py.enum_dtype({"FALSE": 0, "TRUE": 1, "NA": 2}, basetype="i1")
FROM_R = {
    "logical": (np.array([0, 1, 2] * 4, dtype=R_LOGICAL), [False, True, None] * 4),
    "integer": (np.array([0, 1, -(2**31)] * 4, dtype=np.int32), [0, 1, None] * 4),
    "factor": (np.array([1, 2, 1] * 4, dtype=h5py.enum_dtype({"A": 1, "B": 2})), ["A", "B", "A"] * 4),
    "h5py_bool": (np.array([True, False, True] * 4), [True, False, True] * 4),
}


@pytest.mark.parametrize("kind", ["h5ad", "loom"])
def test_columns_as_r_writes_them(tmp_path, kind):
    adata = small()
    path = tmp_path / f"cells.{kind}"
    if kind == "h5ad":
        adata.write_h5ad(path)
    with h5py.File(path, "a") as file:
        if kind == "loom":
            file["matrix"] = adata.X.toarray().T
            file["row_attrs/Accession"] = np.array(GENES, dtype="S")
            file["col_attrs/CellID"] = np.array([f"c{i}" for i in range(N)], dtype="S")
            file.create_group("layers")
        group = file["obs" if kind == "h5ad" else "col_attrs"]
        for name, (values, _) in FROM_R.items():
            group[name] = values
    with open_source(path) as source:
        for name, (_, want) in FROM_R.items():
            got = source.obs(name)
            assert got.tolist() == want if isinstance(got, np.ndarray) else got.to_pylist() == want, name
    tokenize(path, tmp_path / "out", dictionary=small_vocabulary(), obs=list(FROM_R))
    with open_tokens(tmp_path / "out") as tokens:
        assert tokens.column("logical").to_pylist() == [False, True, None] * 4


def test_an_encoding_that_is_not_known_is_named(tmp_path):
    small().write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        file["obs"].create_group("odd").attrs["encoding-type"] = "awkward-array"
        file["obs/wide"] = np.zeros((N, 2))
        file["obs/complex"] = np.zeros(N, dtype=complex)
    with open_source(tmp_path / "cells.h5ad") as source:
        for name, message in (("odd", r"awkward-array"), ("wide", r"shape \(12, 2\)"), ("complex", "complex128")):
            with pytest.raises(InputError, match=rf"column '{name}'.*{message}"):
                source.obs(name)


def with_raw(n_raw=120, n_var=120) -> anndata.AnnData:
    """Counts in raw.X under symbols; ids in var alone, whose genes are in another order."""
    raw = make_cells(N, 1)[:, :n_raw].copy()
    raw.var_names = [f"SYMBOL{i}" for i in range(n_raw)]
    adata = raw[:, np.random.default_rng(0).permutation(n_raw)[:n_var]].copy()
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    adata.raw = raw
    adata.var["ensembl_id"] = [GENES[int(name.removeprefix("SYMBOL"))] for name in adata.var_names]
    return adata


@pytest.mark.parametrize("gene_column", [None, "ensembl_id"])
@pytest.mark.parametrize("kind", ["memory", "h5ad"])
def test_ids_of_var_are_those_of_raw_by_name(tmp_path, kind, gene_column):
    with open_source(stored(with_raw(), tmp_path, kind), gene_column=gene_column) as source:
        assert source.counts_from == "raw/X"
        assert source.gene_ids_from == "ensembl_id"
        assert source.gene_ids().tolist() == GENES


def test_row_names_with_a_mask_count_the_rows(tmp_path):
    """As AnnData 0.13 writes an index of strings; earlier versions read it too."""
    path = stored(with_raw(), tmp_path, "h5ad")
    with h5py.File(path, "r+") as file:
        for name in ("var/_index", "raw/var/_index"):
            if isinstance(file[name], h5py.Group):
                continue
            values = file[name][:]
            del file[name]
            group = file.create_group(name)
            group.attrs.update({"encoding-type": "nullable-string-array", "encoding-version": "0.1.0"})
            group["values"], group["mask"] = values, np.zeros(len(values), dtype=bool)
    with open_source(path) as source:
        assert source.gene_ids_from == "ensembl_id"
        assert source.gene_ids().tolist() == GENES


@pytest.mark.parametrize("kind", ["memory", "h5ad"])
def test_ids_of_fewer_genes_than_raw_has(tmp_path, kind):
    data = stored(with_raw(n_var=50), tmp_path, kind)
    with pytest.raises(InputError, match=r"raw.var: has no column 'ensembl_id'; var has it, but names only 50 of 120"):
        open_source(data, gene_column="ensembl_id")
    with pytest.warns(UserWarning, match=r"only 50 of 120 genes of raw\.X"), open_source(data) as source:
        assert source.gene_ids_from == "var_names"
    with pytest.raises(InputError, match=r"raw.var has no column 'nope'; there are none"):
        open_source(data, gene_column="nope")


def test_names_that_occur_twice_match_nothing(tmp_path):
    adata = with_raw()
    adata.var_names = ["SYMBOL1", *adata.var_names[1:]]
    with pytest.raises(InputError, match=r"var has it, but names only 11[89] of 120"):
        open_source(adata, gene_column="ensembl_id")
