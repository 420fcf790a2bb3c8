"""AnnData's zarr stores, formats 2 and 3. The zarr package is optional."""

from __future__ import annotations

from pathlib import Path

from geneformer_fast.counts.encodings import plain_vector
from geneformer_fast.counts.h5ad import open_anndata_store
from geneformer_fast.counts.reading import reading
from geneformer_fast.counts.source import CountSource
from geneformer_fast.errors import InputError, UnsupportedError


def open_zarr(path: Path, name: str, *, layer: str | None, gene_column: str | None, allow_float: bool) -> CountSource:
    """Open a .zarr store written by anndata."""
    try:
        import zarr
    except ImportError:
        raise UnsupportedError(
            f"{name}: reading .zarr needs the zarr package: pip install 'geneformer-fast[zarr]', or save as .h5ad"
        ) from None
    from packaging.version import Version

    if Version(zarr.__version__) < Version(_LEAST_ZARR):
        raise UnsupportedError(
            f"{name}: reading .zarr needs zarr {_LEAST_ZARR} or later, here is {zarr.__version__}: pip install -U "
            "'geneformer-fast[zarr]', or save as .h5ad"
        )
    with reading(name, "store"):
        root = zarr.open(str(path), mode="r")
    if not hasattr(root, "keys"):
        raise InputError(f"{name}: is a single zarr array, not an AnnData store with X, obs and var")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return open_anndata_store(
        root,
        name,
        kind="zarr",
        make_vector=plain_vector,
        layer=layer,
        gene_column=gene_column,
        allow_float=allow_float,
        paths=[file for file in files if file.name in _METADATA],
        parts={str(file.relative_to(path)): file for file in files if file.name not in _METADATA},
        close=lambda: None,
    )


# Earlier versions read shards that do not divide an array as zeros, without a word.
_LEAST_ZARR = "3.1.3"
# These are read to tell whether a store changed; of its chunks, which may be a hundred thousand files, size and time.
_METADATA = frozenset({".zgroup", ".zattrs", ".zarray", ".zmetadata", "zarr.json"})
