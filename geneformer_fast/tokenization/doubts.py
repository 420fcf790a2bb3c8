"""What can be read, but is probably not what was meant: said in warnings and in the report, with the consequence."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from geneformer_fast.counts import CountSource

if TYPE_CHECKING:
    from geneformer_fast.tokenization.inputs import Task
    from geneformer_fast.tokenization.values import ValueGenes
    from geneformer_fast.tokenization.vocabulary import Vocabulary

# Single-cell assays of the whole transcriptome list 10,000 genes and more; selections of variable genes, and panels,
# hold at most this many.
_SELECTED_GENES = 5_000
_WHOLE_VOCABULARY = 10_000
# Barcodes of different samples come from one list of 737,000 or more: a few in a hundred are the same by chance.
_SHARED_BY_CHANCE = 0.1
_MOST_HASHES = 8_000_000
# Of many inputs with one name, each is compared with so many neighbours only: equal inputs stay few pairs.
_MOST_COMPARED = 8
# Counts above the total of a cell are of something else; below, genes were removed, of which a few are no matter.
_ABOVE, _BELOW = 1.01, 0.8
_FEW_CELLS = 0.1


def warn(message: str) -> None:
    """Say it at once; the report says it again."""
    warnings.warn(message, stacklevel=2)


def about_genes(source: CountSource, vocabulary: Vocabulary | ValueGenes) -> str | None:
    """What to say where genes look like a selection of variable ones, or a panel."""
    if source.n_genes > _SELECTED_GENES or len(vocabulary.token_ids) < _WHOLE_VOCABULARY:
        return None
    consequence = (
        "Values are relative to all genes that a cell expresses: these will be larger than those the models were "
        "trained on"
        if vocabulary.medians is None
        else "Tokens are ranks among all genes that a cell expresses: these will be shorter and in other places than "
        "those the models were trained on"
    )
    return (
        f"{source.name}: {source.counts_from} has only {source.n_genes:,} genes, as a selection of highly variable "
        f"genes or a targeted panel has. {consequence}. Give the counts of all measured genes if there are any"
    )


class CellNames:
    """The names of cells of many inputs, to find inputs that share more of them than chance explains.

    Names are remembered as 32-bit hashes; beyond some millions, as a sample of them that is the same in all inputs.
    """

    def __init__(self) -> None:
        self._inputs: list[str] = []
        self._hashes: list[np.ndarray] = []
        self._limit = 1 << 32

    def add(self, source: CountSource) -> None:
        """Remember the names of an input; names that are row numbers name no cells."""
        names = source.cell_names().tolist()
        if names[0].isdigit() and names[-1].isdigit():
            return
        hashes = (crc32(name.encode("utf-8", "surrogatepass")) for name in names)
        kept = np.unique(np.fromiter(hashes, dtype=np.uint32, count=len(names)))
        self._inputs.append(source.name)
        self._hashes.append(kept[kept < self._limit])
        while sum(map(len, self._hashes)) > _MOST_HASHES:
            self._limit //= 2
            self._hashes = [kept[kept < self._limit] for kept in self._hashes]

    def messages(self) -> dict[str, str]:
        """Name of an input -> what to say about it and an earlier one."""
        if len(self._inputs) < 2 or sum(map(len, self._hashes)) < 2:
            return {}
        sizes = [len(kept) for kept in self._hashes]
        hashes = np.concatenate(self._hashes)
        owners = np.repeat(np.arange(len(sizes)), sizes)
        order = np.lexsort((owners, hashes))
        hashes, owners = hashes[order], owners[order]
        pairs = []
        for apart in range(1, min(_MOST_COMPARED, len(hashes))):
            is_same = hashes[apart:] == hashes[:-apart]
            pairs.append(np.stack([owners[:-apart][is_same], owners[apart:][is_same]]))
        shared, counts = np.unique(np.concatenate(pairs, axis=1), axis=1, return_counts=True)
        found: dict[str, str] = {}
        for i in np.argsort(counts).tolist():  # the largest last, which stays
            first, second = shared[:, i].tolist()
            share = counts[i] / min(sizes[first], sizes[second])
            if share > _SHARED_BY_CHANCE:
                found[self._inputs[second]] = (
                    f"{self._inputs[second]} and {self._inputs[first]} share {share:.0%} of the cell names (barcodes) "
                    "of the smaller: the same cells are probably read twice, and results cannot be told apart by "
                    "name. Leave one of them out, or make the names unique"
                )
        return found


def totals_tally(task: Task) -> dict[str, int]:
    """Of the cells in an input's first block: how many were looked at, and how many have other totals than obs says."""
    tally = dict.fromkeys(("totals_looked_at", "totals_above", "totals_below"), 0)
    block, rows = task.block, task.prepared.rows
    if task.n_counts is None or block.start != (0 if rows is None else rows[0]):
        return tally
    from geneformer_fast.counts import loops

    is_counted = np.ones(len(task.prepared.gene_map.column_to_gene), dtype=np.bool_)
    found = loops.row_totals(block.indptr, block.indices, block.data, is_counted)
    is_used = (found > 0) & (task.n_counts > 0)
    for is_left in (task.is_wanted, task.is_asked):
        if is_left is not None:
            is_used &= is_left
    stated = np.asarray(task.n_counts, dtype=np.float64)
    tally["totals_looked_at"] = int(is_used.sum())
    tally["totals_above"] = int((is_used & (found > _ABOVE * stated)).sum())
    tally["totals_below"] = int((is_used & (found < _BELOW * stated)).sum())
    return tally


def about_totals(name: str, column: str | None, tally: Mapping[str, Any]) -> str | None:
    """What to say where counts do not add up to the totals in obs."""
    looked_at, above, below = (tally.get(f"totals_{key}", 0) for key in ("looked_at", "above", "below"))
    if above + below <= _FEW_CELLS * looked_at:
        return None
    if above > _FEW_CELLS * looked_at:
        finding = f"{above:,} of {looked_at:,} cells have counts that add up to more than obs column {column} says"
        reason = "these are not the counts that it was taken from"
    else:
        finding = f"{below:,} of {looked_at:,} cells have counts that add up to less than {_BELOW:.0%} of {column}"
        reason = "genes were removed, which tokens then lack, or these are not the counts that it was taken from"
    return (
        f"{name}: {finding}: {reason}. The official tokenizer divides by {column} all the same, and so does this: the "
        "order of genes within a cell stays, but medians of this file would be off. Check the counts, or pass "
        "--n-counts computed (n_counts='computed')"
    )
