"""Total counts per cell: from obs, or summed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from geneformer_fast.errors import InputError

if TYPE_CHECKING:
    from geneformer_fast.tokenization.inputs import Task
    from geneformer_fast.tokenization.values import ValueGenes
    from geneformer_fast.tokenization.vocabulary import Vocabulary


def cell_totals(task: Task, vocabulary: Vocabulary | ValueGenes) -> np.ndarray:
    """n_counts of a block's cells, with 1 where a cell is not going to be used.

    Raises
    ------
    InputError
        A cell that is wanted has counts, but no positive finite total.
    """
    from geneformer_fast.counts import loops

    block, entry = task.block, task.prepared
    is_needed = np.diff(block.indptr) > 0
    for is_left in (task.is_wanted, task.is_asked):
        if is_left is not None:
            is_needed &= is_left
    if task.n_counts is not None:
        n_counts = task.n_counts
    else:
        gene_of = entry.gene_map.column_to_gene
        is_counted = gene_of >= 0 if vocabulary.totals_over_vocabulary else np.ones(len(gene_of), dtype=np.bool_)
        n_counts = loops.row_totals(block.indptr, block.indices, block.data, is_counted)
        # A cell may hold stored zeros only, or nothing of the vocabulary: no tokens, whatever it is divided by.
        is_needed &= n_counts != 0
    is_good = (n_counts > 0) & np.isfinite(n_counts)
    bad = np.flatnonzero(is_needed & ~is_good)
    if len(bad):
        where = f"obs column {entry.n_counts_column}" if entry.n_counts_column else "the sum of its counts"
        raise InputError(
            f"{entry.name}: cell {block.start + bad[0]} has counts, but {where} is {n_counts[bad[0]]}. Total counts "
            "must be positive: correct the column, or pass --n-counts computed (n_counts='computed')."
        )
    return n_counts if is_good.all() else np.where(is_good, n_counts, n_counts.dtype.type(1))
