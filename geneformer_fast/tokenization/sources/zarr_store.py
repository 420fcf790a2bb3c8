"""AnnData's zarr stores, formats 2 and 3. The zarr package is optional."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from geneformer_fast.errors import InputError, UnsupportedError
from geneformer_fast.tokenization.sources.h5ad import open_anndata_store
from geneformer_fast.tokenization.sources.reading import reading
from geneformer_fast.tokenization.sources.source import CountSource
from geneformer_fast.tokenization.sources.vectors import SlicedVector, Vector


def open_zarr(path: Path, name: str, *, layer: str | None, gene_column: str | None, allow_float: bool) -> CountSource:
    """Open a .zarr store written by anndata."""
    try:
        import zarr
    except ImportError:
        raise UnsupportedError(
            f"{name}: reading .zarr needs the zarr package: pip install 'geneformer-fast[zarr]', or save as .h5ad"
        ) from None
    with reading(name, "store"):
        root = zarr.open(str(path), mode="r")
    if not hasattr(root, "keys"):
        raise InputError(f"{name}: is a single zarr array, not an AnnData store with X, obs and var")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return open_anndata_store(
        root,
        name,
        kind="zarr",
        make_vector=_vector,
        layer=layer,
        gene_column=gene_column,
        allow_float=allow_float,
        paths=[file for file in files if file.name in _METADATA],
        parts={str(file.relative_to(path)): file for file in files if file.name not in _METADATA},
        close=lambda: None,
    )


def _vector(array: Any) -> Vector:
    """zarr reads a chunk file that is not there as zeros, which would silently empty the cells of a partial copy."""
    missing = array.nchunks - array.nchunks_initialized
    if missing and array.path.endswith("/data"):
        raise ValueError(f"{array.path} lacks {missing} of {array.nchunks} chunks; the store was not copied completely")
    return SlicedVector(array)


# These are read to tell whether a store changed; of its chunks, which may be a hundred thousand files, size and time.
_METADATA = frozenset({".zgroup", ".zattrs", ".zarray", ".zmetadata", "zarr.json"})
