"""Which cells are perturbed, and in which order.

In this order: columns of the tokens (``where``), the state that cells start from, the genes that they must have, a draw
of at most so many, the longest first, and a window of these. The place of a cell in what is left is its *rank*.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from geneformer_fast.data.selection import Selection
from geneformer_fast.errors import InputError, UnsupportedError, VocabularyError
from geneformer_fast.perturbation.edits import Edits
from geneformer_fast.ragged import Ragged
from geneformer_fast.tokenization.arrow import TokenFolder

#: Of the draw, where none is given; the official tool's.
SEED = 42
# Cells that are read at a time.
_CELLS_AT_ONCE = 1024
# Cells and lists of genes that are compared at a time.
_PLACES_AT_ONCE = 2**24


@dataclass(frozen=True)
class ChosenCells:
    """The cells of a run, in the order in which they are perturbed.

    Attributes
    ----------
    cells
        [n] int64, their numbers in the token folder, by rank.
    lengths
        [n] int64, tokens of each, special tokens included.
    left
        How many cells each step left, by the name of what was asked for.
    """

    cells: np.ndarray
    lengths: np.ndarray
    left: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.cells)


def chosen_cells(
    folder: TokenFolder,
    edits: Edits,
    *,
    where: Mapping[str, Any] | None = None,
    state: tuple[str, Any] | None = None,
    max_cells: int | None = None,
    seed: int | None = None,
    window: tuple[int | None, int | None] | None = None,
    n_tokens: int | None = None,
) -> ChosenCells:
    """The cells to perturb, and their order.

    Parameters
    ----------
    folder
        The tokens, of which it is known whether a model reads them (``identity_of``).
    edits
        What is done to cells: those that lack the genes for it are left out. They are those without all genes of a list
        that is deleted or moved together, without any edit of several such lists, or without the anchor.
    where
        Column -> the values of which a cell has one; of several columns all must hold.
    state
        Column and value that cells start from.
    max_cells, seed
        Most cells, drawn from those; a seed of None is 42, with which the official tool draws the same cells.
    window
        ``(start, stop)``, either of them None: these of the cells, the longest first. A stop beyond the last cell is
        the last, with a warning.
    n_tokens
        Size of the model's vocabulary; None does not look.

    Raises
    ------
    InputError
        No cell is left; a cell is longer than the model reads, or has a gene twice.
    UnsupportedError
        The window holds no cell, or begins beyond the last one.
    VocabularyError
        A cell has a token that the model does not know.
    """
    selection = Selection.of(where, max_cells, seed, default_seed=SEED)
    first, stop = _window(window)
    left = {"tokens": folder.n_cells}
    cells = np.arange(folder.n_cells)
    if where:
        assert selection is not None
        cells = selection.matching(folder)
        left["where"] = len(cells)
    if state is not None:
        cells = _of_state(folder, cells, *state, is_filtered=bool(where))
        left["state"] = len(cells)
    if edits.anchor is not None or (edits.items is not None and edits.needs != "none"):
        cells = _with_genes(folder, cells, edits)
        left["genes"] = len(cells)
    if not len(cells):
        raise InputError(f"{folder.path}: there are no cells to perturb")
    if max_cells is not None and max_cells < len(cells):
        cells = cells[np.random.default_rng(SEED if seed is None else seed).permutation(len(cells))[:max_cells]]
        left["max_cells"] = len(cells)
    lengths = _checked_lengths(folder, cells, edits, n_tokens)
    order = np.argsort(-lengths, kind="stable")
    if window is not None:
        order = _within(order, first, stop)
        left["window"] = len(order)
    return ChosenCells(cells[order], lengths[order], left)


def packed_cells(folder: TokenFolder, cells: np.ndarray, n_at_once: int) -> Iterator[tuple[np.ndarray, Ragged]]:
    """Some cells of a folder, so many at a time: their numbers, and their tokens on the host."""
    for start in range(0, len(cells), n_at_once):
        some = cells[start : start + n_at_once]
        values, bounds = folder.read(some)
        lengths = np.diff(bounds)
        longest = int(lengths.max(initial=0))
        cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
        yield some, Ragged(torch.from_numpy(values.astype(np.int64)), cu_seqlens, longest)


def cells_at_once(edits: Edits) -> int:
    """Cells whose edits are looked at together: lists and cells make a table."""
    n_lists = 1 if edits.items is None else len(edits.items)
    return max(1, min(_CELLS_AT_ONCE, _PLACES_AT_ONCE // n_lists))


def _of_state(folder: TokenFolder, cells: np.ndarray, column: str, value: Any, *, is_filtered: bool) -> np.ndarray:
    """Cells in the state that is started from."""
    start = Selection.of({column: value}, None, None)
    assert start is not None
    kept = cells[np.isin(cells, start.matching(folder), assume_unique=True)]
    if not len(kept) and is_filtered:
        raise InputError(f"{folder.path}: no cell that where leaves has {column} {value!r}, the state to start from")
    return kept


def _with_genes(folder: TokenFolder, cells: np.ndarray, edits: Edits) -> np.ndarray:
    """Cells with the genes that are perturbed."""
    has_edits = [
        some[edits.on(packed).n_variants > 0] for some, packed in packed_cells(folder, cells, cells_at_once(edits))
    ]
    kept = np.concatenate(has_edits) if has_edits else cells
    if not len(kept):
        if edits.anchor is not None:
            what = f"the anchor (token {edits.anchor}) and another of the genes"
        elif edits.sets is not None or not (edits.together or edits.pairs):
            what = "any of the genes to perturb"
        else:
            what = "both genes of any pair" if edits.pairs else "all genes to perturb"
        raise InputError(f"{folder.path}: none of {len(cells):,} cells has {what}")
    return kept


def _checked_lengths(folder: TokenFolder, cells: np.ndarray, edits: Edits, n_tokens: int | None) -> np.ndarray:
    """[n] tokens of cells, which can be perturbed and read by the model."""
    lengths = np.zeros(len(cells), dtype=np.int64)
    for start, (some, packed) in enumerate(packed_cells(folder, cells, _CELLS_AT_ONCE)):
        each = packed.lengths.long().numpy()
        lengths[start * _CELLS_AT_ONCE : start * _CELLS_AT_ONCE + len(some)] = each
        if edits.max_len is not None and packed.max_len > edits.max_len:
            raise InputError(
                f"{folder.path}: cell {some[each.argmax()]} has {each.max():,} tokens, and the model reads "
                f"{edits.max_len:,}: tokenize again for this model, or leave the cell out"
            )
        _check_tokens(folder, some, packed, n_tokens)
    return lengths


def _check_tokens(folder: TokenFolder, cells: np.ndarray, packed: Ragged, n_tokens: int | None) -> None:
    """Refuse cells with a gene twice, of which nobody knows which one is meant, and tokens that a model lacks."""
    values, cell = packed.values.numpy(), packed.cell_index().numpy()
    if n_tokens is not None and len(values) and not 0 <= values.min() <= values.max() < n_tokens:
        wrong = int(((values < 0) | (values >= n_tokens)).argmax())
        raise VocabularyError(
            f"{folder.path}: cell {cells[cell[wrong]]} has token {values[wrong]}, and the model knows tokens up to "
            f"{n_tokens - 1}: the tokens belong to another vocabulary"
        )
    keys = np.sort(cell * (int(values.max(initial=0)) + 1) + values)
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
        number, token = divmod(int(keys[twice[0]]), int(values.max()) + 1)
        raise InputError(
            f"{folder.path}: cell {cells[number]} has token {token} twice, so it is no ranking of genes; tokenize "
            "the counts again, or leave the cell out"
        )


def _window(window: tuple[int | None, int | None] | None) -> tuple[int, int | None]:
    """First and last of a window."""
    start, stop = (None, None) if window is None else window
    start = 0 if start is None else start
    if start < 0 or (stop is not None and stop <= start):
        raise UnsupportedError(f"window must be (start, stop) with 0 <= start < stop, not ({start}, {stop})")
    return start, stop


def _within(order: np.ndarray, start: int, stop: int | None) -> np.ndarray:
    if start >= len(order):
        raise UnsupportedError(f"window begins with cell {start:,} of {len(order):,} that are left to perturb")
    if stop is not None and stop > len(order):
        warnings.warn(f"window ends with the last of {len(order):,} cells, not with {stop:,}", stacklevel=4)
    return order[start:stop]
