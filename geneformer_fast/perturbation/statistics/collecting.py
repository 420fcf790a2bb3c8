"""Rows of a run, in batches, become columns grouped by what was perturbed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geneformer_fast.errors import InputError
from geneformer_fast.perturbation.statistics.columns import Edit, Run, Values
from geneformer_fast.perturbation.statistics.moments import Moments

NEEDED = ("cell", "tokens", "value")


class Collector:
    """Takes batches of rows and makes a :class:`Run` of them.

    Parameters
    ----------
    obs
        Columns of cells to keep.
    anchor
        Take, in place of the values of cells, those of all genes where this token alone was perturbed, each as if it
        were an edit.
    dose
        Take the rows of this dose, where there are several.
    """

    def __init__(self, obs: Sequence[str] = (), anchor: int | None = None, dose: float | None = None) -> None:
        self._asked, self._anchor, self._dose = tuple(obs), anchor, dose
        self._doses, self._n_unknown = set[float](), dict[str | None, int]()
        self._edits: dict[Edit, int] = {}
        self._genes: list[tuple[str | None, ...]] = []
        self._sets: dict[Edit, str] = {}
        self._cells: dict[int, int] = {}
        self._met, self._in_batch = set[int](), list[int]()
        self._obs: dict[str, list[Any]] = {name: [] for name in self._asked}
        self._states: dict[str, int] = {}
        self._parts: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        self._places: list[np.ndarray] = []
        self._seen = np.zeros(0, dtype=np.int64)  # per cell: variants so far
        self._moments = Moments()
        self._n_missing = 0

    def add(self, batches: Iterable[pa.RecordBatch | pa.Table], where: str) -> None:
        """Take the rows of one folder, or table.

        Raises
        ------
        InputError
            A column is missing, a value infinite, or a cell was in another folder already.
        """
        before, n_rows = frozenset(self._met), 0
        for batch in batches:
            if batch.num_rows:
                n_rows += batch.num_rows
                self._add(batch, where)
                if again := before.intersection(self._in_batch):
                    raise InputError(
                        f"{where}: cell {min(again)} is in another of these runs too; give shards of one run, each "
                        "once, and runs that are to be compared as such"
                    )
        if not n_rows:
            raise InputError(f"{where}: there is no row in it: nothing was perturbed")

    def _add(self, batch: pa.RecordBatch | pa.Table, where: str) -> None:
        names = batch.schema.names
        if missing := [name for name in (*NEEDED, *self._asked) if name not in names]:
            had = ", ".join(names)
            raise InputError(f"{where}: there is no column {missing[0]!r}; the run has {had}")
        batch = self._of_dose(batch, where)
        cells = self._cells_of(batch)
        self._in_batch = np.unique(cells[cells >= 0]).tolist()
        self._met.update(self._in_batch)
        values = _numpy(batch, "value").astype(np.float32, copy=False)
        if np.isinf(values).any():
            at = int(np.flatnonzero(np.isinf(values))[0])
            raise InputError(f"{where}: the value of cell {cells[at]} is infinite; the run is damaged: make it again")
        edit = self._edit_codes(batch, where)
        is_gene = _affected(batch)
        is_known = ~np.isnan(values)
        self._n_missing += int((~is_known).sum())
        of_gene = is_gene >= 0
        taken = of_gene & is_known
        if self._anchor is not None:
            self._take_anchor(edit, is_gene, cells, values, taken, batch)
            return
        if taken.any():
            self._moments.add(edit[taken], is_gene[taken], values[taken])
        state = self._state_codes(batch, ~of_gene)
        self._take_cells(edit, state, cells, values, ~of_gene, is_known, batch)

    def _of_dose(self, batch: pa.RecordBatch | pa.Table, where: str) -> pa.RecordBatch | pa.Table:
        """The rows of the dose that was asked for; without one there may be one only."""
        if "dose" not in batch.schema.names:
            if self._dose is not None:
                raise InputError(f"{where}: there are no doses in the run; leave dose (--dose) out")
            return batch
        column = _whole(batch, "dose")
        self._doses.update(round(dose, 6) for dose in pc.unique(column).to_pylist() if dose is not None)
        known = ", ".join(f"{dose:g}" for dose in sorted(self._doses))
        if self._dose is not None:
            dose = column.fill_null(np.nan).to_numpy(zero_copy_only=False)
            return batch.filter(pa.array(np.abs(dose - self._dose) < 1e-6))
        if len(self._doses) > 1:
            raise InputError(f"{where}: there are several doses ({known}); say which with dose (--dose)")
        return batch

    def _cells_of(self, batch: pa.RecordBatch | pa.Table) -> np.ndarray:
        """[n] int64 cells. Where a file does not say, the nth value of a state is taken for that of an nth cell."""
        column = _whole(batch, "cell")
        if not column.null_count:
            return column.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
        cells = column.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        has_states = "state" in batch.schema.names
        states = _whole(batch, "state").to_pylist() if has_states else [None] * len(cells)
        is_own = _affected(batch) < 0
        for row in np.flatnonzero(cells < 0):
            number = self._n_unknown.get(states[row], 0)
            cells[row] = -1 - number
            self._n_unknown[states[row]] = number + int(is_own[row])
        return cells

    def _take_anchor(
        self, edit: np.ndarray, affected: np.ndarray, cells: np.ndarray, values: np.ndarray, taken: np.ndarray,
        batch: pa.RecordBatch | pa.Table,
    ) -> None:  # fmt: skip
        anchor = self._edits.get((self._anchor,)) if self._anchor is not None else None  # type: ignore[arg-type]
        taken = taken & (edit == (-1 if anchor is None else anchor))
        state = np.zeros(len(values), dtype=np.int32)
        self._states.setdefault("", 0)
        codes = self._codes([(int(token),) for token in affected[taken]], None)
        full = np.zeros(len(values), dtype=np.int32)
        full[taken] = codes
        self._take_cells(full, state, cells, values, taken, np.ones(len(values), dtype=bool), batch)

    def _take_cells(
        self, edit: np.ndarray, state: np.ndarray, cells: np.ndarray, values: np.ndarray, of_cell: np.ndarray,
        is_known: np.ndarray, batch: pa.RecordBatch | pa.Table,
    ) -> None:  # fmt: skip
        rows = np.flatnonzero(of_cell)
        if not len(rows):
            return
        code = self._cell_codes(cells, rows, batch)
        states = list(self._states)
        for number, name in enumerate(states):
            at = state[rows] == number
            here = rows[at]
            if not len(here):
                continue
            if number == 0:
                place = self._place(code[at])
                self._places.append(place[is_known[here]])
            keep = is_known[here]
            part = (edit[here][keep], code[at][keep], values[here][keep])
            self._parts.setdefault(name, []).append(part)

    def _place(self, code: np.ndarray) -> np.ndarray:
        """[n] float32 place of each row among those of its cell, before its size is known: the number."""
        if len(self._seen) < len(self._cells):
            self._seen = np.concatenate([self._seen, np.zeros(len(self._cells) - len(self._seen), dtype=np.int64)])
        order = np.argsort(code, kind="stable")
        cells, first, counts = np.unique(code[order], return_index=True, return_counts=True)
        place = np.empty(len(code), dtype=np.int32)
        place[order] = np.arange(len(code)) - np.repeat(first, counts) + np.repeat(self._seen[cells], counts)
        self._seen[cells] += counts
        return place

    def _cell_codes(self, cells: np.ndarray, rows: np.ndarray, batch: pa.RecordBatch | pa.Table) -> np.ndarray:
        found, first, inverse = np.unique(cells[rows], return_index=True, return_inverse=True)
        codes = np.empty(len(found), dtype=np.int32)
        for i in np.argsort(first):  # in the order in which they come, whatever the batches
            cell = int(found[i])
            if cell not in self._cells:
                self._cells[cell] = len(self._cells)
                for name in self._asked:
                    self._obs[name].append(batch.column(name)[int(rows[first[i]])].as_py())
            codes[i] = self._cells[cell]
        return codes[inverse]

    def _state_codes(self, batch: pa.RecordBatch | pa.Table, of_cell: np.ndarray) -> np.ndarray:
        """[n] int32 which state each row of a cell is about; values of genes have none."""
        codes = np.zeros(len(of_cell), dtype=np.int32)
        if "state" not in batch.schema.names:
            self._states.setdefault("", 0)
            return codes
        column = pc.dictionary_encode(_whole(batch, "state").cast(pa.string()), null_encoding="encode")
        indices = column.indices.to_numpy(zero_copy_only=False)
        names = [name or "" for name in column.dictionary.to_pylist()]
        seen = indices[of_cell]
        table = np.zeros(len(names), dtype=np.int32)
        for at in seen[np.sort(np.unique(seen, return_index=True)[1])].tolist():  # in the order in which they come
            table[at] = self._states.setdefault(names[at], len(self._states))
        return table[indices] if len(names) else codes

    def _edit_codes(self, batch: pa.RecordBatch | pa.Table, where: str) -> np.ndarray:
        """[n] int32 which edit each row is of."""
        column = _whole(batch, "tokens")
        lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        if not len(lengths):
            return np.zeros(0, dtype=np.int32)
        if lengths.min() < 1:
            raise InputError(f"{where}: a row names no perturbed token; the run is damaged: make it again")
        genes = _whole(batch, "genes") if "genes" in batch.schema.names else None
        sets = _whole(batch, "set") if "set" in batch.schema.names else None
        starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
        codes = np.empty(len(lengths), dtype=np.int32)
        for length in np.unique(lengths).tolist():
            rows = np.flatnonzero(lengths == length)
            of_rows = flat[starts[rows, None] + np.arange(length)]
            found, first, inverse = _unique_rows(of_rows)
            known = None if genes is None else genes.take(pa.array(rows[first])).to_pylist()
            edits = [tuple(row) for row in found.tolist()]
            codes[rows] = self._codes(edits, known)[inverse]
            if sets is not None:
                named = zip(edits, sets.take(pa.array(rows[first])).to_pylist(), strict=True)
                self._sets.update({edit: name for edit, name in named if name is not None})
        return codes

    def _codes(self, edits: Sequence[Edit], genes: Sequence[Sequence[str | None] | None] | None) -> np.ndarray:
        codes = np.empty(len(edits), dtype=np.int32)
        for i, edit in enumerate(edits):
            code = self._edits.get(edit)
            if code is None:
                code = self._edits[edit] = len(self._edits)
                of_edit = None if genes is None else genes[i]
                self._genes.append(tuple(of_edit) if of_edit else (None,) * len(edit))
            codes[i] = code
        return codes

    def run(self) -> Run:
        """Everything that was taken.

        Raises
        ------
        InputError
            There is no value.
        """
        if self._dose is not None and not self._parts:
            known = ", ".join(f"{dose:g}" for dose in sorted(self._doses))
            raise InputError(f"there is no dose {self._dose:g} in the run; there are {known}")
        used = sorted({int(code) for parts in self._parts.values() for edit, _, _ in parts for code in np.unique(edit)})
        all_edits = list(self._edits)
        of_moments = self._moments.edits()
        if "" in self._parts and len(self._parts) > 1:
            raise InputError("some of these runs have shifts towards states and others have none; read them apart")
        used = sorted({*used, *of_moments.tolist()}, key=lambda code: all_edits[code])
        if not used:
            lost = f"; all {self._n_missing:,} are NaN" if self._n_missing else ""
            raise InputError(f"there is no value in these runs{lost}")
        new = np.full(len(all_edits), -1, dtype=np.int32)
        new[used] = np.arange(len(used), dtype=np.int32)
        states = [name for name in self._states if name in self._parts] or [""]
        n_cells = np.array(self._seen[: len(self._cells)])
        rank = self._ranks(new, n_cells, len(used))
        values = {name: _grouped(self._parts.pop(name, []), new, len(used)) for name in states}
        return Run(
            edits=[all_edits[code] for code in used],
            genes=[self._genes[code] for code in used],
            states=states,
            values=values,
            cells=np.fromiter(self._cells, dtype=np.int64, count=len(self._cells)),
            obs={name: np.array(column, dtype=object) for name, column in self._obs.items()},
            rank=rank,
            moments=self._moments.renumbered(new),
            n_missing=self._n_missing,
            sets=self._sets,
        )

    def _ranks(self, new: np.ndarray, n_in_cell: np.ndarray, n_edits: int) -> np.ndarray:
        """[E] mean place, 0 to 1, of each edit among those of its cells; NaN where all cells have one only."""
        total, counts = np.zeros(n_edits), np.zeros(n_edits)
        first = next((name for name in self._states if name in self._parts), None)
        if first is None:
            return np.full(n_edits, np.nan)
        for place, (edit, cell, _) in zip(self._places, self._parts[first], strict=True):
            last = n_in_cell[cell] - 1
            has_order = last > 0
            at, share = new[edit[has_order]], place[has_order] / last[has_order]
            total += np.bincount(at, weights=share, minlength=n_edits)
            counts += np.bincount(at, minlength=n_edits)
        with np.errstate(invalid="ignore"):
            return np.where(counts > 0, total / counts, np.nan)


def _grouped(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], new: np.ndarray, n_edits: int) -> Values:
    """Rows by edit; within one in the order in which they came."""
    if not parts:
        return Values.empty(n_edits)
    edit = new[np.concatenate([part[0] for part in parts])]
    cells = np.concatenate([part[1] for part in parts])
    values = np.concatenate([part[2] for part in parts])
    parts.clear()
    order = np.argsort(edit, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(edit, minlength=n_edits))]).astype(np.int64)
    return Values(values[order], cells[order], starts)


def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct rows [n, k], where each is first, and which of them each row is."""
    if rows.shape[1] == 1:
        found, first, inverse = np.unique(rows[:, 0], return_index=True, return_inverse=True)
        return found[:, None], first, inverse
    found, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return found, first, inverse.reshape(-1)


def _affected(batch: pa.RecordBatch | pa.Table) -> np.ndarray:
    """[n] int64 affected token; -1 is the cell itself."""
    if "affected" not in batch.schema.names:
        return np.full(batch.num_rows, -1, dtype=np.int64)
    return _whole(batch, "affected").cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)


def _whole(batch: pa.RecordBatch | pa.Table, name: str) -> Any:
    column = batch.column(name)
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _numpy(batch: pa.RecordBatch | pa.Table, name: str) -> np.ndarray:
    column = _whole(batch, name)
    if column.null_count:
        raise InputError(f"the column {name!r} of a run has empty places; the run is damaged: make it again")
    return column.to_numpy(zero_copy_only=False)
