"""10x Genomics' HDF5 matrices, Cell Ranger 2 (a group per genome) and 3 and later (one group, features described)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from geneformer_fast.counts.encodings import is_group, read_array
from geneformer_fast.counts.hdf5_storage import OwnBytes
from geneformer_fast.counts.reading import reading
from geneformer_fast.counts.selection import Candidate, choose_counts
from geneformer_fast.counts.source import CountSource
from geneformer_fast.counts.sparse import CsrMatrix
from geneformer_fast.counts.table import Table, as_text
from geneformer_fast.counts.tenx_features import choose_genome, gene_features
from geneformer_fast.counts.vectors import hdf5_vector
from geneformer_fast.errors import InputError

_MATRIX_KEYS = ("barcodes", "data", "indices", "indptr", "shape")
_V3_FEATURES = {"id": "gene_ids", "name": "gene_symbol", "feature_type": "feature_types", "genome": "genome"}
_V2_FEATURES = {"genes": "gene_ids", "gene_names": "gene_symbol"}


def open_tenx_h5(
    file: Any, path: Path, name: str, *, layer: str | None, gene_column: str | None, allow_float: bool
) -> CountSource:
    """Open a 10x .h5 from an h5py file; the source closes it."""
    own = OwnBytes(file)

    def close() -> None:
        file.close()
        own.close()

    try:
        with reading(name, "matrix"):
            group, genome = _find_matrix(file, name, layer)
            features = _features(group, name)
            # 10x stores features x barcodes by column, which is cells x features by row
            n_features, n_cells = (int(n) for n in read_array(group["shape"]))
            barcodes = as_text(read_array(group["barcodes"]))

            def open_matrix() -> CsrMatrix:
                vectors = (hdf5_vector(group["data"], own), hdf5_vector(group["indices"], own))
                return CsrMatrix(*vectors, read_array(group["indptr"]), (n_cells, n_features))

            _, matrix = choose_counts(name, [Candidate("X", open_matrix)], layer=None, allow_float=allow_float)
            kept, var = gene_features(name, matrix, features, genome)
        return CountSource(
            name=name,
            kind="10x_h5",
            matrix=kept,
            counts_from="X",
            obs=Table(f"{name}: barcodes", n_cells, {}, lambda: barcodes),
            var=var,
            gene_column=gene_column,
            allow_float=allow_float,
            paths=[path],
            close=close,
        )
    except BaseException:
        close()
        raise


def _find_matrix(file: Any, name: str, layer: str | None) -> tuple[Any, str | None]:
    """The group with the matrix, and the genome still to be chosen among its features (Cell Ranger 3)."""
    if "matrix" in file and is_group(file["matrix"]) and "features" in file["matrix"]:
        return _complete(file["matrix"], name), layer
    genomes = sorted(key for key in file if is_group(file[key]) and "indptr" in file[key])
    if not genomes:
        raise InputError(
            f"{name}: an HDF5 file, but neither AnnData (obs, var), 10x (matrix) nor loom; it holds "
            f"{', '.join(sorted(file)) or 'nothing'}"
        )
    return _complete(file[choose_genome(name, genomes, layer)], name), None


def _complete(group: Any, name: str) -> Any:
    missing = [key for key in _MATRIX_KEYS if key not in group]
    if missing:
        raise InputError(f"{name}: the 10x matrix lacks {', '.join(missing)}; the file is incomplete")
    return group


def _features(group: Any, name: str) -> dict[str, np.ndarray]:
    node, keys = (group["features"], _V3_FEATURES) if "features" in group else (group, _V2_FEATURES)
    features = {new: as_text(read_array(node[key])) for key, new in keys.items() if key in node}
    if "gene_ids" not in features:
        raise InputError(f"{name}: the 10x matrix lists no feature ids; the file is incomplete")
    return features
