"""The genes of raw, described also by what only the AnnData's own var says of them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from geneformer_fast.counts.selection import CHOSEN_BY
from geneformer_fast.counts.source import GENE_COLUMNS
from geneformer_fast.counts.table import Table
from geneformer_fast.errors import InputError


def raw_table(raw: Table, var: Table, gene_column: str | None) -> Table:
    """The table of raw's genes, with the columns that only var has, matched by gene name.

    Counts often lie in raw.X while ids were added to var alone. They are taken where var has every gene of raw; where
    it has fewer (variable genes were chosen), most counts would be without an id.

    Parameters
    ----------
    raw, var
        The two tables.
    gene_column
        The column that was asked for, None for the first known one.

    Raises
    ------
    InputError
        The column that was asked for is in var alone, and var lacks genes of raw.
    """
    further = [column for column in var.columns if column not in raw.columns]
    if not further or raw.stored_index() is None or var.stored_index() is None:
        return raw
    names, own = raw.index(), var.index()
    order = _places(names, own)
    if (order >= 0).all():
        columns = {column: lambda column=column: raw.read(column) for column in raw.columns}  # type: ignore[misc]
        columns |= {column: lambda column=column: _taken(var.read(column), order) for column in further}  # type: ignore[misc]
        return Table(raw.name, raw.n_rows, columns, raw.stored_index)
    there = f"{np.count_nonzero(order >= 0)} of {len(names)} genes of raw.X"
    advice = f"add the ids to adata.raw.var, or choose a matrix that has var's genes with {CHOSEN_BY}"
    if gene_column is not None and gene_column in further:
        raise InputError(
            f"{raw.name}: has no column {gene_column!r}; var has it, but names only {there}, which holds the counts: "
            f"{advice}"
        )
    ids = next((column for column in GENE_COLUMNS if column in further), None)
    if gene_column is None and ids is not None and not any(column in raw.columns for column in GENE_COLUMNS):
        warnings.warn(
            f"{raw.name}: the counts are those of raw.X, whose genes have no column of ids; var has {ids!r}, but names "
            f"only {there}. The row names of raw.var are taken as ids; if they are none, {advice}",
            stacklevel=2,
        )
    return raw


def _places(names: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Row of each name in another list, -1 where it is not there or more than once."""
    if len(names) == len(own) and (names == own).all():
        return np.arange(len(names))
    row_of: dict[str, int] = {}
    for row, name in enumerate(own.tolist()):
        row_of[name] = -1 if name in row_of else row
    return np.array([row_of.get(name, -1) for name in names.tolist()], dtype=np.int64)


def _taken(values: Any, order: np.ndarray) -> Any:
    if isinstance(values, np.ndarray):
        return values[order]
    from geneformer_fast.counts.arrays import number_array

    return values.take(number_array(order))
