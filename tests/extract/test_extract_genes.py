"""Gene embeddings against brute force, and their places in var."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import torch
import toys

from geneformer_fast import Ragged, embed, tokenize
from geneformer_fast.tokenization.run import tokenize_anndata


def by_hand(model, adata, words, n_blocks: int = 2) -> dict[int, np.ndarray]:
    """Token -> mean hidden state over the cells that hold it, one cell at a time in float64."""
    tokens, bounds, _, _ = tokenize_anndata(adata, words)
    states = defaultdict(list)
    for start, stop in itertools.pairwise(bounds):
        cell = torch.from_numpy(tokens[start:stop].astype(np.int64))
        with torch.no_grad():
            hidden = model.hidden_states(Ragged.from_cells([cell]))[n_blocks].values.double().numpy()
        for token, state in zip(cell.tolist(), hidden, strict=True):
            states[token].append(state)
    special = set(words.special.values())
    return {token: np.mean(found, 0) for token, found in states.items() if token not in special}


def without(counts, columns: list[int]):
    """Counts in which some genes are never seen."""
    dense = counts.toarray()
    dense[:, columns] = 0
    return sp.csr_matrix(dense)


@pytest.mark.parametrize("family", ["v1", "v2"])
@pytest.mark.parametrize("token_budget", [30, None])
def test_means_per_gene(family: str, token_budget: int | None, tmp_path: Path) -> None:
    words, adata = toys.vocabulary(family), toys.cells(15)
    adata.X = without(adata.X, [7, 30])
    model = toys.encoder(words)
    tokenize(adata, tmp_path / "tokens", dictionary=words)
    result = embed(tmp_path / "tokens", model, pool="gene", token_budget=token_budget)
    assert result.shape == (words.n_tokens, 32)
    assert result.dtype == np.float32
    expected = by_hand(model, adata, words)
    seen = np.flatnonzero(~np.isnan(result).any(1))
    assert seen.tolist() == sorted(expected)
    assert words.token_ids[toys.gene_ids()[7]] not in expected
    for token in seen:
        np.testing.assert_allclose(result[token], expected[token], atol=2e-6, rtol=0)


def test_rows_follow_var_whatever_its_order() -> None:
    words, adata = toys.vocabulary(), toys.cells(12)
    model = toys.encoder(words)
    straight = embed(adata, model, dictionary=words, pool="gene", copy=True)
    shuffled = adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy()
    assert embed(shuffled, model, dictionary=words, pool="gene") is None
    assert "X_geneformer" not in shuffled.obsm
    expected = straight[:, shuffled.var_names].varm["X_geneformer"]
    np.testing.assert_allclose(shuffled.varm["X_geneformer"], expected, atol=1e-6, rtol=0)
    assert shuffled.uns["X_geneformer"]["pool"] == "gene"


def test_duplicated_and_unknown_columns() -> None:
    """Columns of one gene share its embedding; a column without a token has none."""
    import anndata
    import pandas as pd

    words, adata = toys.vocabulary(), toys.cells(10)
    ids = [*toys.gene_ids(), f"{toys.gene_ids()[3]}.7", "NOT_A_GENE"]
    counts = sp.hstack([adata.X, adata.X[:, [5]], adata.X[:, [6]]], format="csr")
    wide = anndata.AnnData(counts, obs=adata.obs, var=pd.DataFrame({"ensembl_id": ids}, index=map(str, range(62))))
    embed(wide, toys.encoder(words), dictionary=words, pool="gene")
    result = wide.varm["X_geneformer"]
    np.testing.assert_array_equal(result[60], result[3])
    assert np.isnan(result[61]).all()
    assert not np.isnan(result[3]).any()
    assert np.abs(result[3] - result[4]).max() > 1e-3


def test_counts_from_raw_land_on_the_genes_of_var() -> None:
    """Highly variable genes in X, counts of all genes in raw: rows belong to the columns of X."""
    words, adata = toys.vocabulary(), toys.cells(10)
    model = toys.encoder(words)
    expected = embed(adata, model, dictionary=words, pool="gene", copy=True)
    scaled = adata.copy()
    scaled.raw = adata
    kept = [40, 3, 22, 9]
    scaled = scaled[:, kept].copy()
    scaled.X = np.asarray(scaled.X.todense()) * 0.3 - 0.7
    embed(scaled, model, dictionary=words, pool="gene")
    np.testing.assert_allclose(scaled.varm["X_geneformer"], expected[:, kept].varm["X_geneformer"], atol=1e-6, rtol=0)


def test_gene_ids_in_raw_var_only() -> None:
    """The column with gene ids may exist beside the counts only; the genes of var are found by name then."""
    words, adata = toys.vocabulary(), toys.cells(10)
    adata.var["my_ids"] = toys.gene_ids()
    adata.var_names = [f"g{i}" for i in range(adata.n_vars)]
    expected = embed(adata, toys.encoder(words), dictionary=words, pool="gene", gene_column="my_ids", copy=True)
    scaled = adata.copy()
    scaled.raw = adata
    scaled = scaled[:, [2, 1]].copy()
    scaled.X = np.asarray(scaled.X.todense()) * 0.3 - 0.7
    del scaled.var["my_ids"]
    embed(scaled, toys.encoder(words), dictionary=words, pool="gene", gene_column="my_ids")
    np.testing.assert_array_equal(scaled.varm["X_geneformer"], expected.varm["X_geneformer"][[2, 1]])


def test_gene_files(tmp_path: Path) -> None:
    words, adata = toys.vocabulary(), toys.cells(10)
    adata.X = without(adata.X, [7])
    adata.write_h5ad(tmp_path / "cells.h5ad")
    model = toys.encoder(words)
    options = dict(dictionary=words, pool="gene", progress=False)
    expected = embed(tmp_path / "cells.h5ad", model, **options)
    embed(tmp_path / "cells.h5ad", model, tmp_path / "genes.npy", **options)
    np.testing.assert_array_equal(np.load(tmp_path / "genes.npy"), expected)
    embed(tmp_path / "cells.h5ad", model, tmp_path / "genes.arrow", **options)
    with pa.memory_map(str(tmp_path / "genes.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    genes = table.column("gene").to_pylist()
    assert sorted(genes) == sorted(set(toys.gene_ids()) - {toys.gene_ids()[7]})
    tokens = [words.token_ids[gene] for gene in genes]
    assert table.column("token").to_pylist() == tokens
    n_cells = (adata.X > 0).sum(axis=0).A1[[toys.gene_ids().index(gene) for gene in genes]]
    assert table.column("n_cells").to_pylist() == n_cells.tolist()
    np.testing.assert_array_equal(np.array(table.column("embedding").to_pylist(), np.float32), expected[tokens])


@pytest.mark.parametrize("suffix", ["npy", "parquet", "csv"])
def test_tables_of_genes(suffix: str, tmp_path: Path) -> None:
    """An array has a row per token and a table beside it with the same rows; a table has the genes that were seen."""
    words, adata = toys.vocabulary(), toys.cells(10)
    symbols = {f"SYM{i}": gene for i, gene in enumerate(toys.gene_ids()[:20])}
    words = dataclasses.replace(words, symbols=symbols)
    adata.X = without(adata.X, [7])
    model, out = toys.encoder(words), tmp_path / f"genes.{suffix}"
    expected = embed(adata, model, dictionary=words, pool="gene", copy=True).varm["X_geneformer"]
    embed(adata, model, out, dictionary=words, pool="gene")
    beside = tmp_path / "genes.genes.parquet" if suffix == "npy" else out
    table = pd.read_csv(beside) if suffix == "csv" else pq.read_table(beside).to_pandas()
    assert list(table)[:4] == ["token", "gene", "symbol", "n_cells"]
    if suffix == "npy":
        assert table["token"].tolist() == list(range(words.n_tokens))
        assert table["gene"].isna().sum() == len(words.special)
        values = np.load(out)
    else:
        names = [f"embedding_{i}" for i in range(32)]
        values = table[names].to_numpy() if suffix == "csv" else np.stack(table["embedding"])
        assert len(table) == toys.N_GENES - 1
    counted = (adata.X > 0).sum(axis=0).A1
    for place, (gene, n_cells) in enumerate(zip(toys.gene_ids(), counted, strict=True)):
        found = np.flatnonzero(table["gene"] == gene)
        if place == 7 and suffix != "npy":
            assert not len(found)
            continue
        assert table["n_cells"].iloc[found[0]] == n_cells
        assert table["token"].iloc[found[0]] == words.token_ids[gene]
        assert (table["symbol"].iloc[found[0]] == f"SYM{place}") == (place < 20)
        np.testing.assert_allclose(values[found[0]], expected[place], atol=1e-6, rtol=0)
