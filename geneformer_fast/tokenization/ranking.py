"""One block of counts as ranked tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_fast.counts.arrays import number_array
from geneformer_fast.tokenization.doubts import totals_tally
from geneformer_fast.tokenization.tally import NAMED_ROWS
from geneformer_fast.tokenization.totals import cell_totals

if TYPE_CHECKING:
    import pyarrow as pa

    from geneformer_fast.tokenization.inputs import Task
    from geneformer_fast.tokenization.vocabulary import Vocabulary


@dataclass
class Ranked:
    """The result of one block; ``extra`` are further columns, a number per token or per cell."""

    source: int
    next_row: int
    values: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    tally: dict[str, Any]
    carried: dict[str, pa.Array]
    extra: dict[str, np.ndarray] = field(default_factory=dict)


def rank(task: Task, vocabulary: Vocabulary, max_len: int) -> Ranked:
    """Rank one block and leave out cells that are filtered or have no tokens."""
    from geneformer_kernels.ops.rank_genes.host import rank_block

    block, entry = task.block, task.prepared
    assert entry.columns is not None
    n_counts = cell_totals(task, vocabulary)
    specials = {
        "first": -1 if vocabulary.cls_id is None else vocabulary.cls_id,
        "last": -1 if vocabulary.eos_id is None else vocabulary.eos_id,
    }
    values, lengths = rank_block(
        block.indptr,
        block.indices,
        block.data,
        n_counts,
        entry.columns,
        is_division=bool(entry.description["is_dense"]),
        keep=vocabulary.gene_capacity - (vocabulary.max_len - max_len),
        out_dtype=vocabulary.input_ids_dtype,
        is_checked=True,  # by the source, while reading
        **specials,
    )
    is_asked = np.ones(block.n_cells, dtype=bool) if task.is_asked is None else task.is_asked
    is_wanted = is_asked if task.is_wanted is None else is_asked & task.is_wanted
    is_kept = is_wanted & (lengths > 0)
    if not is_wanted.all():
        values = values[np.repeat(is_kept, lengths)]
    kept = np.flatnonzero(is_kept)
    empty = np.flatnonzero(is_wanted & (lengths == 0)) + block.start
    tally = {
        "read": int(is_asked.sum()),
        "written": len(kept),
        "filtered": int(is_asked.sum() - is_wanted.sum()),
        "empty": len(empty),
        "empty_rows": empty[:NAMED_ROWS].tolist(),
        "full": int((lengths[kept] == max_len).sum()),
        # As integers, which numpy counts five times as fast; the bits of a float zero are zeros.
        "stored_zeros": int(len(block.data) - np.count_nonzero(block.data.view(f"i{block.data.itemsize}"))),
        **totals_tally(task),
    }
    carried = {
        name: column.slice(block.start, block.n_cells).take(number_array(kept)) for name, column in task.carried.items()
    }
    rows = kept + block.start
    next_row = block.start + block.n_cells
    block.release()
    return Ranked(task.source, next_row, values, lengths[kept], rows, tally, carried)
