"""Dictionaries are read without executing anything that is in them."""

from __future__ import annotations

import os
import pickle
import struct
import time
import tracemalloc
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geneformer_fast.errors import VocabularyError
from geneformer_fast.tokenization.pickles import read_pickle


def written(tmp_path: Path, value: object, protocol: int = 4) -> Path:
    path = tmp_path / "dictionary.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value",
    [
        {"ENSG00000000003": 4, "<pad>": 0},
        {"a": 1.5, "b": float("inf"), "c": None, "d": [1, (2, "x")]},
        {"ENSG1": np.int16(2), "ENSG2": np.int64(-3), "ENSG3": np.uint8(200)},
        {"ENSG1": np.float64(0.1), "ENSG2": np.float32(0.25)},
        OrderedDict(b=2, a=1),
    ],
)
def test_plain_values_and_numpy_scalars_of_every_protocol(tmp_path, value, protocol):
    assert read_pickle(written(tmp_path, value, protocol)) == dict(value)


def test_big_endian_scalars_keep_their_value(tmp_path):
    assert read_pickle(written(tmp_path, {"g": np.dtype(">f8").type(2.5), "h": np.array(7, dtype=">i4")[()]})) == {
        "g": 2.5,
        "h": 7,
    }


def test_numpy_scalars_come_back_as_python_numbers(tmp_path):
    read = read_pickle(written(tmp_path, {"g": np.float64(0.1), "t": np.int16(5)}))
    assert type(read["g"]) is float
    assert type(read["t"]) is int


class _Runs:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_executes_something_is_refused_before_it_does(tmp_path, protocol):
    victim = tmp_path / "executed"
    path = written(tmp_path, {"ENSG1": 1, "x": _Runs(os.system, f"touch {victim}")}, protocol)
    with pytest.raises(VocabularyError, match=r"dictionary\.pkl.*system.*could execute"):
        read_pickle(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    "harmful",
    [
        _Runs(eval, "1"),
        _Runs(getattr, {}, "get"),
        _Runs(open, "x"),
        _Runs(np.load, "x"),
        np.arange(3),
        np.datetime64("2020-01-01"),
        Path("x"),
    ],
    ids=["eval", "getattr", "open", "numpy.load", "array", "datetime", "Path"],
)
def test_everything_that_must_be_imported_is_refused_by_name(tmp_path, harmful):
    with pytest.raises(VocabularyError, match=r"dictionary\.pkl"):
        read_pickle(written(tmp_path, {"x": harmful}))


def test_object_scalars_are_refused(tmp_path):
    # the pickle asks numpy for a scalar of type object, which numpy would build from raw bytes
    body = b"\x80\x04cnumpy\ndtype\n(X\x02\x00\x00\x00O8I0\nI1\ntR."
    path = tmp_path / "dictionary.pkl"
    path.write_bytes(body)
    with pytest.raises(VocabularyError, match="not a plain number"):
        read_pickle(path)


def handmade(tmp_path: Path, *body: bytes) -> Path:
    path = tmp_path / "dictionary.pkl"
    path.write_bytes(b"\x80\x04" + b"".join(body))
    return path


@pytest.mark.parametrize(
    "body",
    [
        (b"}r", struct.pack("<I", 2**31), b"."),
        (b"}I1\np150000000\nI2\ns."),
        (b"}p99999999999999999999\n."),
    ],
    ids=["LONG_BINPUT", "PUT", "PUT beyond 64 bits"],
)
def test_a_giant_memo_index_takes_no_memory(tmp_path, body):
    tracemalloc.start()
    try:
        with suppress(VocabularyError):
            read_pickle(handmade(tmp_path, *([body] if isinstance(body, bytes) else body)))
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


SIXTY = [b"(K\x01K\x02tq\x00", *[b"h\x000h\x00h\x00\x86q\x00"] * 60]
BOMBS = {
    "as a value": (b"}K\x01", *SIXTY, b"s."),
    "as a key": (b"}", *SIXTY, b"K\x01s."),
    "with DUP": (b"}K\x01(K\x01t", b"2\x86" * 60, b"s."),
    "lists": (b"}K\x01]K\x01a", b"q\x00", b"]q\x01(h\x00h\x00e", b"s."),
    "a list that holds itself": (b"}K\x01]q\x00h\x00as.",),
    "deep tuples": (b"}K\x01)", b"\x85" * 200_000, b"s."),
    "deep tuples as a key": (b"}K\x01\x85", b"\x85" * 200_000, b"K\x01s."),
    "deep lists": (b"}K\x01", b"]" * 100_000, b"a" * 99_999, b"s."),
    "a key in pairs": (b"ccollections\nOrderedDict\n(((K\x01t", b"\x85" * 200_000, b"K\x01tttR."),
    "many marks": (b"(" * 200_000, b"t" * 200_000, b"."),
    # multiples of 2^61 - 1 all have the hash 0
    "keys of one hash": (
        b"}(",
        *(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"K\x00" for i in range(1, 30_000)),
        b"u.",
    ),
    "a text encoded again and again": (
        b"c_codecs\nencode\nq\x000X@B\x0f\x00" + b"a" * 10**6 + b"q\x010}K\x01(",
        b"h\x00h\x01\x85R" * 1000,
        b"ls.",
    ),
    "a long integer": (b"}K\x01\x8b", struct.pack("<i", 10**6), b"\x7f" * 10**6, b"s."),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_would_be_large_when_compared_hashed_or_printed_is_refused(tmp_path, name):
    began = time.process_time()  # a busy machine takes its time
    with pytest.raises(VocabularyError, match=r"dictionary\.pkl: not a readable pickle"):
        read_pickle(handmade(tmp_path, *BOMBS[name]))
    assert time.process_time() - began < 5


STAND_INS = [b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\nscalar\n", b"c_codecs\nencode\n"]


@pytest.mark.parametrize("stand_in", [*STAND_INS, b"ccollections\nOrderedDict\n"])
@pytest.mark.parametrize("state", [b"}X\x08\x00\x00\x00__call__K\x01s", b"N}X\x04\x00\x00\x00codeK\x01s\x86"])
def test_no_state_is_given_to_a_function(tmp_path, stand_in, state):
    with pytest.raises(VocabularyError, match="is given a state"):
        read_pickle(handmade(tmp_path, b"}K\x01", stand_in, state, b"bs."))
    value = {"ENSG1": np.float64(0.1), "b": b"raw", "o": OrderedDict(a=1)}
    for protocol in (0, 2, 4):
        assert read_pickle(written(tmp_path, value, protocol)) == value


@pytest.mark.parametrize(
    "body",
    [
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8I0\nI1\ntR(K\x03K\x07tb.",
        b"cnumpy\ndtype\n)\x81.",
        b"(icollections\nOrderedDict\n.",
        b"\x8f.",
        b"}K\x01\x96\x01\x00\x00\x00\x00\x00\x00\x00as.",
        b"}K\x01Pid\ns.",
        b"X\x01\x00\x00\x00a)R.",
        b"]K\x01K\x02s.",
        b"\x82\x01.",
    ],
)
def test_instructions_that_no_dictionary_needs_are_refused(tmp_path, body):
    with pytest.raises(VocabularyError, match=r"dictionary\.pkl: not a readable pickle"):
        read_pickle(handmade(tmp_path, body))


def test_missing_file_and_git_lfs_pointer(tmp_path):
    with pytest.raises(VocabularyError, match="cannot be read"):
        read_pickle(tmp_path / "absent.pkl")
    path = tmp_path / "pointer.pkl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 425590\n")
    with pytest.raises(VocabularyError, match="Git LFS"):
        read_pickle(path)


WHOLE = pickle.dumps({f"ENSG{i:011d}": np.float64(i) for i in range(30)}, protocol=4)


@pytest.mark.parametrize("length", [0, 1, 2, 11, 50, len(WHOLE) // 2, len(WHOLE) - 1])
def test_truncated_pickles(tmp_path, length):
    path = tmp_path / "dictionary.pkl"
    path.write_bytes(WHOLE[:length])
    with pytest.raises(VocabularyError, match="truncated or corrupt"):
        read_pickle(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_give_a_value_or_our_own_error(tmp_path, flips):
    damaged = bytearray(WHOLE)
    for position, value in flips:
        damaged[position] = value
    path = tmp_path / "dictionary.pkl"
    path.write_bytes(damaged)
    with suppress(VocabularyError):
        read_pickle(path)


@pytest.mark.parametrize("release", ["gc30M", "gc95M"])
def test_official_dictionaries_equal_what_pickle_reads(shared_dir, release):
    for path in sorted((shared_dir / "data" / "dicts").glob(f"*_{release}.pkl")):
        with path.open("rb") as file:
            assert read_pickle(path) == pickle.load(file)
