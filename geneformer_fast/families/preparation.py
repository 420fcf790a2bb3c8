"""How counts become what a family reads, where that is no ranking: what such a family declares.

A cell is stored sparse: numbers of genes, a value for each, perhaps the cell's total. What a model reads of it, which
may be a value for every gene there is, is made when it is read. Rules are numpy and compiled loops, without torch.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_fast.errors import OutputError, UnsupportedError
from geneformer_fast.families.gene_list import GeneList


@dataclass(frozen=True)
class Option:
    """What a user may choose about a family's input: one of some words, or a whole number.

    Attributes
    ----------
    default
        Without a choice.
    what
        For help and documentation.
    choices
        The words; empty for a number.
    least, most
        Bounds of a number.
    """

    default: str | int
    what: str
    choices: tuple[str, ...] = ()
    least: int = 0
    most: int = 2**31 - 1

    def checked(self, name: str, value: Any) -> str | int:
        """A value of the right kind, also of text from a command line."""
        if self.choices:
            if value not in self.choices:
                raise UnsupportedError(f"option {name} must be {' or '.join(self.choices)}, not {value!r}")
            return str(value)
        try:
            number = int(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if type(number) is not int or not self.least <= number <= self.most:
            raise UnsupportedError(
                f"option {name} must be a whole number from {self.least} to {self.most}, not {value!r}"
            )
        return number


@dataclass(frozen=True)
class Counted:
    """Cells as sums of counts per gene of the list.

    Attributes
    ----------
    indptr
        [n + 1] int64.
    ids
        int32, numbers of genes, ascending within a cell.
    counts
        float64, above 0; columns of one gene are summed.
    totals
        [n] the cells' totals, which some families divide by.
    keys
        [n] uint64, of the cells' names, to draw by; None where nothing is drawn.
    """

    indptr: np.ndarray
    ids: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    keys: np.ndarray | None


@dataclass(frozen=True)
class Stored:
    """Cells as they are stored.

    Attributes
    ----------
    ids, values
        int32 numbers of genes, ascending within a cell, and a float32 for each.
    bounds
        [n + 1] int64, where each cell begins and ends.
    totals
        [n] float64, for families that keep them.
    """

    ids: np.ndarray
    values: np.ndarray
    bounds: np.ndarray
    totals: np.ndarray | None = None

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.bounds) - 1


@dataclass(frozen=True)
class Facts:
    """What reading stored cells needs to know besides: all of it is in their folder's manifest.

    Attributes
    ----------
    n_genes
        Of the list.
    special
        Numbers that are no genes.
    options
        What was chosen.
    n_ids
        Numbers of genes, and of what is none, are below this.
    """

    n_genes: int
    special: Mapping[str, int]
    options: Mapping[str, Any]
    n_ids: int


@dataclass(frozen=True)
class Preparation:
    """How counts become what a family reads.

    Attributes
    ----------
    inputs
        What its encoders read (``EncoderConfig.inputs``).
    patterns
        How the file with its genes is called in folders that come with its models.
    genes
        Reads such a file or folder.
    prepare
        Takes counts, the genes and all options; gives cells to store.
    expand
        Takes stored cells, the facts, and [n, n_genes] which genes each cell's file has (for families with an order of
        all genes, else None). Gives what a model reads, packed, and [n + 1] bounds.
    is_dense
        Whether a model reads a value for every gene of the list.
    n_extra
        Positions a model reads beyond those.
    has_totals
        Whether totals are stored.
    max_len
        Most positions, where a user may choose it; None where it is given.
    options
        What a user may choose.
    is_drawn
        Takes the options; says whether anything is drawn by chance. UnsupportedError for what does not go together.
    totals_over_list
        Takes the options; whether a total is over the genes of the list (else over all of the file).
    least_genes
        Takes the options; cells with fewer genes of the list are left out.
    uses_totals
        Takes the options; whether anything depends on a cell's total.
    """

    inputs: str
    patterns: tuple[str, ...]
    genes: Callable[[Path], GeneList]
    prepare: Callable[[Counted, GeneList, Mapping[str, Any]], Stored]
    expand: Callable[[Stored, Facts, np.ndarray | None], tuple[np.ndarray, np.ndarray]]
    is_dense: bool
    n_extra: int
    has_totals: bool = False
    max_len: int | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    is_drawn: Callable[[Mapping[str, Any]], bool] = lambda options: False
    totals_over_list: Callable[[Mapping[str, Any]], bool] = lambda options: True
    least_genes: Callable[[Mapping[str, Any]], int] = lambda options: 1
    uses_totals: Callable[[Mapping[str, Any]], bool] = lambda options: True

    def chosen(self, family: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """All options: those given, checked, and the defaults of the others.

        Raises
        ------
        UnsupportedError
            There is no such option, or no such value of it.
        """
        given = given or {}
        unknown = next((name for name in given if name not in self.options), None)
        if unknown is not None:
            known = ", ".join(self.options) or "none"
            raise UnsupportedError(f"{family} has no option {unknown!r}; there are {known}")
        return {
            name: option.checked(name, given[name]) if name in given else option.default
            for name, option in self.options.items()
        }

    def lengths(self, stored: np.ndarray, facts: Facts) -> np.ndarray:
        """[n] positions that a model reads of cells with so many stored genes."""
        if self.is_dense:
            return np.full(len(stored), facts.n_genes + self.n_extra, dtype=np.int64)
        return stored + self.n_extra


def pack_genes(is_there: np.ndarray) -> str:
    """[n_genes] bool as text: which genes of the list a file has."""
    return base64.b64encode(zlib.compress(np.packbits(is_there).tobytes(), 9)).decode("ascii")


def unpack_genes(text: Any, n_genes: int, where: str) -> np.ndarray:
    """The inverse of :func:`pack_genes`; OutputError, beginning with ``where``, for what it did not write."""
    try:
        packed = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), n_genes // 8 + 2)
        bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=n_genes)
    except (ValueError, TypeError, zlib.error):
        bits = np.zeros(0, dtype=np.uint8)
    if len(bits) != n_genes or len(packed) != -(-n_genes // 8):
        raise OutputError(f"{where} does not say which of {n_genes:,} genes it has; tokenize again")
    return bits.astype(bool)


def name_keys(names: Sequence[str]) -> np.ndarray:
    """[n] uint64, a number for each name of a cell, by which chance is drawn: the same for a cell wherever it lies."""
    from hashlib import blake2b

    digests = (
        int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        for name in names
    )
    return np.fromiter(digests, dtype=np.uint64, count=len(names))
