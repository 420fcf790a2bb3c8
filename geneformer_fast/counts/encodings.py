"""AnnData's on-disk encodings of tables and matrices, in HDF5 and zarr alike, from anndata 0.5 to today."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_fast.counts.block import CountMatrix
from geneformer_fast.counts.dense import DenseMatrix
from geneformer_fast.counts.sparse import CsrMatrix
from geneformer_fast.counts.spool import SpooledMatrix, csc_entries
from geneformer_fast.counts.stored import Absent, readable
from geneformer_fast.counts.table import Table, decode_categories, text_array, with_missing
from geneformer_fast.counts.vectors import SlicedVector, Vector
from geneformer_fast.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

MakeVector = Callable[[Any], Vector]
# NA_integer_
_R_MISSING = np.iinfo(np.int32).min


def plain_vector(array: Any) -> Vector:
    """A stored array read through its own library."""
    if len(array.shape) != 1:
        raise ValueError(f"has shape {tuple(array.shape)}, expected one dimension")
    return SlicedVector(readable(array))


def is_group(node: Any) -> bool:
    """True for an HDF5 or zarr group, False for an array."""
    return not hasattr(node, "shape")


def member(group: Any, key: str) -> Any:
    """``group[key]``; a link into another HDF5 file that does not lead to anything is named as such."""
    try:
        return group[key]
    except (KeyError, OSError):
        link = group.get(key, getlink=True) if hasattr(group, "file") else None
        if link is None or not hasattr(link, "filename"):
            raise
        raise InputError(
            f"{group.file.filename}: {group.name.rstrip('/')}/{key} is a link to {link.path} in {link.filename}, which "
            "is not there or cannot be opened; put that file beside this one"
        ) from None


def read_array(node: Any, *, absent: Absent = "refuse") -> Any:
    """A one-dimensional array: numbers as numpy in native byte order, text and what misses values as pyarrow."""
    if is_group(node):
        raise ValueError(f"is a group of {', '.join(node) or 'nothing'}, expected an array")
    if len(node.shape) != 1:
        raise ValueError(f"has shape {tuple(node.shape)}, expected one dimension")
    node = readable(node, absent=absent)
    values = np.asarray(node[...])
    if values.dtype.kind in "OSUT":
        return text_array(values)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"has type {values.dtype}, expected numbers or text")
    described = values.dtype.metadata
    if described is not None and "enum" in described:
        return _named(values, described["enum"])
    if values.dtype.kind == "f" and values.dtype.itemsize > 8:
        return values.astype(np.float64)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    return _without_r_missing(values)


def _named(values: np.ndarray, names: dict[str, int]) -> pa.Array:
    """Values of an HDF5 enumeration: R's logical (FALSE, TRUE, NA) as booleans, of any other the names."""
    from geneformer_fast.counts.arrays import number_array, text_list_array

    if {name.upper() for name in names} <= {"FALSE", "TRUE", "NA"}:
        code = {name.upper(): number for name, number in names.items()}
        is_true, is_false = (values == code.get(name, -1) for name in ("TRUE", "FALSE"))
        return number_array(is_true, ~(is_true | is_false))
    name_of = {number: name for name, number in names.items()}
    return text_list_array([name_of.get(int(value)) for value in values])


def _without_r_missing(values: np.ndarray) -> Any:
    """R stores a missing integer, or logical, as the least int32."""
    from geneformer_fast.counts.arrays import number_array

    if values.dtype != np.int32 or not (missing := values == _R_MISSING).any():
        return values
    return number_array(np.where(missing, 0, values).astype(np.int32), missing)


def read_column(node: Any, root: Any) -> Any:
    """A column of a table in any encoding; `root` resolves references to categories (anndata 0.7)."""
    if is_group(node):
        if "codes" in node and "categories" in node:
            return _categorical(node["codes"], read_column(node["categories"], root))
        if "values" in node and "mask" in node:
            # Nothing is missing where a writer left the empty mask out; a lost one turns missing texts into empty ones,
            # which are told apart where it matters, but missing numbers into others.
            values = read_array(node["values"])
            return with_missing(values, read_array(node["mask"], absent="usual" if _is_text(values) else "warn"))
        kind = _plain(node.attrs.get("encoding-type", "none given"))
        raise ValueError(f"its encoding ({kind}) is none of numbers, text, categories or nullable values")
    categories = node.attrs.get("categories")
    if categories is None:
        return read_array(node)
    # a reference means a place in the file that holds it, which links may have led to
    home = getattr(node, "file", root)
    return _categorical(node, read_column(home[categories], home))


def _is_text(values: Any) -> bool:
    return hasattr(values, "type") and str(values.type) in ("string", "large_string")


def _categorical(codes: Any, categories: Any) -> Any:
    # the codes of a single category are zeros, which writers leave out: most files of 10x have such feature_types
    return decode_categories(read_array(codes, absent="usual" if len(categories) == 1 else "refuse"), categories)


def read_table(group: Any, root: Any, name: str, n_rows: int) -> Table:
    """The table stored in `group`: a group of columns (anndata 0.7 and later) or one compound array (before)."""
    if not is_group(group):
        return _compound_table(group, root, name, n_rows)
    index_key = _index_key(group)
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


def _index_key(group: Any) -> str | None:
    """The column with the row names."""
    key = group.attrs.get("_index")
    if key is None:
        return next((other for other in ("_index", "index") if other in group), None)
    if _plain(key) not in group:
        raise ValueError(f"the row names should be in {_plain(key)!r}, which is not there")
    return _plain(key)


def table_length(group: Any) -> int:
    """Rows of a stored table, as its row names say; 0 where it has none."""
    key = _index_key(group) if is_group(group) else None
    node = group if key is None else group[key]
    if is_group(node):
        # Row names as categories, or with a mask of missing ones, as AnnData writes what pandas 3 calls strings.
        values = next((part for part in ("codes", "values") if node is not group and part in node), None)
        return 0 if values is None else int(node[values].shape[0])
    return int(node.shape[0]) if len(node.shape) else 0


def _plain(key: Any) -> str:
    return key.decode() if isinstance(key, bytes) else str(key)


def _compound_table(dataset: Any, root: Any, name: str, n_rows: int) -> Table:
    dataset = readable(dataset)
    fields = dataset.dtype.names
    if not fields:
        raise InputError(f"{name}: is an array of {dataset.dtype}, not a table")

    def column(field: str) -> Any:
        values = dataset[field]
        home = getattr(dataset, "file", root)
        # categories of these files lie in uns under the column's name
        key = f"uns/{field}_categories"
        if values.dtype.kind in "iu" and key in home:
            return decode_categories(values, read_array(home[key]))
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


def read_matrix(node: Any, make_vector: MakeVector = plain_vector) -> CountMatrix:
    """The matrix stored in `node`: sparse by rows, sparse by columns, or dense."""
    shape = stored_shape(node)
    if not is_group(node):
        return DenseMatrix(readable(node, absent="warn"))
    encoding = _plain(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
    data, indices = make_vector(member(node, "data")), make_vector(member(node, "indices"))
    # without values every cell begins and ends at 0
    indptr = read_array(member(node, "indptr"), absent="refuse" if len(data) else "accept")
    if encoding.startswith("csr"):
        return CsrMatrix(data, indices, indptr, shape)
    if encoding.startswith("csc"):
        return SpooledMatrix(csc_entries(data, indices, indptr, shape), shape, data.dtype, len(data), data)
    raise ValueError(f"unknown matrix encoding {encoding!r}")
