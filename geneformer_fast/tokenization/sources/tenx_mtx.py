"""10x Genomics' matrix folders: matrix.mtx, features.tsv (genes.tsv before Cell Ranger 3) and barcodes.tsv, or .gz."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from geneformer_fast.errors import InputError
from geneformer_fast.tokenization.sources.reading import reading
from geneformer_fast.tokenization.sources.selection import Candidate, choose_counts
from geneformer_fast.tokenization.sources.source import CountSource
from geneformer_fast.tokenization.sources.spool import Entries, SpooledMatrix
from geneformer_fast.tokenization.sources.table import Table
from geneformer_fast.tokenization.sources.tenx_features import gene_features

_BLOCK_BYTES = 8 << 20
_PLAIN_ENTRY = re.compile(rb"\d+ \d+ \S+\r?\n?$")
_FEATURE_COLUMNS = ("gene_ids", "gene_symbol", "feature_types")


def open_tenx_folder(
    path: Path, name: str, *, layer: str | None, gene_column: str | None, allow_float: bool
) -> CountSource:
    """Open a 10x matrix folder, or one matrix file whose companions share its prefix (as GEO names them)."""
    matrix_path, prefix = _matrix_file(path)
    folder = matrix_path.parent
    features_path = _companion(folder, prefix, ("features.tsv", "genes.tsv"), name)
    barcodes_path = _companion(folder, prefix, ("barcodes.tsv",), name)
    with reading(name, features_path.name):
        rows = [line.split("\t") for line in _lines(features_path)]
        n_columns = min(len(_FEATURE_COLUMNS), min((len(row) for row in rows), default=1))
        features = {
            column: np.array([row[i] for row in rows], dtype=object)
            for i, column in enumerate(_FEATURE_COLUMNS[:n_columns])
        }
    with reading(name, barcodes_path.name):
        barcodes = np.array([line.split("\t")[0] for line in _lines(barcodes_path)], dtype=object)

    def open_matrix() -> SpooledMatrix:
        return _open_matrix(matrix_path, name, len(rows), len(barcodes))

    _, matrix = choose_counts(name, [Candidate("X", open_matrix)], layer=None, allow_float=allow_float)
    kept, var = gene_features(name, matrix, features, layer)
    return CountSource(
        name=name,
        kind="10x_mtx",
        matrix=kept,
        counts_from="X",
        obs=Table(f"{name}: barcodes", len(barcodes), {}, lambda: barcodes),
        var=var,
        gene_column=gene_column,
        allow_float=allow_float,
        paths=[matrix_path, features_path, barcodes_path],
    )


def _matrix_file(path: Path) -> tuple[Path, str]:
    if path.is_dir():
        return next(path / file for file in ("matrix.mtx", "matrix.mtx.gz") if (path / file).is_file()), ""
    return path, re.sub(r"(matrix)?\.mtx(\.gz)?$", "", path.name)


def _companion(folder: Path, prefix: str, names: tuple[str, ...], name: str) -> Path:
    for file in names:
        for suffix in ("", ".gz"):
            path = folder / f"{prefix}{file}{suffix}"
            if path.is_file():
                return path
    raise InputError(f"{name}: {' or '.join(prefix + file for file in names)} (or .gz) is missing beside the matrix")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> list[str]:
    with _open(path) as file:
        text = file.read().decode("utf-8")
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _open_matrix(path: Path, name: str, n_features: int, n_cells: int) -> SpooledMatrix:
    with _open(path) as file:
        banner = file.readline(1024).decode("latin1").split()
        if len(banner) < 5 or banner[0] != "%%MatrixMarket" or banner[2] != "coordinate":
            raise ValueError(f"{path.name} does not begin with a MatrixMarket coordinate header")
        if banner[3] not in ("integer", "real") or banner[4] != "general":
            raise ValueError(f"{path.name} holds {' '.join(banner[3:5])} values, expected integer or real, general")
        line = file.readline(1 << 16)
        while line.startswith(b"%") or (line and not line.strip()):
            line = file.readline(1 << 16)
        size = line.split()
        first = file.readline(1024)
    if len(size) != 3:
        raise ValueError(f"{path.name} has no line with its size")
    shape, n_entries = (int(size[0]), int(size[1])), int(size[2])
    if shape == (n_cells, n_features) and shape[0] != shape[1]:
        raise InputError(f"{name}: {path.name} is cells x features; 10x folders are features x cells. Transpose it.")
    if shape != (n_features, n_cells):
        raise InputError(
            f"{name}: {path.name} is {shape[0]} x {shape[1]}, but lists {n_features} features and {n_cells} barcodes"
        )
    dtype = np.dtype(np.int32 if banner[3] == "integer" else np.float32)

    def entries() -> Iterator[Entries]:
        return _read_entries(path, n_entries, dtype, regular=not first or _PLAIN_ENTRY.match(first) is not None)

    return SpooledMatrix(entries, (n_cells, n_features), dtype, n_entries)


class _SingleSpaces:
    """A file whose lines separate fields by any white space, read as if by single spaces."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.closed = False

    def read(self, n: int = -1) -> bytes:
        lines = self._file.readlines(n if n > 0 else -1)
        return b"".join(b" ".join(line.split()) + b"\n" for line in lines if line.strip())


def _read_entries(path: Path, n_entries: int, dtype: np.dtype, *, regular: bool) -> Iterator[Entries]:
    import pyarrow as pa
    from pyarrow import csv

    with _open(path) as file:
        line = file.readline()
        while line.startswith(b"%") or (line and not line.strip()):
            line = file.readline()
        if n_entries == 0:
            return
        stream: Any = file if regular else _SingleSpaces(file)
        names = ["feature", "cell", "count"]
        types = {"feature": pa.int32(), "cell": pa.int32(), "count": pa.from_numpy_dtype(dtype)}
        reader = csv.open_csv(
            pa.PythonFile(stream, mode="r"),
            read_options=csv.ReadOptions(column_names=names, block_size=_BLOCK_BYTES, use_threads=False),
            parse_options=csv.ParseOptions(delimiter=" "),
            convert_options=csv.ConvertOptions(column_types=types, null_values=[], strings_can_be_null=False),
        )
        done = 0
        for batch in reader:
            done += batch.num_rows
            feature, cell, count = (batch.column(name).to_numpy(zero_copy_only=False) for name in names)
            yield cell - 1, feature - 1, count
    if done != n_entries:
        raise ValueError(f"{path.name} announces {n_entries} entries but holds {done}; it is truncated or corrupt")
