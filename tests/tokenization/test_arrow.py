"""Token folders: what others read of them, what is read by position, and what is refused."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from corpus import make_cells, small_vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_fast.errors import OutputError
from geneformer_fast.files.checksums import fingerprint_of, sha256_of
from geneformer_fast.tokenization.arrow import open_tokens
from geneformer_fast.tokenization.run import tokenize
from geneformer_fast.tokenization.shards import ShardWriter, record_batch, token_schema
from geneformer_fast.tokenization.stream import StreamFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two inputs in several shards, with columns of every kind."""
    base = tmp_path_factory.mktemp("tokens")
    for seed in (1, 2):
        make_cells(1500, seed).write_h5ad(base / f"part{seed}.h5ad")
    carried = ["cluster", "score", "donor", "cell type", "is_good"]
    tokenize(base, base / "out", dictionary=small_vocabulary(), obs=carried, shard_bytes=20_000)
    return base / "out"


def _with_pyarrow(folder):
    """All shards in the order of their names, with pyarrow alone."""
    tables = []
    for path in sorted(folder.glob("data-*.arrow")):
        with pa.OSFile(str(path)) as file:
            tables.append(pa.ipc.open_stream(file).read_all())
    return pa.concat_tables(tables)


def test_datasets_opens_it_as_it_is(folder):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.load_from_disk(str(folder))
    table = _with_pyarrow(folder)
    assert dataset.column_names == table.column_names
    assert dataset.features["input_ids"] == datasets.features.Features.from_arrow_schema(table.schema)["input_ids"]
    for row in (0, 5, 1498, 2500, -1):
        row %= len(dataset)
        assert dataset[row]["input_ids"] == table["input_ids"][row].as_py()
    for name in ("cluster", "donor", "cell type", "is_good", "length", "source_file", "source_row"):
        assert dataset[name][:] == table[name].to_pylist()
    label = dataset.features["source_file"]
    assert [label.int2str(i).rsplit("/")[-1] for i in (0, 1)] == ["part1.h5ad", "part2.h5ad"]
    # What Geneformer's scripts do with it: sort, filter, map, save, load.
    short = dataset.filter(lambda row: row["length"] > 12, load_from_cache_file=False).sort("length", reverse=True)
    short = short.map(lambda row: {"first": row["input_ids"][1]}, load_from_cache_file=False)
    assert short["length"][:] == sorted((n for n in table["length"].to_pylist() if n > 12), reverse=True)


def test_a_dict_of_splits_names_its_folders(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    whole = datasets.load_from_disk(str(folder))
    splits = datasets.DatasetDict({"train": whole.select(range(100)), "test": whole.select(range(100, 120))})
    splits.save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(
        OutputError, match=r"DatasetDict of the splits test, train; give one of them, such as .*splits/test"
    ):
        open_tokens(tmp_path / "splits")
    assert open_tokens(tmp_path / "splits" / "train").n_cells == 100
    (tmp_path / "splits" / "dataset_dict.json").unlink()
    with pytest.raises(OutputError, match="no tokens itself, but the token folders test, train; give one of them"):
        open_tokens(tmp_path / "splits")
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / "splits" / split)
    with pytest.raises(OutputError, match=r"not a token folder \(state\.json is missing\)"):
        open_tokens(tmp_path / "splits")


def test_what_datasets_saves_again_can_be_read(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.load_from_disk(str(folder)).select(range(100, 300)).save_to_disk(str(tmp_path / "again"))
    with open_tokens(folder) as ours, open_tokens(tmp_path / "again") as again:
        assert again.manifest is None
        assert again.vocabulary is None
        for got, want in zip(again.read(range(200)), ours.read(range(100, 300)), strict=True):
            np.testing.assert_array_equal(got, want)
        assert again.column("donor").to_pylist() == ours.column("donor").to_pylist()[100:300]


def test_read_by_position_is_what_pyarrow_reads(folder):
    table = _with_pyarrow(folder)
    lists = table["input_ids"].to_pylist()
    with open_tokens(folder) as tokens:
        assert len(tokens) == tokens.n_cells == len(lists) == 2996
        assert len(json.loads((folder / "manifest.json").read_text())["shards"]) > 2
        np.testing.assert_array_equal(tokens.lengths(), [len(cell) for cell in lists])
        assert tokens.n_tokens == sum(map(len, lists))
        for name in ("cluster", "score", "donor", "cell type", "is_good", "length", "source_row"):
            np.testing.assert_array_equal(tokens.column(name).to_pylist(), table[name].to_pylist())
        assert [name.rsplit("/")[-1] for name in tokens.column("source_file").to_pylist()[1497:1499]] == [
            "part1.h5ad",
            "part2.h5ad",
        ]
        rng = np.random.default_rng(0)
        for cells in (range(len(lists)), rng.permutation(len(lists)), [5, 5, 4, 3], [], range(10, 4, -2), [2995]):
            values, cu_seqlens = tokens.read(cells)
            want = [lists[i] for i in cells]
            np.testing.assert_array_equal(cu_seqlens, np.cumsum([0, *map(len, want)]))
            assert values.tolist() == [token for cell in want for token in cell]
        joined = np.concatenate([values for values, _ in tokens.batches(cells_per_batch=100)])
        np.testing.assert_array_equal(joined, tokens.read(range(len(lists)))[0])
        for wrong in ([2996], [-1]):
            with pytest.raises(IndexError, match="not within"):
                tokens.read(wrong)
        with pytest.raises(OutputError, match="no column 'sex'; there are obs_names, cluster"):
            tokens.column("sex")


@settings(max_examples=40, deadline=None)
@given(
    batches=st.lists(st.lists(st.lists(st.integers(0, 2**15 - 1), max_size=5), max_size=6), max_size=4),
    wide=st.booleans(),
    texts=st.lists(st.one_of(st.none(), st.text(max_size=4)), min_size=6, max_size=6),
)
def test_any_stream_of_pyarrow_is_indexed(batches, wide, texts, tmp_path_factory):
    """Empty batches, empty cells, missing values, large offsets: what pyarrow wrote, read by position."""
    folder = tmp_path_factory.mktemp("stream")
    kind = pa.large_list(pa.int64()) if wide else pa.list_(pa.int16())
    schema = pa.schema([("before", pa.string()), ("input_ids", kind), ("flag", pa.bool_()), ("after", pa.float32())])
    with pa.OSFile(str(folder / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for cells in batches:
            n = len(cells)
            columns = [texts[:n], cells, [text is None for text in texts[:n]], [None, 1.5, 2.5, None, 0.0, 1.0][:n]]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    cells = [cell for batch in batches for cell in batch]
    with open_tokens(folder) as tokens:
        values, cu_seqlens = tokens.read(range(len(cells)))
        assert [part.tolist() for part in np.split(values, cu_seqlens[1:-1])][: len(cells)] == cells
        assert tokens.column("before").to_pylist() == [text for batch in batches for text in texts[: len(batch)]]
        flags = [text is None for batch in batches for text in texts[: len(batch)]]
        assert tokens.column("flag").to_pylist() == flags


def test_damaged_folders(folder, tmp_path):
    def copy(name):
        return shutil.copytree(folder, tmp_path / name)

    with pytest.raises(OutputError, match="no such token folder"):
        open_tokens(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match=r"state\.json is missing"):
        open_tokens(tmp_path / "empty")
    shard = sorted(path.name for path in folder.glob("data-*.arrow"))[1]
    size = (folder / shard).stat().st_size
    for i, cut in enumerate((0, 7, 300, size // 2, size - 9, size - 8, size - 1)):
        broken = copy(f"cut{i}")
        (broken / shard).write_bytes((folder / shard).read_bytes()[:cut])
        with pytest.raises(OutputError, match="not a whole Arrow stream"):
            open_tokens(broken)
    gone = copy("gone")
    (gone / shard).unlink()
    with pytest.raises(OutputError, match="cannot be opened"):
        open_tokens(gone)
    other = copy("other")
    (other / shard).write_bytes(sorted(folder.glob("data-*.arrow"))[0].read_bytes())
    with pytest.raises(OutputError, match=r"manifest\.json says 2996 cells \(n_cells\), the shards hold"):
        open_tokens(other)
    garbled = copy("garbled")
    (garbled / "state.json").write_text("{")
    with pytest.raises(OutputError, match=r"state\.json cannot be read"):
        open_tokens(garbled)
    outside = copy("outside")
    (outside / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    with pytest.raises(OutputError, match="names no data files"):
        open_tokens(outside)
    compressed = tmp_path / "compressed"
    compressed.mkdir()
    batch = pa.record_batch({"input_ids": pa.array([[1, 2]] * 50, pa.list_(pa.int16()))})
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        pa.OSFile(str(compressed / "a.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, batch.schema, options=options) as writer,
    ):
        writer.write_batch(batch)
    (compressed / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    with pytest.raises(OutputError, match="compressed"):
        open_tokens(compressed)


def flipped(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_shards_are_compared_with_their_checksums_when_they_are_first_read(folder, tmp_path, monkeypatch):
    broken = shutil.copytree(folder, tmp_path / "broken")
    shards = sorted(broken.glob("data-*.arrow"))
    flipped(shards[1], shards[1].stat().st_size // 2)
    tokens = open_tokens(broken)  # opening costs nothing, and reading pays for what is read
    first = json.loads((broken / "manifest.json").read_text())["shards"][0]["n_cells"]
    assert len(tokens.read(range(first))[1]) == first + 1
    read = [
        lambda: tokens.read([first]),
        lambda: tokens.read([0, tokens.n_cells - 1, first]),
        lambda: tokens.column("length"),
    ]
    for what in read * 2:
        with pytest.raises(
            OutputError, match=rf"{shards[1].name} is damaged or was changed: its SHA-256 is .*tokenize again"
        ):
            what()
    for unchecked in (open_tokens(broken, verify=False), open_tokens(folder, verify=True)):
        assert len(unchecked.column("length")) == tokens.n_cells
        assert len(unchecked.read(range(tokens.n_cells))[1]) == tokens.n_cells + 1
    monkeypatch.setenv("GENEFORMER_FAST_VERIFY", "0")
    open_tokens(broken).column("length")
    with pytest.raises(OutputError, match="damaged"):
        open_tokens(broken, verify=True).column("length")


def test_a_shard_is_read_for_its_checksum_once_by_however_many_threads(folder, monkeypatch):
    read = []
    monkeypatch.setattr(StreamFile, "sha256", lambda self: read.append(self.path) or sha256_of(self.path))
    tokens = open_tokens(folder)
    assert not read
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda cell: tokens.read([cell % tokens.n_cells]), range(0, 7 * tokens.n_cells, 97)))
    assert sorted(read) == sorted(folder.glob("data-*.arrow"))


def test_a_folder_without_checksums_is_read_as_before(folder, tmp_path):
    """As versions before this one wrote it."""
    old = shutil.copytree(folder, tmp_path / "old")
    content = json.loads((old / "manifest.json").read_text())
    for entry in content["shards"]:
        del entry["sha256"]
    (old / "manifest.json").write_text(json.dumps(content))
    state = json.loads((old / "state.json").read_text())
    (old / "state.json").write_text(json.dumps({**state, "_fingerprint": fingerprint_of(content)[:16]}))
    with open_tokens(old) as tokens, open_tokens(folder) as now:
        assert np.array_equal(tokens.read(range(50))[0], now.read(range(50))[0])
        assert tokens.content_fingerprint == now.content_fingerprint


def test_the_content_fingerprint_is_of_the_content(folder, tmp_path):
    tokens = open_tokens(folder)
    assert len(tokens.content_fingerprint) == 64
    assert (
        open_tokens(shutil.copytree(folder, tmp_path / "elsewhere")).content_fingerprint == tokens.content_fingerprint
    )
    foreign = shutil.copytree(folder, tmp_path / "foreign")
    (foreign / "manifest.json").unlink()
    assert open_tokens(foreign).content_fingerprint == tokens.content_fingerprint
    last = sorted(foreign.glob("data-*.arrow"))[-1]
    flipped(last, last.stat().st_size // 2)
    assert open_tokens(foreign).content_fingerprint != tokens.content_fingerprint


def test_checksums_are_those_of_the_files(folder):
    for entry in json.loads((folder / "manifest.json").read_text())["shards"]:
        assert entry["sha256"] == sha256_of(folder / entry["file"])


@pytest.mark.parametrize("change", [("manifest.json", '"n_tokens": ', '"n_tokens": 1'), ("state.json", "-of-", "-fo-")])
def test_another_digit_in_a_manifest_is_seen(folder, tmp_path, change):
    name, old, new = change
    broken = shutil.copytree(folder, tmp_path / "broken")
    content = (broken / name).read_text()
    (broken / name).write_text(content.replace(old, new, 1))
    with pytest.raises(OutputError, match=r"manifest\.json"):
        open_tokens(broken)


def test_a_batch_never_overflows_its_offsets():
    """2 GB of tokens in one list column is where 32-bit offsets end."""
    schema = token_schema(np.dtype(np.int16), {}, ["a"])
    columns = {"length": np.array([2**30, 2**30]), "source_file": np.zeros(2, int), "source_row": np.arange(2)}
    with pytest.raises(ValueError, match="32-bit offsets"):
        record_batch(schema, np.zeros(0, np.int16), columns)


def test_an_incomplete_shard_has_no_name(tmp_path):
    schema = token_schema(np.dtype(np.int16), {}, ["a"])
    columns = {"length": np.array([2, 1]), "source_file": np.zeros(2, int), "source_row": np.arange(2)}
    writer = ShardWriter(tmp_path, 0, schema)
    writer.write(record_batch(schema, np.arange(3, dtype=np.int16), columns))
    assert not list(tmp_path.glob("data-*"))
    entry = writer.finish()
    assert not list(tmp_path.glob("data-*"))
    assert writer.seal() == sha256_of(writer.path)
    assert entry == {"file": "data-00000.arrow", "n_cells": 2, "n_tokens": 3, "n_bytes": writer.path.stat().st_size}
    assert StreamFile(writer.path).n_rows == 2
    abandoned = ShardWriter(tmp_path, 1, schema)
    abandoned.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["data-00000.arrow"]
