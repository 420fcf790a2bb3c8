"""AnnData objects, in memory or backed by a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_fast.counts.block import CountMatrix
from geneformer_fast.counts.dense import DenseMatrix
from geneformer_fast.counts.encodings import read_matrix
from geneformer_fast.counts.raw_table import raw_table
from geneformer_fast.counts.selection import Candidate, choose_counts
from geneformer_fast.counts.source import CountSource
from geneformer_fast.counts.sparse import MemoryCsr
from geneformer_fast.counts.table import Table
from geneformer_fast.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

NAME = "<AnnData>"


def open_anndata(adata: AnnData, *, layer: str | None, gene_column: str | None, allow_float: bool) -> CountSource:
    """Open an AnnData.

    Nothing is copied, except a matrix stored by columns, and a view of a backed AnnData, which anndata loads whole.
    """
    backed = bool(getattr(adata, "isbacked", False))
    name = f"{NAME} backed by {adata.filename}" if backed else NAME
    candidates = []
    if backed or adata.X is not None:
        candidates.append(Candidate("X", lambda: _matrix(adata.X)))
    raw = None if backed and adata.is_view else adata.raw
    if raw is not None:
        candidates.append(Candidate("raw/X", lambda: _matrix(raw.X)))
    names = [key for key in adata.layers if key is not None]  # None is X itself, from anndata 0.13 on
    candidates += [Candidate(f"layers/{key}", lambda key=key: _matrix(adata.layers[key])) for key in names]  # type: ignore[misc]
    counts_from, matrix = choose_counts(name, candidates, layer=layer, allow_float=allow_float)
    var = frame_table(adata.var, f"{name}: var")
    if counts_from == "raw/X" and raw is not None:
        var = raw_table(frame_table(raw.var, f"{name}: raw.var"), var, gene_column)
    return CountSource(
        name=name,
        kind="anndata",
        matrix=matrix,
        counts_from=counts_from,
        obs=frame_table(adata.obs, f"{name}: obs"),
        var=var,
        gene_column=gene_column,
        allow_float=allow_float,
    )


def _matrix(values: Any) -> CountMatrix:
    kind = getattr(values, "format", None)
    if kind is not None and hasattr(values, "tocsr") and hasattr(values, "indptr"):
        return MemoryCsr(values if kind == "csr" else values.tocsr())
    if isinstance(values, np.ndarray):
        return DenseMatrix(np.asarray(values))
    if kind is not None and hasattr(values, "tocsr"):
        return MemoryCsr(values.tocsr())
    # backed: anndata's wrapper of a stored sparse matrix, or the stored dense one itself
    if hasattr(values, "to_memory") and hasattr(values, "group"):
        return read_matrix(values.group)
    if hasattr(values, "shape") and hasattr(values, "chunks") and hasattr(values, "attrs"):
        return read_matrix(values)
    raise InputError(
        f"{NAME}: a matrix of type {type(values).__module__}.{type(values).__name__} is not supported; convert it to a "
        "scipy CSR matrix or a numpy array"
    )


def frame_table(frame: pd.DataFrame, name: str) -> Table:
    """A pandas data frame as a table."""
    columns = {str(key): lambda i=i: _series(frame.iloc[:, i]) for i, key in enumerate(frame.columns)}  # type: ignore[misc]
    return Table(name, len(frame), columns, lambda: frame.index.to_numpy())


def _series(series: pd.Series) -> Any:
    if isinstance(series.dtype, np.dtype) and series.dtype.kind in "biuf":
        return series.to_numpy()
    import pyarrow as pa

    if hasattr(series, "cat"):
        series = series.astype(series.cat.categories.dtype if not series.isna().any() else object)
        if isinstance(series.dtype, np.dtype) and series.dtype.kind in "biuf":
            return series.to_numpy()
    try:
        array = pa.Array.from_pandas(series)
        if isinstance(array, pa.ChunkedArray):
            array = array.combine_chunks()
    except pa.ArrowException:
        return pa.array([None if value is None or value != value else str(value) for value in series], type=pa.string())
    return array.cast(pa.string()) if pa.types.is_large_string(array.type) else array
