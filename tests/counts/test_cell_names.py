"""The names of cells go with their tokens, whatever file they come from and whatever its columns are called."""

from __future__ import annotations

import gzip
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp
import toys

from geneformer_fast import tokenize
from geneformer_fast.counts import open_source
from geneformer_fast.errors import InputError

NAMES = [f"AAAC{i:02d}-1" for i in range(6)]


def cells() -> anndata.AnnData:
    adata = toys.cells(6, empty=(2,))
    adata.obs_names = NAMES
    return adata


def write(kind: str, folder: Path) -> object:
    adata, genes = cells(), [gene.encode() for gene in toys.gene_ids()]
    if kind == "memory":
        return adata
    if kind == "h5ad":
        adata.write_h5ad(folder / "cells.h5ad")
        return folder / "cells.h5ad"
    if kind == "zarr":
        pytest.importorskip("zarr")
        adata.write_zarr(folder / "cells.zarr")
        return folder / "cells.zarr"
    if kind == "loom":
        with h5py.File(folder / "cells.loom", "w") as file:
            file["matrix"] = adata.X.toarray().T
            file["row_attrs/Accession"] = genes
            file["col_attrs/CellID"] = [name.encode() for name in NAMES]
            file["col_attrs/kind"] = [name.encode() for name in adata.obs["kind"]]
        return folder / "cells.loom"
    if kind == "10x h5":
        with h5py.File(folder / "cells.h5", "w") as file:
            matrix = adata.X.astype(np.int32)
            for name in ("data", "indices", "indptr"):
                file[f"matrix/{name}"] = getattr(matrix, name)
            file["matrix/shape"] = matrix.shape[::-1]
            file["matrix/barcodes"] = [name.encode() for name in NAMES]
            file["matrix/features/id"] = file["matrix/features/name"] = genes
            file["matrix/features/feature_type"] = [b"Gene Expression"] * len(genes)
        return folder / "cells.h5"
    scipy.io.mmwrite(folder / "matrix.mtx", sp.coo_matrix(adata.X.T.astype(np.int32)))
    rows = "".join(f"{gene}\tg\tGene Expression\n" for gene in toys.gene_ids())
    (folder / "features.tsv.gz").write_bytes(gzip.compress(rows.encode()))
    (folder / "barcodes.tsv").write_text("\n".join(NAMES) + "\n")
    return folder


@pytest.mark.parametrize("kind", ["memory", "h5ad", "zarr", "loom", "10x h5", "10x folder"])
def test_every_reader_has_them(kind: str, tmp_path: Path) -> None:
    (tmp_path / "counts").mkdir()
    data = write(kind, tmp_path / "counts")
    kept = [name for i, name in enumerate(NAMES) if i != 2]
    tokens = tokenize(data, tmp_path / "plain", dictionary=toys.vocabulary(), progress=False)
    assert tokens.columns == ["input_ids", "obs_names", "length", "source_file", "source_row"]
    assert tokens.column("obs_names").to_pylist() == kept
    for index in ("index", "_index"):
        named = {"obs_names": "barcode", index: "also"}
        tokens = tokenize(data, tmp_path / index, dictionary=toys.vocabulary(), obs=named, progress=False)
        assert tokens.columns[1:3] == ["barcode", "also"]
        assert tokens.column("barcode").to_pylist() == tokens.column("also").to_pylist() == kept


@pytest.mark.parametrize("is_file", [True, False])
def test_a_column_called_index_is_reached(is_file: bool, tmp_path: Path) -> None:
    adata = cells()
    adata.obs["index"] = [f"i{i}" for i in range(6)]
    adata.var["index"] = toys.gene_ids()
    adata.var_names = [f"g{i}" for i in range(adata.n_vars)]
    if is_file:
        adata.write_h5ad(tmp_path / "cells.h5ad")
    data = tmp_path / "cells.h5ad" if is_file else adata
    options = dict(dictionary=toys.vocabulary(), gene_column="index", progress=False)
    tokens = tokenize(data, tmp_path / "out", obs=["index"], **options)
    assert tokens.column("index").to_pylist() == ["i0", "i1", "i3", "i4", "i5"]
    assert tokens.column("obs_names").to_pylist() == [name for i, name in enumerate(NAMES) if i != 2]
    with open_source(data, gene_column="index") as source:
        assert source.gene_ids().tolist() == toys.gene_ids()
    with open_source(data, gene_column="var_names") as source:
        assert source.gene_ids()[0] == "g0"


def test_cells_without_names_are_told_apart_by_their_row(tmp_path: Path) -> None:
    cells().write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        del file["obs/_index"], file["obs"].attrs["_index"]
    tokens = tokenize(tmp_path / "cells.h5ad", tmp_path / "out", dictionary=toys.vocabulary(), progress=False)
    assert tokens.column("obs_names").to_pylist() == ["0", "1", "3", "4", "5"]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'obs_names' for a carried obs column is taken.*--obs another_name=kind"):
        tokenize(cells(), tmp_path / "out", dictionary=toys.vocabulary(), obs={"kind": "obs_names"})
    with pytest.raises(InputError, match=r"no column 'sex' to carry along; there are kind, score \(and obs_names\)"):
        tokenize(cells(), tmp_path / "out", dictionary=toys.vocabulary(), obs="sex")
    with pytest.raises(InputError, match="columns of obs go into a folder"):
        tokenize(cells(), dictionary=toys.vocabulary(), obs=["kind"])
    assert not list(tmp_path.iterdir())
