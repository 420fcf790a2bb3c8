"""zarr stores: which codecs may run, how much a chunk may inflate to, and chunks that are not there."""

from __future__ import annotations

import atexit
import functools
import gzip
import json
import os
import pickle
import shutil
import tempfile
import tracemalloc
import warnings
import zlib
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from geneformer_fast.counts import open_source
from geneformer_fast.errors import InputError

zarr = pytest.importorskip("zarr", minversion="3.1.3")
numcodecs = pytest.importorskip("numcodecs")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Writing zarr v2|zarr v3 autosharding|Consolidated metadata"),
    pytest.mark.filterwarnings("ignore:.*obs/age/mask"),
    pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3"),
]
N_CELLS, N_GENES = 120, 30
#: Where names of cells are, without and with a mask.
NAMES = "obs/_index", "obs/_index/values"


def counts() -> np.ndarray:
    dense = np.random.default_rng(3).poisson(1.5, (N_CELLS, N_GENES)).astype(np.float32)
    dense[:, 0] += 1
    return dense


def store(tmp_path: Path, fmt: int, dense: bool = False, *, has_mask: bool = False) -> Path:
    shutil.copytree(written(fmt, dense, has_mask), tmp_path / "cells.zarr")
    return tmp_path / "cells.zarr"


@functools.cache
def written(fmt: int, dense: bool, has_mask: bool) -> Path:
    """One store of each kind, which the tests change copies of.

    Names of rows are an array of texts, as anndata up to 0.12 writes them, or with ``has_mask`` texts and a mask, as
    later ones do: which it is does not depend on the version that is installed.
    """
    obs = pd.DataFrame(
        {
            "label": pd.Categorical(["a", "b", "c"] * 40),
            "one": pd.Categorical(["only"] * N_CELLS),
            "total": np.arange(N_CELLS) + 1.0,
            "age": pd.array(range(N_CELLS), dtype="Int64"),
            "note": pd.array([f"note {i}" for i in range(N_CELLS)], dtype="string"),
        },
        index=[f"c{i}" for i in range(N_CELLS)],
    )
    var = pd.DataFrame({"feature_types": "Gene Expression"}, index=[f"ENSG{i:011d}" for i in range(N_GENES)])
    path = Path(tempfile.mkdtemp(prefix="geneformer_fast_")) / "cells.zarr"
    atexit.register(shutil.rmtree, path.parent)
    with anndata.settings.override(zarr_write_format=fmt, allow_write_nullable_strings=True):
        adata = anndata.AnnData(counts() if dense else sp.csr_matrix(counts()), obs=obs, var=var)
        adata.write_zarr(path)
        unconsolidated(path)
        for part, frame in (("obs", obs), ("var", var)):
            group, names = zarr.open(str(path), mode="r+")[part], frame.index.to_numpy(object)
            del group["_index"]
            anndata.io.write_elem(group, "_index", pd.array(names, dtype="string") if has_mask else names)
    zarr.consolidate_metadata(str(path))
    return path


def read(path) -> np.ndarray:
    with open_source(path) as source:
        blocks = [sp.csr_matrix((b.data, b.indices, b.indptr), (b.n_cells, N_GENES)) for b in source.blocks(rows=50)]
        assert source.obs("label").to_pylist() == ["a", "b", "c"] * 40
        assert source.obs("one").to_pylist() == ["only"] * N_CELLS
        assert source.obs("total").tolist() == list(range(1, N_CELLS + 1))
        assert source.obs("age").to_pylist() == list(range(N_CELLS))
        assert source.obs("note").to_pylist() == [f"note {i}" for i in range(N_CELLS)]
        return sp.vstack(blocks).toarray()


def rewrite(path: Path, key: str, fmt: int, **options) -> None:
    """One array again, stored in another way."""
    root = zarr.open(str(path), mode="r+")
    values, attributes = root[key][...], dict(root[key].attrs)
    root.create_array(key, data=values, overwrite=True, attributes=attributes, **options)
    unconsolidated(path)


def unconsolidated(path: Path) -> None:
    (path / ".zmetadata").unlink(missing_ok=True)
    if (path / "zarr.json").exists():
        content = json.loads((path / "zarr.json").read_text())
        content.pop("consolidated_metadata", None)
        (path / "zarr.json").write_text(json.dumps(content))


def chunk_files(path: Path, key: str) -> list[Path]:
    return sorted(
        f for f in (path / key).rglob("*") if f.is_file() and not f.name.startswith(".z") and f.name != "zarr.json"
    )


class Touches:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


# Each array, role and kind of metadata with each other one; all three together are slow tests.
@pytest.mark.parametrize(
    ("role", "key", "consolidated"),
    [
        pytest.param(role, key, consolidated, marks=() if (i + j + consolidated) % 2 else pytest.mark.slow)
        for i, role in enumerate(("filters", "compressor"))
        for j, key in enumerate(("obs/_index", "obs/label/codes", "X/indptr"))
        for consolidated in (True, False)
    ],
)
def test_a_codec_that_executes_what_it_reads_is_never_run(tmp_path, monkeypatch, key, role, consolidated):
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    path = store(tmp_path, 2)
    codec = {"id": "pickle", "protocol": 5}
    metadata = json.loads((path / key / ".zarray").read_text())
    is_text = metadata["dtype"] == "|O"
    metadata |= {"filters": [codec], "compressor": None} if role == "filters" else {"compressor": codec}
    if role == "compressor":
        metadata["filters"] = [{"id": "vlen-utf8"}] if is_text else None
    (path / key / ".zarray").write_text(json.dumps(metadata))
    for file in chunk_files(path, key):
        file.write_bytes(pickle.dumps(Touches(tmp_path / "executed")))
    if consolidated:
        whole = json.loads((path / ".zmetadata").read_text())
        whole["metadata"][f"{key}/.zarray"] = metadata
        (path / ".zmetadata").write_text(json.dumps(whole))
    else:
        unconsolidated(path)
    with pytest.raises(InputError, match=rf"{key}.*codec 'pickle'|pickle"):
        read(path)
    assert not (tmp_path / "executed").exists()


class TouchingCodec(zarr.codecs.GzipCodec):
    def __init__(self, path: str) -> None:
        object.__setattr__(self, "path", path)

    @classmethod
    def from_dict(cls, data):
        return cls(**data["configuration"])

    def to_dict(self):
        return {"name": "touches", "configuration": {"path": self.path}}

    async def _decode_single(self, chunk_bytes, chunk_spec):
        Path(self.path).touch()
        raise FileExistsError(self.path)


@pytest.mark.parametrize("shards", [None, (1 << 10,)])
def test_codecs_of_format_3_are_checked_too_also_inside_shards(tmp_path, shards):
    path = store(tmp_path, 3)
    length = zarr.open(str(path), mode="r")["X/data"].shape[0]
    chunks = (64,) if shards else (length,)
    rewrite(path, "X/data", 3, chunks=chunks, shards=shards, compressors=[zarr.codecs.GzipCodec()])
    np.testing.assert_array_equal(read(path), counts())
    # what any installed package may bring: a codec of a name of its own
    zarr.registry.register_codec("touches", TouchingCodec)
    text = (path / "X/data/zarr.json").read_text()
    changed = text.replace('"gzip"', '"touches"').replace('"level": 5', f'"path": "{tmp_path}/executed"')
    assert changed != text
    (path / "X/data/zarr.json").write_text(changed)
    with pytest.raises(InputError, match=r"X/data: is stored with the codec 'touches', which is not among those"):
        read(path)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileExistsError):
        zarr.open(str(path), mode="r")["X/data"][...]


COMPRESSORS_2 = [
    *(numcodecs.Zlib(), numcodecs.GZip(), numcodecs.BZ2(), numcodecs.LZMA(), numcodecs.Zstd(), numcodecs.LZ4()),
    *(numcodecs.Blosc(), numcodecs.Blosc("zstd"), None),
]


@pytest.mark.parametrize("codec", COMPRESSORS_2, ids=repr)
def test_every_allowed_compressor_of_format_2(tmp_path, codec):
    path = store(tmp_path, 2)
    for key in ("X/data", "X/indices", "X/indptr", "obs/total", "obs/label/codes"):
        chunks = (500,) if key in ("X/data", "X/indices") else (50,)
        filters = [numcodecs.Shuffle(4)] if key == "X/data" else None
        rewrite(path, key, 2, chunks=chunks, compressors=codec, filters=filters)
    rewrite(path, "obs/_index", 2, chunks=(50,), compressors=codec)
    np.testing.assert_array_equal(read(path), counts())


@pytest.mark.parametrize(
    "make",
    [
        lambda: [zarr.codecs.GzipCodec()],
        lambda: [zarr.codecs.ZstdCodec()],
        lambda: [zarr.codecs.BloscCodec(), zarr.codecs.Crc32cCodec()],
        lambda: [zarr.codecs.numcodecs.Zlib()],
        lambda: [zarr.codecs.numcodecs.LZ4()],
        lambda: [zarr.codecs.numcodecs.BZ2()],
        lambda: [],
    ],
    ids=["gzip", "zstd", "blosc", "zlib", "lz4", "bz2", "none"],
)
@pytest.mark.parametrize("is_sharded", [False, True])
def test_every_allowed_compressor_of_format_3(tmp_path, make, is_sharded):
    path = store(tmp_path, 3)
    for key in ("X/data", "obs/total", "obs/_index"):
        n = 500 if key == "X/data" else 50
        rewrite(path, key, 3, chunks=(n,), shards=(2 * n,) if is_sharded else None, compressors=make())
    np.testing.assert_array_equal(read(path), counts())


def zstd_without_size(raw: bytes) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


BOMB = 32 << 20
BOMBS = {
    "zlib": lambda raw: zlib.compress(raw, 1),
    "gzip": lambda raw: gzip.compress(raw, 1),
    "bz2": lambda raw: numcodecs.BZ2(1).encode(raw),
    "zstd": lambda raw: numcodecs.Zstd().encode(raw),
    "zstd of unknown size": zstd_without_size,
    "lz4": lambda raw: numcodecs.LZ4().encode(raw),
    "blosc": lambda raw: bytes(numcodecs.Blosc().encode(raw)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_chunk_that_inflates_to_more_than_it_may(tmp_path, name):
    """A few kilobytes that would be 32 MB, where the array says 480 bytes."""
    path = store(tmp_path, 2)
    codec = next(c for c in COMPRESSORS_2 if c is not None and c.codec_id == name.partition(" ")[0])
    rewrite(path, "X/indptr", 2, chunks=(N_CELLS + 1,), compressors=codec)
    np.testing.assert_array_equal(read(path), counts())
    (file,) = chunk_files(path, "X/indptr")
    file.write_bytes(BOMBS[name](bytes(BOMB)))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"does not end within its|of values holds"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < BOMB / 4
    finally:
        tracemalloc.stop()


def test_many_empty_streams_in_a_chunk(tmp_path):
    """Two megabytes that hold nothing, before what is meant."""
    path = store(tmp_path, 2)
    rewrite(path, "X/indptr", 2, chunks=(N_CELLS + 1,), compressors=numcodecs.GZip())
    (file,) = chunk_files(path, "X/indptr")
    whole = file.read_bytes()
    file.write_bytes(gzip.compress(b"") * 5 + whole)
    np.testing.assert_array_equal(read(path), counts())
    file.write_bytes(gzip.compress(b"") * 100_000 + whole)
    with pytest.raises(InputError, match="more than 1000 streams"):
        read(path)


@pytest.mark.parametrize("fmt", [2, 3])
@pytest.mark.parametrize("shards", [None, (N_CELLS,)])
@pytest.mark.parametrize(("is_compressed", "has_mask"), [(True, False), (False, False), (True, True)])
def test_a_chunk_that_announces_more_texts_than_it_may(tmp_path, fmt, shards, is_compressed, has_mask):
    """Places for all of them would be made first: eight bytes each, 32 GB."""
    if fmt == 2 and shards:
        pytest.skip("format 2 has no shards")
    path, key = store(tmp_path, fmt, has_mask=has_mask), NAMES[has_mask]
    sharded = {} if shards is None else {"shards": shards}
    make = numcodecs.Zlib() if fmt == 2 else zarr.codecs.GzipCodec()
    rewrite(path, key, fmt, chunks=(60,), compressors=make if is_compressed else None, **sharded)
    np.testing.assert_array_equal(read(path), counts())
    root = zarr.open(str(path), mode="r+")
    honest = numcodecs.vlen.VLenUTF8.encode
    with pytest.MonkeyPatch.context() as patch:
        announced = (2**27).to_bytes(4, "little")

        class Boasting(numcodecs.vlen.VLenUTF8):
            def encode(self, buf):
                return announced + bytes(honest(self, buf))[4:]

        if fmt == 3:
            patch.setattr(zarr.codecs.vlen_utf8, "_vlen_utf8_codec", Boasting())
            root[key][:] = root[key][:]
        else:
            file = chunk_files(path, key)[0]
            content = file.read_bytes()
            content = zlib.decompress(content) if is_compressed else content
            file.write_bytes((zlib.compress if is_compressed else bytes)(announced + content[4:]))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=f"a chunk of 60 texts announces {2**27}"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("fmt", [2, 3])
@pytest.mark.parametrize("key", ["X/data", "X/indices", "X/indptr", *NAMES, "obs/label/codes", "obs/label/categories"])
def test_chunks_that_are_not_there(tmp_path, fmt, key):
    path = store(tmp_path, fmt, has_mask=key == NAMES[True])
    n = zarr.open(str(path), mode="r")[key].shape[0]
    rewrite(path, key, fmt, chunks=(max(1, n // 3),))
    np.testing.assert_array_equal(read(path), counts())
    chunk_files(path, key)[-1].unlink()
    with pytest.raises(InputError, match=rf"{key} lacks 1 of [34] chunks; the store was not copied"):
        read(path)


@pytest.mark.parametrize("fmt", [2, 3])
@pytest.mark.parametrize("key", ["obs/total", "obs/age/values"])
def test_numbers_of_cells_that_are_not_there(tmp_path, fmt, key):
    path = store(tmp_path, fmt)
    shutil.rmtree(path / key / "c") if fmt == 3 else (path / key / "0").unlink()
    with pytest.raises(InputError, match=rf"{key} lacks 1 of 1 chunks.*write_empty_chunks"):
        read(path)


@pytest.mark.parametrize("fmt", [2, 3])
def test_what_a_writer_always_leaves_out(tmp_path, fmt):
    """A label with one category, columns without missing values: codes and masks are all zero, thus not there."""
    path = store(tmp_path, fmt)
    for key in ("obs/one/codes", "obs/note/mask", "var/feature_types/codes", "obs/age/mask"):
        assert not chunk_files(path, key)
    # a lost mask of numbers would make numbers of missing values; of the others nothing can be lost
    with pytest.warns(UserWarning, match="lacks 1 of 1 chunks") as caught:
        np.testing.assert_array_equal(read(path), counts())
    assert {str(w.message).split(": ")[1].split(" ")[0] for w in caught} == {"obs/age/mask"}
    # where some of it is stored, the rest may be lost
    codes = np.where(np.arange(N_CELLS) < 40, -1, 0).astype("i1")
    zarr.open(str(path), mode="r+")["obs"]["one"].create_array("codes", data=codes, chunks=(40,), overwrite=True)
    unconsolidated(path)
    assert len(chunk_files(path, "obs/one/codes")) == 1
    with open_source(path) as source, pytest.warns(UserWarning, match="obs/one/codes of shape .* lacks 2 of 3 chunks"):
        assert source.obs("one").null_count == 40


@pytest.mark.parametrize("fmt", [2, 3])
def test_zeros_that_are_meant_are_stored_by_what_the_message_says(tmp_path, fmt):
    """Sorted labels of small chunks, and a column that is false throughout: both are refused as written."""
    path = store(tmp_path, fmt)
    root = zarr.open(str(path), mode="r+")
    codes = np.repeat(np.arange(3, dtype="i1"), 40)
    root["obs"]["label"].create_array("codes", data=codes, chunks=(20,), overwrite=True)
    root["obs"].create_array("total", data=np.zeros(N_CELLS, bool), overwrite=True)
    root["obs/total"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    unconsolidated(path)
    wanted = {"label": ["a"] * 40 + ["b"] * 40 + ["c"] * 40, "total": [False] * N_CELLS}
    for column, values in wanted.items():
        with open_source(path) as source, pytest.raises(InputError, match=r"chunks; .* if zeros are meant") as caught:
            source.obs(column)
        with zarr.config.set({"array.write_empty_chunks": False}):  # what is set inside of it ends with it
            exec(str(caught.value).partition("in Python: ")[2], {})
        with open_source(path) as source:
            got = source.obs(column)
        assert (got.tolist() if isinstance(got, np.ndarray) else got.to_pylist()) == values


@pytest.mark.parametrize("fmt", [2, 3])
def test_a_dense_matrix_with_chunks_that_are_not_there(tmp_path, fmt):
    path = store(tmp_path, fmt, dense=True)
    rewrite(path, "X", fmt, chunks=(30, N_GENES))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(read(path), counts())
    assert not [w for w in caught if "X of shape" in str(w.message)]
    chunk_files(path, "X")[1].unlink()
    with pytest.warns(UserWarning, match=r"cells\.zarr: X of shape \(120, 30\) lacks 1 of 4 chunks.*copy it again"):
        got = read(path)
    assert int((got.sum(axis=1) == 0).sum()) == 30


@pytest.mark.parametrize(("chunk", "shard"), [(7, 21), (50, 100), (5, 1000)])
def test_shards_that_do_not_divide_the_array(tmp_path, chunk, shard):
    path = store(tmp_path, 3)
    for key in ("X/data", "X/indices", "X/indptr", "obs/total", "obs/_index"):
        times = 10 if key in ("X/data", "X/indices") else 1  # they are as much longer, and more
        rewrite(path, key, 3, chunks=(times * chunk,), shards=(times * shard,))
    np.testing.assert_array_equal(read(path), counts())
    chunk_files(path, "X/data")[0].unlink()
    with pytest.raises(InputError, match=r"X/data lacks 1 of \d+ chunks"):
        read(path)


@pytest.mark.parametrize("options", [{}, {"chunk_key_encoding": {"name": "v2", "separator": "."}}, {"separator": "/"}])
def test_every_spelling_of_chunk_names(tmp_path, options):
    fmt = 2 if "separator" in options else 3
    path = store(tmp_path, fmt, dense=True)
    if options:
        options = options if fmt == 3 else {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    rewrite(path, "X", fmt, chunks=(50, 20), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lacks")
        warnings.filterwarnings("ignore", message=".*obs/age/mask")
        np.testing.assert_array_equal(read(path), counts())
    os.remove(chunk_files(path, "X")[0])
    with pytest.warns(UserWarning, match="lacks 1 of 6 chunks"):
        read(path)
