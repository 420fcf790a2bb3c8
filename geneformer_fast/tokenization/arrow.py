"""Token folders, and how their cells are read.

A token folder is what ``datasets.load_from_disk`` opens: Arrow stream files with a ``state.json`` and a
``dataset_info.json``. Written and read here with pyarrow alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from geneformer_fast.arguments import checked
from geneformer_fast.counts.arrays import text_list_array
from geneformer_fast.errors import OutputError
from geneformer_fast.files.checksums import damaged_message, fingerprint_of, is_verifying
from geneformer_fast.files.schema import parse_json
from geneformer_fast.tokenization import manifest
from geneformer_fast.tokenization.stream import StreamFile

_DAMAGED = "restore it from a good copy, or tokenize again"


@checked
def open_tokens(folder: str | os.PathLike[str], *, verify: bool | None = None) -> TokenFolder:
    """Open a finished token folder, ours or one that ``datasets`` wrote with an ``input_ids`` column.

    Parameters
    ----------
    folder
        The folder.
    verify
        Whether shards are compared with their checksums, each when it is first read from; None: unless the environment
        says ``GENEFORMER_FAST_VERIFY=0``. Folders without checksums pass.

    Raises
    ------
    OutputError
        There is no such folder, it is unfinished, or files are missing or damaged.
    """
    return TokenFolder(folder, verify=verify)


class TokenFolder:
    """Ranked tokens of many cells on disk, read by position: memory is what is asked for plus 20 bytes per cell.

    Parameters
    ----------
    folder
        What ``tokenize`` made.
    verify
        As in :func:`open_tokens`.

    Attributes
    ----------
    path
        The folder.
    manifest
        Contents of ``manifest.json``; None where another program wrote the folder.
    schema
        The Arrow schema.
    dtype
        Integer dtype of the stored tokens.
    on_read
        Called with the cells that ``read`` gives, and what it would give of them; its result is given instead. Where it
        has ``lengths``, these are the lengths of cells as read.
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool | None = None) -> None:
        self.path = Path(folder)
        self.on_read: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
        manifest.check_finished(self.path)
        written = manifest.read_state(self.path)
        has_manifest = (self.path / manifest.MANIFEST).exists()
        self.manifest = manifest.read_manifest(self.path, state=written, verify=verify) if has_manifest else None
        names = [entry["filename"] for entry in written["_data_files"]]
        self._sums = manifest.sums_of(self.path, self.manifest, names)
        # What is left to compare: a shard's place is emptied once it has been found as it was written.
        self._unchecked = list(self._sums) if is_verifying(verify) else [None] * len(names)
        self._checking = [threading.Lock() for _ in names]
        self._files = [StreamFile(self.path / name) for name in names]
        self.schema: pa.Schema = self._files[0].schema
        for file in self._files[1:]:
            if not file.schema.equals(self.schema):
                raise OutputError(f"{file.path}: has other columns than {self._files[0].path.name}")
        self.dtype = self._token_dtype()
        self._locate_cells()
        if self.manifest is not None and self.manifest.get("n_cells") != self.n_cells:
            raise OutputError(
                f"{self.path}: {manifest.MANIFEST} says {self.manifest.get('n_cells')} cells (n_cells), the shards "
                f"hold {self.n_cells}; the folder was changed after it was written"
            )

    def _token_dtype(self) -> np.dtype:
        index = self.schema.get_field_index("input_ids")
        kind = self.schema.field(index).type if index >= 0 else pa.null()
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not is_list or not pa.types.is_integer(kind.value_type):
            raise OutputError(f"{self.path}: has no input_ids column of integer lists, so these are no tokens")
        return np.dtype(kind.value_type.to_pandas_dtype())

    def _locate_cells(self) -> None:
        """Where every cell's tokens lie: file, byte position, length."""
        rows = [(number, batch.n_rows) for number, file in enumerate(self._files) for batch in file.batches]
        files = [np.full(n_rows, number, dtype=np.int32) for number, n_rows in rows]
        self._file_of = np.concatenate(files) if files else np.zeros(0, np.int32)
        position_of, self._length_of = self._located("input_ids", self.dtype)
        self._lists = {"input_ids": (self.dtype, position_of)}

    def _located(self, name: str, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """[n_cells] byte positions of every cell's list in a column, and how long they are."""
        positions, lengths = [], []
        for file in self._files:
            for batch in file.batches:
                offsets, buffer = file.list_column(batch, name)
                positions.append(buffer.position + offsets[:-1] * dtype.itemsize)
                lengths.append(np.diff(offsets))
        if not positions:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return np.concatenate(positions), np.concatenate(lengths)

    def locate_values(self, name: str) -> None:
        """Find a column of float32 lists as long as ``input_ids``, for ``read_stored`` to give.

        Raises
        ------
        OutputError
            There is no such column, or it does not fit.
        """
        if name in self._lists:
            return
        index = self.schema.get_field_index(name)
        kind = self.schema.field(index).type if index >= 0 else pa.null()
        if kind != pa.list_(pa.float32()):
            raise OutputError(f"{self.path}: has no column {name} of lists of float32; tokenize again")
        positions, lengths = self._located(name, np.dtype(np.float32))
        if not np.array_equal(lengths, self._length_of):
            raise OutputError(f"{self.path}: lists of {name} are not as long as those of input_ids; tokenize again")
        self._lists[name] = np.dtype(np.float32), positions

    def __len__(self) -> int:
        return self.n_cells

    def __repr__(self) -> str:
        return f"TokenFolder({str(self.path)!r}: {self.n_cells:,} cells, {self.n_tokens:,} tokens)"

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self._length_of)

    @property
    def n_tokens(self) -> int:
        """Number of stored tokens of all cells, specials included."""
        return int(self._length_of.sum())

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return list(self.schema.names)

    @property
    def vocabulary(self) -> dict[str, Any] | None:
        """Identity of the vocabulary the tokens belong to; None where another program wrote the folder."""
        return self.manifest["vocabulary"] if self.manifest is not None else None

    @cached_property
    def content_fingerprint(self) -> str:
        """SHA-256 over all shards: equal only for the same tokens, columns and order in the same shards.

        From the checksums in the manifest; a folder without any is read in full, once.
        """
        sums = [
            digest if digest is not None else file.sha256()
            for digest, file in zip(self._sums, self._files, strict=True)
        ]
        return fingerprint_of(sums)

    def _check(self, number: int) -> None:
        """Compare a shard with its checksum, once in this process, before anything of it is given out."""
        if self._unchecked[number] is None:
            return
        with self._checking[number]:
            expected = self._unchecked[number]
            if expected is None:  # another thread was faster
                return
            file = self._files[number]
            if (found := file.sha256()) != expected:
                raise OutputError(damaged_message(file.path, found, expected, _DAMAGED))
            self._unchecked[number] = None

    def lengths(self) -> np.ndarray:
        """[n_cells] int64, tokens per cell as ``read`` gives them, specials included."""
        as_read: np.ndarray | None = getattr(self.on_read, "lengths", None)
        return (self._length_of if as_read is None else as_read).copy()

    def stored_lengths(self) -> np.ndarray:
        """[n_cells] int64, what is stored of each cell, whatever ``on_read`` makes of it."""
        return self._length_of.copy()

    def column(self, name: str) -> pa.ChunkedArray:
        """A carried column, ``length``, ``source_row``, or ``source_file`` (as a dictionary array of file names).

        Raises
        ------
        OutputError
            There is no such column.
        """
        if name not in self.columns or name == "input_ids":
            known = ", ".join(column for column in self.columns if column != "input_ids")
            raise OutputError(f"{self.path}: has no column {name!r}; there are {known}")
        for number in range(len(self._files)):
            self._check(number)
        chunks = [file.column(batch, name) for file in self._files for batch in file.batches]
        array = pa.chunked_array(chunks, type=self.schema.field(name).type)
        names = self._label_names(name)
        if names is None:
            return array
        try:
            indices = array.combine_chunks().cast(pa.int32())
            return pa.chunked_array([pa.DictionaryArray.from_arrays(indices, text_list_array(names))])
        except (pa.ArrowException, IndexError, ValueError) as error:
            raise OutputError(
                f"{self.path}: column {name} does not fit its {len(names)} labels ({error}); write the folder again"
            ) from None

    def _label_names(self, name: str) -> list[str] | None:
        """The names behind a ClassLabel column, None for other columns."""
        described: Any = (self.schema.metadata or {}).get(b"huggingface")
        if described is None:
            return None
        where = f"{self.path}: the metadata of the shards"
        described = parse_json(described, where, OutputError)
        for key in ("info", "features", name, "names"):
            if not isinstance(described, dict):
                raise OutputError(f"{where} hold no description of column {name}; write the folder again")
            if described.get(key) is None:
                return None
            described = described[key]
        if not isinstance(described, list) or not all(isinstance(label, str) for label in described):
            raise OutputError(f"{where} name no labels of column {name}; write the folder again")
        return described

    def read(self, cells: np.ndarray | Sequence[int] | range) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of some cells, in the order asked for, as ``on_read`` leaves them.

        Parameters
        ----------
        cells
            Indices into the folder.

        Returns
        -------
        values, cu_seqlens
            The packed tokens in the stored dtype, and [len(cells) + 1] int64 where each cell begins and ends.
        """
        values, cu_seqlens = self.read_stored(cells)
        if self.on_read is None:
            return values, cu_seqlens
        return self.on_read(np.asarray(cells), values, cu_seqlens)

    def read_stored(
        self, cells: np.ndarray | Sequence[int] | range, column: str = "input_ids"
    ) -> tuple[np.ndarray, np.ndarray]:
        """What is stored of some cells, whatever ``on_read`` makes of it; of ``column``, once that was located."""
        dtype, position_of = self._lists[column]
        cells = np.arange(cells.start, cells.stop, cells.step) if isinstance(cells, range) else np.asarray(cells)
        cells = cells.astype(np.int64, copy=False)
        if len(cells) and not 0 <= cells.min() <= cells.max() < self.n_cells:
            raise IndexError(f"cells {cells.min()}..{cells.max()} are not within 0..{self.n_cells - 1}")
        lengths = self._length_of[cells]
        cu_seqlens = np.zeros(len(cells) + 1, dtype=np.int64)
        np.cumsum(lengths, out=cu_seqlens[1:])
        values = np.empty(int(cu_seqlens[-1]), dtype=dtype)
        view = values.view(np.uint8)
        size = dtype.itemsize
        files, positions = self._file_of[cells], position_of[cells]
        for number in np.unique(files).tolist():
            self._check(number)
        # Neighbours on the disk come with one read.
        is_next = (files[1:] == files[:-1]) & (positions[1:] == positions[:-1] + lengths[:-1] * size)
        bounds = np.flatnonzero(np.concatenate([[True], ~is_next, [True]])) if len(cells) else np.zeros(1, np.int64)
        for start, stop in pairwise(bounds.tolist()):
            target = view[cu_seqlens[start] * size : cu_seqlens[stop] * size]
            if len(target):
                self._files[files[start]].read_into(target, int(positions[start]))
        return values, cu_seqlens

    def batches(
        self, groups: Iterable[np.ndarray | Sequence[int] | range] | None = None, *, cells_per_batch: int = 1024
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """``read`` of one group of cells after another; without groups, all cells in order."""
        if groups is None:
            groups = (
                range(start, min(start + cells_per_batch, self.n_cells))
                for start in range(0, self.n_cells, cells_per_batch)
            )
        for cells in groups:
            yield self.read(cells)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> TokenFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
