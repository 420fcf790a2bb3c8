"""Count matrices of every supported format behind one interface."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_fast.counts.block import CountBlock
from geneformer_fast.counts.discovery import (
    COMPRESSED,
    FORMATS,
    SUFFIXES,
    expand_inputs,
    is_tenx_folder,
    is_zarr,
)
from geneformer_fast.counts.reading import reading
from geneformer_fast.counts.source import CountSource
from geneformer_fast.counts.triplets import has_companions, matrix_files
from geneformer_fast.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["CountBlock", "CountSource", "expand_inputs", "open_source"]


def open_source(
    data: str | Path | AnnData,
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    allow_float: bool = False,
    allow_duplicate_cells: bool = False,
) -> CountSource:
    """Open a file, folder or AnnData for reading counts.

    Parameters
    ----------
    data
        Path of an .h5ad, .zarr, 10x .h5, 10x matrix folder or .loom, of a MatrixMarket file whose features and barcodes
        lie beside it (GEO, kb-python), or an AnnData (in memory or backed).
    layer
        Which layer holds the counts; by default raw.X where it holds counts, else X. For 10x files with several
        genomes: which genome.
    gene_column
        Column of var with the gene ids (``"var_names"`` for its row names); by default the first of ensembl_id,
        gene_ids, gene_id, feature_id, ensembl that exists, else the row names.
    allow_float
        Let TPM-like non-negative floats pass.
    allow_duplicate_cells
        Let cells with equal names pass.

    Raises
    ------
    InputError
        Unreadable, not a supported format, no counts in it, no cells, no genes, or duplicate cell names.
    UnsupportedError
        A .zarr store, but the zarr package is not installed.
    """
    options: dict[str, Any] = {"layer": layer, "gene_column": gene_column, "allow_float": allow_float}
    if isinstance(data, str | Path):
        with reading(str(data), "file"):
            source = _open_path(Path(data), str(data), options)
    elif hasattr(data, "obs_names") and hasattr(data, "X"):
        from geneformer_fast.counts.memory import open_anndata

        with reading("<AnnData>", "counts"):
            source = open_anndata(data, **options)
    else:
        hint = ": one modality of it, such as mdata['rna']" if hasattr(data, "mod") else ""
        raise InputError(f"cannot read counts from a {type(data).__name__}; give a path or an AnnData{hint}")
    try:
        source.check_cell_names(allow_duplicates=allow_duplicate_cells)
    except BaseException:
        source.close()
        raise
    return source


def _open_path(path: Path, name: str, options: dict[str, Any]) -> CountSource:
    if path.is_dir():
        if is_zarr(path):
            from geneformer_fast.counts.zarr_store import open_zarr

            return open_zarr(path, name, **options)
        if is_tenx_folder(path) or any(map(has_companions, matrix_files(path))):
            from geneformer_fast.counts.tenx_mtx import open_tenx_folder

            return open_tenx_folder(path, name, **options)
        raise InputError(f"{name}: is a folder, but neither a .zarr store nor a 10x matrix folder")
    if not path.exists():
        raise InputError(f"{name}: no such file or folder")
    if path.name.endswith((".mtx", ".mtx.gz")):
        from geneformer_fast.counts.tenx_mtx import open_tenx_folder

        return open_tenx_folder(path, name, **options)
    import h5py

    if path.stat().st_size == 0:
        raise InputError(f"{name}: is empty (0 bytes)")
    if not h5py.is_hdf5(path):
        hint = " It is named like an HDF5 file, but is none: damaged, or still being copied." * path.name.endswith(
            SUFFIXES
        )
        if path.suffix in COMPRESSED:
            hint = f" Decompress it first: {path.stem} may be one." * (Path(path.stem).suffix in SUFFIXES)
        raise InputError(f"{name}: not a supported format. Supported are {FORMATS}.{hint}")
    with reading(name, "file"):
        file = h5py.File(path, "r")
    return _open_hdf5(file, path, name, options)


def _open_hdf5(file: Any, path: Path, name: str, options: dict[str, Any]) -> CountSource:
    """Decide by content: the same suffixes are used for different formats."""
    try:
        keys = set(file)
        if {"matrix", "row_attrs", "col_attrs"} <= keys:
            from geneformer_fast.counts.loom import open_loom

            return open_loom(file, path, name, **options)
        if "obs" in keys or "var" in keys:
            from geneformer_fast.counts.h5ad import open_h5ad

            return open_h5ad(file, path, name, **options)
        from geneformer_fast.counts.tenx_h5 import open_tenx_h5

        return open_tenx_h5(file, path, name, **options)
    except BaseException:
        file.close()
        raise
