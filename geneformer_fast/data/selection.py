"""Which cells are taken: those with some values in columns of obs, and of these so many, drawn by a seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from geneformer_fast.arguments import check_seed
from geneformer_fast.counts import CountSource
from geneformer_fast.counts.arrays import number_array
from geneformer_fast.errors import InputError, UnsupportedError
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.tokenization.inputs import ReadOptions, passes_filter

# Values of a column that a message names.
_MOST_SHOWN = 20
_TRUTHS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class Selection:
    """Cells to take.

    Attributes
    ----------
    where
        Column -> the values of which a cell has one. Of several columns all must hold. Missing values are none.
    max_cells
        Most cells, drawn from those; None takes all of them.
    seed
        Of the draw.
    """

    where: Mapping[str, tuple[Any, ...]]
    max_cells: int | None = None
    seed: int = 0

    @classmethod
    def of(
        cls, where: Mapping[str, Any] | None, max_cells: int | None, seed: int | None, *, default_seed: int = 0
    ) -> Selection | None:
        """What a caller asks for; None where that is every cell.

        Raises
        ------
        UnsupportedError
            A column without values, fewer than one cell, or a seed of no draw.
        """
        wanted = {name: _values(name, values) for name, values in (where or {}).items()}
        if max_cells is not None and max_cells < 1:
            raise UnsupportedError(f"max_cells must be at least 1, not {max_cells}")
        if seed is not None and max_cells is None:
            raise UnsupportedError("seed (--seed) is of the draw of cells: say how many with max_cells (--max-cells)")
        check_seed(seed)
        if not wanted and max_cells is None:
            return None
        return cls(wanted, max_cells, default_seed if seed is None else seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for provenance in ``uns`` and JSON, and for what a run is a run of."""
        found: dict[str, Any] = {}
        if self.where:
            found["where"] = json.dumps({name: list(map(str, values)) for name, values in self.where.items()})
        if self.max_cells is not None:
            found |= {"max_cells": self.max_cells, "seed": self.seed}
        return found

    def matching(self, tokens: TokenFolder) -> np.ndarray:
        """[n] numbers of the cells of a token folder that have the values; nothing is drawn yet.

        Raises
        ------
        InputError
            The folder carries no such column, or no cell has the value, or all of them.
        """
        place = _Places(str(tokens.path))
        is_wanted = np.ones(tokens.n_cells, dtype=bool)
        there = [field.name for field in tokens.schema if not pa.types.is_nested(field.type)]
        for name, values in self.where.items():
            if name not in there:
                raise InputError(
                    f"{tokens.path} carries no column {name!r} to choose cells by; there are "
                    f"{', '.join(there) or 'none'}. Carry it along with tokenize --obs {name}"
                )
            is_wanted &= place.look(name, values, tokens.column(name))
        place.check(self.where, bool(is_wanted.any()))
        return np.flatnonzero(is_wanted)

    def cells_of(self, tokens: TokenFolder) -> np.ndarray:
        """[n] ascending numbers of the cells of a token folder that are taken."""
        return self.drawn(self.matching(tokens))

    def rows_of(self, inputs: Sequence[Any], reading: ReadOptions) -> tuple[list[np.ndarray], np.ndarray]:
        """Ascending rows that are taken, of every input and of all inputs one after another.

        Inputs are files of counts, or an AnnData. Cells whose filter_pass says that they are no cells are not taken.

        Raises
        ------
        InputError
            As :meth:`matching`, of the inputs together.
        """
        place, found = _Places(*map(_name_of, inputs[:2]), n_inputs=len(inputs)), []
        for data in inputs:
            with reading.open(data, is_checked=True) as source:
                is_wanted = passes_filter(source, reading)
                for name, values in self.where.items():
                    is_wanted &= place.look(name, values, _column(source, name))
            found.append(is_wanted)
        sizes = [len(each) for each in found]
        everywhere = np.concatenate(found)
        place.check(self.where, bool(everywhere.any()))
        starts = np.concatenate([[0], np.cumsum(sizes)])
        drawn = self.drawn(np.flatnonzero(everywhere))
        places = np.searchsorted(drawn, starts)
        rows = [drawn[begin:end] - start for begin, end, start in zip(places, places[1:], starts, strict=False)]
        return rows, drawn

    def drawn(self, cells: np.ndarray) -> np.ndarray:
        """At most so many of some cells, ascending; the same ones for the same cells and seed."""
        if self.max_cells is None or len(cells) <= self.max_cells:
            return cells
        return np.sort(np.random.default_rng(self.seed).choice(cells, self.max_cells, replace=False))


class _Places:
    """Where values are looked for, and which have been found."""

    def __init__(self, *names: str, n_inputs: int = 1) -> None:
        self._name = " and ".join(names) if n_inputs <= 2 else f"{names[0]} and {n_inputs - 1:,} more inputs"
        self._found: dict[str, set[int]] = {}
        self._there: dict[str, set[str]] = {}

    def look(self, name: str, values: Sequence[Any], column: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """[n] whether each cell has one of the values."""
        known = self._found.setdefault(name, set())
        is_wanted = np.zeros(len(column), dtype=bool)
        stored, parse = _comparable(column)
        for number, value in enumerate(values):
            parsed = parse(value)
            if parsed is None:
                continue
            has_value = np.asarray(stored == parsed, dtype=bool)
            if has_value.any():
                known.add(number)
                is_wanted |= has_value
        if len(known) < len(values):
            there = stored[stored == stored]  # without NaN
            self._there.setdefault(name, set()).update(map(str, set(there.tolist()) - {None}))
        return is_wanted

    def check(self, where: Mapping[str, Sequence[Any]], is_any: bool) -> None:
        """Refuse values that no cell has: most likely they are misspelt, and other cells would be taken."""
        for name, values in where.items():
            absent = next((value for number, value in enumerate(values) if number not in self._found[name]), None)
            if absent is not None:
                there = sorted(self._there[name], key=_in_order)
                more = f" and {len(there) - _MOST_SHOWN:,} more" if len(there) > _MOST_SHOWN else ""
                shown = ", ".join(there[:_MOST_SHOWN]) or "none"
                raise InputError(f"{self._name}: no cell has {name} {str(absent)!r}; there are {shown}{more}")
        if not is_any:
            said = " and ".join(f"{name} {' or '.join(map(str, values))}" for name, values in where.items())
            raise InputError(f"{self._name}: no cell is left to take{f', with {said}' if said else ''}")


def _values(name: str, values: Any) -> tuple[Any, ...]:
    """The values of one column, of which a single one needs no list."""
    is_list = not isinstance(values, str | bytes) and hasattr(values, "__len__") and hasattr(values, "__iter__")
    found = tuple(values) if is_list else (values,)
    if not found or any(value is None or value != value for value in found):
        raise UnsupportedError(f"where: {name!r} needs a value, or several, that cells have")
    return found


def _name_of(data: Any) -> str:
    return "<AnnData>" if hasattr(data, "obs_names") else str(data)


def _column(source: CountSource, name: str) -> pa.Array:
    if not source.has_obs(name):
        known = ", ".join(source.obs_columns) or "no columns"
        raise InputError(f"{source.name}: obs has no column {name!r} to choose cells by; there are {known}")
    values = source.obs(name)
    return values if isinstance(values, pa.Array) else number_array(values)


def _comparable(column: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, Any]:
    """A column as numpy, missing values as None or NaN, and what makes of a value one to compare with it."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(pa.string()), pa.string()
    if pa.types.is_boolean(kind):
        return np.array(column.to_pylist(), dtype=object), _truth
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        is_whole = pa.types.is_integer(kind) and not column.null_count
        return np.asarray(column.to_numpy()) if is_whole else column.cast(pa.float64()).to_numpy(), _number
    return np.array([None if value is None else str(value) for value in column.to_pylist()], dtype=object), str


def _truth(value: Any) -> bool | None:
    return _TRUTHS.get(str(value).lower())


def _number(value: Any) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(str(value))
        except ValueError:
            continue
    return None


def _in_order(text: str) -> tuple[float, str]:
    """Numbers by size, before text."""
    number = _number(text)
    return (float("inf") if number is None else float(number), text)
