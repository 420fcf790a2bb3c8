"""Cells of families that read values: one block of counts by the rule of a family, as sparse cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_fast.counts import CountSource
from geneformer_fast.counts.arrays import number_array
from geneformer_fast.counts.identifiers import id_text
from geneformer_fast.errors import UnsupportedError, VocabularyError
from geneformer_fast.families.gene_list import SAVED_FILE, GeneList
from geneformer_fast.families.preparation import Counted, Facts, Preparation
from geneformer_fast.tokenization.doubts import totals_tally
from geneformer_fast.tokenization.manifest import PREPARATION
from geneformer_fast.tokenization.ranking import Ranked
from geneformer_fast.tokenization.tally import NAMED_ROWS
from geneformer_fast.tokenization.totals import cell_totals

if TYPE_CHECKING:
    from geneformer_fast.tokenization.inputs import Task
    from geneformer_fast.tokenization.vocabulary import Vocabulary

#: Columns of a folder of values, beside those of every token folder.
VALUES, TOTAL = "values", "total"
# Columns of var that hold symbols, looked into where the ids that come first are not those of the list.
_OTHER_COLUMNS = ("var_names", "feature_name", "gene_name", "gene_symbols", "gene_symbol", "symbol", "gene_short_name")


@dataclass(frozen=True, eq=False)
class ValueGenes:
    """A family that reads values, its genes, and what a user chose: what ``tokenize`` makes cells by.

    It stands where a :class:`Vocabulary` stands for families that read ranked tokens.

    Attributes
    ----------
    family
        Its name in the registry.
    preparation
        Its rule.
    genes
        The list.
    options
        All options of the rule.
    """

    family: str
    preparation: Preparation
    genes: GeneList
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        # A row has a place for every gene of such a list.
        if self.preparation.is_dense and sorted(self.genes.token_ids.values()) != list(range(len(self.genes))):
            raise VocabularyError(
                f"the gene list of {self.family}: its numbers must be 0 to {len(self.genes) - 1}, the places of genes"
            )

    @classmethod
    def from_folder(cls, path: str | Path, family: str, options: Mapping[str, Any] | None = None) -> ValueGenes:
        """Read the gene list of a family.

        Parameters
        ----------
        path
            The file with the genes, or a folder that holds it.
        family
            ``"aido-cell"``, ``"scgpt"``, ``"scbert"`` or another that reads values.
        options
            What is chosen otherwise than by default.

        Raises
        ------
        VocabularyError
            No list is there, or it cannot be understood.
        UnsupportedError
            No such family or option.
        """
        preparation = value_preparation(family)
        chosen = preparation.chosen(family, options)
        preparation.is_drawn(chosen)  # refuses what does not go together, before a file is read
        return cls(family, preparation, preparation.genes(Path(path)), chosen)

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"ValueGenes({self.family!r}, {len(self.genes):,} genes{', ' * bool(said)}{said})"

    @property
    def name(self) -> str:
        """Of the list, which is what models call it."""
        return self.genes.name

    @property
    def token_ids(self) -> dict[str, int]:
        """Name of a gene to its number."""
        return self.genes.token_ids

    @property
    def aliases(self) -> dict[str, str]:
        """UPPER-CASE other id to name."""
        return self.genes.aliases

    @property
    def medians(self) -> None:
        """Values need none."""
        return

    @property
    def symbols(self) -> dict[str, str]:
        """Names are symbols already, or are all there is."""
        return {}

    @property
    def special(self) -> dict[str, int]:
        """Numbers that are no genes."""
        return self.genes.special

    @property
    def max_len(self) -> int:
        """Positions that a model reads of a cell, at most, where a user does not say."""
        return self.preparation.max_len or len(self.genes) + self.preparation.n_extra

    @property
    def totals_over_vocabulary(self) -> bool:
        """Whether a cell's total is over the genes of the list only."""
        return self.preparation.totals_over_list(self.options)

    @property
    def is_drawn(self) -> bool:
        """Whether anything is drawn by the name of a cell."""
        return self.preparation.is_drawn(self.options)

    @property
    def input_ids_dtype(self) -> np.dtype:
        """Integer type of stored numbers."""
        return np.dtype(np.int32)

    @property
    def facts(self) -> Facts:
        """What reading the cells needs to know."""
        return Facts(len(self.genes), self.special, self.options, self._n_ids)

    @property
    def _n_ids(self) -> int:
        return max(*self.token_ids.values(), *self.special.values(), -1) + 1

    @property
    def hint(self) -> str:
        """What to do where a file has next to none of the genes."""
        advice = "Name the column of var with the names of the list with gene_column= (--gene-column)"
        if not self.aliases:
            advice += ", or put Geneformer's ensembl_mapping_dict beside the list, by which other ids are found"
        return advice + "."

    def identity(self) -> dict[str, Any]:
        """The few values that tell lists apart, as of a vocabulary."""
        return {
            "name": self.name,
            "family": self.family,
            "special": dict(self.special),
            "n_tokens": None if self.preparation.is_dense else self._n_ids,
            "n_genes": len(self.genes),
            "fingerprint": self.genes.fingerprint,
            "mapping": self.genes.mapping_fingerprint,
        }

    def plan(self) -> dict[str, Any]:
        """What the manifest says of the rule."""
        return {PREPARATION: {"family": self.family, "n_genes": len(self.genes), "options": dict(self.options)}}


def value_preparation(family: str) -> Preparation:
    """The rule of a family that reads values.

    Raises
    ------
    UnsupportedError
        There is no such family, or it reads ranked tokens.
    """
    from geneformer_fast import families

    found = families.family(family).preparation
    if found is None:
        raise UnsupportedError(f"{family} reads ranked tokens, which tokenize makes without options of a family")
    rule: Preparation = found() if callable(found) else found
    return rule


def make_value_genes(
    dictionary: Any, family: str, options: Mapping[str, Any] | None, preset: str | None = None
) -> ValueGenes:
    """The genes of a family that reads values, of a :class:`GeneList`, a file or a folder.

    Raises
    ------
    VocabularyError
        None is given, or one of another family.
    UnsupportedError
        A preset, which is of ranked tokens; or no such option.
    """
    if preset is not None:
        raise UnsupportedError(f"preset (--preset) is a choice among Geneformer's dictionaries, and {family} has none")
    if isinstance(dictionary, ValueGenes):
        if dictionary.family != family:
            raise VocabularyError(f"these genes are of {dictionary.family}, not of {family}")
        if options:
            raise UnsupportedError("options (--option) were chosen with these genes already; leave them out")
        return dictionary
    preparation = value_preparation(family)
    if dictionary is None:
        raise VocabularyError(
            f"no genes given: --dictionary (dictionary=) names the file with the genes of {family}, or a folder that "
            f"holds it as {' or '.join(preparation.patterns)} or genes.json"
        )
    if isinstance(dictionary, GeneList):
        if dictionary.family != family:
            raise VocabularyError(f"these genes are of {dictionary.family}, not of {family}")
        chosen = preparation.chosen(family, options)
        preparation.is_drawn(chosen)
        return ValueGenes(family, preparation, dictionary, chosen)
    if not isinstance(dictionary, str | Path):
        raise VocabularyError(f"{family} reads a list of genes, not a {type(dictionary).__name__}")
    return ValueGenes.from_folder(dictionary, family, options)


def has_genes(folder: Path, family: str) -> bool:
    """Whether a folder holds the gene list of a family, under a name that one has."""
    return any(any(folder.glob(pattern)) for pattern in (SAVED_FILE, *value_preparation(family).patterns))


def ids_for(source: CountSource, genes: Vocabulary | ValueGenes, asked: str | None) -> tuple[np.ndarray, str]:
    """The gene ids of a file, and the column of var they are from.

    Files often have symbols beside Ensembl ids, and lists of families that read values are of symbols: where nobody
    named a column and the ids that come first are mostly unknown to such a list, the column is taken that has most of
    its genes.
    """
    ids, column = source.gene_ids(), source.gene_ids_from
    if asked is not None or not isinstance(genes, ValueGenes):
        return ids, column
    best = _n_known(ids, genes)
    if 2 * best >= min(len(ids), len(genes.token_ids)):
        return ids, column
    for other in _OTHER_COLUMNS:
        if other != column and (found := source.gene_ids_of(other)) is not None:
            n_known = _n_known(found, genes)
            if n_known > best:
                ids, column, best = found, other, n_known
    return ids, column


def _n_known(ids: np.ndarray, genes: ValueGenes) -> int:
    names = id_text(ids)
    return sum(name in genes.token_ids or name.upper() in genes.aliases for name in names)


def value_cells(task: Task, genes: ValueGenes, max_len: int) -> Ranked:
    """The cells of one block, those aside that are filtered or have no genes, or too few."""
    from geneformer_fast.families.preparations import loops

    block, entry, rule = task.block, task.prepared, genes.preparation
    gene_map, n_entries = entry.gene_map, len(block.indices)
    totals = cell_totals(task, genes)
    bounds, ids, counts = np.empty_like(block.indptr), np.empty(n_entries, np.int32), np.empty(n_entries)
    filled = loops.collapse(
        block.indptr, block.indices, block.data, gene_map.column_to_gene, len(gene_map.genes), bounds, ids, counts
    )
    ids, counts, lengths = gene_map.token_ids[ids[:filled]], counts[:filled], np.diff(bounds)
    is_asked = np.ones(block.n_cells, dtype=bool) if task.is_asked is None else task.is_asked
    is_wanted = is_asked if task.is_wanted is None else is_asked & task.is_wanted
    least = max(1, rule.least_genes(genes.options))
    is_kept = is_wanted & (lengths >= least)
    if not is_kept.all():
        is_in = np.repeat(is_kept, lengths)
        ids, counts = ids[is_in], counts[is_in]
    kept = np.flatnonzero(is_kept)
    counted = Counted(
        np.concatenate([[0], np.cumsum(lengths[kept])]), ids, counts, totals[kept],
        None if task.keys is None else task.keys[kept],
    )  # fmt: skip
    stored = rule.prepare(counted, genes.genes, {**genes.options, "max_len": max_len})
    empty = np.flatnonzero(is_wanted & (lengths == 0)) + block.start
    n_stored = np.diff(stored.bounds)
    tally = {
        "read": int(is_asked.sum()),
        "written": len(kept),
        "filtered": int(is_asked.sum() - is_wanted.sum()),
        "empty": len(empty),
        "empty_rows": empty[:NAMED_ROWS].tolist(),
        "few_genes": int((is_wanted & (lengths > 0) & (lengths < least)).sum()),
        "full": 0 if rule.max_len is None else int((n_stored + rule.n_extra == max_len).sum()),
        "stored_zeros": 0,  # which mean the same here as zeros that are not stored
        **totals_tally(task),
    }
    carried = {
        name: column.slice(block.start, block.n_cells).take(number_array(kept)) for name, column in task.carried.items()
    }
    extra = {VALUES: stored.values}
    if rule.has_totals:
        assert stored.totals is not None
        extra[TOTAL] = stored.totals
    rows, next_row = kept + block.start, block.start + block.n_cells
    block.release()
    return Ranked(task.source, next_row, stored.ids, n_stored, rows, tally, carried, extra)
