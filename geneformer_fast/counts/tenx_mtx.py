"""MatrixMarket files with their features and barcodes: 10x Genomics' folders, GEO's prefixed files, kb-python's."""

from __future__ import annotations

import codecs
import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from geneformer_fast.counts.reading import reading
from geneformer_fast.counts.selection import Candidate, choose_counts
from geneformer_fast.counts.source import CountSource
from geneformer_fast.counts.spool import Entries, SpooledMatrix
from geneformer_fast.counts.table import Table
from geneformer_fast.counts.tenx_features import gene_features
from geneformer_fast.counts.triplets import Triplet, triplet_at
from geneformer_fast.errors import InputError

_BLOCK_BYTES = 8 << 20
_PLAIN_ENTRY = re.compile(rb"\d+ \d+ \S+\r?\n?$")
_FEATURE_COLUMNS = ("gene_ids", "gene_symbol", "feature_types")


def open_tenx_folder(
    path: Path, name: str, *, layer: str | None, gene_column: str | None, allow_float: bool
) -> CountSource:
    """Open a 10x matrix folder, or one matrix file whose companions share its name (as GEO and kb-python name them)."""
    files = triplet_at(path, name)
    with reading(name, files.features.name):
        rows = [line.split("\t") for line in _lines(files.features)]
        n_columns = min(len(_FEATURE_COLUMNS), max((len(row) for row in rows), default=1))
        # A row may be shorter than the others: what it lacks is missing there, not in the whole file.
        features = {
            column: np.array([row[i] if i < len(row) else "" for row in rows], dtype=object)
            for i, column in enumerate(_FEATURE_COLUMNS[:n_columns])
        }
    with reading(name, files.barcodes.name):
        barcodes = np.array([line.split("\t")[0] for line in _lines(files.barcodes)], dtype=object)

    def open_matrix() -> SpooledMatrix:
        return _open_matrix(files, name, len(rows), len(barcodes))

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
        paths=[files.matrix, files.features, files.barcodes],
    )


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> list[str]:
    with _open(path) as file:
        text = file.read().decode("utf-8-sig")  # editors put a mark before the first id
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _open_matrix(files: Triplet, name: str, n_features: int, n_cells: int) -> SpooledMatrix:
    path = files.matrix
    with _open(path) as file:
        banner = file.readline(1024).removeprefix(codecs.BOM_UTF8).decode("latin1").split()
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
    has_cells_first = files.is_bustools and shape == (n_cells, n_features)
    if not has_cells_first and shape == (n_cells, n_features) and shape[0] != shape[1]:
        raise InputError(f"{name}: {path.name} is cells x features; 10x folders are features x cells. Transpose it.")
    if not has_cells_first and shape != (n_features, n_cells):
        raise InputError(
            f"{name}: {path.name} is {shape[0]} x {shape[1]}, but lists {n_features} features and {n_cells} barcodes"
        )
    dtype = np.dtype(np.int32 if banner[3] == "integer" else np.float32)

    def entries() -> Iterator[Entries]:
        is_regular = not first or _PLAIN_ENTRY.match(first) is not None
        for rows, columns, counts in _read_entries(path, n_entries, dtype, regular=is_regular):
            cells, features = (rows, columns) if has_cells_first else (columns, rows)
            yield cells - 1, features - 1, counts

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
    """Row, column (both from 1) and count of every entry, in pieces."""
    import pyarrow as pa

    if n_entries == 0:
        return
    done = 0
    exact = [np.dtype(np.int32), np.dtype(np.int32), dtype]
    try:
        for piece in _parsed(path, exact, regular=regular):
            done += len(piece[0])
            yield piece
    except pa.ArrowInvalid:
        # R writes 100000 as 1e+05, as a count or as a position: read the rest as numbers of any spelling
        skipped, done = done, 0
        for numbers in _parsed(path, [np.dtype(np.float64)] * 3, regular=regular):
            begin = min(max(skipped - done, 0), len(numbers[0]))
            done += len(numbers[0])
            rest = (_converted(values[begin:], kind, path) for values, kind in zip(numbers, exact, strict=True))
            row, column, count = rest
            if len(row):
                yield row, column, count
    if done != n_entries:
        raise ValueError(f"{path.name} announces {n_entries} entries but holds {done}; it is truncated or corrupt")


def _parsed(path: Path, kinds: Sequence[np.dtype], *, regular: bool) -> Iterator[Entries]:
    import pyarrow as pa
    from pyarrow import csv

    with _open(path) as file:
        line = file.readline().removeprefix(codecs.BOM_UTF8)
        while line.startswith(b"%") or (line and not line.strip()):
            line = file.readline()
        stream: Any = file if regular else _SingleSpaces(file)
        names = ["row", "column", "count"]
        types = {name: pa.from_numpy_dtype(kind) for name, kind in zip(names, kinds, strict=True)}
        reader = csv.open_csv(
            pa.PythonFile(stream, mode="r"),
            read_options=csv.ReadOptions(column_names=names, block_size=_BLOCK_BYTES, use_threads=False),
            parse_options=csv.ParseOptions(delimiter=" "),
            convert_options=csv.ConvertOptions(column_types=types, null_values=[], strings_can_be_null=False),
        )
        for batch in reader:
            row, column, count = (batch.column(name).to_numpy(zero_copy_only=False) for name in names)
            yield row, column, count


def _converted(values: np.ndarray, kind: np.dtype, path: Path) -> np.ndarray:
    """Numbers as the type they were announced with, or ValueError where one does not fit it."""
    if kind.kind == "f":
        return values.astype(kind)
    limits = np.iinfo(kind)
    is_good = (values >= limits.min) & (values <= limits.max) & (np.floor(values) == values)
    if not is_good.all():
        wrong = values[np.flatnonzero(~is_good)[0]]
        raise ValueError(f"{path.name} holds {wrong:.10g} where a whole number of {kind.itemsize * 8} bits is expected")
    return values.astype(kind)
