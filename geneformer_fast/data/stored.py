"""What a stored cell may hold: genes, and special tokens only where its family puts them.

Tokens that other programs wrote may be padded to one length, hold masks of a training, or be cut. A model would read
all of that as genes, so it is looked for in every cell that is read for one.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np

from geneformer_fast.errors import InputError
from geneformer_fast.tokenization.arrow import TokenFolder

#: What stands before and after the genes; other special tokens have no place in a stored cell.
_FIRST, _LAST = ("cls",), ("eos", "sep")
_MEANT = {"cls": "CLS", "eos": "EOS", "pad": "padding", "mask": "the mask of a training"}
_CELLS_AT_ONCE = 4096


class StoredCells:
    """Checks cells of a token folder as they are read, and leaves out padding after their genes.

    Parameters
    ----------
    folder
        Whose cells.
    special
        Name to id of the special tokens of their vocabulary.
    """

    def __init__(self, folder: TokenFolder, special: Mapping[str, int]) -> None:
        self._folder, self._path = folder, folder.path
        self.special = {str(name): int(token) for name, token in special.items()}
        self._most = max(self.special.values())
        self._ids = np.array(sorted(self.special.values()))
        self._lock = threading.Lock()
        self._is_counted = False

    def __call__(self, cells: np.ndarray, values: np.ndarray, cu_seqlens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cells as a model may read them.

        Parameters
        ----------
        cells
            [n] their numbers in the folder, for messages.
        values, cu_seqlens
            As ``TokenFolder.read`` gives them.

        Raises
        ------
        InputError
            A cell has no tokens, or special tokens where none may be: it is named.
        """
        n_padded, values, cu_seqlens = self._checked(cells, values, cu_seqlens)
        if n_padded:
            self._count()
        return values, cu_seqlens

    def _checked(
        self, cells: np.ndarray, values: np.ndarray, cu_seqlens: np.ndarray
    ) -> tuple[int, np.ndarray, np.ndarray]:
        """How many cells are padded, and all of them without their padding."""
        n_padded, values, cu_seqlens = without_padding(values, cu_seqlens, self.special.get("pad"))
        self._check(cells, values, cu_seqlens)
        return n_padded, values, cu_seqlens

    def _check(self, cells: np.ndarray, values: np.ndarray, cu_seqlens: np.ndarray) -> None:
        starts, stops = cu_seqlens[:-1], cu_seqlens[1:]
        is_empty = starts == stops
        if is_empty.any():
            self._refuse(cells[is_empty.argmax()], "has no tokens")
        # Special ids are the smallest of every family, so that few tokens are looked at twice.
        places = np.flatnonzero(values <= self._most)
        found = values[places]
        cell = np.searchsorted(cu_seqlens, places, side="right") - 1
        is_right = ~np.isin(found, self._ids)
        is_right |= np.isin(found, self._named(_FIRST)) & (places == starts[cell])
        is_right |= np.isin(found, self._named(_LAST)) & (places == stops[cell] - 1)
        if not is_right.all():
            wrong = int(np.argmin(is_right))
            token, place = int(found[wrong]), int(places[wrong] - starts[cell[wrong]])
            name = next(name for name, value in self.special.items() if value == token)
            what = _MEANT.get(name, f"the special token {name!r}")
            where = (
                "among its genes"
                if name == "pad"
                else f"as token {place + 1} of {self._length(cu_seqlens, cell[wrong])}"
            )
            self._refuse(cells[cell[wrong]], f"has {what} (id {token}) {where}")
        for name, ends, side in (("cls", values[starts], "begin"), ("eos", values[stops - 1], "end")):
            if name in self.special and (ends != self.special[name]).any():
                wrong = int((ends != self.special[name]).argmax())
                self._refuse(cells[wrong], f"does not {side} with {_MEANT[name]} (id {self.special[name]})")

    @staticmethod
    def _length(cu_seqlens: np.ndarray, cell: int) -> int:
        return int(cu_seqlens[cell + 1] - cu_seqlens[cell])

    def _named(self, names: tuple[str, ...]) -> list[int]:
        return [self.special[name] for name in names if name in self.special]

    def _refuse(self, cell: int, what: str) -> NoReturn:
        raise InputError(
            f"{self._path}: cell {int(cell)} {what}, which no model was trained to read; tokenize the counts again, or "
            "leave the cell out"
        )

    def _count(self) -> None:
        """Look at the whole folder once some padding was found: how much of it there is, and whether all may go."""
        with self._lock:
            if self._is_counted:
                return
            self._is_counted = True
            n_padded = 0
            for start in range(0, self._folder.n_cells, _CELLS_AT_ONCE):
                cells = np.arange(start, min(start + _CELLS_AT_ONCE, self._folder.n_cells))
                n_padded += self._checked(cells, *self._folder.read_stored(cells))[0]
            warnings.warn(padding_message(self._path, n_padded, self._folder.n_cells), UserWarning, stacklevel=2)


def padding_message(path: Path, n_padded: int, n_cells: int) -> str:
    """What is said once of a folder with padded cells."""
    return f"{path}: {n_padded:,} of {n_cells:,} cells are stored with padding after their genes, which is left out"


def without_padding(
    values: np.ndarray, cu_seqlens: np.ndarray, pad_id: int | None
) -> tuple[int, np.ndarray, np.ndarray]:
    """How many cells end with padding, and packed cells without it.

    Parameters
    ----------
    values, cu_seqlens
        Packed tokens, and [n + 1] where each cell begins and ends.
    pad_id
        The token that is padding; None where the vocabulary has none.
    """
    lengths = np.diff(cu_seqlens)
    ends = values[cu_seqlens[1:][lengths > 0] - 1] if len(values) else values
    if pad_id is None or not (ends == pad_id).any():
        return 0, values, cu_seqlens
    # The place of the last token of each cell that is no padding: a running maximum that begins before the cell.
    places = np.where(values != pad_id, np.arange(len(values)), -1)
    last = np.full(len(lengths), -1, dtype=np.int64)
    last[lengths > 0] = np.maximum.reduceat(places, cu_seqlens[:-1][lengths > 0])
    kept = np.maximum(last + 1 - cu_seqlens[:-1], 0)
    is_kept = np.arange(len(values)) < np.repeat(cu_seqlens[:-1] + kept, lengths)
    bounds = np.zeros_like(cu_seqlens)
    np.cumsum(kept, out=bounds[1:])
    return int((kept < lengths).sum()), values[is_kept], bounds
