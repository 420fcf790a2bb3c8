"""Embeddings of genes: what names their rows in a table, and their places in var."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from geneformer_fast.counts.features import expression_of
from geneformer_fast.counts.memory import frame_table
from geneformer_fast.counts.source import GENE_COLUMNS
from geneformer_fast.tokenization.genes import map_genes
from geneformer_fast.tokenization.values import ValueGenes
from geneformer_fast.tokenization.vocabulary import Vocabulary

if TYPE_CHECKING:
    from anndata import AnnData


def gene_columns(
    tokens: np.ndarray, n_cells: np.ndarray, vocabulary: Vocabulary | ValueGenes | None
) -> dict[str, pa.ChunkedArray]:
    """What names rows of genes.

    Parameters
    ----------
    tokens
        [n] token ids.
    n_cells
        [n] how many cells hold each.
    vocabulary
        Knows the genes; None where nobody does.

    Returns
    -------
    dict
        ``token``; ``gene`` (its id) and ``symbol`` where the vocabulary knows them, empty for special tokens;
        ``n_cells``.
    """
    columns = {"token": pa.array(tokens, pa.int64())}
    if vocabulary is not None:
        gene_of = {token: gene for gene, token in vocabulary.token_ids.items()}
        genes = [gene_of.get(int(token)) for token in tokens]
        columns["gene"] = pa.array(genes, pa.string())
        if vocabulary.symbols:
            symbol_of: dict[str, str] = {}
            for symbol, gene in vocabulary.symbols.items():
                symbol_of.setdefault(gene, symbol)
            columns["symbol"] = pa.array([symbol_of.get(gene or "") for gene in genes], pa.string())
    columns["n_cells"] = pa.array(n_cells, pa.int64())
    return {name: pa.chunked_array([column]) for name, column in columns.items()}


def by_column(
    embeddings: np.ndarray,
    adata: AnnData,
    vocabulary: Vocabulary | ValueGenes | None,
    gene_column: str | None,
    allow_few_genes: bool = False,
) -> np.ndarray:
    """[n_vars, C] rows of [tokens, C] gene embeddings in the order of var, NaN for genes without a token or unseen."""
    assert vocabulary is not None  # the counts were tokenized with it
    ids = _ids_of_var(adata, gene_column)
    is_gene = expression_of(frame_table(adata.var, "var"))
    if is_gene is not None:  # an antibody has the name of a gene, but no embedding
        ids = [gene if kept else "" for gene, kept in zip(ids, is_gene.tolist(), strict=True)]
    genes = map_genes(ids, vocabulary, source_name="<AnnData>", allow_few_genes=allow_few_genes)
    tokens = genes.column_to_token
    placed = np.full((adata.n_vars, embeddings.shape[1]), np.nan, dtype=np.float32)
    placed[tokens >= 0] = embeddings[tokens[tokens >= 0]]
    return placed


def _ids_of_var(adata: AnnData, gene_column: str | None) -> list[str]:
    """The gene id of every row of var; from raw.var, by name, where only that has them (counts may come from raw)."""
    columns = GENE_COLUMNS if gene_column is None else (gene_column,)
    for table in (adata.var, *(() if adata.raw is None else (adata.raw.var,))):
        column = next((name for name in columns if name in table), None)
        if column is not None:
            by_name = table[column][~table.index.duplicated()] if table is not adata.var else None
            ids = table[column] if by_name is None else by_name.reindex(adata.var_names)
            return [str(gene) for gene in ids]
    return [str(gene) for gene in adata.var_names]
