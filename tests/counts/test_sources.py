"""Every format gives the same counts, in checked row blocks of bounded size."""

from __future__ import annotations

import sys

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from small_sources import DENSE, LAYOUTS, N_CELLS, N_GENES, check, check_tables, make

from geneformer_fast.counts import block as block_module
from geneformer_fast.counts import expand_inputs, open_source, spool
from geneformer_fast.errors import InputError, UnsupportedError


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_h5ad(tmp_path, layout, compression):
    path = tmp_path / "cells.h5ad"
    make(LAYOUTS[layout]()).write_h5ad(path, compression=compression)
    with open_source(path) as source:
        assert (source.kind, source.counts_from, source.name) == ("h5ad", "X", str(path))
        assert source.is_dense == layout.startswith("dense")
        assert source.value_dtype == LAYOUTS[layout]().dtype
        check(source)
        check_tables(source)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_anndata_in_memory(layout):
    adata = make(LAYOUTS[layout]())
    with open_source(adata) as source:
        assert (source.kind, source.name) == ("anndata", "<AnnData>")
        check(source)
        check_tables(source)
    with open_source(adata[5:40, ::3]) as source:
        check(source, DENSE[5:40, ::3])
    stored = adata.X.toarray() if sp.issparse(adata.X) else adata.X
    np.testing.assert_array_equal(stored, DENSE)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_backed_anndata(tmp_path, layout):
    path = tmp_path / "cells.h5ad"
    make(LAYOUTS[layout]()).write_h5ad(path)
    adata = anndata.read_h5ad(path, backed="r")
    with open_source(adata) as source:
        check(source)
    with open_source(adata[5:40, ::3]) as source:
        check(source, DENSE[5:40, ::3])
    adata.file.close()


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_zarr(tmp_path, monkeypatch, layout, zarr_format):
    pytest.importorskip("zarr", minversion="3.1.3")
    path = tmp_path / "cells.zarr"
    with anndata.settings.override(zarr_write_format=zarr_format):
        make(LAYOUTS[layout]()).write_zarr(path)
    with open_source(path) as source:
        assert source.kind == "zarr"
        check(source)
        check_tables(source)
        assert source.fingerprint()["bytes"] > 0
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'geneformer-fast\[zarr\]'"):
        open_source(path)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 100, 5000])
def test_gzip_chunks_of_any_size(tmp_path, chunk, shuffle):
    path = tmp_path / "cells.h5ad"
    make(sp.csr_matrix(DENSE)).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for key in ("data", "indices"):
            values = file[f"X/{key}"][:]
            del file[f"X/{key}"]
            file["X"].create_dataset(
                key, data=values, maxshape=(None,), chunks=(chunk,), compression="gzip", shuffle=shuffle
            )
    with open_source(path) as source:
        check(source)


def test_other_storage_goes_through_the_library(tmp_path):
    path = tmp_path / "cells.h5ad"
    make(sp.csr_matrix(DENSE)).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        data, indices = file["X/data"][:], file["X/indices"][:]
        del file["X/data"], file["X/indices"]
        file["X"].create_dataset("data", data=data.astype(">f4"))
        file["X"].create_dataset("indices", data=indices.astype(">i8"), chunks=(50,), fletcher32=True)
    with open_source(path) as source:
        check(source)


def test_blocks_are_bounded_by_entries_too(tmp_path, monkeypatch):
    monkeypatch.setattr(block_module, "MAX_ENTRIES", 100)
    path = tmp_path / "cells.h5ad"
    make(sp.csr_matrix(DENSE)).write_h5ad(path)
    with open_source(path) as source:
        sizes = [len(block.data) for block in source.blocks()]
        assert max(sizes) <= 100
        assert len(sizes) > 8
        check(source)


def test_csc_beyond_one_bucket_goes_through_a_scratch_file(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "MAX_ENTRIES", 150)
    monkeypatch.setattr(spool, "_PIECE", 64)
    made = []
    temporary_file = spool.tempfile.TemporaryFile
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda **kw: made.append(temporary_file(**kw)) or made[-1])
    path = tmp_path / "cells.h5ad"
    make(sp.csc_matrix(DENSE)).write_h5ad(path)
    with open_source(path) as source:
        assert source._matrix._rows_per_bucket < N_CELLS / 5
        check(source)
        assert made
        assert all(file.closed for file in made)


def test_released_buffers_are_reused_and_kept_blocks_are_not_touched(tmp_path):
    path = tmp_path / "cells.h5ad"
    make(sp.csr_matrix(DENSE)).write_h5ad(path)
    with open_source(path) as source:
        kept = list(source.blocks(rows=5))
        rebuilt = [sp.csr_matrix((b.data, b.indices, b.indptr), shape=(b.n_cells, N_GENES)).toarray() for b in kept]
        np.testing.assert_array_equal(np.concatenate(rebuilt), DENSE)
        pool = block_module.BufferPool(keep=2)
        buffers = [pool.take(10), pool.take(20), pool.take(30)]
        pool.give(tuple(buffers))
        assert pool.take(25) is buffers[2]
        assert len(pool.take(25)) == 25


def test_inputs_are_sorted_and_unique(tmp_path):
    for name in ("b.h5ad", "a.loom", "c.h5", "notes.txt", ".hidden.h5ad"):
        (tmp_path / name).touch()
    (tmp_path / "d.zarr").mkdir()
    (tmp_path / "d.zarr" / ".zgroup").touch()
    (tmp_path / "e_mtx").mkdir()
    (tmp_path / "e_mtx" / "matrix.mtx.gz").touch()
    (tmp_path / "other").mkdir()
    names = ["a.loom", "b.h5ad", "c.h5", "d.zarr", "e_mtx"]
    assert [path.name for path in expand_inputs(tmp_path)] == names
    given = [str(tmp_path / "c*"), tmp_path / "b.h5ad", f"{tmp_path}/*.h5ad", str(tmp_path / "d.zarr")]
    assert [path.name for path in expand_inputs(given)] == ["b.h5ad", "c.h5", "d.zarr"]
    with pytest.raises(InputError, match=r"\*\.zip.*nothing matches"):
        expand_inputs(str(tmp_path / "*.zip"))
    with pytest.raises(InputError, match=r"holds no input\. Supported are AnnData"):
        expand_inputs(tmp_path / "other")
    with pytest.raises(InputError, match="no inputs"):
        expand_inputs([])


def test_fingerprint_notices_a_changed_input(tmp_path):
    path = tmp_path / "cells.h5ad"
    make(sp.csr_matrix(DENSE)).write_h5ad(path)
    with open_source(path) as source:
        first = source.fingerprint()
        assert source.fingerprint() == first
        assert (first["path"], first["bytes"]) == (str(path), path.stat().st_size)
    changed = DENSE.copy()
    changed[0, 0] += 1
    make(sp.csr_matrix(changed)).write_h5ad(path)
    with open_source(path) as source:
        assert source.fingerprint()["sha256"] != first["sha256"]
    with open_source(make(DENSE)) as one, open_source(make(changed)) as two:
        assert one.fingerprint()["sha256"] != two.fingerprint()["sha256"]
