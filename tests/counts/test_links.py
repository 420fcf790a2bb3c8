"""Counts that do not lie in the opened HDF5 file itself: links, virtual data sets, other storage, user blocks."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from geneformer_fast.counts import open_source
from geneformer_fast.errors import InputError

N_CELLS, N_GENES = 40, 30


def counts(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).poisson(1.5, (N_CELLS, N_GENES)).astype(np.float32) + np.eye(40, 30, dtype="f4")


def write(path, values, compression=None) -> None:
    adata = anndata.AnnData(sp.csr_matrix(values))
    adata.var_names = [f"ENSG{i:011d}" for i in range(N_GENES)]
    adata.obs_names = [f"c{i}" for i in range(N_CELLS)]
    adata.write_h5ad(path, compression=compression)


def read(path) -> np.ndarray:
    with open_source(path) as source:
        blocks = [sp.csr_matrix((b.data, b.indices, b.indptr), (b.n_cells, N_GENES)) for b in source.blocks(rows=16)]
        return sp.vstack(blocks).toarray()


def linked(tmp_path, link, compression=None):
    """A file with the same layout as the one its links lead to, so that offsets of one fit the other."""
    write(tmp_path / "main.h5ad", counts(1), compression)
    write(tmp_path / "other.h5ad", counts(2), compression)
    with h5py.File(tmp_path / "main.h5ad", "r+") as file:
        link(file)
    return tmp_path / "main.h5ad"


def _to_matrix(file):
    del file["X"]
    file["X"] = h5py.ExternalLink("other.h5ad", "/X")


def _to_arrays(file):
    for name in ("data", "indices", "indptr"):
        del file[f"X/{name}"]
        file[f"X/{name}"] = h5py.ExternalLink("other.h5ad", f"/X/{name}")


def _through_soft_link(file):
    del file["X"]
    file["elsewhere"] = h5py.ExternalLink("other.h5ad", "/")
    file["X"] = h5py.SoftLink("/elsewhere/X")


def _layer_group(file):
    del file["X"], file["layers"]
    file["all"] = h5py.ExternalLink("other.h5ad", "/")
    file["layers"] = h5py.SoftLink("/all")
    file["X"] = h5py.SoftLink("/layers/X")


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("link", [_to_matrix, _to_arrays, _through_soft_link, _layer_group])
def test_external_links_give_the_counts_they_lead_to(tmp_path, link, compression):
    np.testing.assert_array_equal(read(linked(tmp_path, link, compression)), counts(2))


def test_a_change_behind_a_link_changes_the_fingerprint(tmp_path):
    path = linked(tmp_path, _to_arrays)
    with open_source(path) as source:
        before = source.fingerprint()
    write(tmp_path / "new.h5ad", counts(5))
    os.replace(tmp_path / "new.h5ad", tmp_path / "other.h5ad")
    with open_source(path) as source:
        assert source.fingerprint() != before


def test_soft_links_inside_the_file(tmp_path):
    def link(file):
        file.create_group("stored")
        file.move("X", "stored/here")
        file["X"] = h5py.SoftLink("/stored/here")

    np.testing.assert_array_equal(read(linked(tmp_path, link)), counts(1))


def test_a_dense_matrix_behind_a_link(tmp_path):
    path = linked(tmp_path, lambda file: None)
    for name, seed in (("main.h5ad", 1), ("other.h5ad", 2)):
        with h5py.File(tmp_path / name, "r+") as file:
            del file["X"]
            file["X"] = counts(seed)
    with h5py.File(path, "r+") as file:
        _to_matrix(file)
    np.testing.assert_array_equal(read(path), counts(2))


def test_categories_are_those_of_the_file_behind_the_link(tmp_path):
    """As anndata 0.7 stored them: a reference, which is a place in a file."""

    def edit(file):
        del file["obs"]
        file["obs"] = h5py.ExternalLink("other.h5ad", "/obs")

    path = linked(tmp_path, lambda file: None)
    for name, labels in (("main.h5ad", ["wrong", "labels"]), ("other.h5ad", ["right", "names"])):
        with h5py.File(tmp_path / name, "r+") as file:
            file["obs/__categories/kind"] = labels
            file["obs/kind"] = np.arange(N_CELLS, dtype=np.int8) % 2
            file["obs/kind"].attrs["categories"] = file["obs/__categories/kind"].ref
    with h5py.File(path, "r+") as file:
        edit(file)
    with open_source(path) as source:
        assert source.obs("kind").to_pylist()[:3] == ["right", "names", "right"]


@pytest.mark.parametrize("driver", ["core", "stdio"])
def test_files_opened_by_other_drivers(tmp_path, monkeypatch, driver):
    path = linked(tmp_path, lambda file: None)
    opened = h5py.File
    monkeypatch.setattr(h5py, "File", lambda name, mode: opened(name, mode, driver=driver))
    np.testing.assert_array_equal(read(path), counts(1))


@pytest.mark.filterwarnings("ignore:.*lacks")
def test_a_matrix_of_more_columns_than_fit_into_memory(tmp_path):
    """Nothing of it is stored, so the file is small; read as zeros, one row is a terabyte."""

    def edit(file):
        del file["X"]
        file.create_dataset("X", (N_CELLS, 2**38), "f4", chunks=(1, 2**20))

    path = linked(tmp_path, edit)
    with pytest.raises(InputError, match="columns are more genes than there are"):
        read(path)


def test_a_link_that_leads_nowhere(tmp_path):
    path = linked(tmp_path, _to_matrix)
    (tmp_path / "other.h5ad").unlink()
    with pytest.raises(InputError, match=r"/X is a link to /X in other\.h5ad, which is not there"):
        read(path)
    path = linked(tmp_path, _to_arrays)
    (tmp_path / "other.h5ad").unlink()
    with pytest.raises(InputError, match=r"/X/data is a link to /X/data in other\.h5ad, which is not there"):
        read(path)


def virtual(file, name, n_first=None, source="other.h5ad", *, is_whole=False):
    """X/name as a virtual data set over the other file, or over its beginning alone; ``is_whole`` selects nothing."""
    with h5py.File(os.path.join(os.path.dirname(file.filename), "other.h5ad")) as other:
        length, dtype = other[f"X/{name}"].shape[0], other[f"X/{name}"].dtype
    layout = h5py.VirtualLayout((length,), dtype)
    n_first = length if n_first is None else n_first
    values = h5py.VirtualSource(source, f"X/{name}", (length,))
    layout[:n_first] = values if is_whole else values[:n_first]
    del file[f"X/{name}"]
    file.create_virtual_dataset(f"X/{name}", layout)


@pytest.mark.parametrize("is_whole", [False, True])
def test_virtual_data_sets(tmp_path, monkeypatch, is_whole):
    monkeypatch.chdir("/")
    names = ("data", "indices", "indptr")
    path = linked(tmp_path, lambda file: [virtual(file, name, is_whole=is_whole) for name in names])
    np.testing.assert_array_equal(read(path), counts(2))
    # HDF5 reads what is missing as zeros, without a word
    shutil.move(tmp_path / "other.h5ad", tmp_path / "moved.h5ad")
    with pytest.raises(InputError, match=r"source 'X/data' in 'other\.h5ad' is not there, so its values would read as"):
        read(path)


def test_a_virtual_data_set_whose_whole_source_became_shorter(tmp_path):
    path = linked(tmp_path, lambda file: virtual(file, "data", is_whole=True))
    with h5py.File(tmp_path / "other.h5ad", "r+") as file:
        values = file["X/data"][:-1]
        del file["X/data"]
        file["X/data"] = values
    with pytest.raises(InputError, match=r"has shape \(\d+,\), not what is taken from it"):
        read(path)


@pytest.mark.parametrize("name", ["data", "indices", "indptr"])
def test_virtual_data_sets_with_gaps(tmp_path, name):
    path = linked(tmp_path, lambda file: virtual(file, name, n_first=20))
    with pytest.raises(InputError, match=r"virtual data set with sources for 20 of \d+ values"):
        read(path)


def test_a_virtual_data_set_of_itself(tmp_path):
    path = linked(tmp_path, lambda file: virtual(file, "data", source="."))
    with pytest.raises(InputError, match="leads to itself"):
        read(path)


def test_values_in_hdf5s_external_storage(tmp_path):
    def edit(file):
        values = file["X/data"][:]
        del file["X/data"]
        raw = str(tmp_path / "raw.bin")
        file.create_dataset("X/data", values.shape, values.dtype, external=[(raw, 0, values.nbytes)], data=values)

    with pytest.raises(InputError, match=r"X/data keeps its values in another file, .*raw\.bin"):
        read(linked(tmp_path, edit))


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_user_blocks(tmp_path, compression):
    write(tmp_path / "plain.h5ad", counts(3), compression)
    with (
        h5py.File(tmp_path / "plain.h5ad") as plain,
        h5py.File(tmp_path / "block.h5ad", "w", userblock_size=1024) as block,
    ):
        for key in plain:
            plain.copy(key, block)
    np.testing.assert_array_equal(read(tmp_path / "block.h5ad"), counts(3))


def test_numbers_stored_in_other_ways(tmp_path):
    """20 bits of 32, shifted: HDF5 converts them, their bytes are not the numbers."""
    path = linked(tmp_path, lambda file: None)
    with h5py.File(path, "r+") as file:
        values = file["X/data"][:].astype(np.int32)
        kind = h5py.h5t.NATIVE_INT32.copy()
        kind.set_precision(20)
        kind.set_offset(4)
        del file["X/data"]
        space = h5py.h5s.create_simple(values.shape)
        h5py.h5d.create(file["X"].id, b"data", kind, space).write(h5py.h5s.ALL, h5py.h5s.ALL, values)
    np.testing.assert_array_equal(read(path), counts(1))


def test_the_file_that_was_opened_is_read_even_if_another_takes_its_name(tmp_path):
    path = linked(tmp_path, lambda file: None)
    with open_source(path) as source:
        os.replace(tmp_path / "other.h5ad", path)
        block = next(iter(source.blocks()))
        matrix = sp.csr_matrix((block.data, block.indices, block.indptr), (N_CELLS, N_GENES))
        np.testing.assert_array_equal(matrix.toarray(), counts(1))


def test_chunks_that_were_never_written(tmp_path):
    for key in ("X/data", "X/indices", "X/indptr"):

        def edit(file, key=key):
            values = file[key][:]
            del file[key]
            dataset = file.create_dataset(key, values.shape, values.dtype, chunks=(7,))
            dataset[:-10] = values[:-10]

        with pytest.raises(InputError, match=rf"{key} lacks [12] of \d+ chunks; the file was not copied or written"):
            read(linked(tmp_path, edit))

    def dense(file):
        del file["X"]
        file.create_dataset("X", (N_CELLS, N_GENES), "f4", chunks=(10, N_GENES))[:30] = counts(1)[:30]

    path = linked(tmp_path, dense)
    with pytest.warns(UserWarning, match=r"main\.h5ad: X of shape \(40, 30\) lacks 1 of 4 chunks"):
        read(path)


def test_unknown_compression_is_named(tmp_path):
    """Written with a filter that is not here, as zstd- or blosc-compressed files are without hdf5plugin."""

    def edit(file):
        n = len(file["X/data"])
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((n,))
        properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
        del file["X/data"]
        space = h5py.h5s.create_simple((n,))
        made = h5py.h5d.create(file["X"].id, b"data", h5py.h5t.NATIVE_FLOAT, space, properties)
        made.write_direct_chunk((0,), b"\x28\xb5\x2f\xfd" + bytes(60))

    path = linked(tmp_path, edit)
    if find_spec("hdf5plugin") is not None:
        pytest.skip("hdf5plugin brings the filter")
    with pytest.raises(InputError, match=r"main\.h5ad: /X/data is compressed .*'zstd' \(number 32015\)") as caught:
        read(path)
    assert "hdf5plugin" in str(caught.value)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("filter_name", ["Zstd", "Blosc", "LZ4", "Bitshuffle"])
def test_compression_that_hdf5plugin_brings(tmp_path, filter_name):
    hdf5plugin = pytest.importorskip("hdf5plugin")

    def edit(file):
        for key in ("X/data", "X/indices", "X/indptr"):
            values, attributes = file[key][:], dict(file[key].attrs)
            del file[key]
            made = file.create_dataset(key, data=values, chunks=(16,), compression=getattr(hdf5plugin, filter_name)())
            made.attrs.update(attributes)

    np.testing.assert_array_equal(read(linked(tmp_path, edit)), counts(1))


def test_a_chunk_that_inflates_to_more_than_it_may(tmp_path):
    import zlib

    def edit(file):
        n = len(file["X/data"])
        del file["X/data"]
        made = file["X"].create_dataset("data", (n,), "f4", chunks=(n,), compression="gzip")
        made.id.write_direct_chunk((0,), zlib.compress(bytes(100 * 4 * n)))

    with pytest.raises(InputError, match="a compressed chunk does not end within its"):
        read(linked(tmp_path, edit))
