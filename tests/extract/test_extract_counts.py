"""Counts that are embedded: cut to the model's length, genes without antibodies, and folders that are no tokens."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
import toys

from geneformer_fast import embed, tokenize
from geneformer_fast.errors import OutputError


@pytest.mark.parametrize("is_file", [False, True])
def test_counts_are_cut_to_the_length_of_the_model(is_file: bool, tmp_path: Path) -> None:
    words, adata = toys.vocabulary(), toys.cells(9)
    model = toys.encoder(words, max_len=12)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    data = tmp_path / "cells.h5ad" if is_file else adata
    result = embed(data, model, dictionary=words, pool="mean", copy=not is_file)
    tokens = tokenize(adata, tmp_path / "tokens", dictionary=words, max_len=12)
    assert (tokens.lengths() == 12).any()
    expected = embed(tmp_path / "tokens", model, pool="mean")
    np.testing.assert_array_equal(result if is_file else result.obsm["X_geneformer"], expected)


def test_antibodies_have_no_embeddings_of_genes() -> None:
    words, adata = toys.vocabulary(), toys.cells(9)
    model = toys.encoder(words)
    embed(adata, model, dictionary=words, pool="gene")
    expected = adata.varm["X_geneformer"]
    ids = toys.gene_ids()
    with_antibodies = anndata.concat([adata, adata[:, 3:5]], axis=1)
    with_antibodies.var_names = [*ids, "antibody-a", "antibody-b"]
    with_antibodies.var["ensembl_id"] = [*ids, *ids[3:5]]
    with_antibodies.var["feature_types"] = ["Gene Expression"] * len(ids) + ["Antibody Capture"] * 2
    embed(with_antibodies, model, dictionary=words, pool="gene")
    found = with_antibodies.varm["X_geneformer"]
    np.testing.assert_array_equal(found[:-2], expected)
    assert np.isnan(found[-2:]).all()


def test_a_dict_of_splits_is_not_taken_for_counts(tmp_path: Path) -> None:
    words = toys.vocabulary()
    tokenize(toys.cells(9), tmp_path / "splits" / "train", dictionary=words)
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(OutputError, match=r"DatasetDict of the splits train; give one of them, such as .*splits/train"):
        embed(tmp_path / "splits", toys.encoder(words))
