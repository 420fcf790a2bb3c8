"""The cells that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anndata import AnnData

#: 500 sorted blood cells; what they are and whose stands beside them.
CELLS = Path(__file__).resolve().parent / "data" / "pbmc_facs.h5ad"


def example_cells() -> AnnData:
    """500 real blood cells, 50 of each of ten sort gates, as they come with the package.

    Returns
    -------
    AnnData
        ``X`` [500 cells, genes], CSR float32 whole counts. ``obs``: ``cell_type`` (the gate the cell was sorted into),
        ``lineage`` (five groups of gates) and ``n_counts``. ``var``: ``ensembl_id``; names are gene symbols. Cells of
        the gates stand in turns, so that any beginning holds equally many of each. A new object with every call.

    References
    ----------
    Zheng et al., Nature Communications 8, 14049 (2017); by way of the R package fastTopics (BSD 2-clause).
    """
    import anndata

    return anndata.read_h5ad(CELLS)
