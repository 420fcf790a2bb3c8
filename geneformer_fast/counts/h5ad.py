"""AnnData's HDF5 files, from anndata 0.5 to today."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geneformer_fast.counts.encodings import is_group, member, read_matrix, read_table, table_length
from geneformer_fast.counts.hdf5_storage import OwnBytes, linked_files
from geneformer_fast.counts.raw_table import raw_table
from geneformer_fast.counts.reading import reading
from geneformer_fast.counts.selection import Candidate, choose_counts, modalities_message
from geneformer_fast.counts.source import CountSource
from geneformer_fast.counts.vectors import hdf5_vector
from geneformer_fast.errors import InputError


def open_h5ad(
    file: Any, path: Path, name: str, *, layer: str | None, gene_column: str | None, allow_float: bool
) -> CountSource:
    """Open an h5ad from an h5py file; the source closes it."""
    with reading(name, "file"):
        own, paths = OwnBytes(file), [path, *linked_files(file)]

    def close() -> None:
        file.close()
        own.close()

    try:
        return open_anndata_store(
            file,
            name,
            kind="h5ad",
            make_vector=lambda dataset: hdf5_vector(dataset, own),
            layer=layer,
            gene_column=gene_column,
            allow_float=allow_float,
            paths=paths,
            close=close,
        )
    except BaseException:
        close()
        raise


def open_anndata_store(
    root: Any,
    name: str,
    *,
    kind: str,
    make_vector: Any,
    layer: str | None,
    gene_column: str | None,
    allow_float: bool,
    paths: list[Path],
    parts: Mapping[str, Path] | None = None,
    close: Any,
) -> CountSource:
    """Open anything laid out as AnnData writes it, HDF5 or zarr."""
    with reading(name, "the list of matrices"):
        if "mod" in root and "X" not in root:
            raise InputError(modalities_message(name, root["mod"]))
        nodes: dict[str, Any] = {}
        if "X" in root:
            nodes["X"] = member(root, "X")
        for key in ("raw/X", "raw.X"):
            if key in root:
                nodes["raw/X"] = root[key]
        if "layers" in root and is_group(layers := member(root, "layers")):
            nodes.update({f"layers/{key}": member(layers, key) for key in layers})
        for table in ("obs", "var"):
            if table not in root:
                raise InputError(f"{name}: has no {table}; this is not a complete AnnData file")
    candidates = [
        Candidate(label, lambda node=node: read_matrix(node, make_vector))  # type: ignore[misc]
        for label, node in nodes.items()
    ]
    counts_from, matrix = choose_counts(name, candidates, layer=layer, allow_float=allow_float)
    with reading(name, "obs and var"):
        obs = read_table(member(root, "obs"), root, f"{name}: obs", matrix.shape[0])
        own = member(root, "var")
        raw_key = next((key for key in ("raw/var", "raw.var") if key in root), None)
        if counts_from == "raw/X" and raw_key is not None:
            raw = read_table(member(root, raw_key), root, f"{name}: {raw_key}", matrix.shape[1])
            var = raw_table(raw, read_table(own, root, f"{name}: var", table_length(own)), gene_column)
        else:
            var = read_table(own, root, f"{name}: var", matrix.shape[1])
    return CountSource(
        name=name,
        kind=kind,
        matrix=matrix,
        counts_from=counts_from,
        obs=obs,
        var=var,
        gene_column=gene_column,
        allow_float=allow_float,
        paths=paths,
        parts=parts,
        close=close,
    )
