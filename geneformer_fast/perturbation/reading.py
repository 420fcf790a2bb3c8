"""Folders of perturbations, and how their rows are read: in pieces, as tables, as data frames and as AnnData."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from geneformer_fast.arguments import checked
from geneformer_fast.errors import InputError, OutputError
from geneformer_fast.perturbation.folder import is_official
from geneformer_fast.perturbation.matrix import anndata_of
from geneformer_fast.perturbation.official_rows import official_rows
from geneformer_fast.perturbation.parts import PartFolder, Source, by_rank, check_together
from geneformer_fast.perturbation.rows import AFFECTED, CELL, OWN, STATE, TOKENS

if TYPE_CHECKING:
    import pandas
    from anndata import AnnData


@checked
def open_perturbations(
    folder: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    partial: bool = False,
    verify: bool | None = None,
) -> Perturbations:
    """Open what ``perturb`` wrote, or Geneformer's own perturber.

    Parameters
    ----------
    folder
        The folder, or those of all shards of a run, in any order. One of the official perturber's pickles is read
        without executing them; ``cell`` is then the place in its order, which is all that the files say.
    partial
        Take some shards of a run without the others.
    verify
        Whether files are compared with their checksums, each when it is first read; None: unless the environment says
        ``GENEFORMER_FAST_VERIFY=0``.

    Raises
    ------
    OutputError
        There is no such folder; it is unfinished, or files are missing or damaged; or the folders are no shards of one
        run, one is missing, or one is there twice.
    InputError
        A pickle holds something else than effects of perturbations.
    """
    places = [folder] if isinstance(folder, str | os.PathLike) else list(folder)
    if not places:
        raise OutputError("no folder of perturbations is named")
    if len(places) == 1 and is_official(Path(places[0])):
        return Perturbations([official_rows(places[0])])
    folders = [PartFolder(Path(place), verify=verify) for place in places]
    check_together(folders, is_partial=partial)
    folders.sort(key=lambda part: part.manifest["shard"]["index"])
    return Perturbations(folders)


class Perturbations:
    """Values of perturbed cells.

    Reading takes memory for what is asked for; :meth:`batches` for 65,536 rows of each folder.

    Attributes
    ----------
    path
        The folder, or the first one of several shards.
    manifest
        What ``_manifest.json`` says: ``plan`` (tokens, model, dictionary, options, versions), ``states``, ``report``.
    states
        Names of the states that values are shifts towards: start, goal, alternatives. Empty without states.
    cells
        A table of the perturbed cells, in the order in which they were processed: ``rank``, ``cell`` (row of the token
        folder), ``length`` (tokens), and ``obs_NAME`` of every column that was carried.
    schema
        The Arrow schema of the rows.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = list(sources)
        first = self._sources[0]
        self.path, self.manifest, self.schema = first.path, first.manifest, first.schema
        self.states: list[str] = list(self.manifest["states"])
        cells = pa.concat_tables([source.cells for source in self._sources])
        self.cells: pa.Table = cells.sort_by("rank") if len(self._sources) > 1 else cells

    def __repr__(self) -> str:
        what = f"{self.n_rows:,} values of {self.n_cells:,} cells"
        return f"Perturbations({str(self.path)!r}: {what}, columns {', '.join(self.columns)})"

    @property
    def n_cells(self) -> int:
        """Cells that were perturbed, those without rows included."""
        return self.cells.num_rows

    @property
    def n_rows(self) -> int:
        """Values."""
        return sum(source.n_rows for source in self._sources)

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.schema.names)

    @property
    def obs_columns(self) -> list[str]:
        """Names of the columns that were carried from obs."""
        return [name.removeprefix("obs_") for name in self.cells.column_names if name.startswith("obs_")]

    @property
    def extra_columns(self) -> list[str]:
        """Names of further columns that tell variants of the same genes apart, such as ``dose``."""
        return [name for name in self.columns if name not in OWN and name not in self.obs_columns]

    @checked
    def batches(
        self,
        *,
        columns: Sequence[str] | None = None,
        cells: Sequence[int] | None = None,
        states: str | Sequence[str] | None = None,
        affected: bool | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Rows in pieces, in the order in which cells were processed, also of several shards.

        Parameters
        ----------
        columns
            Those to read; None: all.
        cells
            Rows of the token folder; None: all cells.
        states
            A state, or several; None: all, and rows without one.
        affected
            False: values of cells. True: values of genes. None: both.

        Raises
        ------
        InputError
            There is no such column, cell or state.
        OutputError
            A file is damaged.
        """
        wanted = self._columns(columns)
        choose = self._choice(cells, states, affected)
        needed = list(dict.fromkeys([*wanted, *choose.columns, *([CELL] if len(self._sources) > 1 else [])]))
        streams = [source.batches(needed, choose.places(source)) for source in self._sources]
        for batch in streams[0] if len(streams) == 1 else by_rank(streams, self._rank_of):
            if CELL in batch.schema.names:
                self._check_listed(batch.column(CELL))
            if (chosen := choose.rows(batch)).num_rows:
                yield chosen.select(wanted)

    @checked
    def read(
        self,
        *,
        columns: Sequence[str] | None = None,
        cells: Sequence[int] | None = None,
        states: str | Sequence[str] | None = None,
        affected: bool | None = None,
    ) -> pa.Table:
        """The same rows as :meth:`batches`, as one table."""
        found = list(self.batches(columns=columns, cells=cells, states=states, affected=affected))
        wanted = self._columns(columns)
        return pa.Table.from_batches(found, schema=pa.schema([self.schema.field(name) for name in wanted]))

    @checked
    def to_frame(
        self,
        *,
        columns: Sequence[str] | None = None,
        cells: Sequence[int] | None = None,
        states: str | Sequence[str] | None = None,
        affected: bool | None = None,
    ) -> pandas.DataFrame:
        """The same rows as :meth:`batches`, as a pandas DataFrame; lists of tokens and genes are tuples."""
        table = self.read(columns=columns, cells=cells, states=states, affected=affected)
        frame = table.to_pandas()
        for field in table.schema:
            if pa.types.is_list(field.type):
                frame[field.name] = [None if values is None else tuple(values) for values in frame[field.name]]
        if AFFECTED in frame:
            frame[AFFECTED] = table[AFFECTED].to_pandas(types_mapper=_nullable)
        return frame

    @checked
    def to_anndata(self, *, state: str | None = None, cells: Sequence[int] | None = None) -> AnnData:
        """Values of cells as an AnnData: cells x perturbations, NaN where a cell was not perturbed so.

        Parameters
        ----------
        state
            Whose shifts are X; all states are layers. None: the goal, where there are states.
        cells
            Rows of the token folder; None: all cells.

        Returns
        -------
        AnnData
            ``obs`` are the cells with what was carried, by their rows of the token folder; ``var`` the perturbations,
            by the genes' ids (tokens without a dictionary), with ``tokens``, ``n_cells`` (how many cells have a value)
            and further columns of the run. Values of genes are left out.

        Raises
        ------
        InputError
            There is no such state or cell, or the matrix is larger than the memory that is free.
        """
        if state is not None and state not in self.states:
            raise InputError(f"{self.path}: there is no state {state!r}; there are {self._known_states()}")
        goal = self.states[min(1, len(self.states) - 1)] if self.states else None
        names = [CELL, TOKENS, *([STATE] if self.states else []), "genes", "value", *self.extra_columns]
        batches = self.batches(columns=names, cells=cells, affected=False)
        known = self.cells if cells is None else self.cells.filter(_is_in(self.cells[CELL], cells))
        return anndata_of(
            batches, known, states=self.states, state=state or goal, extra=self.extra_columns, path=self.path,
            about={"plan": self.manifest.get("plan", {}), "report": self.manifest.get("report", {})},
        )  # fmt: skip

    @cached_property
    def _ranks(self) -> dict[int, int]:
        return dict(zip(self.cells[CELL].to_pylist(), self.cells["rank"].to_pylist(), strict=True))

    def _rank_of(self, cell: int) -> int:
        if (rank := self._ranks.get(cell)) is None:
            raise self._unlisted(cell)
        return rank

    def _check_listed(self, cells: pa.Array) -> None:
        """Refuse rows of a cell that is not among those of the folder.

        Of some values in the official perturber's files nobody knows the cell.
        """
        is_official = self.manifest.get("plan", {}).get("options", {}).get("official", False)
        for cell in cells.unique().to_pylist():
            if cell not in self._ranks and not (cell is None and is_official):
                raise self._unlisted(cell)

    def _unlisted(self, cell: int | None) -> OutputError:
        return OutputError(f"{self.path}: there are values of cell {cell}, which it does not list; perturb again")

    def _columns(self, columns: Sequence[str] | None) -> list[str]:
        wanted = self.columns if columns is None else list(columns)
        if absent := next((name for name in wanted if name not in self.columns), None):
            raise InputError(f"{self.path}: there is no column {absent!r}; there are {', '.join(self.columns)}")
        return wanted

    def _choice(
        self, cells: Sequence[int] | None, states: str | Sequence[str] | None, affected: bool | None
    ) -> _Choice:
        asked = [states] if isinstance(states, str) else states
        for name in asked or ():
            if name not in self.states:
                raise InputError(f"{self.path}: there is no state {name!r}; there are {self._known_states()}")
        if cells is not None:
            is_there = np.isin(np.asarray(cells, dtype=np.int64), self.cells[CELL].to_numpy())
            if not is_there.all():
                absent = np.asarray(cells)[~is_there][0]
                raise InputError(f"{self.path}: cell {absent} was not perturbed; cells are rows of the token folder")
        return _Choice(cells, asked, affected)

    def _known_states(self) -> str:
        return ", ".join(self.states) or "none"


class _Choice:
    """Which rows are wanted."""

    def __init__(self, cells: Sequence[int] | None, states: Sequence[str] | None, affected: bool | None) -> None:
        self._cells = None if cells is None else np.asarray(cells, dtype=np.int64)
        self._states, self._affected = states, affected
        asked = {CELL: cells, STATE: states, AFFECTED: affected}
        self.columns = [name for name, what in asked.items() if what is not None]

    def places(self, source: Source) -> np.ndarray | None:
        """Places among a source's cells that rows are wanted of; None: all."""
        return None if self._cells is None else np.flatnonzero(np.isin(source.cells[CELL].to_numpy(), self._cells))

    def rows(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Those of a batch."""
        import pyarrow.compute as pc

        if self._affected is not None:
            batch = batch.filter(pc.is_valid(batch[AFFECTED]) if self._affected else pc.is_null(batch[AFFECTED]))
        if self._states is not None:
            batch = batch.filter(pc.is_in(batch[STATE], pa.array(self._states, pa.string())))
        if self._cells is not None:
            batch = batch.filter(_is_in(batch[CELL], self._cells))
        return batch


def _nullable(kind: pa.DataType) -> Any:
    """Whole numbers that may be missing stay whole numbers."""
    import pandas

    return pandas.Int32Dtype() if pa.types.is_int32(kind) else None


def _is_in(values: Any, cells: Any) -> Any:
    import pyarrow.compute as pc

    return pc.is_in(values, pa.array(np.asarray(cells, dtype=np.int64)))
