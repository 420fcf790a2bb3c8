"""A result on the disk with what belongs to it: whole, of one run, or not there.

Beside ``z.npy`` lie ``z.npy.json``, which says how it was made, and ``z.cells.parquet`` (``z.genes.parquet``), whose
rows are those of the array. The old ones go before the new file takes its name, and the new ones come after it, the
JSON last: a run that is killed in between leaves a file without them, never one beside those of another. Both say the
SHA-256 of the array.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from geneformer_fast.errors import OutputError
from geneformer_fast.files.checksums import sha256_of
from geneformer_fast.files.locks import file_lock
from geneformer_fast.files.schema import read_json
from geneformer_fast.files.writing import settle, whole_file

# These have no place of their own for provenance, so that what lies beside them names them by their content.
_HASHED = (".npy", ".csv")
_KINDS = ("cells", "genes")


class Output:
    """A file to write.

    Parameters
    ----------
    path
        Where. Missing parent folders are made.
    overwrite
        Whether it may exist.
    suffixes
        What its name may end in.
    is_genes
        Whether its rows are genes, after which the table beside an .npy is called.

    Raises
    ------
    OutputError
        It, or the table beside it, is there already and may not be replaced; its suffix is unknown.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, overwrite: bool, suffixes: tuple[str, ...], is_genes: bool = False
    ) -> None:
        self.path = Path(path)
        if self.path.suffix not in suffixes:
            raise OutputError(f"{self.path}: the name must end in one of {', '.join(suffixes)}")
        kind = "genes" if is_genes else "cells"
        self.table = table_of(self.path, kind) if self.path.suffix == ".npy" else None
        check_free(self.path, overwrite=overwrite)
        if self.table is not None and (self.path.exists() or not _is_of_array(self.table)):
            check_free(self.table, overwrite=overwrite)

    @property
    def beside(self) -> list[Path]:
        """What will lie beside it."""
        return [json_of(self.path), *([] if self.table is None else [self.table])]

    @contextlib.contextmanager
    def writing(self, provenance: Mapping[str, Any], table: Callable[[], pa.Table] | None = None) -> Iterator[Path]:
        """The path to write to; in the end it takes its name, with its table and provenance beside it.

        Parameters
        ----------
        provenance
            For the JSON beside it.
        table
            Makes the table for the Parquet file beside an .npy.
        """
        about = json_of(self.path)
        with contextlib.ExitStack() as stack:
            # Left last to first: the file takes its name before its table, and its table before the JSON.
            about_draft = stack.enter_context(whole_file(about))
            table_draft = None if self.table is None else stack.enter_context(whole_file(self.table))
            draft = stack.enter_context(whole_file(self.path))
            yield draft
            settle(draft)
            said = dict(provenance)
            if self.path.suffix in _HASHED:
                said["sha256"] = sha256_of(draft)
            if table_draft is not None:
                assert table is not None
                write_table(table(), table_draft, said)
                settle(table_draft)
            about_draft.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            settle(about_draft)
            for old in (about, *(table_of(self.path, kind) for kind in _KINDS if self.table is not None)):
                old.unlink(missing_ok=True)


def json_of(path: Path) -> Path:
    """Where the provenance of a file lies."""
    return path.with_name(f"{path.name}.json")


def table_of(path: Path, kind: str) -> Path:
    """Where the table of the rows of an .npy lies."""
    return path.with_name(f"{path.stem}.{kind}.parquet")


def write_table(table: pa.Table, path: Path, provenance: Mapping[str, Any]) -> None:
    """A table in memory as Parquet, with provenance in its metadata, or as CSV, with text in quotes."""
    if path.suffix == ".csv":
        from pyarrow import csv

        csv.write_csv(table, path)
        return
    from pyarrow import parquet

    parquet.write_table(table.replace_schema_metadata(as_text(provenance)), path)


def as_text(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Provenance for the metadata of a table."""
    return {key: str(value) for key, value in provenance.items()}


@contextlib.contextmanager
def alone(path: Path, *beside: Path, overwrite: bool) -> Iterator[None]:
    """While this process, and no other, computes and writes a file, and what will lie beside it.

    Missing folders above it are made, and are gone again where nothing came of it.

    Raises
    ------
    OutputError
        Another process is writing it, or has written it since.
    """
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        with contextlib.ExitStack() as stack:
            for place in (path, *beside):
                stack.enter_context(file_lock(place))
            check_free(path, overwrite=overwrite)
            yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuse a path that may not be written.

    Raises
    ------
    OutputError
        A file is there and may not be replaced, or a folder is.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already; choose another name or pass overwrite (--overwrite)")


def read_cells(path: Path, rows: np.ndarray, key: str) -> np.ndarray:
    """[n, C] embeddings of the cells in the given rows of a file that was written here.

    Raises
    ------
    OutputError
        The table or the JSON beside an .npy belongs to another one.
    """
    if path.suffix == ".npy":
        check_companions(path)
        return np.load(path, mmap_mode="r", allow_pickle=False)[rows]
    if path.suffix == ".h5ad":
        import h5py

        with h5py.File(path, "r") as file:
            return file["obsm"][key][:][rows]
    if path.suffix == ".csv":
        from pyarrow import csv

        names = csv.open_csv(path).schema.names
        names = names[-1 - int(names[-1].removeprefix("embedding_")) :]
        kinds = csv.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, pa.float32()))
        return np.stack([column.to_numpy() for column in csv.read_csv(path, convert_options=kinds)], axis=1)
    if path.suffix == ".parquet":
        from pyarrow import parquet

        column = parquet.read_table(path, columns=["embedding"]).column("embedding").combine_chunks()
        return column.flatten().to_numpy().reshape(len(column), -1).copy()
    with pa.memory_map(str(path)) as file:
        column = pa.ipc.open_file(file).read_all().column("embedding").combine_chunks()
        return column.flatten().to_numpy().reshape(len(column), -1).copy()


def _is_of_array(table: Path) -> bool:
    """Whether a table was written beside an .npy; where that is gone, nobody needs it."""
    from pyarrow import parquet

    try:
        return b"sha256" in (parquet.read_schema(table).metadata or {})
    except (OSError, pa.ArrowException):
        return False


def check_companions(path: Path) -> None:
    """Make sure that what lies beside an .npy belongs to it.

    Raises
    ------
    OutputError
        It is of another array.
    """
    from pyarrow import parquet

    digest = sha256_of(path)
    for beside in (json_of(path), *(table_of(path, kind) for kind in _KINDS)):
        if not beside.exists():
            continue
        if beside.suffix == ".json":
            said = read_json(beside, OutputError)
        else:
            said = {key.decode(): value.decode() for key, value in (parquet.read_schema(beside).metadata or {}).items()}
        if said.get("sha256") != digest:
            raise OutputError(f"{beside} was not written with {path}; embed once more with --overwrite")
