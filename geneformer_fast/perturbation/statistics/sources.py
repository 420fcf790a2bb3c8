"""Where rows of a run come from: a folder that ``perturb`` wrote, one of the official tool, or a table in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from geneformer_fast.errors import InputError
from geneformer_fast.perturbation.reading import Perturbations, open_perturbations
from geneformer_fast.perturbation.statistics.collecting import Collector
from geneformer_fast.perturbation.statistics.columns import Run
from geneformer_fast.tokenization.vocabulary import Vocabulary

Runs = Any  # a folder, shards of a run, a Perturbations, or a table of its columns

_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Rows:
    """Rows of one run, and what is known of it.

    Attributes
    ----------
    where
        What the run is called.
    states
        In their order: start, goal, alternatives; empty where there are none, or nobody says.
    n_cells
        Cells that were perturbed; None where nobody says.
    plan
        What made the values.
    noise
        The largest difference between values that were computed twice, in other batches; None where nobody looked.
    """

    where: str
    _data: Any
    states: list[str] = field(default_factory=list)
    n_cells: int | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    noise: float | None = None

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Rows, of the columns that there are."""
        if isinstance(self._data, pa.Table):
            yield from self._data.select([name for name in columns if name in self._data.column_names]).to_batches(
                max_chunksize=_ROWS_AT_ONCE
            )
        else:
            yield from self._data.batches(columns=[name for name in columns if name in self._data.columns])

    @property
    def roles(self) -> dict[str, Any]:
        """What is ``start`` and ``goal`` among the states, where the run says so."""
        return dict((self.plan.get("states") or {}).get("roles") or {})

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return self._data.column_names if isinstance(self._data, pa.Table) else self._data.columns

    def read(self, *, obs: Sequence[str] = (), anchor: int | None = None, dose: float | None = None) -> Run:
        """All rows.

        Raises
        ------
        InputError
            A column is missing, or there are several doses and none is named.
        """
        collector = Collector(obs, anchor, dose)
        columns = ["cell", "tokens", "genes", "affected", "state", "value", "dose", "set", *obs]
        if absent := [name for name in obs if name not in self.columns]:
            raise InputError(
                f"{self.where}: no column {absent[0]!r} was carried; perturb again with obs={absent[0]!r} to have it"
            )
        collector.add(self.batches(columns), self.where)
        run = collector.run()
        options = self.plan.get("options") or {}
        if options.get("genes") is not None or options.get("sets") is not None:
            # Variants come in the order of the list, which says nothing of where a gene stands in a cell.
            run = replace(run, rank=np.full(len(run.edits), np.nan))
        if isinstance(self._data, pa.Table):
            return run
        cells = self._data.cells
        if "length" not in cells.column_names:
            return run
        known = dict(zip(cells["cell"].to_pylist(), cells["length"].to_pylist(), strict=True))
        lengths = [known.get(cell) for cell in run.cells.tolist()]
        return run if None in lengths else replace(run, lengths=np.array(lengths))


def open_rows(runs: Runs) -> Rows:
    """Open a run.

    Parameters
    ----------
    runs
        The folder of ``perturb``, or of the official perturber, those of all shards, what ``open_perturbations`` gave,
        or a table with the columns of such a run.

    Raises
    ------
    InputError, OutputError
        There is none, or it is not whole.
    """
    if isinstance(runs, pa.Table):
        return Rows("the table", runs)
    found = runs if isinstance(runs, Perturbations) else open_perturbations(_places(runs))
    plan = dict(found.manifest.get("plan", {}))
    noise = (found.manifest.get("report") or {}).get("noise") or {}
    return Rows(str(found.path), found, list(found.states), found.n_cells, plan, noise.get("largest"))


def _places(runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Any:
    if isinstance(runs, str | os.PathLike):
        return Path(runs)
    places = [Path(each) for each in runs]
    if not places:
        raise InputError("no run is named; give the folder that perturb wrote")
    return places[0] if len(places) == 1 else places


def vocabulary_of(dictionary: str | os.PathLike[str] | Vocabulary | None) -> Vocabulary | None:
    """The dictionary that names genes."""
    if dictionary is None or isinstance(dictionary, Vocabulary):
        return dictionary
    return Vocabulary.from_folder(Path(dictionary))
