"""AnnData's on-disk encodings of tables and matrices, in HDF5 and zarr alike, from anndata 0.5 to today."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from geneformer_fast.errors import InputError
from geneformer_fast.tokenization.sources.block import CountMatrix
from geneformer_fast.tokenization.sources.dense import DenseMatrix
from geneformer_fast.tokenization.sources.sparse import CsrMatrix
from geneformer_fast.tokenization.sources.spool import SpooledMatrix, csc_entries
from geneformer_fast.tokenization.sources.table import Table, decode_categories, text_array, with_missing
from geneformer_fast.tokenization.sources.vectors import SlicedVector, Vector

MakeVector = Callable[[Any], Vector]


def is_group(node: Any) -> bool:
    """True for an HDF5 or zarr group, False for an array."""
    return not hasattr(node, "shape")


def read_array(node: Any) -> Any:
    """A one-dimensional array: numbers as numpy in native byte order, text as pyarrow."""
    if len(node.shape) != 1:
        raise ValueError(f"has shape {tuple(node.shape)}, expected one dimension")
    values = node[...] if not _is_text(node) or not hasattr(node, "asstr") else node[:]
    values = np.asarray(values)
    if values.dtype.kind in "OSUT":
        return text_array(values)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"has type {values.dtype}, expected numbers or text")
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _is_text(node: Any) -> bool:
    return np.dtype(node.dtype).kind in "OSUT"


def read_column(node: Any, root: Any) -> Any:
    """A column of a table in any encoding; `root` resolves references to categories (anndata 0.7)."""
    if is_group(node):
        if "codes" in node and "categories" in node:
            return decode_categories(node["codes"][...], read_array(node["categories"]))
        if "values" in node and "mask" in node:
            return with_missing(read_array(node["values"]), node["mask"][...])
        raise ValueError(f"unknown encoding {node.attrs.get('encoding-type')!r}")
    categories = node.attrs.get("categories")
    if categories is None:
        return read_array(node)
    target = root[categories]
    return decode_categories(node[...], read_array(target))


def read_table(group: Any, root: Any, name: str, n_rows: int) -> Table:
    """The table stored in `group`: a group of columns (anndata 0.7 and later) or one compound array (before)."""
    if not is_group(group):
        return _compound_table(group, root, name, n_rows)
    index_key = group.attrs.get("_index")
    if isinstance(index_key, bytes):
        index_key = index_key.decode()
    if index_key is None or index_key not in group:
        index_key = next((key for key in ("_index", "index") if key in group), None)
    order = group.attrs.get("column-order")
    listed = [] if order is None else [_plain(key) for key in order]
    keys = [*listed, *(key for key in group if key not in listed)]
    columns = {
        key: lambda key=key: read_column(group[key], root)  # type: ignore[misc]
        for key in keys
        if key in group and key not in (index_key, "__categories")
    }
    index = None if index_key is None else lambda: read_column(group[index_key], root)
    return Table(name, n_rows, columns, index)


def _plain(key: Any) -> str:
    return key.decode() if isinstance(key, bytes) else str(key)


def _compound_table(dataset: Any, root: Any, name: str, n_rows: int) -> Table:
    fields = dataset.dtype.names
    if not fields:
        raise InputError(f"{name}: is an array of {dataset.dtype}, not a table")

    def column(field: str) -> Any:
        values = dataset[field]
        # categories of these files lie in uns under the column's name
        key = f"uns/{field}_categories"
        if values.dtype.kind in "iu" and key in root:
            return decode_categories(values, read_array(root[key]))
        return text_array(values) if values.dtype.kind in "OSU" else values

    index = next((field for field in ("index", "_index") if field in fields), None)
    columns = {field: lambda field=field: column(field) for field in fields if field != index}  # type: ignore[misc]
    return Table(name, n_rows, columns, None if index is None else lambda: column(index))


def stored_shape(node: Any) -> tuple[int, int]:
    """Shape of a stored matrix, sparse or dense."""
    shape = node.shape if not is_group(node) else node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
    if shape is None:
        raise ValueError("holds no matrix (no shape)")
    if len(shape) != 2:
        raise ValueError(f"has shape {tuple(int(n) for n in shape)}, expected cells x genes")
    n_rows, n_columns = int(shape[0]), int(shape[1])
    if n_rows < 0 or n_columns < 0:
        raise ValueError(f"has shape {n_rows} x {n_columns}")
    return n_rows, n_columns


def read_matrix(
    node: Any, make_vector: MakeVector = SlicedVector, make_dense: Callable[[Any], Any] | None = None
) -> CountMatrix:
    """The matrix stored in `node`: sparse by rows, sparse by columns, or dense."""
    shape = stored_shape(node)
    if not is_group(node):
        return DenseMatrix(node if make_dense is None else make_dense(node))
    encoding = _plain(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
    indptr = np.asarray(node["indptr"][...])
    data, indices = make_vector(node["data"]), make_vector(node["indices"])
    if encoding.startswith("csr"):
        return CsrMatrix(data, indices, indptr, shape)
    if encoding.startswith("csc"):
        return SpooledMatrix(csc_entries(data, indices, indptr, shape), shape, data.dtype, len(data), data)
    raise ValueError(f"unknown matrix encoding {encoding!r}")
