"""A folder of perturbations in the making: Parquet files of whole cells, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from geneformer_fast.errors import OutputError, UnsupportedError
from geneformer_fast.files.checksums import check_file, fingerprint_of, is_verifying, sha256_of, with_digest
from geneformer_fast.files.locks import folder_lock
from geneformer_fast.files.writing import system_errors, whole_file, write_json
from geneformer_fast.perturbation import folder as layout
from geneformer_fast.perturbation import row_file
from geneformer_fast.perturbation.rows import AFFECTED, VALUE, CellRows, RowSchema, plain
from geneformer_fast.perturbation.shards import Shard

#: A file is closed by the first cell that brings it to so many rows, or to a thousandth of the folder: little is lost
#: when a run is killed, and there are never many thousand files.
_ROWS_PER_FILE, _MOST_FILES = 16_384, 1_000


@dataclass(frozen=True)
class RunCells:
    """The cells that a folder is to hold, in the order in which they are processed.

    Attributes
    ----------
    cell
        [n] int64 rows of the token folder.
    length
        [n] tokens of each.
    n_rows
        [n] rows that each is expected to have: they decide where files end. What a cell really has may differ.
    rank
        [n] place of each among the cells of the whole run; None where the folder holds them all.
    n_cells_of_run
        Cells of the whole run; None where the folder holds them all.
    obs
        [n] columns that are carried into the rows.
    """

    cell: np.ndarray
    length: np.ndarray
    n_rows: np.ndarray
    rank: np.ndarray | None = None
    n_cells_of_run: int | None = None
    obs: Mapping[str, pa.Array | pa.ChunkedArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.cell)

    def table(self) -> pa.Table:
        """What is written down of them."""
        rank = np.arange(len(self)) if self.rank is None else self.rank
        own = {"rank": rank, "cell": self.cell, "length": self.length}
        columns = {name: pa.array(np.asarray(values, dtype=np.int64)) for name, values in own.items()}
        return pa.table({**columns, **{f"obs_{name}": plain(column) for name, column in self.obs.items()}})

    def of_shard(self, shard: Shard) -> RunCells:
        """Those of one part of the run.

        Raises
        ------
        UnsupportedError
            There are fewer cells than parts, so that this one has none.
        """
        ranks = shard.ranks(len(self))
        if not len(ranks):
            raise UnsupportedError(f"shard {shard} has no cells, since there are {len(self):,}; make fewer shards")
        obs = {name: column.take(pa.array(ranks)) for name, column in self.obs.items()}
        return RunCells(self.cell[ranks], self.length[ranks], self.n_rows[ranks], ranks, len(self), obs)

    def blocks(self) -> list[tuple[int, int]]:
        """First place and end of the cells of every file."""
        totals = np.cumsum(np.asarray(self.n_rows, dtype=np.int64))
        most = max(_ROWS_PER_FILE, -(-int(totals[-1]) // _MOST_FILES)) if len(totals) else _ROWS_PER_FILE
        blocks, start = [], 0
        while start < len(self):
            before = int(totals[start - 1]) if start else 0
            stop = min(int(np.searchsorted(totals, before + most)) + 1, len(self))
            blocks.append((start, stop))
            start = stop
        return blocks


class PerturbationWriter:
    """Writes one folder of perturbations. Use it as a context manager; what :meth:`finish` did not see is unfinished.

    Files hold the rows of whole cells in order, and where one ends depends on the cells alone. So the bytes are the
    same for any number of workers, and however often the run was interrupted.

    Parameters
    ----------
    out
        The folder.
    cells
        What it is to hold.
    plan
        What decides the values, as JSON: fingerprints of tokens, model and dictionary, and the options. Versions are
        put beside them. Going on needs the same plan.
    rows
        How rows become a table; its ``obs`` are taken from the cells.
    shard
        The part of the run that the folder holds.
    resume, overwrite
        What to do with what is there: go on with it, or remove it.
    part, n_parts
        Of the processes that write into one folder, which this is. The first one is made before all others, and has the
        folder's lock. Each writes every ``n_parts``-th file, unless it is there.

    Attributes
    ----------
    is_finished
        True where resuming found nothing left to do.

    Raises
    ------
    OutputError
        The folder holds something else, or another run, or what neither option speaks for; or another process writes
        into it.
    """

    def __init__(
        self,
        out: str | Path,
        cells: RunCells,
        *,
        plan: Mapping[str, Any],
        rows: RowSchema | None = None,
        shard: Shard | None = None,
        resume: bool = False,
        overwrite: bool = False,
        part: int = 0,
        n_parts: int = 1,
    ) -> None:
        self.folder, self.cells = Path(out), cells
        carried = {name: plain(column) for name, column in cells.obs.items()}
        rows = rows or RowSchema()
        self._rows = RowSchema(rows.states, rows.names, rows.extra, {name: c.type for name, c in carried.items()})
        self._carried, self._part, self._n_parts = carried, part, n_parts
        self._place_of = {int(cell): place for place, cell in enumerate(cells.cell)}
        if len(self._place_of) < len(cells):
            raise ValueError("a cell is among those of a run twice")
        self._blocks = cells.blocks()
        self._lock = contextlib.ExitStack()
        self._open: row_file.RowFile | None = None
        self._is_new = not self.folder.exists()
        self._next = 0
        self.is_finished = False
        self._begin(dict(plan), shard or Shard(), resume, overwrite)
        # By number and not by what is left, which another process may be changing.
        own = range(part, 0 if self.is_finished else len(self._blocks), n_parts)
        self._waiting = [number for number in own if self._block(number) is None]

    def _begin(self, plan: dict[str, Any], shard: Shard, resume: bool, overwrite: bool) -> None:
        """Look at what is there, and write down what is to be made."""
        table = self.cells.table()
        n_of_run = len(self.cells) if self.cells.n_cells_of_run is None else self.cells.n_cells_of_run
        self._described = {
            "format": layout.FORMAT,
            "format_version": layout.FORMAT_VERSION,
            # As it will be read again: tuples are lists there.
            "plan": json.loads(json.dumps({**plan, "versions": layout.versions()})),
            "states": list(self._rows.states),
            "columns": [*self._rows.schema.names],
            "shard": {"index": shard.index, "n_shards": shard.n_shards},
            "n_cells": len(self.cells),
            "n_cells_of_run": n_of_run,
            "cells_sha256": layout.cells_fingerprint(table),
        }
        self._run = fingerprint_of(self._described)
        if self._part:
            self.is_finished = layout.state_of(self.folder) == "finished"
            return
        layout.check_state(self.folder, resume=resume, overwrite=overwrite)
        self._lock.enter_context(folder_lock(self.folder))
        is_begun = False
        try:
            # Again, since another process may have written meanwhile.
            state = layout.check_state(self.folder, resume=resume, overwrite=overwrite)
            if state in ("finished", "unfinished") and not overwrite:
                self._resume(state)
            else:
                is_begun = True
                self._clear()
                self._write_beginning(table)
        except BaseException:
            if is_begun:
                self._leave_nothing()
            self._lock.close()
            raise

    def _write_beginning(self, table: pa.Table) -> None:
        from pyarrow import parquet

        self._mark_unfinished()
        with system_errors(self.folder):
            (self.folder / layout.BLOCKS).mkdir(exist_ok=True)
        with whole_file(self.folder / layout.CELLS) as temporary:
            parquet.write_table(table, temporary, compression="zstd")

    def _mark_unfinished(self) -> None:
        message = "These perturbations are unfinished. Run the same command with --resume to go on."
        content = {**self._described, "message": message, "blocks": self._blocks}
        write_json(self.folder / layout.UNFINISHED, with_digest(content), indent=None)

    def _clear(self) -> None:
        """Remove what is there of another run; from the first step on the folder says that it is unfinished."""
        if (self.folder / layout.MANIFEST).exists():
            self._mark_unfinished()
        with system_errors(self.folder):
            self._remove_files()

    def _resume(self, state: str) -> None:
        is_finished = state == "finished"
        begun = layout.read_manifest(self.folder) if is_finished else layout.read_unfinished(self.folder)
        lines = [
            line
            for key in ("plan", "states", "columns", "shard", "n_cells_of_run", "n_cells", "cells_sha256")
            for line in layout.differences(begun.get(key), self._described[key], key.removeprefix("plan"))
        ]
        if lines:
            raise OutputError(
                f"{self.folder} cannot be resumed, it was begun differently:\n  "
                + "\n  ".join(line.lstrip(".").replace("cells_sha256", "which cells") for line in lines[:10])
                + f"\nRepeat what it was begun with, name another folder, or {layout.AGAIN}."
            )
        if is_finished:
            self.is_finished = True
            with system_errors(self.folder):  # of a run that was killed at its very end
                (self.folder / layout.UNFINISHED).unlink(missing_ok=True)
                shutil.rmtree(self.folder / layout.BLOCKS, ignore_errors=True)
            return
        if begun["blocks"] != [list(block) for block in self._blocks]:
            raise OutputError(f"{self.folder} was begun with other numbers of rows per cell; {layout.AGAIN}")
        self._check_blocks()
        self._write_beginning(self.cells.table())  # again, since it may have been killed between the first steps

    def _check_blocks(self) -> None:
        """Whole files stay as they are, and everything else goes."""
        kept = set()
        for number in range(len(self._blocks)):
            if (entry := self._block(number)) is None:
                continue
            path = self.folder / layout.part_name(number)
            if not path.exists() or path.stat().st_size != entry["n_bytes"]:
                raise OutputError(f"{path}: missing or not of {entry['n_bytes']} bytes any more; {layout.AGAIN}")
            if is_verifying():
                check_file(path, entry["sha256"], OutputError, layout.AGAIN)
            kept.add(path.name)
        with system_errors(self.folder):
            (self.folder / layout.BLOCKS).mkdir(exist_ok=True)
            for path in self.folder.glob(layout.PART):
                if path.name not in kept:
                    path.unlink()  # whole, but killed before its checksum was written down

    @property
    def remaining(self) -> np.ndarray:
        """[m] ascending places among the cells that this process has still to append."""
        ranges = [np.arange(*self._blocks[number]) for number in self._waiting]
        places = np.concatenate(ranges) if ranges else np.zeros(0, dtype=np.int64)
        return places[places >= self._next]

    def append(self, cell: int, rows: CellRows) -> None:
        """Append rows of a cell, or some of them: those of one cell may come in several pieces.

        Parameters
        ----------
        cell
            Its row of the token folder. Cells come in order of processing; with a cell all before it are complete, and
            one without rows need not come at all.
        rows
            The rows.
        """
        place = self._place_of.get(int(cell))
        if place is None:
            raise ValueError(f"cell {cell} is not among those of the run")
        if place < self._next:
            raise ValueError(f"cell {cell} comes after a later one")
        self._next = place
        while self._waiting and self._blocks[self._waiting[0]][1] <= place:
            self._close_block()
        if not self._waiting or place < self._blocks[self._waiting[0]][0]:
            raise ValueError(f"cell {cell} is in a file that is whole, or another process's")
        block = self._opened()
        carried = {name: column[place] for name, column in self._carried.items()}
        for piece in rows.pieces(row_file.ROWS_AT_ONCE):
            block.write(self._rows.table(int(cell), piece, carried))

    def _opened(self) -> row_file.RowFile:
        if self._open is None:
            self._open = row_file.RowFile(self.folder / layout.part_name(self._waiting[0]), self._rows.schema)
        return self._open

    def _close_block(self) -> None:
        """Complete the first file that is waiting, with or without rows, and write down what it holds."""
        block, number = self._opened(), self._waiting[0]
        start, stop = self._blocks[number]
        entry = {"file": layout.part_name(number), "start": start, "stop": stop, **block.finish()}
        self._open = None
        layout.write_block(self.folder, number, self._run, entry)
        del self._waiting[0]

    def complete(self) -> None:
        """All cells of this process are appended."""
        while self._waiting:
            self._close_block()
        self._next = len(self.cells)

    def finish(self, report: Mapping[str, Any] | None = None) -> None:
        """Complete the folder; of several processes only in the first one, when all others are :meth:`complete`.

        Parameters
        ----------
        report
            What else is to be known of the run, as JSON, such as its noise and speed.
        """
        if self.is_finished:
            return
        self.complete()
        entries = [self._block(number) for number in range(len(self._blocks))]
        if absent := [number for number, entry in enumerate(entries) if entry is None]:
            raise OutputError(
                f"{self.folder / layout.part_name(absent[0])} is not complete, which another process was to write; run "
                "the same command with --resume to go on"
            )
        content = {
            **self._described,
            "cells_file_sha256": sha256_of(self.folder / layout.CELLS),
            "n_rows": sum(entry["n_rows"] for entry in entries if entry),
            "files": entries,
            "report": dict(report or {}),
        }
        write_json(self.folder / layout.MANIFEST, with_digest(content))
        with system_errors(self.folder):
            (self.folder / layout.UNFINISHED).unlink(missing_ok=True)
            shutil.rmtree(self.folder / layout.BLOCKS, ignore_errors=True)
        self.is_finished = True

    def close(self) -> None:
        """Give up a file that is not complete, and the lock. Where nothing is complete, nothing is left."""
        if self._open is not None:
            self._open.abandon()
            self._open = None
        if not (self._part or self.is_finished or list((self.folder / layout.BLOCKS).glob("*.json"))):
            self._leave_nothing()
        self._lock.close()

    def values_of_cells(self) -> Iterator[np.ndarray]:
        """Values of cells themselves, without those of their genes, piece by piece; all files must be whole."""
        from pyarrow import parquet

        for number in range(len(self._blocks)):
            path = self.folder / layout.part_name(number)
            with system_errors(path), parquet.ParquetFile(path) as file:
                for piece in file.iter_batches(columns=[AFFECTED, VALUE]):
                    is_cells = pyarrow.compute.is_null(piece.column(AFFECTED))
                    yield piece.column(VALUE).filter(is_cells).to_numpy(zero_copy_only=False)

    def _block(self, number: int) -> dict[str, Any] | None:
        """What is written down of a whole file of this run; None where it is not whole yet."""
        return layout.read_block(self.folder, number, self._run)

    def _leave_nothing(self) -> None:
        with contextlib.suppress(OSError):
            self._remove_files()
            (self.folder / layout.UNFINISHED).unlink(missing_ok=True)
            if self._is_new:
                self.folder.rmdir()

    def _remove_files(self) -> None:
        for path in layout.own_files(self.folder):
            path.unlink()
        shutil.rmtree(self.folder / layout.BLOCKS, ignore_errors=True)

    def __enter__(self) -> PerturbationWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
