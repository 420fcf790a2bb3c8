"""Embeddings as a pandas data frame: what a .csv output would hold, by the names of cells or the ids of genes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from geneformer_fast.counts.source import OBS_NAMES
from geneformer_fast.extract.files import check_columns, embedding_names, plain
from geneformer_fast.extract.genes import gene_columns
from geneformer_fast.tokenization.values import ValueGenes
from geneformer_fast.tokenization.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pandas

    from geneformer_fast.extract.encoding import EncodingRun

_CSV = ".csv"


def cell_frame(run: EncodingRun) -> tuple[pandas.DataFrame, np.ndarray]:
    """A row per cell that has an embedding, and the array with a row for all of them."""
    cells = run.cells
    check_columns(cells.columns, embedding_names(_CSV, run.width))
    embeddings = run.to_memory()
    columns = {name: cells.column(name) for name in cells.columns}
    return _frame(columns, embeddings[cells.rows], OBS_NAMES), embeddings


def gene_frame(run: EncodingRun, vocabulary: Vocabulary | ValueGenes | None) -> tuple[pandas.DataFrame, np.ndarray]:
    """A row per gene that some cell holds, and the array with a row for every token."""
    means, n_cells = run.genes()
    seen = np.flatnonzero(n_cells)
    return _frame(gene_columns(seen, n_cells[seen], vocabulary), means[seen], "gene"), means


def _frame(columns: Mapping[str, Any], embeddings: np.ndarray, index: str) -> pandas.DataFrame:
    import pandas as pd

    names = pa.table({name: plain(column) for name, column in columns.items()}).to_pandas()
    values = pd.DataFrame(embeddings, columns=embedding_names(_CSV, embeddings.shape[1]), index=names.index)
    frame = pd.concat([names, values], axis=1)
    return frame.set_index(index) if index in names else frame
