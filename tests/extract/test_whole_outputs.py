"""A result is there whole, with what belongs to it, from one run; or it is not there."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import anndata
import numpy as np
import pyarrow.parquet as pq
import pytest
import toys

import geneformer_fast
from geneformer_fast import embed, save, tokenize
from geneformer_fast.errors import OutputError
from geneformer_fast.extract import encoding
from geneformer_fast.extract.outputs import read_cells
from geneformer_fast.files import writing
from geneformer_fast.files.locks import file_lock

ROOT = Path(geneformer_fast.__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two files of cells of other names, their tokens and a model."""
    folder = tmp_path_factory.mktemp("whole")
    words = toys.vocabulary()
    save(toys.encoder(words, width=64), folder / "model")
    words.save(folder / "model")
    for name, seed in (("a", 1), ("b", 2)):
        toys.cells(400, seed=seed, prefix=name).write_h5ad(folder / f"{name}.h5ad")
        tokenize(folder / f"{name}.h5ad", folder / name, dictionary=words, progress=False)
    return folder


def of_one_run(out: Path) -> str | None:
    """Whose cells an .npy holds ("a" or "b"), after a look at all that lies beside it; None where it is not there."""
    beside = [out.with_name(f"{out.name}.json"), out.with_name(f"{out.stem}.cells.parquet")]
    if not out.exists():
        assert not any(path.exists() for path in beside)
        return None
    values = np.load(out)
    assert np.isfinite(values).all(), "no row is missing"
    digest = sha256(out.read_bytes()).hexdigest()
    if beside[0].exists():
        assert json.loads(beside[0].read_text())["sha256"] == digest
        assert beside[1].exists(), "the JSON comes last"
    if beside[1].exists():
        table = pq.read_table(beside[1])
        assert table.schema.metadata[b"sha256"].decode() == digest
        assert table.num_rows == len(values)
        return table.column("obs_names")[0].as_py()[0]
    return "?"


def test_the_table_beside_an_array_has_its_rows(home: Path, tmp_path: Path) -> None:
    embed(home / "a", home / "model", tmp_path / "z.npy")
    assert of_one_run(tmp_path / "z.npy") == "a"
    table = pq.read_table(tmp_path / "z.cells.parquet")
    assert table.column("obs_names").to_pylist() == [f"a{i}" for i in range(400)]
    assert table.schema.metadata[b"pool"] == b"cls"


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_killed_between_renames(last: int, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the moment, no array lies beside the table or JSON of another one."""
    out = tmp_path / "z.npy"
    embed(home / "a", home / "model", out)
    renamed = []
    rename = os.replace

    class Killed(BaseException):
        pass

    def replace(source: Path, target: Path) -> None:
        if len(renamed) == last:
            raise Killed
        renamed.append(Path(target).name)
        rename(source, target)

    monkeypatch.setattr(writing.os, "replace", replace)
    if last < 3:
        with pytest.raises(Killed):
            embed(home / "b", home / "model", out, overwrite=True)
    else:
        embed(home / "b", home / "model", out, overwrite=True)
    assert renamed == ["z.npy", "z.cells.parquet", "z.npy.json"][:last]
    assert of_one_run(out) == ["?", "?", "b", "b"][last]
    assert np.load(out).shape == (400, 64)
    assert not toys.leftovers(tmp_path)


def test_companions_of_another_array_are_noticed(home: Path, tmp_path: Path) -> None:
    for name in "ab":
        embed(home / name, home / "model", tmp_path / f"{name}.npy")
    rows = np.arange(400)
    assert read_cells(tmp_path / "a.npy", rows, "X").shape == (400, 64)
    (tmp_path / "a.cells.parquet").replace(tmp_path / "b.cells.parquet")
    with pytest.raises(OutputError, match=r"b\.cells\.parquet was not written with .*b\.npy"):
        read_cells(tmp_path / "b.npy", rows, "X")
    (tmp_path / "a.npy.json").write_text("{}")
    with pytest.raises(OutputError, match=r"a\.npy\.json was not written with"):
        read_cells(tmp_path / "a.npy", rows, "X")


def test_a_table_that_is_somebodys_own_is_not_replaced(home: Path, tmp_path: Path) -> None:
    table = tmp_path / "z.cells.parquet"
    table.write_text("mine")
    with pytest.raises(OutputError, match=r"z\.cells\.parquet exists already"):
        embed(home / "a", home / "model", tmp_path / "z.npy")
    assert table.read_text() == "mine"
    table.unlink()
    embed(home / "a", home / "model", tmp_path / "z.npy")
    (tmp_path / "z.npy").unlink()
    embed(home / "b", home / "model", tmp_path / "z.npy")  # what was left of a removed array is in nobody's way
    assert of_one_run(tmp_path / "z.npy") == "b"


def test_another_table_does_not_stay_beside_a_new_array(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "z.npy"
    embed(home / "a", home / "model", out)
    embed(home / "a", home / "model", out, pool="gene", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["z.genes.parquet", "z.npy", "z.npy.json"]


@pytest.mark.parametrize("suffix", ["npy", "arrow", "parquet", "csv"])
def test_folders_are_made_where_something_comes_of_it(suffix: str, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / f"z.{suffix}"
    (home / "broken").mkdir(exist_ok=True)
    (home / "broken" / "state.json").write_text("{}")
    with pytest.raises(OutputError, match=r"broken/state\.json"):
        embed(home / "broken", home / "model", out)
    assert not list(tmp_path.iterdir())
    embed(home / "a", home / "model", out)
    assert out.exists()
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        embed(home / "a", home / "model", tmp_path / "folder.npy", overwrite=True)


def test_one_process_at_a_time(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "z.npy"
    with file_lock(out), pytest.raises(OutputError, match=r"z\.npy is being written by another process"):
        embed(home / "a", home / "model", out)
    with file_lock(tmp_path / "p.png"), pytest.raises(OutputError, match=r"p\.png is being written by another process"):
        embed(home / "a", home / "model", out, plot=tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


def test_what_another_process_wrote_meanwhile_is_not_replaced(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look at the output and the lock."""
    from geneformer_fast.extract import run

    load = run.load

    def slow_load(*arguments: object, **options: object) -> object:
        (tmp_path / "z.npy").write_text("theirs")
        return load(*arguments, **options)

    monkeypatch.setattr(run, "load", slow_load)
    monkeypatch.setattr(encoding.EncodingRun, "stream", lambda *a: pytest.fail("refused only after work was done"))
    with pytest.raises(OutputError, match="exists already"):
        embed(home / "a", home / "model", tmp_path / "z.npy")
    assert (tmp_path / "z.npy").read_text() == "theirs"


@contextlib.contextmanager
def room_for(n_bytes: int) -> Iterator[None]:
    """No file may become larger, as on a full disk; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refusal(n_bytes: int, data: Path, out: Path, **options: object) -> str:
    with room_for(n_bytes), pytest.raises(OutputError) as caught:
        embed(data, data.parent / "model", out, progress=False, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["npy", "arrow", "parquet", "csv", "h5ad"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(suffix: str, home: Path, tmp_path: Path) -> None:
    out = tmp_path / f"z.{suffix}"
    line = refusal(80_000, home / ("a.h5ad" if suffix == "h5ad" else "a"), out)
    assert line.startswith(f"{out} cannot be written: it is larger than the file system"), line
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_for_genes_and_for_temporary_files(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genes = refusal(1000, home / "a", tmp_path / "z.npy", pool="gene")
    temporary = refusal(1000, home / "a.h5ad", tmp_path / "z.npy", pool="mean")
    monkeypatch.setattr(tempfile, "tempdir", str(home / "no such folder"))
    absent = refusal(1000, home / "a.h5ad", tmp_path / "z.npy", pool="mean")
    assert genes.startswith(f"{tmp_path / 'z.npy'} cannot be written: it is larger than the file system")
    assert "larger than the file system" in temporary
    assert "no such folder" in absent
    assert temporary.endswith("set TMPDIR to another folder, or tokenize first")
    assert absent.endswith("set TMPDIR to another folder, or tokenize first")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def many(home: Path) -> Path:
    """Cells enough to embed for some seconds, so that a signal finds the command at it."""
    for name, seed in (("a", 1), ("b", 2)):
        toys.cells(6000, seed=seed, prefix=name).write_h5ad(home / f"many_{name}.h5ad")
        tokenize(home / f"many_{name}.h5ad", home / f"many_{name}", dictionary=toys.vocabulary(), progress=False)
    return home


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "geneformer_fast", *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_begun(out: Path, *runs: subprocess.Popen[str]) -> None:
    """Until one of the commands has the lock of the output: imports take longest on a busy machine."""
    lock = out.with_name(f".{out.name}.lock")
    while not lock.exists() and any(run.poll() is None for run in runs):
        time.sleep(0.02)


@pytest.mark.slow
def test_two_at_once_and_killed_at_any_moment(many: Path, tmp_path: Path) -> None:
    """Two commands into one output, one of them killed: what is there is whole and of one of them."""
    rng = random.Random(0)
    out = tmp_path / "z.npy"
    options = ("--model", many / "model", "--out", out, "--overwrite", "--token-budget", 8)
    for _ in range(4):
        runs = [start("embed", many / f"many_{name}", *options) for name in "ab"]
        wait_until_begun(out, *runs)
        time.sleep(rng.uniform(0.0, 6.0))
        runs[rng.randrange(2)].send_signal(signal.SIGKILL)
        for run in runs:
            _, said = run.communicate()
            assert run.returncode in (0, 2, -signal.SIGKILL)
            if run.returncode == 2:
                assert "is being written by another process" in said
        of_one_run(out)
    last = start("embed", many / "many_a", *options)
    assert last.wait() == 0
    assert of_one_run(out) == "a"
    assert not toys.leftovers(tmp_path), "the next run removes what killed ones left"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "csv", "arrow", "h5ad"])
def test_killed_at_any_moment(suffix: str, many: Path, tmp_path: Path) -> None:
    rng = random.Random(suffix)
    for number in range(2):
        out = tmp_path / f"{number}.{suffix}"
        data = many / ("many_a.h5ad" if suffix == "h5ad" else "many_a")
        run = start("embed", data, "--model", many / "model", "--out", out, "--token-budget", 8)
        wait_until_begun(out, run)
        time.sleep(rng.uniform(0.0, 6.0))
        run.send_signal(signal.SIGKILL)
        run.communicate()
        if out.exists():
            values = read_cells(out, np.arange(6000), "X_geneformer")
            assert values.shape == (6000, 64)
            assert np.isfinite(values).all()
            assert suffix != "h5ad" or anndata.read_h5ad(out).n_obs == 6000
