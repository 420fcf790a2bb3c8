"""scBERT: counts as six levels of log2, over the genes of gene2vec.

The original normalises to 10,000, takes ``log1p`` to base 2, cuts off what is behind the point and lets 5 stand for
more. A level is therefore the number of k from 1 to 5 with ``count * 10,000 >= (2**k - 1) * total``. That is computed
here, exactly for whole counts: no logarithm that another library or processor would round to the other side.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_fast.families.gene_list import GeneList, read_gene_list
from geneformer_fast.families.preparation import Counted, Facts, Option, Preparation, Stored

FAMILY = "scbert"
PATTERNS = ("panglao*.h5ad", "gene2vec*.tsv", "gene2vec*.csv", "gene2vec*.txt")
#: Counts per so many, and the largest level.
PER, MOST = 10_000.0, 5

OPTIONS = {
    "min_genes": Option(
        200,
        "cells with fewer expressed genes of the list are left out, as the original's preprocessing does; 1 keeps all",
        least=1,
    ),
}


def prepare(counted: Counted, genes: GeneList, options: Mapping[str, Any]) -> Stored:
    """Levels from 1 to 5; genes of level 0 are not stored."""
    lengths = np.diff(counted.indptr)
    totals = np.repeat(counted.totals.astype(np.float64), lengths)
    scaled = counted.counts * PER
    levels = np.zeros(len(scaled), dtype=np.float32)
    for level in range(1, MOST + 1):
        levels += scaled >= (2**level - 1) * totals
    kept = levels > 0
    bounds = np.concatenate([[0], np.cumsum(kept)])[counted.indptr]
    return Stored(counted.ids[kept], levels[kept], bounds.astype(np.int64))


def expand(cells: Stored, facts: Facts, is_there: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """[n * (n_genes + 1)] int16: a level for every gene of the list, and a 0."""
    length = facts.n_genes + 1
    rows = np.zeros((cells.n_cells, length), dtype=np.int16)
    rows[np.repeat(np.arange(cells.n_cells), np.diff(cells.bounds)), cells.ids] = cells.values.astype(np.int16)
    return rows.reshape(-1), np.arange(cells.n_cells + 1, dtype=np.int64) * length


def genes(path: Path) -> GeneList:
    """The list, in the order of gene2vec: row names of the original's panglao .h5ad, or a table."""
    return read_gene_list(path, FAMILY, PATTERNS)


PREPARATION = Preparation(
    inputs="tokens",
    patterns=PATTERNS,
    genes=genes,
    prepare=prepare,
    expand=expand,
    is_dense=True,
    n_extra=1,
    options=OPTIONS,
    least_genes=lambda options: options["min_genes"],
)
