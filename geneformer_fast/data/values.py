"""Cells of families that read values, as a model reads them: expanded from what is stored when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_fast import families
from geneformer_fast.config import EncoderConfig
from geneformer_fast.errors import InputError, OutputError, UnsupportedError, VocabularyError
from geneformer_fast.families.preparation import Facts, Preparation, Stored, unpack_genes
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.tokenization.manifest import GENES_THERE, MANIFEST, PREPARATION
from geneformer_fast.tokenization.values import TOTAL, VALUES, value_preparation

if TYPE_CHECKING:
    from geneformer_fast.tokenization.values import ValueGenes

_INPUTS = {"tokens": "tokens", "values": "a value per gene", "pairs": "pairs of genes and values"}


class ValueCells:
    """Cells as a model of a value family reads them.

    Parameters
    ----------
    preparation, facts
        The family's rule, and what reading its cells needs to know.
    stored
        Takes cell numbers, and their stored genes and bounds where these were read already; gives them as stored.
    stored_lengths
        [n] stored genes per cell.
    sources
        [n] which input each cell is of.
    genes_there
        [inputs, n_genes] which genes of the list each input has; None where that makes no difference.
    where
        What the cells are of, for errors.

    Attributes
    ----------
    lengths
        [n] int64, positions per cell as a model reads them.
    """

    def __init__(
        self,
        preparation: Preparation,
        facts: Facts,
        stored: Callable[[np.ndarray, tuple[np.ndarray, np.ndarray] | None], Stored],
        stored_lengths: np.ndarray,
        sources: np.ndarray,
        genes_there: np.ndarray | None,
        where: str,
    ) -> None:
        self.preparation, self.facts, self._stored, self._where = preparation, facts, stored, where
        self._sources, self._genes_there = sources, genes_there
        self.lengths = preparation.lengths(stored_lengths, facts)
        self.special = dict(facts.special)

    def __call__(
        self, cells: np.ndarray, values: np.ndarray | None = None, cu_seqlens: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Packed values (or pairs [T, 2]) of some cells, and [n + 1] int64 where each begins and ends.

        Raises
        ------
        InputError
            What is stored is no cell of this family: it is named.
        """
        is_read = values is not None and cu_seqlens is not None
        stored = self._checked(cells, (values, cu_seqlens) if is_read else None)  # type: ignore[arg-type]
        return self.preparation.expand(stored, self.facts, self._there(cells))

    def measured(self, cells: np.ndarray) -> np.ndarray | None:
        """[T] bool, which positions of some cells are no genes that their files lack; None: all are."""
        there = self._there(cells)
        if there is None or there.all():
            return None
        found = np.ones((len(cells), self.facts.n_genes + self.preparation.n_extra), dtype=bool)
        found[:, : self.facts.n_genes] = there
        return found.reshape(-1)

    def of(self, numbers: np.ndarray) -> SomeValueCells:
        """Some of the cells, numbered from 0."""
        return SomeValueCells(self, numbers)

    def _there(self, cells: np.ndarray) -> np.ndarray | None:
        return None if self._genes_there is None else self._genes_there[self._sources[cells]]

    def _checked(self, cells: np.ndarray, read: tuple[np.ndarray, np.ndarray] | None) -> Stored:
        """Stored cells, after a look at what would write or read elsewhere, or be no number."""
        cells = np.asarray(cells)
        stored = self._stored(cells, read)
        is_wrong = (stored.ids < 0) | (stored.ids >= self.facts.n_ids) | ~np.isfinite(stored.values)
        if is_wrong.any():
            place = int(is_wrong.argmax())
            cell = int(cells[np.searchsorted(stored.bounds, place, side="right") - 1])
            raise InputError(
                f"{self._where}: cell {cell} has gene {stored.ids[place]} with value {stored.values[place]}, which is "
                "none of its list or no number; tokenize the counts again"
            )
        if stored.totals is not None and not ((stored.totals > 0) & np.isfinite(stored.totals)).all():
            raise InputError(f"{self._where}: a cell has a total that is no positive number; tokenize the counts again")
        return stored


class SomeValueCells:
    """Some of the cells of :class:`ValueCells`, numbered from 0.

    Parameters
    ----------
    cells
        All of them.
    numbers
        [n] which these are.
    """

    def __init__(self, cells: ValueCells, numbers: np.ndarray) -> None:
        self._cells, self._numbers, self.preparation = cells, numbers, cells.preparation

    def measured(self, cells: np.ndarray) -> np.ndarray | None:
        """As :meth:`ValueCells.measured`."""
        return self._cells.measured(self._numbers[cells])

    def of(self, numbers: np.ndarray) -> SomeValueCells:
        """Some of these."""
        return SomeValueCells(self._cells, self._numbers[numbers])


def values_of(folder: TokenFolder) -> ValueCells | None:
    """How a folder's values are read, once :func:`identity_of` has looked at it; None for ranked tokens."""
    return folder.on_read if isinstance(folder.on_read, ValueCells) else None


def preparation_in(folder: TokenFolder) -> dict[str, Any] | None:
    """What a folder's manifest says of the rule of a value family; None where its cells are ranked tokens.

    Raises
    ------
    OutputError
        It says something that no version of this library wrote.
    """
    said = None if folder.manifest is None else folder.manifest.get(PREPARATION)
    if said is None:
        return None
    where = folder.path / MANIFEST
    is_whole = isinstance(said, dict) and isinstance(said.get("family"), str) and isinstance(said.get("options"), dict)
    if not is_whole or type(said.get("n_genes")) is not int or not 0 < said["n_genes"] < 2**24:
        raise OutputError(f"{where}: does not say how its values were made ({PREPARATION}); tokenize again")
    return said


def cells_of_folder(folder: TokenFolder) -> ValueCells:
    """The cells of a folder of values.

    Raises
    ------
    OutputError
        Columns or descriptions of inputs are missing or damaged.
    UnsupportedError
        Its family is not known here.
    """
    said = preparation_in(folder)
    assert said is not None
    assert folder.manifest is not None
    rule = value_preparation(said["family"])
    try:
        options = rule.chosen(said["family"], said["options"])
    except UnsupportedError as error:
        raise OutputError(f"{folder.path / MANIFEST}: {error}; tokenize again") from None
    special = dict(folder.manifest["vocabulary"].get("special") or {})
    n_ids = folder.manifest["vocabulary"].get("n_tokens") or said["n_genes"]
    if not rule.is_dense and "cls" not in special:
        raise OutputError(f"{folder.path / MANIFEST}: does not say which number is <cls>; tokenize again")
    facts = Facts(said["n_genes"], special, options, n_ids)
    folder.locate_values(VALUES)
    totals = folder.column(TOTAL).to_numpy() if rule.has_totals else None

    def stored(cells: np.ndarray, read: tuple[np.ndarray, np.ndarray] | None) -> Stored:
        ids, bounds = folder.read_stored(cells) if read is None else read
        values, _ = folder.read_stored(cells, VALUES)
        return Stored(ids, values, bounds, None if totals is None else totals[cells])

    names = [entry["path"] for entry in folder.manifest["inputs"]]
    there = _genes_there(folder.manifest["inputs"], facts, str(folder.path)) if rule.is_dense else None
    indices = np.concatenate([np.asarray(chunk.indices) for chunk in folder.column("source_file").chunks])
    if len(indices) and not 0 <= indices.min() <= indices.max() < len(names):
        raise OutputError(f"{folder.path}: its column source_file names other inputs than its {MANIFEST}")
    return ValueCells(rule, facts, stored, folder.stored_lengths(), indices, there, str(folder.path))


def cells_in_memory(stored: Stored, genes: ValueGenes, inputs: Sequence[Mapping[str, Any]]) -> ValueCells:
    """The cells of an AnnData that was tokenized in memory, given all of them and the description of the input."""
    bounds, rule = stored.bounds, genes.preparation

    def some(cells: np.ndarray, _: tuple[np.ndarray, np.ndarray] | None) -> Stored:
        parts = [np.arange(bounds[cell], bounds[cell + 1]) for cell in cells.tolist()]
        places = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        cuts = np.concatenate([[0], np.cumsum(np.diff(bounds)[cells])])
        totals = None if stored.totals is None else stored.totals[cells]
        return Stored(stored.ids[places], stored.values[places], cuts, totals)

    there = _genes_there(inputs, genes.facts, "<AnnData>") if rule.is_dense else None
    sources = np.zeros(stored.n_cells, dtype=np.int64)
    return ValueCells(rule, genes.facts, some, np.diff(bounds), sources, there, "<AnnData>")


def _genes_there(inputs: Sequence[Mapping[str, Any]], facts: Facts, where: str) -> np.ndarray:
    return np.stack(
        [unpack_genes(entry.get(GENES_THERE), facts.n_genes, f"{where}: input {i}") for i, entry in enumerate(inputs)]
    )


def check_model(identity: Mapping[str, Any], config: EncoderConfig) -> None:
    """Refuse cells of a value family that a model does not read.

    Parameters
    ----------
    identity
        Of the list of genes, as in a manifest.
    config
        The model's.

    Raises
    ------
    VocabularyError
        Another family, list, kind of input or number of genes.
    """
    family = str(identity["family"])
    rule = value_preparation(family)
    config.check_vocabulary(dict(identity))
    if config.inputs.partition("-")[0] != rule.inputs:  # "pairs-category" reads the same cells as "pairs"
        raise VocabularyError(
            f"these cells were made for {family}, as {_INPUTS.get(rule.inputs, rule.inputs)}, but the model reads "
            f"{_INPUTS.get(config.inputs, config.inputs)}; tokenize for the model's family, or load the model that fits"
        )
    n_positions = int(identity["n_genes"]) + rule.n_extra
    if rule.is_dense and n_positions != config.max_len:
        raise VocabularyError(
            f"these cells have {n_positions:,} positions, for {identity['n_genes']:,} genes of {family}, but the model "
            f"has {config.max_len:,}; tokenize again with the gene list that belongs to the model"
        )


def check_ranked(identity: Mapping[str, Any], config: EncoderConfig) -> None:
    """Refuse ranked tokens that a model of values is to read.

    Raises
    ------
    VocabularyError
        It reads values.
    """
    found = families.family_of(config)
    if config.inputs != "tokens" or (found is not None and found.preparation is not None):
        name = "values" if found is None else f"cells of {found.name}"
        raise VocabularyError(
            f"these tokens are ranks of {identity.get('name') or 'a vocabulary'}, but the model reads {name}; tokenize "
            f"the counts for it: --family {'FAMILY' if found is None else found.name}"
        )
