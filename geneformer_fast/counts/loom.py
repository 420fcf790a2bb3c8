"""Loom files: genes x cells, dense, read through h5py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from geneformer_fast.counts.dense import DenseMatrix
from geneformer_fast.counts.encodings import is_group, read_array
from geneformer_fast.counts.reading import reading
from geneformer_fast.counts.selection import Candidate, choose_counts
from geneformer_fast.counts.source import CountSource
from geneformer_fast.counts.stored import readable
from geneformer_fast.counts.table import Table
from geneformer_fast.errors import InputError

_CELL_NAMES = ("CellID", "cell_names", "obs_names", "barcode")
_GENE_NAMES = ("Accession", "var_names", "Gene")


def open_loom(
    file: Any, path: Path, name: str, *, layer: str | None, gene_column: str | None, allow_float: bool
) -> CountSource:
    """Open a loom from an h5py file; the source closes it."""
    with reading(name, "layers"):
        nodes = {"X": file["matrix"]}
        if "layers" in file and is_group(file["layers"]):
            nodes.update({f"layers/{key}": file["layers"][key] for key in file["layers"]})
        if is_group(file["matrix"]):
            raise InputError(f"{name}: matrix is a group, expected the dense matrix of a loom file")
    candidates = [
        Candidate(label, lambda node=node: DenseMatrix(readable(node, absent="warn"), cells_in_columns=True))  # type: ignore[misc]
        for label, node in nodes.items()
    ]
    counts_from, matrix = choose_counts(name, candidates, layer=layer, allow_float=allow_float)
    with reading(name, "row_attrs and col_attrs"):
        var = _attributes(file["row_attrs"], f"{name}: row_attrs", matrix.shape[1], _GENE_NAMES)
        obs = _attributes(file["col_attrs"], f"{name}: col_attrs", matrix.shape[0], _CELL_NAMES)
    return CountSource(
        name=name,
        kind="loom",
        matrix=matrix,
        counts_from=counts_from,
        obs=obs,
        var=var,
        gene_column=gene_column,
        allow_float=allow_float,
        paths=[path],
        close=file.close,
    )


def _attributes(group: Any, name: str, n_rows: int, index_names: tuple[str, ...]) -> Table:
    keys = [key for key in group if not is_group(group[key]) and len(group[key].shape) == 1]
    columns = {key: lambda key=key: read_array(group[key]) for key in keys}  # type: ignore[misc]
    index = next((columns[key] for key in index_names if key in columns), None)
    return Table(name, n_rows, columns, index)
