"""Where embeddings go: obsm, files, rows of cells left out, and what a failure leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toys

from geneformer_fast import Encoder, embed, save, tokenize
from geneformer_fast.errors import InputError, OutputError
from geneformer_fast.extract import encoding

KEY = "X_geneformer"


@pytest.fixture(params=[8192, 4], ids=["one window", "windows of 4"])
def _windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "WINDOW_CELLS", request.param)


def read_arrow(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def embedding_of(table: pa.Table) -> np.ndarray:
    return np.array(table.column("embedding").to_pylist(), dtype=np.float32)


def test_anndata_gets_obsm_and_provenance() -> None:
    words, adata = toys.vocabulary(), toys.cells(9)
    model = toys.encoder(words)
    assert embed(adata, model, dictionary=words, pool="mean", layer=1) is None
    assert adata.obsm[KEY].shape == (9, 32)
    assert adata.obsm[KEY].dtype == np.float32
    said = adata.uns[KEY]
    assert {key: said[key] for key in ("pool", "layer", "blocks_computed", "dtype", "vocabulary", "cells")} == {
        "pool": "mean", "layer": "1", "blocks_computed": 2, "dtype": "float32", "vocabulary": "toy", "cells": 9,
    }  # fmt: skip
    assert said["vocabulary_fingerprint"] == words.fingerprint
    assert json.loads(said["config"])["n_layers"] == 3


def test_provenance_survives_a_file(tmp_path: Path) -> None:
    words, adata = toys.vocabulary(), toys.cells(9)
    embed(adata, toys.encoder(words), dictionary=words, key_added="emb")
    adata.write_h5ad(tmp_path / "out.h5ad")
    again = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert dict(again.uns["emb"]) == adata.uns["emb"]
    np.testing.assert_array_equal(again.obsm["emb"], adata.obsm["emb"])


def test_implementations_asked_for_by_name_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are encoded in other threads, and these ask for the same."""
    from geneformer_kernels.dispatch import ImplUnavailableError, use_impl
    from geneformer_kernels.ops.varlen_attention import reference

    calls = []
    plain = reference.varlen_attention
    monkeypatch.setattr(reference, "varlen_attention", lambda *arguments: calls.append(1) or plain(*arguments))
    with use_impl("reference", "varlen_attention"):
        embed(toys.cells(9), toys.encoder(), dictionary=toys.vocabulary())
    assert calls
    with use_impl("numba", "varlen_attention"), pytest.raises(ImplUnavailableError, match="numba was asked for"):
        embed(toys.cells(9), toys.encoder().cast("float64"), dictionary=toys.vocabulary())


def test_copy_leaves_the_input_alone() -> None:
    words, adata = toys.vocabulary(), toys.cells(9)
    before = adata.copy()
    result = embed(adata, toys.encoder(words), dictionary=words, copy=True)
    assert KEY in result.obsm
    assert not adata.obsm.keys()
    assert not adata.uns.keys()
    assert (adata.X != before.X).nnz == 0
    result.X.data[:] = 77
    assert (adata.X != before.X).nnz == 0


def test_views_and_layers() -> None:
    words, adata = toys.vocabulary(), toys.cells(12)
    model = toys.encoder(words)
    adata.layers["counts"] = adata.X.copy()
    adata.X.data *= 0.37
    rows = [7, 2, 11]
    whole = embed(adata, model, dictionary=words, counts_layer="counts", copy=True)
    part = embed(adata[rows], model, dictionary=words, counts_layer="counts", copy=True)
    np.testing.assert_allclose(part.obsm[KEY], whole.obsm[KEY][rows], atol=2e-6, rtol=0)


@pytest.mark.usefixtures("_windows")
def test_every_output_is_the_in_memory_result(tmp_path: Path) -> None:
    words, model = toys.vocabulary(), toys.encoder()
    adata = toys.cells(11, empty=(0, 4, 5, 10))
    source = tmp_path / "cells.h5ad"
    adata.write_h5ad(source)
    options = dict(dictionary=words, pool="mean", progress=False)
    expected = embed(adata, model, copy=True, **options).obsm[KEY]
    assert np.flatnonzero(np.isnan(expected).all(1)).tolist() == [0, 4, 5, 10]
    assert np.isnan(expected).any(1).sum() == 4
    assert_same(embed(source, model, **options), expected)
    for suffix in ("npy", "arrow", "parquet", "csv", "h5ad"):
        out = tmp_path / f"out.{suffix}"
        assert embed(source, model, out, obs=None if suffix == "h5ad" else ["kind"], **options) == out
        assert json.loads((tmp_path / f"out.{suffix}.json").read_text())["pool"] == "mean"
    assert_same(np.load(tmp_path / "out.npy"), expected)
    assert np.load(tmp_path / "out.npy").dtype == np.float32
    kept = [1, 2, 3, 6, 7, 8, 9]
    for table in (read_arrow(tmp_path / "out.arrow"), pq.read_table(tmp_path / "out.parquet")):
        assert table.column_names == ["obs_names", "kind", "length", "source_file", "source_row", "embedding"]
        assert table.column("source_row").to_pylist() == kept
        assert_same(embedding_of(table), expected[kept])
        assert table.column("obs_names").to_pylist() == adata.obs_names[kept].tolist()
        assert table.column("kind").to_pylist() == adata.obs["kind"].iloc[kept].tolist()
        assert table.schema.metadata[b"pool"] == b"mean"
    frame = pd.read_csv(tmp_path / "out.csv", float_precision="round_trip")
    names = [f"embedding_{i}" for i in range(32)]
    assert list(frame) == [*table.column_names[:-1], *names]
    np.testing.assert_array_equal(frame[names].to_numpy(np.float32), embedding_of(table))
    assert frame["obs_names"].tolist() == adata.obs_names[kept].tolist()
    rows = pq.read_table(tmp_path / "out.cells.parquet")
    assert rows.column_names == table.column_names[:-1]
    assert rows.column("obs_names").to_pylist() == adata.obs_names.tolist()
    assert rows.column("kind").to_pylist() == adata.obs["kind"].tolist()
    assert rows.column("source_row").to_pylist() == list(range(11))
    assert set(rows.column("source_file").to_pylist()) == {str(source)}
    assert np.flatnonzero(rows.column("length")).tolist() == kept
    copied = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert_same(copied.obsm[KEY], expected)
    assert copied.uns[KEY]["pool"] == "mean"
    assert (copied.X != adata.X).nnz == 0
    assert copied.obs.equals(adata.obs)
    assert not toys.leftovers(tmp_path)


def assert_same(result: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for the rounding of another order of cells within batches."""
    np.testing.assert_allclose(result, expected, atol=2e-6, rtol=0)


def test_h5ad_output_replaces_an_older_embedding(tmp_path: Path) -> None:
    words, model = toys.vocabulary(), toys.encoder()
    adata = toys.cells(6)
    adata.obsm[KEY] = np.zeros((6, 3))
    adata.obsm["X_pca"] = np.ones((6, 2))
    adata.uns[KEY] = {"old": "yes"}
    adata.write_h5ad(tmp_path / "cells.h5ad")
    expected = embed(adata, model, dictionary=words, copy=True).obsm[KEY]
    # In place: the copy takes the name of its source.
    embed(tmp_path / "cells.h5ad", model, tmp_path / "cells.h5ad", dictionary=words, overwrite=True, progress=False)
    again = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert_same(again.obsm[KEY], expected)
    assert "old" not in again.uns[KEY]
    np.testing.assert_array_equal(again.obsm["X_pca"], 1)


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("given", ["folder", "list"])
def test_several_files_in_sorted_order_with_cells_left_out(given: str, tmp_path: Path) -> None:
    words, model = toys.vocabulary(), toys.encoder()
    first, second = toys.cells(5, seed=1, empty=(4,), prefix="a"), toys.cells(7, seed=2, empty=(0, 3), prefix="b")
    second.obs["filter_pass"] = [1, 1, 0, 1, 1, 1, 1]
    folder = tmp_path / "counts"
    folder.mkdir()
    second.write_h5ad(folder / "b.h5ad")
    first.write_h5ad(folder / "a.h5ad")
    data = folder if given == "folder" else [folder / "b.h5ad", folder / "a.h5ad"]
    parts = [embed(adata, model, dictionary=words, copy=True).obsm[KEY] for adata in (first, second)]
    assert np.isnan(parts[1][2]).all(), "a cell that did not pass the filter has no embedding"
    result = embed(data, model, dictionary=words, progress=False)
    assert_same(result, np.concatenate(parts))
    assert np.flatnonzero(np.isnan(result).all(1)).tolist() == [4, 5, 7, 8]
    embed(data, model, tmp_path / "out.npy", dictionary=words, progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), result)


@pytest.mark.usefixtures("_windows")
def test_token_folders_of_ours_and_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    words, adata = toys.vocabulary(), toys.cells(13, empty=(2,))
    folder = tokenize(adata, tmp_path / "ours", dictionary=words, obs=["kind", "score"], shard_bytes=1)
    table = datasets.load_from_disk(str(tmp_path / "ours")).remove_columns(["source_file", "source_row"])
    table.save_to_disk(str(tmp_path / "theirs"), num_shards=3)
    # Without a manifest only a published vocabulary can be assumed.
    published = toys.encoder(words, vocabulary="geneformer-v2", vocabulary_fingerprint=None)
    ours = embed(tmp_path / "ours", toys.encoder(words))
    theirs = embed(tmp_path / "theirs", published)
    np.testing.assert_array_equal(ours, theirs)
    kept = np.delete(np.arange(13), 2)
    whole = embed(adata, toys.encoder(words), dictionary=words, copy=True).obsm[KEY]
    assert_same(ours, whole[kept])
    assert folder.n_cells == 12
    embed(tmp_path / "theirs", published, tmp_path / "theirs.arrow")
    out = read_arrow(tmp_path / "theirs.arrow")
    assert_same(embedding_of(out), ours)
    assert out.column("kind").to_pylist() == adata.obs["kind"].iloc[kept].tolist()
    np.testing.assert_array_equal(out.column("score").to_numpy(), adata.obs["score"].iloc[kept])


def test_tokens_that_carry_nothing(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"input_ids": [[2, 9, 3], [2, 8, 7, 3]]}).save_to_disk(str(tmp_path / "theirs"))
    published = toys.encoder(vocabulary="geneformer-v2", vocabulary_fingerprint=None)
    embed(tmp_path / "theirs", published, tmp_path / "z.npy")
    assert pq.read_table(tmp_path / "z.cells.parquet").to_pydict() == {"length": [3, 4]}
    embed(tmp_path / "theirs", published, tmp_path / "z.csv")
    assert pd.read_csv(tmp_path / "z.csv")["length"].tolist() == [3, 4]


def test_lists_that_tokens_carry_are_of_no_table(tmp_path: Path) -> None:
    """Masks of attention, as datasets for transformers hold them: they say nothing that names a cell."""
    datasets = pytest.importorskip("datasets")
    cells = [[2, 9, 3], [2, 8, 7, 3]]
    columns = {"input_ids": cells, "attention_mask": [[1] * len(cell) for cell in cells], "kind": ["x", "y"]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "theirs"))
    published = toys.encoder(vocabulary="geneformer-v2", vocabulary_fingerprint=None)
    for suffix in ("npy", "arrow", "parquet", "csv"):
        embed(tmp_path / "theirs", published, tmp_path / f"z.{suffix}")
    assert pq.read_table(tmp_path / "z.cells.parquet").to_pydict() == {"kind": ["x", "y"], "length": [3, 4]}
    assert pq.read_table(tmp_path / "z.parquet").column_names == ["kind", "length", "embedding"]
    with pytest.raises(InputError, match="carries no column 'attention_mask', of one value per cell; there are kind"):
        embed(tmp_path / "theirs", published, tmp_path / "y.npy", obs=["attention_mask"])


def test_checkpoint_folder_with_its_vocabulary(tmp_path: Path) -> None:
    words, adata = toys.vocabulary(), toys.cells(8)
    save(toys.encoder(words), tmp_path / "model")
    words.save(tmp_path / "model")
    embed(adata, tmp_path / "model", dtype="float32")
    expected = embed(adata, toys.encoder(words), dictionary=words, copy=True).obsm[KEY]
    np.testing.assert_array_equal(adata.obsm[KEY], expected)
    assert adata.uns[KEY]["model"] == "model"


def test_existing_output_is_refused_or_replaced(tmp_path: Path) -> None:
    words, adata = toys.vocabulary(), toys.cells(8)
    out = tmp_path / "out.npy"
    out.write_text("precious")
    with pytest.raises(OutputError, match=r"out\.npy exists already.*overwrite"):
        embed(adata, toys.encoder(words), out, dictionary=words)
    assert out.read_text() == "precious"
    embed(adata, toys.encoder(words), out, dictionary=words, overwrite=True)
    assert np.load(out).shape == (8, 32)


@pytest.mark.parametrize("suffix", ["npy", "arrow", "parquet", "csv", "h5ad"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failure_in_the_middle_leaves_nothing(
    suffix: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "WINDOW_CELLS", 4)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    words, model = toys.vocabulary(), toys.encoder()
    toys.cells(12).write_h5ad(tmp_path / "cells.h5ad")
    kept = tmp_path / f"kept.{suffix}"
    embed(tmp_path / "cells.h5ad", model, kept, dictionary=words, progress=False)
    content = kept.read_bytes()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    calls = []

    def forward(self: Encoder, *args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise error("in the middle")
        return Encoder.forward(self, *args, **kwargs)

    monkeypatch.setattr(model, "forward", forward.__get__(model))
    for out, overwrite in ((tmp_path / f"new.{suffix}", False), (kept, True)):
        calls.clear()
        with pytest.raises(error, match="in the middle"):
            embed(
                tmp_path / "cells.h5ad", model, out,
                dictionary=words, overwrite=overwrite, token_budget=40, progress=False,
            )  # fmt: skip
        assert len(calls) >= 3  # batches ahead of the failing one may have begun
        assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert kept.read_bytes() == content


def test_old_embedding_in_memory_stays_when_embedding_fails() -> None:
    words, adata = toys.vocabulary(), toys.cells(6)
    adata.obsm[KEY] = np.zeros((6, 2))
    adata.X.data[:] = np.nan
    with pytest.raises(InputError, match="NaN"):
        embed(adata, toys.encoder(words), dictionary=words)
    assert adata.obsm[KEY].shape == (6, 2)
