"""Which pictures a folder of statistics has, and what they are drawn from."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from geneformer_fast.errors import InputError, UnsupportedError
from geneformer_fast.perturbation.pictures import (
    plot_cells,
    plot_interactions,
    plot_ranked,
    plot_shifts,
    plot_volcano,
)
from geneformer_fast.perturbation.statistics.columns import Run
from geneformer_fast.perturbation.statistics.effects import Settings

if TYPE_CHECKING:
    import pandas

    from geneformer_fast.perturbation.statistics.result import Statistics

#: Genes that are shown on a UMAP.
SHOWN = 5


@dataclass(frozen=True)
class Drawings:
    """The pictures of a folder of statistics, not drawn yet."""

    pictures: dict[str, Callable[[Path], Path]]

    @classmethod
    def of(
        cls, found: Statistics, run: Run, settings: Settings, embeddings: str | os.PathLike[str] | None = None,
        color: str | None = None,
    ) -> Drawings:  # fmt: skip
        """Those that there is something to show for."""
        states = found.about["states"]
        state = states[0] if states else ""
        table = of_state(found.effects, state)
        title = f"shifts towards {state}" if state else "cosines to the cell before"
        pictures: dict[str, Callable[[Path], Path]] = {}
        if table["p_value"].notna().any():
            pictures["volcano.png"] = lambda path: plot_volcano(table, path, fdr=settings.fdr, title=title)
        pictures["ranked.png"] = lambda path: plot_ranked(table, path, title=title)
        if len(table) > 1:
            pictures["heatmap.png"] = lambda path: plot_cells(run, table, path, state=state, title=title)
        pairs = found.interactions
        if pairs is not None and len(pairs):
            pictures["interactions.png"] = lambda path: plot_interactions(pairs, path, title=title)
        if embeddings is not None:
            cells, labels, lengths = embedded_cells(Path(embeddings), color)
            _check_same_cells(run, len(cells), lengths, str(embeddings))
            shifts = _shifts_of(run, table, state, len(cells))
            pictures["shifts.png"] = lambda path: plot_shifts(
                cells, labels, shifts, path, label=color or "", towards=state, seed=settings.seed
            )
        return cls(pictures)

    def draw(self, folder: Path) -> list[str]:
        """Draw all; returns the names of the files."""
        for name, draw in self.pictures.items():
            draw(folder / name)
        return list(self.pictures)


def embedded_cells(path: Path, color: str | None) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """[cells, C] embeddings of a token folder's cells, the column beside them, and the cells' numbers of tokens.

    Raises
    ------
    UnsupportedError
        It is no .npy and no .parquet.
    InputError
        There are no embeddings in it, or no such column.
    OutputError
        What lies beside an .npy is of another one.
    """
    from pyarrow import parquet

    from geneformer_fast.extract.outputs import read_cells, table_of

    if path.suffix not in (".npy", ".parquet"):
        raise UnsupportedError(f"{path}: shifts are shown on embeddings in .npy or .parquet, as embed writes them")
    beside = path if path.suffix == ".parquet" else table_of(path, "cells")
    names = parquet.read_schema(beside).names if beside.exists() else []
    if path.suffix == ".parquet" and "embedding" not in names:
        raise InputError(f"{path}: there is no column 'embedding' in it; give what embed wrote")
    cells = read_cells(path, np.arange(_n_rows(path)), "")
    if color is not None and color not in names:
        raise InputError(f"{path}: there is no column {color!r} beside the embeddings; there are {', '.join(names)}")
    columns = (
        parquet.read_table(beside, columns=[name for name in ("length", color) if name in names]) if names else None
    )
    labels = None if color is None or columns is None else np.array(columns[color].to_pylist(), dtype=object)
    lengths = columns["length"].to_numpy() if columns is not None and "length" in columns.column_names else None
    return cells, labels, lengths


def _n_rows(path: Path) -> int:
    from pyarrow import parquet

    if path.suffix == ".parquet":
        return parquet.read_metadata(path).num_rows
    return len(np.load(path, mmap_mode="r", allow_pickle=False))


def _check_same_cells(run: Run, n_cells: int, lengths: np.ndarray | None, where: str) -> None:
    """Embeddings of other cells, or of some of them, would show shifts at wrong places."""
    is_there = run.cells < n_cells
    ours = run.lengths
    is_same = is_there.all() and (lengths is None or ours is None or bool((lengths[run.cells] == ours).all()))
    if not is_same:
        raise InputError(
            f"{where} has {n_cells:,} cells, which are not those of the token folder that was perturbed; embed that "
            "whole folder, without where and max_cells"
        )


def _shifts_of(run: Run, table: pandas.DataFrame, state: str, n_cells: int) -> dict[str, np.ndarray]:
    """Shifts of all cells by the genes with the largest effects."""
    tested = table[table["is_covered"]] if table["is_covered"].any() else table
    number = {" ".join(map(str, edit)): at for at, edit in enumerate(run.edits)}
    shifts = {}
    for row in tested.sort_values("mean", ascending=not state, kind="stable").head(SHOWN).itertuples():
        values, edit = run.values[state], number[row.tokens]
        shown = np.full(n_cells, np.nan)
        of_cells = run.cells[values.cells[values.starts[edit] : values.starts[edit + 1]]]
        shown[of_cells] = values.of(edit) if state else 1 - values.of(edit)
        shifts[str(row.symbol)] = shown
    return shifts


def of_state(table: pandas.DataFrame, state: str) -> pandas.DataFrame:
    """The effects on one state."""
    return table[table["state"] == state] if "state" in table else table
