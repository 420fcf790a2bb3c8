"""Which cells are trained and evaluated on, and whether a model can read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import InputError, UnsupportedError
from geneformer_fast.tokenization.arrow import TokenFolder

# Held out by default: this share, but not more cells than tell a loss to the third digit.
_EVAL_SHARE, _MOST_EVAL_CELLS = 0.01, 10_000


def checked_cells(cells: np.ndarray, tokens: TokenFolder) -> np.ndarray:
    """[N] int64, ascending, each once."""
    cells = np.asarray(cells)
    cells = np.flatnonzero(cells) if cells.dtype == bool else cells.astype(np.int64)
    if len(cells) and not 0 <= cells.min() <= cells.max() < tokens.n_cells:
        raise InputError(
            f"cells {cells.min()} to {cells.max()} are not all among the {tokens.n_cells} of {tokens.path}"
        )
    unique = np.unique(cells)
    if len(unique) != len(cells):
        raise InputError("cells to train or evaluate on are named more than once; repeat them with a sampler")
    return unique


def checked_eval_cells(
    cells: np.ndarray | None, eval_tokens: TokenFolder | None, train_cells: np.ndarray, tokens: TokenFolder
) -> np.ndarray:
    """[N] int64, ascending, each once, of ``eval_tokens``, else of ``tokens``; None: all of the one, none of the other.

    Raises
    ------
    InputError
        A cell is trained on as well.
    """
    if cells is None:
        cells = np.arange(0 if eval_tokens is None else eval_tokens.n_cells)
    found = checked_cells(cells, tokens if eval_tokens is None else eval_tokens)
    if eval_tokens is None and (shared := np.intersect1d(train_cells, found)).size:
        raise InputError(f"cell {shared[0]} is both in the training and in the evaluation cells; choose one")
    return found


def check_lengths(model: nn.Module, tokens: TokenFolder, lengths: np.ndarray) -> None:
    """Refuse cells that are longer than a model has positions, before anything is computed."""
    for module in model.modules():
        if isinstance(module, Encoder) and (n_long := int((lengths > module.config.max_len).sum())):
            limit = module.config.max_len
            raise InputError(
                f"{tokens.path}: {n_long:,} cells are longer than the model's {limit:,} positions (the longest has "
                f"{lengths.max():,}); use tokenize --max-len {limit} (max_len={limit}), or a longer model"
            )


def split_cells(
    tokens: TokenFolder,
    seed: int,
    eval_share: float | None = None,
    eval_tokens: TokenFolder | None = None,
    eval_column: tuple[str, Sequence[Any]] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """(training cells, evaluation cells), ascending; None for all cells of ``eval_tokens``.

    The same folder and seed give the same cells.
    """
    if sum(option is not None for option in (eval_share, eval_tokens, eval_column)) > 1:
        raise UnsupportedError("hold cells out by a share, by a folder, or by a column: choose one of them")
    if not tokens.n_cells:
        raise InputError(f"{tokens.path}: holds no cells")
    everything = np.arange(tokens.n_cells)
    if eval_tokens is not None:
        return everything, None
    if eval_column is not None:
        name, values = eval_column
        found = np.asarray(tokens.column(name).to_pylist(), dtype=object).astype(str)
        is_held_out = np.isin(found, [str(value) for value in values])
        if missing := [str(value) for value in values if str(value) not in set(found)]:
            raise InputError(f"{tokens.path}: no cell has {name} {missing[0]!r}, which was to be held out")
        if is_held_out.all():
            raise InputError(f"{tokens.path}: every cell has such a {name}; none is left to train on")
        return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    if eval_share is not None and not 0 <= eval_share < 1:
        raise UnsupportedError(f"the share of held-out cells must be from 0 to below 1, not {eval_share}")
    n_held_out = round((_EVAL_SHARE if eval_share is None else eval_share) * tokens.n_cells)
    if eval_share is None:
        n_held_out = min(n_held_out, _MOST_EVAL_CELLS)
    held_out = np.random.default_rng(seed).choice(everything, min(n_held_out, tokens.n_cells - 1), replace=False)
    return np.setdiff1d(everything, held_out), np.sort(held_out)
