"""The official algorithm, one cell after another, as plainly as it can be said."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp


def oracle_tokens(adata, vocabulary, *, id_column="ensembl_id", is_dense=None):
    """Token lists of all cells of an AnnData with ``obs["n_counts"]``, in numpy's and scipy's own arithmetic.

    ``is_dense`` None follows X; True computes as for dense matrices and loom files.
    """
    is_dense = not sp.issparse(adata.X) if is_dense is None else is_dense
    targets = [_gene(identifier, vocabulary) for identifier in adata.var[id_column]]
    genes = sorted({gene for gene in targets if gene is not None}, key=vocabulary.token_ids.__getitem__)
    columns: dict[str, list[int]] = {gene: [] for gene in genes}
    for i, target in enumerate(targets):
        if target is not None:
            columns[target].append(i)
    x = adata.X.toarray() if sp.issparse(adata.X) else np.asarray(adata.X)
    collapsed = np.stack([x[:, places].sum(axis=1, dtype=x.dtype) for places in columns.values()], axis=1)
    medians = np.array([vocabulary.medians[gene] for gene in genes])
    tokens = np.array([vocabulary.token_ids[gene] for gene in genes])
    n_counts = np.asarray(adata.obs["n_counts"])[:, None]
    matrix = collapsed if is_dense else sp.csr_matrix(collapsed)
    normalised = sp.csr_matrix(matrix / n_counts * 10_000 / medians)
    cells = []
    for row in range(normalised.shape[0]):
        cell = normalised[row]
        keep = cell.data != 0
        score, found = cell.data[keep], tokens[cell.indices[keep]]
        ranked = found[np.lexsort((found, -score))].tolist()
        if vocabulary.cls_id is not None:
            ranked = [vocabulary.cls_id, *ranked[: vocabulary.max_len - 2], vocabulary.eos_id]
        cells.append(ranked[: vocabulary.max_len])
    return cells


def _gene(identifier, vocabulary):
    gene = vocabulary.aliases.get(identifier.upper(), identifier.upper())
    return gene if gene in vocabulary.token_ids else None


def as_lists(values, cu_seqlens):
    """Packed tokens as one list per cell."""
    return [part.tolist() for part in np.split(values, cu_seqlens[1:-1])]
