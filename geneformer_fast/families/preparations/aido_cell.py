"""AIDO.Cell: log counts per ten thousand over 19,264 genes, and the depth twice.

The tool aligns counts to its list, divides by their total in float32, takes ``log1p`` and appends two depths, each
``max(log10(total), 5)``. Here the same is computed in float64 and rounded once to float32, so that a value is the
nearest float32 to the true one; theirs lies within a few roundings of it (and is rounded to bfloat16 on a GPU).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_fast.families.gene_list import GeneList, read_gene_list
from geneformer_fast.families.preparation import Counted, Facts, Option, Preparation, Stored

FAMILY = "aido-cell"
PATTERNS = ("OS_scRNA_gene_index*.tsv",)
#: Counts per so many; the largest value; the least depth; what stands for a gene that nobody measured.
PER, MOST, LEAST_DEPTH, MASKED = 10_000.0, 20.0, 5.0, -1.0
N_DEPTHS = 2

OPTIONS = {
    "missing": Option(
        "zero",
        "what a gene of the list that a file lacks is read as: zero, as the tool's embed.py does, or mask (-1, the "
        "model's mask embedding), as its newer tokenizer does",
        ("zero", "mask"),
    ),
    "totals": Option(
        "list",
        "the total that counts are divided by, and that the depth is of: over the genes of the list, as the tool's, or "
        "over all genes of the file",
        ("list", "all"),
    ),
}


def prepare(counted: Counted, genes: GeneList, options: Mapping[str, Any]) -> Stored:
    """``log1p(count / total * 10,000)``, at most 20."""
    totals = np.repeat(counted.totals.astype(np.float64), np.diff(counted.indptr))
    values = np.minimum(np.log1p(counted.counts / totals * PER), MOST).astype(np.float32)
    return Stored(counted.ids, values, counted.indptr, counted.totals.astype(np.float64))


def expand(cells: Stored, facts: Facts, is_there: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """[n * (n_genes + 2)] float32: a value for every gene of the list, then the depth twice."""
    assert is_there is not None
    assert cells.totals is not None
    length = facts.n_genes + N_DEPTHS
    rows = np.zeros((cells.n_cells, length), dtype=np.float32)
    if facts.options["missing"] == "mask":
        rows[:, : facts.n_genes][~is_there] = MASKED
    rows[np.repeat(np.arange(cells.n_cells), np.diff(cells.bounds)), cells.ids] = cells.values
    depths = np.minimum(np.maximum(np.log10(cells.totals), LEAST_DEPTH), MOST)
    rows[:, facts.n_genes :] = depths[:, None]
    return rows.reshape(-1), np.arange(cells.n_cells + 1, dtype=np.int64) * length


def genes(path: Path) -> GeneList:
    """The list, from a table in the form of OS_scRNA_gene_index or what :func:`read_gene_list` takes."""
    return read_gene_list(path, FAMILY, PATTERNS)


PREPARATION = Preparation(
    inputs="values",
    patterns=PATTERNS,
    genes=genes,
    prepare=prepare,
    expand=expand,
    is_dense=True,
    n_extra=N_DEPTHS,
    has_totals=True,
    options=OPTIONS,
    totals_over_list=lambda options: options["totals"] == "list",
)
