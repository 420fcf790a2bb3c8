"""The rival: tokenization the way the official tool works, one cell after another.

The same algorithm with the same result, in its way: the whole file as an AnnData; genes of several columns summed with
a pandas frame per gene and chunk of cells; a chunk's normalised matrix by scipy; one numpy argsort per cell; all tokens
in Python lists; a ``datasets.Dataset`` made of them, mapped once for truncation and special tokens, and saved.

Nothing is slowed down on purpose, and the dictionaries come as a gift: they are read before the clock starts.
"""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from datasets import Dataset, disable_progress_bars

from geneformer_fast.tokenization.vocabulary import Vocabulary

CHUNK_CELLS = 512
TARGET_SUM = 10_000


def tokenize_per_cell(path: Path, out: Path, vocabulary: Vocabulary, *, carried: dict[str, str] | None = None) -> int:
    """Tokenize one .h5ad with obs["n_counts"] and var["ensembl_id"] into a folder; returns the number of cells."""
    disable_progress_bars()
    adata = _collapsed(anndata.read_h5ad(path), vocabulary)
    tokens, metadata = _rank_cells(adata, vocabulary, carried or {})
    del adata
    gc.collect()
    dataset = _dataset(tokens, metadata, vocabulary)
    dataset.save_to_disk(str(out))
    return len(dataset)


def _collapsed(adata: anndata.AnnData, vocabulary: Vocabulary) -> anndata.AnnData:
    """One column per gene: columns of genes with several are summed and appended."""
    known = {key: gene for key, gene in vocabulary.aliases.items() if gene in vocabulary.token_ids}
    if not known:
        known = {gene: gene for gene in vocabulary.token_ids}
    ids = adata.var["ensembl_id"]
    adata.var["ensembl_id_collapsed"] = ids.str.upper().map(known)
    in_dictionary = {identifier for identifier in ids if identifier in known}
    if len(in_dictionary) == len({known[identifier] for identifier in in_dictionary}):
        return adata
    adata.var_names = adata.var["ensembl_id_collapsed"]
    adata = adata[:, ~adata.var_names.isna()]
    shared = [gene for gene, count in Counter(adata.var_names).items() if count > 1]
    sums = pd.concat([_summed(adata[i : i + CHUNK_CELLS], shared) for i in range(0, adata.n_obs, CHUNK_CELLS)])
    var = pd.DataFrame({"ensembl_id_collapsed": sums.columns}, index=sums.columns)
    added = anndata.AnnData(X=sp.csr_matrix(sums.to_numpy()), obs=adata.obs, var=var)
    alone = adata[:, ~adata.var_names.isin(shared)]
    return anndata.concat([alone, added], axis=1, merge="same")


def _summed(chunk: anndata.AnnData, shared: list[str]) -> pd.DataFrame:
    columns = []
    for gene in shared:
        part = chunk[:, chunk.var_names == gene]
        frame = pd.DataFrame.sparse.from_spmatrix(part.X, index=part.obs_names, columns=part.var_names)
        columns.append(frame.sum(axis=1).rename(gene))
    return pd.concat(columns, axis=1)


def _rank_cells(
    adata: anndata.AnnData, vocabulary: Vocabulary, carried: dict[str, str]
) -> tuple[list[np.ndarray], dict[str, list[Any]]]:
    genes = adata.var["ensembl_id_collapsed"]
    places = np.flatnonzero([gene in vocabulary.token_ids for gene in genes])
    medians = np.array([vocabulary.medians[gene] for gene in genes.iloc[places]])
    ids = np.array([vocabulary.token_ids[gene] for gene in genes.iloc[places]])
    tokens: list[np.ndarray] = []
    metadata: dict[str, list[Any]] = {new: [] for new in carried.values()}
    for start in range(0, adata.n_obs, CHUNK_CELLS):
        chunk = adata[start : start + CHUNK_CELLS]
        n_counts = chunk.obs["n_counts"].to_numpy()[:, None]
        normalised = sp.csr_matrix(chunk[:, places].X / n_counts * TARGET_SUM / medians)
        tokens += [_ranked(normalised[i].data, ids[normalised[i].indices]) for i in range(normalised.shape[0])]
        for old, new in carried.items():
            metadata[new] += chunk.obs[old].tolist()
    return tokens, metadata


def _ranked(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return ids[np.argsort(-values)]


def _dataset(tokens: list[np.ndarray], metadata: dict[str, list[Any]], vocabulary: Vocabulary) -> Dataset:
    dataset = Dataset.from_dict({"input_ids": tokens, **metadata})

    def complete(cell: dict[str, Any]) -> dict[str, Any]:
        ranked = cell["input_ids"][: vocabulary.gene_capacity]
        if vocabulary.cls_id is not None:
            ranked = [vocabulary.cls_id, *ranked, vocabulary.eos_id]
        cell["input_ids"] = ranked
        cell["length"] = len(ranked)
        return cell

    return dataset.map(complete, load_from_cache_file=False)
