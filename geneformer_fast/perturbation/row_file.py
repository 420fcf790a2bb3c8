"""One Parquet file of rows, whose bytes depend on the rows alone and not on the pieces in which they come."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pyarrow as pa

from geneformer_fast.files.checksums import sha256_of
from geneformer_fast.files.writing import system_errors, whole_file
from geneformer_fast.perturbation.rows import CELL, VALUE

#: Rows that are in memory at once, whatever a cell has. They are also a row group, the least that is read at once.
ROWS_AT_ONCE = 65_536


class RowFile:
    """A file that appears when it is whole.

    Parameters
    ----------
    path
        Where.
    schema
        Of the rows.

    Raises
    ------
    OutputError
        The system does not let it be written; by all methods.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        from pyarrow import parquet

        self._place, self._waiting, self._n_waiting, self._n_rows = path, [schema.empty_table()], 0, 0
        self._stack = contextlib.ExitStack()
        self._path = self._stack.enter_context(whole_file(path))
        try:
            with system_errors(path):
                # Values hardly repeat, so a dictionary of them saves nothing; their bytes are sorted by significance.
                self._writer = parquet.ParquetWriter(
                    self._path, schema, compression="zstd", write_statistics=[CELL],
                    use_dictionary=[leaf for leaf in _leaves(schema) if leaf != VALUE],
                    column_encoding={VALUE: "BYTE_STREAM_SPLIT"},
                )  # fmt: skip
        except BaseException:
            self._leave()
            raise

    def write(self, rows: pa.Table) -> None:
        """Append rows."""
        self._waiting.append(rows)
        self._n_waiting += rows.num_rows
        while self._n_waiting >= ROWS_AT_ONCE:
            self._write_group(ROWS_AT_ONCE)

    def _write_group(self, n_rows: int) -> None:
        waiting = pa.concat_tables(self._waiting)
        self._waiting = [waiting.slice(n_rows)]
        self._n_waiting -= n_rows
        self._n_rows += n_rows
        with system_errors(self._place):
            # In one piece: pages end where a piece does.
            self._writer.write_table(waiting.slice(0, n_rows).combine_chunks(), row_group_size=ROWS_AT_ONCE)

    def finish(self) -> dict[str, Any]:
        """Complete the file; returns its numbers of rows and bytes, and its checksum."""
        if self._n_waiting:
            self._write_group(self._n_waiting)
        with system_errors(self._place):
            self._writer.close()
        made = {"n_rows": self._n_rows, "n_bytes": self._path.stat().st_size, "sha256": sha256_of(self._path)}
        self._stack.close()
        return made

    def abandon(self) -> None:
        """Leave nothing of the file."""
        with contextlib.suppress(OSError, pa.ArrowException):
            self._writer.close()
        self._leave()

    def _leave(self) -> None:
        with contextlib.suppress(_Abandoned), self._stack:
            raise _Abandoned


class _Abandoned(Exception):
    """What a file ends with that is not to appear."""


def _leaves(schema: pa.Schema) -> list[str]:
    """Names of columns as Parquet has them, where a list's values have a name of their own."""
    return [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in schema]
