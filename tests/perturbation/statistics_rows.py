"""Rows of runs: those of the references, and made-up ones whose answer is known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geneformer_fast.perturbation.statistics.collecting import Collector
from geneformer_fast.perturbation.statistics.columns import Run


def table_of_reference(folder: Path, name: str) -> pa.Table:
    """Raw values of a scenario, in the columns of a run. Where the cell is unknown, the place in the list stands."""
    found = pq.read_table(folder / "outputs" / f"{name}.parquet")
    rank, item = (found.column(each).to_numpy().astype(np.int64) for each in ("rank", "item"))
    perturbed = found.column("perturbed").to_pylist()
    affected = found.column("affected").to_pylist()
    states = [state or None for state in found.column("state").to_pylist()]
    return pa.table(
        {
            "cell": pa.array(np.where(rank < 0, item, rank)),
            "tokens": pa.array([[int(token) for token in each.split()] for each in perturbed], pa.list_(pa.int32())),
            "affected": pa.array([None if token < 0 else token for token in affected], pa.int32()),
            "state": pa.array(states, pa.string()),
            "value": found.column("value").cast(pa.float32()),
        }
    )


@cache
def scenarios(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "index.json").read_text())["scenarios"]


def collected(*tables: pa.Table, batch: int | None = None, **options: Any) -> Run:
    """Runs in memory as one, in batches of so many rows."""
    collector = Collector(**options)
    for number, table in enumerate(tables):
        collector.add(table.to_batches(max_chunksize=batch), f"run {number}")
    return collector.run()


def table_of(
    rows: Sequence[tuple[int, Sequence[int], float]] | Sequence[tuple[int, Sequence[int], float, str]],
    affected: Sequence[int | None] | None = None,
    **obs: Sequence[Any],
) -> pa.Table:
    """(cell, tokens, value[, state]) as a table."""
    columns: dict[str, Any] = {
        "cell": pa.array([row[0] for row in rows], pa.int64()),
        "tokens": pa.array([list(row[1]) for row in rows], pa.list_(pa.int32())),
        "affected": pa.array(affected if affected is not None else [None] * len(rows), pa.int32()),
        "state": pa.array([row[3] if len(row) > 3 else None for row in rows], pa.string()),
        "value": pa.array([row[2] for row in rows], pa.float32()),
    }
    return pa.table(columns | {name: pa.array(values) for name, values in obs.items()})


def screen(
    values: np.ndarray, *, state: str | None = None, cells: Sequence[int] | None = None,
    obs: Mapping[str, Sequence[Any]] | None = None, first_token: int = 10,
) -> pa.Table:  # fmt: skip
    """[cells, genes] values, NaN where a cell lacks a gene, as the table of a run; genes in the order of columns."""
    row, gene = np.nonzero(~np.isnan(values))
    names = np.arange(len(values)) if cells is None else np.asarray(cells)
    columns: dict[str, Any] = {
        "cell": pa.array(names[row].astype(np.int64)),
        "tokens": pa.array([[first_token + int(each)] for each in gene], pa.list_(pa.int32())),
        "affected": pa.array([None] * len(row), pa.int32()),
        "state": pa.array([state] * len(row), pa.string()),
        "value": pa.array(values[row, gene].astype(np.float32)),
    }
    for name, column in (obs or {}).items():
        columns[name] = pa.array([column[each] for each in row])
    return pa.table(columns)


def write_run(
    folder: Path, table: pa.Table, *, states: Sequence[str] = (), n_cells: int | None = None, obs: Sequence[str] = (),
    lengths: Sequence[int] | None = None, options: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """A table as the folder that ``perturb`` would write; cells are 0 to ``n_cells`` - 1."""
    from geneformer_fast.perturbation.rows import CellRows, RowSchema
    from geneformer_fast.perturbation.store import PerturbationWriter, RunCells

    cell = table["cell"].to_numpy()
    n_cells = int(cell.max()) + 1 if n_cells is None else n_cells
    carried = {}
    for name in obs:
        first = [int(np.flatnonzero(cell == each)[0]) if (cell == each).any() else None for each in range(n_cells)]
        carried[name] = pa.array([None if at is None else table[name][at].as_py() for at in first], pa.string())
    number = {state: at for at, state in enumerate(states)}
    n_tokens = np.arange(n_cells, 0, -1) if lengths is None else np.asarray(lengths)
    cells = RunCells(np.arange(n_cells), n_tokens, np.full(n_cells, 5), obs=carried)
    with PerturbationWriter(
        folder, cells, plan={"options": dict(options or {})}, rows=RowSchema(states=list(states))
    ) as writer:
        for each in range(n_cells):
            rows = np.flatnonzero(cell == each)
            of_cell = table.take(pa.array(rows))
            state = None
            if states:
                state = np.array([number[name] for name in of_cell["state"].to_pylist()], dtype=np.int32)
            affected = np.array([-1 if token is None else token for token in of_cell["affected"].to_pylist()])
            writer.append(
                each,
                CellRows.of(of_cell["tokens"].to_pylist(), of_cell["value"].to_numpy(), affected=affected, state=state),
            )
        writer.finish(report=dict(report or {}))
    return folder
