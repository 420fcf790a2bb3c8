"""One set of counts in every format that is read."""

from __future__ import annotations

import anndata
import h5py
import numpy as np
import scipy.io
import scipy.sparse as sp

FORMATS = ("memory", "memory_dense", "backed", "raw", "h5ad", "h5ad_csc", "h5ad_dense", "zarr", "loom", "10x_h5", "10x")


def written(kind, adata, folder, *, feature_types="feature_types"):
    """Counts of an AnnData (dense in X) in one of FORMATS, as what ``open_source`` takes; var goes along with each."""
    if kind in ("loom", "10x_h5", "10x"):
        return _foreign(kind, adata, folder, feature_types)
    make = {"memory_dense": np.asarray, "h5ad_dense": np.asarray, "h5ad_csc": sp.csc_matrix}.get(kind, sp.csr_matrix)
    stored = anndata.AnnData(make(adata.X), obs=adata.obs, var=adata.var)
    if kind == "raw":
        stored.raw = stored
        stored = stored[:, :1].copy()
        stored.X = stored.X * 0.5
    if kind.startswith("memory") or kind == "raw":
        return stored
    path = folder / ("cells.zarr" if kind == "zarr" else "cells.h5ad")
    if kind == "zarr":
        with anndata.settings.override(zarr_write_format=2):
            stored.write_zarr(path)
        return path
    stored.write_h5ad(path)
    return anndata.read_h5ad(path, backed="r") if kind == "backed" else path


def _foreign(kind, adata, folder, feature_types):
    ids = adata.var.get("gene_ids", adata.var_names)
    types = adata.var[feature_types].astype(str).tolist() if feature_types in adata.var else None
    if kind == "loom":
        path = folder / "cells.loom"
        with h5py.File(path, "w") as file:
            file["matrix"] = adata.X.T
            file["row_attrs/Accession"] = np.array(list(ids), dtype="S")
            if types is not None:
                file[f"row_attrs/{feature_types}"] = np.array(types, dtype="S")
            file["col_attrs/CellID"] = np.array(list(adata.obs_names), dtype="S")
        return path
    if kind == "10x_h5":
        path = folder / "cells.h5"
        matrix = sp.csr_matrix(adata.X.astype(np.int32))
        with h5py.File(path, "w") as file:
            group = file.create_group("matrix")
            for key in ("data", "indices", "indptr"):
                group[key] = getattr(matrix, key)
            group["shape"] = np.array(matrix.shape[::-1])
            group["barcodes"] = np.array(list(adata.obs_names), dtype="S")
            group["features/id"] = np.array(list(ids), dtype="S")
            group["features/name"] = np.array(list(adata.var_names), dtype="S")
            if types is not None:
                group["features/feature_type"] = np.array(types, dtype="S")
        return path
    path = folder / "matrices"
    path.mkdir()
    scipy.io.mmwrite(path / "matrix.mtx", sp.coo_matrix(adata.X.T.astype(np.int64)))
    columns = [list(ids), list(adata.var_names), *([types] if types is not None else [])]
    (path / "features.tsv").write_text("".join("\t".join(row) + "\n" for row in zip(*columns, strict=True)))
    (path / "barcodes.tsv").write_text("".join(f"{name}\n" for name in adata.obs_names))
    return path
