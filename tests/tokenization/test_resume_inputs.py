"""A run goes on only with the inputs it began with: every chunk of a store, every value of an AnnData in memory."""

from __future__ import annotations

import os

import anndata
import numpy as np
import pytest
from corpus import make_cells, small_vocabulary

from geneformer_fast.errors import OutputError
from geneformer_fast.tokenization.run import tokenize

VOCABULARY = small_vocabulary()


@pytest.mark.parametrize("version", [2, 3])
def test_a_store_whose_chunks_changed_is_another_input(tmp_path, version):
    zarr = pytest.importorskip("zarr", minversion="3.1.3")
    path, out = tmp_path / "cells.zarr", tmp_path / "out"
    adata = make_cells(300, 1)
    with anndata.settings.override(zarr_write_format=version):
        adata.write_zarr(path)
    tokenize(path, out, dictionary=VOCABULARY)
    tokenize(path, out, dictionary=VOCABULARY, resume=True)
    array = zarr.open_group(path, mode="r+")["X/data"]
    metadata = {file: file.read_bytes() for file in path.rglob("*") if file.name in (".zarray", "zarr.json")}
    values = array[:]
    values[0] += 1
    array[:] = values
    assert all(file.read_bytes() == content for file, content in metadata.items())
    with pytest.raises(OutputError, match=r"cannot be resumed(.|\n)*inputs\[0\]"):
        tokenize(path, out, dictionary=VOCABULARY, resume=True)


def test_a_store_that_lost_a_chunk_or_got_one_is_another_input(tmp_path):
    pytest.importorskip("zarr")
    path, out = tmp_path / "cells.zarr", tmp_path / "out"
    make_cells(300, 1).write_zarr(path)
    tokenize(path, out, dictionary=VOCABULARY)
    times = {file: os.stat(file) for file in path.rglob("*")}
    (path / "obs" / "more").write_bytes(b"")
    for file, status in times.items():
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(OutputError, match="cannot be resumed"):
        tokenize(path, out, dictionary=VOCABULARY, resume=True)


@pytest.mark.parametrize("storage", ["csr", "csc", "dense"])
def test_an_anndata_with_another_value_is_another_input(tmp_path, storage):
    out = tmp_path / "out"
    tokenize(make_cells(1_000, storage=storage), out, dictionary=VOCABULARY)
    tokenize(make_cells(1_000, storage=storage), out, dictionary=VOCABULARY, resume=True)
    other = make_cells(1_000, storage=storage)
    other.X[251, int(other.X[251].argmax())] += 1  # no row of the sample
    with pytest.raises(OutputError, match=r"inputs\[0\]\.sha256"):
        tokenize(other, out, dictionary=VOCABULARY, resume=True)


@pytest.mark.parametrize("column", ["donor", "n_counts", "filter_pass"])
def test_an_anndata_with_other_annotations_is_another_input(tmp_path, column):
    def cells():
        adata = make_cells(300)
        adata.obs["n_counts"] = np.asarray(adata.X.sum(1)).ravel() + 1
        adata.obs["filter_pass"] = 1
        return adata

    out = tmp_path / "out"
    tokenize(cells(), out, dictionary=VOCABULARY, obs=["donor"])
    other = cells()
    other.obs["cluster"] = 0  # nothing depends on it
    tokenize(other, out, dictionary=VOCABULARY, obs=["donor"], resume=True)
    other.obs.loc[other.obs_names[150], column] = "D9" if column == "donor" else 0.5 if column == "n_counts" else 0
    with pytest.raises(OutputError, match=r"inputs\[0\]\.obs_sha256"):
        tokenize(other, out, dictionary=VOCABULARY, obs=["donor"], resume=True)
