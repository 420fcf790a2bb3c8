"""Damaged token shards: whatever the bytes say, there is one error of ours, and no byte outside of a buffer is read."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from geneformer_fast.errors import OutputError
from geneformer_fast.tokenization.arrow import open_tokens
from geneformer_fast.tokenization.stream import StreamFile

CELLS = [[5, 9, 7], [4], [], [8, 8, 3, 1]]
TEXTS = ["alpha", "beta", "gamma", "delta"]
LABELS = {"info": {"features": {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}}}


def shard(folder: Path, columns=None, metadata: object = LABELS, name: str = "a.arrow") -> Path:
    columns = columns or {
        "input_ids": pa.array(CELLS, pa.list_(pa.int16())),
        "text": pa.array(TEXTS),
        "label": pa.array([0, 1, 1, 0]),
    }
    batch = pa.record_batch(columns)
    if metadata is not None:
        content = metadata if isinstance(metadata, str) else json.dumps(metadata)
        batch = batch.replace_schema_metadata({"huggingface": content})
    with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    return folder / name


def use(folder: Path) -> list[object]:
    """Everything a token folder gives."""
    with open_tokens(folder) as tokens:
        values, cu_seqlens = tokens.read(range(len(tokens)))
        columns = [tokens.column(name).to_pylist() for name in tokens.columns if name != "input_ids"]
        return [values.tolist(), cu_seqlens.tolist(), *columns]


def changed(path: Path, old: bytes, new: bytes, which: int = 0) -> None:
    """Overwrite one place, which must be there."""
    content = bytearray(path.read_bytes())
    place = -1
    for _ in range(which + 1):
        place = content.index(old, place + 1)
    content[place : place + len(new)] = new
    path.write_bytes(content)


def ints(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


TEXT_OFFSETS, TOKEN_OFFSETS = ints(0, 5, 9, 14, 19), ints(0, 3, 4, 4, 8)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (TEXT_OFFSETS, ints(0, 5, 2**30, 14, 19), "column text is damaged"),
        (TEXT_OFFSETS, ints(0, 5, 9, 14, 2**30), "column text is damaged"),
        (TEXT_OFFSETS, ints(0, 5, 9, 14, 25), "column text is damaged"),
        (TEXT_OFFSETS, ints(0, 5, -9, 14, 19), "column text is damaged"),
        (TEXT_OFFSETS, ints(-1, 5, 9, 14, 19), "column text is damaged"),
        (TEXT_OFFSETS, ints(0, 9, 5, 14, 19), "column text is damaged"),
        (b"alphabeta", b"\xff\xfe", "column text is damaged"),
        (TOKEN_OFFSETS, ints(0, 2**30, 4, 4, 8), "offsets of column input_ids are damaged"),
        (TOKEN_OFFSETS, ints(0, 3, 4, 4, 2**30), "offsets of column input_ids are damaged"),
        (TOKEN_OFFSETS, ints(0, 3, 4, 4, 100), "offsets of column input_ids are damaged"),
        (TOKEN_OFFSETS, ints(-4, 3, 4, 4, 8), "offsets of column input_ids are damaged"),
        (TOKEN_OFFSETS, ints(0, 4, 3, 4, 8), "offsets of column input_ids are damaged"),
        (struct.pack("<4q", 0, 1, 1, 0), struct.pack("<4q", 0, 2, 1, 0), "column label does not fit its 2 labels"),
        (struct.pack("<4q", 0, 1, 1, 0), struct.pack("<4q", 0, 2**40, 1, 0), "column label does not fit its 2 labels"),
    ],
)
def test_offsets_texts_and_labels_that_lead_elsewhere(tmp_path, old, new, message):
    path = shard(tmp_path)
    assert use(tmp_path)[2] == TEXTS
    changed(path, old, new)
    with pytest.raises(OutputError, match=message) as caught:
        use(tmp_path)
    assert str(tmp_path) in str(caught.value)


def body_length(path: Path) -> bytes:
    """The record batch's bodyLength as it stands in its message."""
    (batch,) = StreamFile(path).batches
    content = path.read_bytes()
    return struct.pack("<q", len(content) - 8 - min(buffer.position for buffer in batch.buffers))


@pytest.mark.parametrize("n_bytes", [-8, -(2**62), 2**62, 8])
def test_a_body_of_an_impossible_length_ends_the_reading(tmp_path, n_bytes):
    path = shard(tmp_path)
    old = body_length(path)
    changed(path, old, struct.pack("<q", n_bytes))
    with pytest.raises(OutputError, match="not a whole Arrow stream file"):
        use(tmp_path)


@pytest.mark.parametrize("row", range(8))
def test_rows_nulls_and_buffers_that_do_not_fit(tmp_path, row):
    """One after another, the 64-bit fields of the message: rows, missing values, positions and sizes of buffers."""
    path = shard(tmp_path)
    content = path.read_bytes()
    n_rows = [i for i in range(len(content) - 8) if content[i : i + 8] == struct.pack("<q", 4)][row % 4]
    for value in (2**60, -1, 3, 5) if row < 4 else (2**40,):
        damaged = bytearray(content)
        damaged[n_rows : n_rows + 8] = struct.pack("<q", value)
        path.write_bytes(damaged)
        with suppress(OutputError):
            assert use(tmp_path)[0] == [token for cell in CELLS for token in cell]


def test_values_missing_inside_a_cell_are_no_tokens(tmp_path):
    shard(tmp_path, {"input_ids": pa.array([[5, None], [3]], pa.list_(pa.int16()))})
    with pytest.raises(OutputError, match="input_ids has missing values"):
        use(tmp_path)


@pytest.mark.parametrize(
    "metadata",
    [
        *("{", "[]", "3", "[" * 100_000, '{"info": 3}', '{"info": {"features": []}}'),
        *(json.dumps({"info": {"features": {"label": label}}}) for label in (3, {"names": "xy"}, {"names": [1, 2]})),
    ],
)
def test_metadata_of_odd_kinds(tmp_path, metadata):
    shard(tmp_path, metadata=metadata)
    with pytest.raises(OutputError, match="the metadata of the shards"):
        use(tmp_path)


@pytest.mark.parametrize("metadata", [None, {}, {"info": {}}, {"info": {"features": None}}])
def test_metadata_that_says_nothing(tmp_path, metadata):
    shard(tmp_path, metadata=metadata)
    assert use(tmp_path)[3] == [0, 1, 1, 0]


@pytest.mark.parametrize("column", [pa.array([[[1]], [[2]], [[3]], [[4]]]), pa.array([[1.5], [], [2.0, 3.0], []])])
def test_nested_columns_are_stepped_over(tmp_path, column):
    shard(tmp_path, {"other": column, "input_ids": pa.array(CELLS, pa.list_(pa.int16()))}, metadata=None)
    with open_tokens(tmp_path) as tokens:
        assert tokens.read([0])[0].tolist() == [5, 9, 7]
        with pytest.raises(OutputError, match="column other holds list<"):
            tokens.column("other")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([{"a": 1}] * 4), r"struct<.*not understood"),
        (pa.array([b"1234"] * 4, pa.binary(4)), r"fixed_size_binary.*not understood"),
        (pa.array(["a"] * 4, pa.string_view()), r"string_view are not understood"),
        (pa.array(["a"] * 4).dictionary_encode(), "dictionary"),
    ],
)
def test_columns_of_other_kinds_are_named(tmp_path, column, message):
    shard(tmp_path, {"other": column, "input_ids": pa.array(CELLS, pa.list_(pa.int16()))}, metadata=None)
    with pytest.raises(OutputError, match=message):
        open_tokens(tmp_path)


def test_a_column_without_any_value(tmp_path):
    shard(tmp_path, {"input_ids": pa.array(CELLS, pa.list_(pa.int16())), "nothing": pa.nulls(4)}, metadata=None)
    assert use(tmp_path)[2] == [None] * 4


def test_two_columns_of_one_name(tmp_path):
    column = pa.array(CELLS, pa.list_(pa.int16()))
    batch = pa.RecordBatch.from_arrays([column, column], names=["input_ids", "input_ids"])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(OutputError, match="the same name"):
        StreamFile(tmp_path / "a.arrow")


def test_shards_with_other_columns_than_the_first(tmp_path):
    shard(tmp_path)
    shard(tmp_path, {"input_ids": pa.array(CELLS, pa.list_(pa.int32()))}, name="b.arrow")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in ("a.arrow", "b.arrow")]}))
    with pytest.raises(OutputError, match=r"b\.arrow: has other columns than a\.arrow"):
        open_tokens(tmp_path)


def by_pyarrow(path: Path) -> list[object] | None:
    try:
        with pa.OSFile(str(path)) as file:
            table = pa.ipc.open_stream(file).read_all()
        table.validate(full=True)
    except (OSError, pa.ArrowException):
        return None
    cells = table["input_ids"].to_pylist()
    return [
        [token for cell in cells for token in cell],
        np.cumsum([0, *map(len, cells)]).tolist(),
        table[1].to_pylist(),
    ]


def test_every_single_byte_overwritten(tmp_path):
    """Two values for each byte of a small shard: what is given is what pyarrow reads, else one error of ours."""
    path = shard(tmp_path)
    content = path.read_bytes()
    whole = use(tmp_path)
    n_errors = 0
    for place in range(len(content)):
        for value in (0xFF, content[place] ^ 0x10):
            damaged = bytearray(content)
            damaged[place] = value
            path.write_bytes(damaged)
            try:
                got = use(tmp_path)
            except OutputError:
                n_errors += 1
                continue
            assert got[:3] in (whole[:3], by_pyarrow(path))
    assert n_errors > 300
