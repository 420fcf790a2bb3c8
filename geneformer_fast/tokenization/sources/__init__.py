"""Count matrices of every supported format behind one interface."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_fast.errors import InputError
from geneformer_fast.tokenization.sources.block import CountBlock
from geneformer_fast.tokenization.sources.reading import reading
from geneformer_fast.tokenization.sources.source import CountSource

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["CountBlock", "CountSource", "expand_inputs", "open_source"]

_SUFFIXES = (".h5ad", ".h5", ".hdf5", ".loom")
_FORMATS = "AnnData .h5ad and .zarr, 10x .h5 and matrix folders (matrix.mtx), .loom"


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
        Path of an .h5ad, .zarr, 10x .h5, 10x matrix folder or .loom, or an AnnData (in memory or backed).
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
        from geneformer_fast.tokenization.sources.memory import open_anndata

        with reading("<AnnData>", "counts"):
            source = open_anndata(data, **options)
    else:
        raise InputError(f"cannot read counts from a {type(data).__name__}; give a path or an AnnData")
    try:
        source.check_cell_names(allow_duplicates=allow_duplicate_cells)
    except BaseException:
        source.close()
        raise
    return source


def _open_path(path: Path, name: str, options: dict[str, Any]) -> CountSource:
    if path.is_dir():
        if is_zarr(path):
            from geneformer_fast.tokenization.sources.zarr_store import open_zarr

            return open_zarr(path, name, **options)
        if is_tenx_folder(path):
            from geneformer_fast.tokenization.sources.tenx_mtx import open_tenx_folder

            return open_tenx_folder(path, name, **options)
        raise InputError(f"{name}: is a folder, but neither a .zarr store nor a 10x matrix folder")
    if not path.exists():
        raise InputError(f"{name}: no such file or folder")
    if path.name.endswith((".mtx", ".mtx.gz")):
        from geneformer_fast.tokenization.sources.tenx_mtx import open_tenx_folder

        return open_tenx_folder(path, name, **options)
    import h5py

    if path.stat().st_size == 0:
        raise InputError(f"{name}: is empty (0 bytes)")
    if not h5py.is_hdf5(path):
        hint = " It is named like an HDF5 file, but is none: damaged, or still being copied." * path.name.endswith(
            _SUFFIXES
        )
        raise InputError(f"{name}: not a supported format. Supported are {_FORMATS}.{hint}")
    with reading(name, "file"):
        file = h5py.File(path, "r")
    return _open_hdf5(file, path, name, options)


def _open_hdf5(file: Any, path: Path, name: str, options: dict[str, Any]) -> CountSource:
    """Decide by content: the same suffixes are used for different formats."""
    try:
        keys = set(file)
        if {"matrix", "row_attrs", "col_attrs"} <= keys:
            from geneformer_fast.tokenization.sources.loom import open_loom

            return open_loom(file, path, name, **options)
        if "obs" in keys or "var" in keys:
            from geneformer_fast.tokenization.sources.h5ad import open_h5ad

            return open_h5ad(file, path, name, **options)
        from geneformer_fast.tokenization.sources.tenx_h5 import open_tenx_h5

        return open_tenx_h5(file, path, name, **options)
    except BaseException:
        file.close()
        raise


def is_zarr(path: Path) -> bool:
    """True for a folder that is a zarr store, format 2 or 3."""
    return any((path / marker).is_file() for marker in (".zgroup", ".zattrs", ".zmetadata", "zarr.json"))


def is_tenx_folder(path: Path) -> bool:
    """True for a folder with matrix.mtx or matrix.mtx.gz."""
    return any((path / file).is_file() for file in ("matrix.mtx", "matrix.mtx.gz"))


def expand_inputs(inputs: str | Path | Iterable[str | Path]) -> list[Path]:
    """Every input among files, folders and globs, sorted by path, each once.

    A .zarr store or 10x matrix folder is one input; any other folder stands for the inputs directly inside it.

    Raises
    ------
    InputError
        A path or glob that leads to nothing.
    """
    given = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    found: set[Path] = set()
    for entry in given:
        path = Path(entry)
        if path.exists():
            matches = [path]
        else:
            matches = [Path(match) for match in glob.glob(str(entry), recursive=True)]
            if not matches:
                raise InputError(f"{entry}: no such file or folder, and nothing matches it as a pattern")
        for match in matches:
            found.update(_inputs_at(match))
    if not found:
        raise InputError("no inputs given")
    return sorted(found)


def _inputs_at(path: Path) -> list[Path]:
    if not path.is_dir() or is_zarr(path) or is_tenx_folder(path):
        return [path]
    inside = [
        entry
        for entry in path.iterdir()
        if not entry.name.startswith(".")
        and (
            (entry.is_file() and entry.suffix in _SUFFIXES)
            or (entry.is_dir() and (is_zarr(entry) or is_tenx_folder(entry)))
        )
    ]
    if not inside:
        raise InputError(f"{path}: the folder holds no input. Supported are {_FORMATS}")
    return inside
