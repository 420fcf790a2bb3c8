"""What ranking looks up for every column of a matrix, tabulated once. numpy only: no compiler, no torch, no device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Columns(NamedTuple):
    """What ranking needs to know of the columns of a matrix; made by :func:`prepare_columns`.

    Attributes
    ----------
    codes
        [G] int32: the token id of a column; -1 drops it; ``-2 - s`` adds it to the sum ``s``.
    medians
        [G] float64, the median of the column's gene (1 where there is none).
    sum_tokens, sum_medians
        Token id and median of every gene that several columns share.
    """

    codes: np.ndarray
    medians: np.ndarray
    sum_tokens: np.ndarray
    sum_medians: np.ndarray


class RepeatedColumnError(ValueError):
    """A row of the matrix names the same column more than once; sum the duplicates first."""


def prepare_columns(column_to_gene: np.ndarray, token_ids: np.ndarray, medians: np.ndarray) -> Columns:
    """Tabulate per column what ranking looks up.

    Parameters
    ----------
    column_to_gene
        [G] integers: index of the column's gene in the next two arrays, or -1 for a column that is left out. Columns of
        one gene are summed.
    token_ids
        [n] token id of each gene.
    medians
        [n] float64 corpus median of each gene.

    Raises
    ------
    ValueError
        Indices or ids are no integers, two genes share a token id, a token id is negative or no int32, a median is not
        a positive finite number, or ``column_to_gene`` names a gene that is not there.
    """
    column_to_gene, token_ids = whole(column_to_gene, "column_to_gene"), whole(token_ids, "token_ids")
    medians = np.asarray(medians, dtype=np.float64)
    if not np.all((medians > 0) & np.isfinite(medians)):
        raise ValueError("medians must be positive finite numbers")
    if ((token_ids < 0) | (token_ids >= 2**31)).any() or len(np.unique(token_ids)) != len(token_ids):
        raise ValueError("token ids must be unique, not negative and less than 2**31")
    if ((column_to_gene < -1) | (column_to_gene >= len(token_ids))).any():
        raise ValueError("column_to_gene names a gene that is not there")
    token_ids = token_ids.astype(np.int32)
    is_kept = column_to_gene >= 0
    genes = column_to_gene[is_kept]
    shared = np.flatnonzero(np.bincount(genes, minlength=len(token_ids)) > 1)
    slot_of_gene = np.full(len(token_ids), -1, np.int32)
    slot_of_gene[shared] = np.arange(len(shared), dtype=np.int32)
    codes = np.full(len(column_to_gene), -1, np.int32)
    codes[is_kept] = np.where(slot_of_gene[genes] >= 0, -2 - slot_of_gene[genes], token_ids[genes])
    column_medians = np.ones(len(column_to_gene))
    column_medians[is_kept] = medians[genes]
    return Columns(codes, column_medians, token_ids[shared], medians[shared])


def whole(values: np.ndarray, name: str) -> np.ndarray:
    """int64 of integers; of other numbers, which would lose their fractions, ValueError."""
    found = np.asarray(values)
    if found.size and found.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, not {found.dtype}")
    return found.astype(np.int64, copy=False)
