"""The official modes ``aggregate_data`` and ``aggregate_gene_shifts``: values of some genes, and means of all pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_fast.errors import InputError
from geneformer_fast.perturbation.statistics.columns import Edit, Run, Values, mean_by
from geneformer_fast.perturbation.statistics.names import Names, columns_of

if TYPE_CHECKING:
    import pandas

CELL = "cell_emb"


def aggregate_data(run: Run, names: Names) -> pandas.DataFrame:
    """A row per value of a cell: ``Cosine_sim``, and ``Gene``, the symbol. Genes perturbed together have a tuple."""
    import pandas as pd

    values = run.only
    symbols = columns_of(run.edits, names)["Gene_name"]
    return pd.DataFrame({"Cosine_sim": values.values.astype(np.float64), "Gene": _objects(symbols)[values.edits]})


def aggregate_gene_shifts(run: Run, names: Names, anchor: int | None = None) -> pandas.DataFrame:
    """A row per (perturbed, affected): mean, standard deviation (divided by n) and number; cells come first.

    Parameters
    ----------
    run
        With values of genes.
    names
        Of genes.
    anchor
        Only edits of several genes that have this token.

    Raises
    ------
    InputError
        The run has no values of genes.
    """
    import pandas as pd

    moments = run.moments
    if not len(moments.keys):
        raise InputError(
            "the run has no values of genes, which aggregate_gene_shifts is about; perturb with mode cell_and_gene "
            "(cls_and_gene), or use another mode of statistics"
        )
    # Shifts of cells towards states are no cosines, and stand in a table of their own.
    cells = Values.empty(len(run.edits)) if run.has_states else run.only
    of_cells = np.flatnonzero(cells.counts > 0)
    centred = (cells.values.astype(np.float64) - np.repeat(cells.means(), cells.counts)) ** 2
    spread = np.sqrt(mean_by(centred, cells.starts))[of_cells]
    edit = np.concatenate([of_cells, moments.edit])
    affected = np.concatenate([np.full(len(of_cells), -1), moments.affected])
    columns = _naming(run.edits, edit, affected, names)
    columns |= {
        "Cosine_sim_mean": np.concatenate([cells.means()[of_cells], moments.means]),
        "Cosine_sim_stdev": np.concatenate([spread, moments.deviations]),
        "N_Detections": np.concatenate([cells.counts[of_cells], moments.counts]),
    }
    table = pd.DataFrame(columns)
    if anchor is not None:
        has_anchor = np.array([len(each) > 1 and anchor in each for each in run.edits])
        table = table[has_anchor[edit]]
        affected = affected[has_anchor[edit]]
    return table.iloc[np.lexsort((table["Cosine_sim_mean"], affected >= 0))]


def _naming(edits: list[Edit], edit: np.ndarray, affected: np.ndarray, names: Names) -> dict[str, Any]:
    """The columns that name rows; each gene is looked up once."""
    perturbed = columns_of(edits, names)
    named: dict[str, Any] = {}
    for ours, theirs in (("Gene", "Perturbed"), ("Gene_name", "Gene_name"), ("Ensembl_ID", "Ensembl_ID")):
        named[theirs] = _objects(perturbed[ours])[edit]
    tokens, inverse = np.unique(affected, return_inverse=True)
    of_tokens = {
        "Affected": [CELL if token < 0 else token for token in tokens.tolist()],
        "Affected_gene_name": [np.nan if token < 0 else names.symbol(token) for token in tokens.tolist()],
        "Affected_Ensembl_ID": [np.nan if token < 0 else names.gene(token) for token in tokens.tolist()],
    }
    named |= {name: _objects(column)[inverse] for name, column in of_tokens.items()}
    return named


def _objects(values: list[Any]) -> np.ndarray:
    """One element each, tuples too."""
    return np.fromiter(values, dtype=object, count=len(values))
