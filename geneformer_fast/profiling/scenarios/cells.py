"""The cells that a run is profiled on: those of a token folder, or made-up ones of given lengths."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from geneformer_fast import families
from geneformer_fast.config import EncoderConfig
from geneformer_fast.data.identity import identity_of
from geneformer_fast.data.values import ValueCells, values_of
from geneformer_fast.errors import InputError, UnsupportedError
from geneformer_fast.extract.cells import Cells
from geneformer_fast.profiling.lengths import Lengths
from geneformer_fast.tokenization.arrow import TokenFolder, open_tokens

#: Made-up cells, where nobody says how many.
MADE_UP_CELLS = 4096
# Made-up genes, of which every cell takes a stretch that begins elsewhere: numbers that are prime to each other.
_N_DRAWN, _STRIDE = 1_048_573, 40_961


class HasLengths(Protocol):
    """Cells whose lengths are known."""

    #: Where they come from, for messages.
    path: Any

    def lengths(self) -> np.ndarray:
        """[n_cells] int64, tokens per cell."""


class ProfileCells(HasLengths, Protocol):
    """Cells to profile on, read as those of a token folder (``fit`` takes them for one)."""

    #: Of their vocabulary: ``special`` and what else is known.
    identity: Mapping[str, Any]
    #: Where they come from, for the report.
    what: str

    @property
    def n_cells(self) -> int:
        """How many there are."""

    def read(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Packed tokens of some cells, and where each begins and ends."""

    def values(self) -> ValueCells | None:
        """How values are read; None for ranked tokens."""


class StoredCells:
    """Cells of a token folder.

    Parameters
    ----------
    folder
        The folder.
    config
        Of the model that is to read them.

    Raises
    ------
    VocabularyError
        They belong to another vocabulary.
    """

    def __init__(self, folder: TokenFolder, config: EncoderConfig) -> None:
        self.folder, self.path = folder, folder.path
        self.identity: Mapping[str, Any] = identity_of(folder, config)
        self.what = f"{folder.path.name}: {folder.n_cells:,} cells"

    @property
    def n_cells(self) -> int:
        """How many the folder has."""
        return self.folder.n_cells

    def lengths(self) -> np.ndarray:
        """[n_cells] int64, tokens per cell."""
        return self.folder.lengths()

    def read(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`TokenFolder.read`."""
        return self.folder.read(cells)

    def values(self) -> ValueCells | None:
        """How values are read; None for ranked tokens."""
        return values_of(self.folder)


class MadeUpCells:
    """Cells of given lengths, their genes drawn by chance; the same on every machine.

    Parameters
    ----------
    lengths
        [n_cells] tokens per cell, special tokens included.
    config
        Of the model that is to read them.
    what
        Which lengths, in words.
    """

    path = "made-up cells"

    def __init__(self, lengths: np.ndarray, config: EncoderConfig, what: str) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self.identity: Mapping[str, Any] = _made_up_identity(config)
        self.what = f"{len(lengths):,} made-up cells, {what}"
        special = self.identity["special"]
        ids = np.setdiff1d(np.arange(config.vocab_size), list(special.values()))
        if not len(ids):
            raise UnsupportedError(f"a vocabulary of {config.vocab_size} tokens has no genes to make cells of")
        self._genes = ids[np.random.default_rng(0).integers(len(ids), size=_N_DRAWN)]
        self._first = special.get("cls")
        self._last = special.get("eos", special.get("sep"))

    @property
    def n_cells(self) -> int:
        """How many there are."""
        return len(self._lengths)

    def values(self) -> ValueCells | None:
        """Ranked tokens have none."""
        return None

    def lengths(self) -> np.ndarray:
        """[n_cells] int64, tokens per cell."""
        return self._lengths.copy()

    def read(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Packed tokens of some cells, and where each begins and ends."""
        cells = np.asarray(cells, dtype=np.int64)
        lengths = self._lengths[cells]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        within = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
        values = self._genes[(within + np.repeat(cells * _STRIDE, lengths)) % _N_DRAWN]
        has_room = lengths > 1
        if self._first is not None:
            values[bounds[:-1]] = self._first
        if self._last is not None:
            values[bounds[1:][has_room] - 1] = self._last
        return values, bounds


def _made_up_identity(config: EncoderConfig) -> dict[str, Any]:
    """A vocabulary for made-up cells: the published one of the model, or special tokens where most have them."""
    published = families.layout_of_vocabulary(config.vocabulary)
    if published is not None and config.vocab_size > max(published[1].special.values()):
        special = dict(published[1].special)
    else:
        special = {"pad": config.pad_id, "mask": 0 if config.pad_id else 1}
    return {"name": config.vocabulary, "special": special, "n_tokens": config.vocab_size, "fingerprint": None}


@contextlib.contextmanager
def open_profile_cells(
    config: EncoderConfig, *, tokens: str | os.PathLike[str] | None, lengths: str | None, n_cells: int | None
) -> Iterator[ProfileCells]:
    """The cells that a user names.

    Parameters
    ----------
    config
        Of the model.
    tokens
        A token folder; or
    lengths
        what made-up cells are like (:meth:`Lengths.parsed`).
    n_cells
        How many made-up cells; None: :data:`MADE_UP_CELLS`.

    Raises
    ------
    InputError
        The folder is empty, or has cells that are longer than the model.
    UnsupportedError
        The model reads values and no folder is given, or made-up cells would be longer than it.
    """
    if tokens is None:
        family = families.family_of(config)
        if config.inputs != "tokens" or (family is not None and family.preparation is not None):
            raise UnsupportedError(
                "cells are made up of ranked tokens only, and this encoder reads values: give a folder of them, made "
                "with tokenize --family"
            )
        assert lengths is not None
        chosen = Lengths.parsed(lengths)
        yield MadeUpCells(chosen.of(n_cells or MADE_UP_CELLS, config.max_len), config, str(chosen))
        return
    with contextlib.closing(open_tokens(tokens)) as folder:
        found = StoredCells(folder, config)
        check_readable(found, config)
        yield found


def check_readable(cells: HasLengths, config: EncoderConfig) -> None:
    """Refuse cells that are none, or longer than a model has positions, before anything is computed.

    Raises
    ------
    InputError
        Naming the folder.
    """
    lengths = cells.lengths()
    if not len(lengths):
        raise InputError(f"{cells.path}: holds no cells")
    if n_long := int((lengths > config.max_len).sum()):
        limit = config.max_len
        raise InputError(
            f"{cells.path}: {n_long:,} cells are longer than the model's {limit:,} positions (the longest has "
            f"{lengths.max():,}); use tokenize --max-len {limit}, or a longer model"
        )


def evenly(lengths: np.ndarray, n_cells: int) -> np.ndarray:
    """Cell numbers, ascending, at even steps through the lengths: few cells that are long and short as all are.

    Parameters
    ----------
    lengths
        [n] tokens per cell.
    n_cells
        How many; at most n.
    """
    n_cells = max(1, min(n_cells, len(lengths)))
    by_length = np.argsort(lengths, kind="stable")
    return np.sort(by_length[((np.arange(n_cells) + 0.5) / n_cells * len(lengths)).astype(np.int64)])


def to_embed(cells: ProfileCells, chosen: np.ndarray) -> Cells:
    """Some cells as ``embed`` reads them; their lengths are those without padding once they were read."""
    lengths = cells.lengths()[chosen]

    def read(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, bounds = cells.read(chosen[numbers])
        lengths[numbers] = np.diff(bounds)
        return values, bounds

    def column(name: str) -> pa.ChunkedArray:
        return pa.chunked_array([pa.array(lengths)])

    rows, of_values = np.arange(len(chosen)), cells.values()
    return Cells(
        lengths, read, rows, len(rows), cells.identity, ["length"], column,
        values=None if of_values is None else of_values.of(chosen),
    )  # fmt: skip
