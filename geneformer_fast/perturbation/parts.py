"""The folders that rows are read from: each with its checks, several as the shards of one run."""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from geneformer_fast.errors import OutputError
from geneformer_fast.files.checksums import check_file, is_verifying
from geneformer_fast.perturbation import folder as layout
from geneformer_fast.perturbation.rows import CELL, OWN

# Rows that are read at once.
_ROWS_AT_ONCE = 65_536
# What shards of one run have in common.
_SHARED = ("plan", "states", "columns", "n_cells_of_run")


class Source:
    """Where rows come from: a folder, or files of another program.

    Attributes
    ----------
    path, manifest, schema, cells
        As :class:`~geneformer_fast.perturbation.reading.Perturbations` has them.
    n_rows
        Rows of it.
    """

    path: Path
    manifest: Mapping[str, Any]
    schema: pa.Schema
    cells: pa.Table
    n_rows: int

    def batches(self, columns: Sequence[str], places: np.ndarray | None) -> Iterator[pa.RecordBatch]:
        """Rows in order of the cells: at least those of the cells at some ``places``."""
        raise NotImplementedError


class PartFolder(Source):
    """One folder of perturbations: a whole run, or a shard of one.

    Raises
    ------
    OutputError
        There is none, it is unfinished, or files are missing or damaged.
    """

    def __init__(self, path: Path, *, verify: bool | None = None) -> None:
        from pyarrow import parquet

        self.path = path
        _check_finished(path)
        self.manifest = layout.read_manifest(path)
        self._files = self.manifest["files"]
        self._check_files()
        self._unchecked = {entry["file"]: entry["sha256"] for entry in self._files} if is_verifying(verify) else {}
        with _readable(path / layout.CELLS):
            if is_verifying(verify):
                check_file(path / layout.CELLS, self.manifest["cells_file_sha256"], OutputError, layout.DAMAGED)
            self.cells = parquet.read_table(path / layout.CELLS)
        if layout.cells_fingerprint(self.cells) != self.manifest["cells_sha256"]:
            raise OutputError(f"{path / layout.CELLS} is damaged or was changed; {layout.DAMAGED}")
        self.n_rows = int(self.manifest["n_rows"])
        with _readable(path / self._files[0]["file"]):
            self.schema = parquet.read_schema(path / self._files[0]["file"]).remove_metadata()
        self._check_schema(self._files[0]["file"], self.schema)

    def _check_files(self) -> None:
        """All files are there and no others, they have their sizes, and hold every cell once."""
        names = [entry["file"] for entry in self._files]
        place = 0
        for number, entry in enumerate(self._files):
            if entry["file"] != layout.part_name(number) or entry["start"] != place or entry["stop"] < place:
                raise OutputError(f"{self.path / layout.MANIFEST} lists files that do not follow; {layout.DAMAGED}")
            place = entry["stop"]
            path = self.path / entry["file"]
            if not path.is_file():
                raise OutputError(f"{path} is missing; {layout.DAMAGED}")
            if path.stat().st_size != entry["n_bytes"]:
                raise OutputError(f"{path} has not its {entry['n_bytes']:,} bytes any more; {layout.DAMAGED}")
        if not names or place != self.manifest["n_cells"]:
            raise OutputError(f"{self.path / layout.MANIFEST} lists files of {place} cells; {layout.DAMAGED}")
        if (n_rows := sum(entry["n_rows"] for entry in self._files)) != self.manifest["n_rows"]:
            raise OutputError(f"{self.path / layout.MANIFEST} lists files of {n_rows:,} rows; {layout.DAMAGED}")
        if odd := next((path for path in sorted(self.path.glob("*.parquet")) if _is_foreign(path, names)), None):
            raise OutputError(f"{odd} is in a folder of perturbations and is none of its files; move it elsewhere")

    def _check_schema(self, name: str, schema: pa.Schema) -> None:
        own = [(field.name, field.type) for field in list(schema)[: len(OWN)]]
        is_own = [column for column, _ in own] == list(OWN) and all(map(_is_kind, own, OWN.values()))
        if not is_own or schema.names != self.manifest["columns"] or not schema.equals(self.schema):
            raise OutputError(f"{self.path / name} has other columns than its manifest says; {layout.DAMAGED}")

    def batches(self, columns: Sequence[str], places: np.ndarray | None) -> Iterator[pa.RecordBatch]:
        """Rows in order of the cells: of the files that hold some ``places``, all without."""
        from pyarrow import parquet

        for entry in self._files:
            if places is not None and not ((places >= entry["start"]) & (places < entry["stop"])).any():
                continue
            path = self.path / entry["file"]
            if (expected := self._unchecked.get(entry["file"])) is not None:
                check_file(path, expected, OutputError, layout.DAMAGED)
                self._unchecked.pop(entry["file"], None)
            with _readable(path), parquet.ParquetFile(path) as file:
                self._check_schema(entry["file"], file.schema_arrow.remove_metadata())
                if file.metadata.num_rows != entry["n_rows"]:
                    raise OutputError(f"{path} holds {file.metadata.num_rows:,} rows, not {entry['n_rows']:,}")
                yield from file.iter_batches(_ROWS_AT_ONCE, columns=list(columns))


def check_together(folders: Sequence[PartFolder], *, is_partial: bool) -> None:
    """Refuse folders that are not the shards of one run, each of them once.

    Raises
    ------
    OutputError
        Names the folders, and what differs or is missing.
    """
    first = folders[0]
    seen: dict[int, PartFolder] = {}
    n_shards = first.manifest["shard"]["n_shards"]
    for folder in folders:
        shard = folder.manifest["shard"]
        lines = [line for key in _SHARED for line in layout.differences(first.manifest[key], folder.manifest[key], key)]
        if shard["n_shards"] != n_shards:
            lines.append(f"one is of {n_shards} shards, the other of {shard['n_shards']}")
        if lines:
            what = lines[0].replace("begun with ", "").replace(", now", " and", 1)
            raise OutputError(f"{first.path} and {folder.path} are not of one run ({what}); open them one by one")
        if (other := seen.setdefault(shard["index"], folder)) is not folder:
            raise OutputError(
                f"{other.path} and {folder.path} are both shard {shard['index']}/{n_shards}; leave one of them out"
            )
    absent = [str(index) for index in range(1, n_shards + 1) if index not in seen]
    if absent and not is_partial:
        several = (
            f"shards {', '.join(absent)} of {n_shards} are"
            if len(absent) > 1
            else (f"shard {absent[0]} of {n_shards} is")
        )
        raise OutputError(
            f"{first.path} is a part of a run, and {several} missing: name the folders of all of them, or pass "
            "partial=True to go without"
        )
    ranks = np.concatenate([folder.cells["rank"].to_numpy() for folder in folders])
    if len(np.unique(ranks)) < len(ranks) or (not absent and len(ranks) != first.manifest["n_cells_of_run"]):
        raise OutputError(f"{first.path}: the shards do not hold every cell of the run once; perturb them again")


def by_rank(streams: Sequence[Iterator[pa.RecordBatch]], rank_of: Callable[[int], int]) -> Iterator[pa.RecordBatch]:
    """Rows of several folders, each in order of its cells, in the order of the cells of all."""

    def runs(stream: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
        for batch in stream:
            cells = batch[CELL].to_numpy()
            bounds = [0, *(np.flatnonzero(np.diff(cells)) + 1).tolist(), len(cells)]
            for start, stop in itertools.pairwise(bounds):
                if stop > start:
                    yield rank_of(int(cells[start])), batch.slice(start, stop - start)

    waiting: list[pa.RecordBatch] = []
    n_rows = 0
    for _, run in heapq.merge(*map(runs, streams), key=lambda entry: entry[0]):
        waiting.append(run)
        n_rows += run.num_rows
        if n_rows >= _ROWS_AT_ONCE:
            yield pa.concat_batches(waiting)
            waiting, n_rows = [], 0
    if waiting:
        yield pa.concat_batches(waiting)


def _check_finished(path: Path) -> None:
    state = layout.state_of(path)
    if state == "absent":
        raise OutputError(f"{path}: no such folder of perturbations")
    if state == "unfinished":
        raise OutputError(layout.unfinished_message(path))
    if state != "finished":
        raise OutputError(f"{path}: holds no perturbations ({layout.MANIFEST} is missing); make some with perturb")


def _is_foreign(path: Path, names: Sequence[str]) -> bool:
    return path.name not in names and not path.name.startswith(("_", "."))


def _is_kind(column: tuple[str, pa.DataType], kind: pa.DataType) -> bool:
    """Whether a stored column has the type that it should; lists may call their values otherwise."""
    found = column[1]
    if pa.types.is_list(kind):
        return pa.types.is_list(found) and found.value_type.equals(kind.value_type)
    return bool(found.equals(kind))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What Arrow and the system say of a file that cannot be read becomes one sentence."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise OutputError(f"{path} cannot be read ({str(error).splitlines()[0]}); {layout.DAMAGED}") from None
