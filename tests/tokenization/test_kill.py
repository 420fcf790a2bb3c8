"""Killed at any moment, a token folder says that it is unfinished or it is finished; resumed, it has the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest
from corpus import folder_bytes, make_cells, small_vocabulary

from geneformer_fast.cli import main
from geneformer_fast.errors import OutputError
from geneformer_fast.files.writing import remove_leftovers
from geneformer_fast.tokenization import run
from geneformer_fast.tokenization.arrow import open_tokens
from geneformer_fast.tokenization.run import tokenize

SHARD_BYTES = 32_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three files, the last of which ends with cells that have no tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed, storage in ((1, "csr"), (2, "csc"), (3, "dense")):
        adata = make_cells(200, seed, storage=storage)
        if seed == 3:
            adata.X[130:] = 0
        adata.write_h5ad(folder / f"{seed}.h5ad")
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(run, "BLOCK_ROWS", 32)


def _tokenize(corpus, out, **options):
    given = {"obs": ["donor"], "shard_bytes": SHARD_BYTES, "workers": 2, "progress": False, **options}
    return tokenize(corpus, out, dictionary=small_vocabulary(), **given)


def _says_what_it_is(out, finished):
    """Finished with all its bytes, or refused by our reader and without what load_from_disk needs."""
    if not out.exists():
        return
    if (out / "state.json").exists() and not (out / "UNFINISHED.json").exists():
        assert folder_bytes(out) == finished
        return
    with pytest.raises(OutputError, match=r"unfinished|state\.json is missing"):
        open_tokens(out)
    assert not (out / "state.json").exists()


def _killed_at_step(step, corpus, out, **options):
    """Run in a fork that SIGKILLs itself before its ``step``-th change of the disk; whether that moment came."""
    child = os.fork()
    if child == 0:
        try:
            left = step

            def killing(change):
                def changed(*arguments, **named):
                    nonlocal left
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left -= 1
                    return change(*arguments, **named)

                return changed

            for name in ("rename", "replace", "unlink", "fsync", "mkdir"):
                setattr(os, name, killing(getattr(os, name)))
            _tokenize(corpus, out, **options)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_killed_before_every_single_step(corpus, tmp_path, every):
    """Before every seventh where that is no slow test: shards and their records are not written in seven changes."""
    _tokenize(corpus, tmp_path / "whole")
    finished = folder_bytes(tmp_path / "whole")
    assert sum(name.endswith(".arrow") for name in finished) >= 3
    step = 0
    while True:
        out = tmp_path / f"killed{step}"
        is_killed = _killed_at_step(step, corpus, out)
        _says_what_it_is(out, finished)
        if not is_killed:
            break
        if step % (3 * every) == 0 and out.exists():  # killed again while resuming
            _killed_at_step(step // 3, corpus, out, resume=True, workers=1)
            _says_what_it_is(out, finished)
        _tokenize(corpus, out, resume=True, workers=1 + step % 3)
        assert folder_bytes(out) == finished, f"killed before step {step}"
        shutil.rmtree(out)
        step += every
    assert step > 30, "the steps were not seen"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_overwriting(corpus, tmp_path):
    """The old tokens are there in full, or the folder says it is unfinished."""
    _tokenize(corpus / "1.h5ad", tmp_path / "old")
    old = folder_bytes(tmp_path / "old")
    _tokenize(corpus, tmp_path / "new")
    new = folder_bytes(tmp_path / "new")
    for step in range(0, 40, 7):
        out = tmp_path / f"over{step}"
        shutil.copytree(tmp_path / "old", out)
        _killed_at_step(step, corpus, out, overwrite=True)
        if (out / "UNFINISHED.json").exists():
            with pytest.raises(OutputError, match="unfinished"):
                open_tokens(out)
            _tokenize(corpus, out, overwrite=True)
            assert folder_bytes(out) == new
        else:
            remove_leftovers(out)  # as whoever writes there next does
            assert folder_bytes(out) in (old, new)
        shutil.rmtree(out)


def _run_command(arguments, seconds_per_rename, said):
    """The command, slowed down by writing many shards, and by so much for each of them; what it says goes to a file."""
    sys.stdout = sys.stderr = said.open("w", buffering=1)
    # Whoever started the tests in the background may have had their children ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    whole, replace = run.tokenize, os.replace
    run.BLOCK_ROWS = 64
    run.tokenize = lambda *a, **k: whole(*a, **k, shard_bytes=20_000)
    os.replace = lambda *a, **k: (time.sleep(seconds_per_rename), replace(*a, **k))[1]
    sys.exit(main(arguments))


def _command(base, out, *options, seconds_per_rename=0.0):
    """The command in a process of its own, forked off this one: it need not load everything once more."""
    arguments = ["tokenize", str(base / "corpus"), "--out", str(out), "--dictionary", str(base / "vocabulary")]
    arguments += ["--obs", "donor", *options]
    process = multiprocessing.get_context("fork").Process(
        target=_run_command, args=(arguments, seconds_per_rename, out.with_name(f"{out.name}.txt"))
    )
    process.start()
    return process


def _ended(process, out, seconds=120):
    """The exit code, and what the command said."""
    process.join(seconds)
    return process.exitcode, out.with_name(f"{out.name}.txt").read_text()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Enough cells for many shards, the vocabulary, and what comes out."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    base = tmp_path_factory.mktemp("large")
    (base / "corpus").mkdir()
    for seed in (1, 2):
        make_cells(3000, seed).write_h5ad(base / "corpus" / f"{seed}.h5ad")
    small_vocabulary().save(base / "vocabulary")
    code, said = _ended(_command(base, base / "whole"), base / "whole")
    assert code == 0, said
    return base


def _wait_for_shards(process, out, n_shards, seconds=60):
    """Until the folder has so many complete shards, or the process has ended."""
    end = time.monotonic() + seconds
    while process.is_alive() and time.monotonic() < end:
        if len(list(out.glob("data-*.arrow"))) >= n_shards:
            return
        time.sleep(0.001)


def test_really_killed_at_random_moments(large, tmp_path):
    finished = folder_bytes(large / "whole")
    out, kills = tmp_path / "out", 0
    rng = random.Random(7)
    for attempt in range(12):
        options = ["--resume"] if (out / "UNFINISHED.json").exists() else []
        options += ["--workers", str(1 + attempt % 3)]
        pause = 0.02 if attempt < 5 else 0.0
        process = _command(large, out, *options, seconds_per_rename=pause)
        if attempt < 5:
            before = len(list(out.glob("data-*.arrow"))) if out.exists() else 0
            _wait_for_shards(process, out, before + rng.randint(1, 4))
            time.sleep(rng.random() * 0.02)
            process.kill()
        code, _ = _ended(process, out)
        kills += code == -signal.SIGKILL
        _says_what_it_is(out, finished)
        if code == 0:
            break
    assert kills >= 3
    assert folder_bytes(out) == finished


def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(large, tmp_path):
    out = tmp_path / "out"
    # Seconds are left when this process, on a busy machine, is woken up.
    process = _command(large, out, seconds_per_rename=0.2)
    _wait_for_shards(process, out, 1)
    os.kill(process.pid, signal.SIGINT)
    code, said = _ended(process, out)
    assert code == 130, said
    assert "interrupted" in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert not list(out.glob("*.part"))
    _says_what_it_is(out, {})
    code, said = _ended(_command(large, out, "--resume"), out)
    assert code == 0, said
    assert folder_bytes(out) == folder_bytes(large / "whole")


def _progress(out):
    return json.loads((out / "UNFINISHED.json").read_text())["progress"]


def _interrupted(corpus, out):
    """An unfinished folder with complete shards that it knows of."""
    step = 0
    while not (out / "UNFINISHED.json").exists() or not _progress(out)["shards"]:
        shutil.rmtree(out, ignore_errors=True)
        step += 4
        assert _killed_at_step(step, corpus, out)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_resuming_something_else_is_refused(corpus, tmp_path):
    out = tmp_path / "out"
    _interrupted(corpus, out)
    with pytest.raises(OutputError, match=r"is unfinished: [\d,]+ cells in \d+ complete shards"):
        _tokenize(corpus, out)
    for options, named in (
        ({"obs": ["cluster"]}, r"options\.obs"),
        ({"allow_float": True}, r"options\.allow_float: begun with false, now true"),
        ({"n_counts": "computed"}, r"options\.n_counts"),
        ({"shard_bytes": 99_999}, "shard_bytes: begun with 32000, now 99999"),
    ):
        with pytest.raises(OutputError, match=rf"(?s)begun differently.*{named}"):
            _tokenize(corpus, out, resume=True, **options)
    with pytest.raises(OutputError, match=r"(?s)vocabulary\.max_len: begun with 40, now 41"):
        tokenize(
            corpus, out, dictionary=small_vocabulary(max_len=41), obs=["donor"], shard_bytes=SHARD_BYTES, resume=True
        )
    with pytest.raises(OutputError, match=r"inputs: begun with 3 entries \(among them .*2\.h5ad.*now 2 entries"):
        _tokenize([corpus / "1.h5ad", corpus / "3.h5ad"], out, resume=True)
    changed = tmp_path / "changed"
    shutil.copytree(corpus, changed)
    status = (changed / "2.h5ad").stat()
    _interrupted(changed, tmp_path / "out2")
    os.utime(changed / "2.h5ad", ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    with pytest.raises(OutputError, match=r"inputs\[1\]\.mtime_ns"):
        _tokenize(changed, tmp_path / "out2", resume=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_lost_shard_is_noticed(corpus, tmp_path):
    out = tmp_path / "out"
    _interrupted(corpus, out)
    path = out / _progress(out)["shards"][0]["file"]
    path.unlink()
    with pytest.raises(OutputError, match=r"data-00000\.arrow: missing or not of \d+ bytes"):
        _tokenize(corpus, out, resume=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_shard_with_another_bit_is_not_gone_on_with(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    _interrupted(corpus, out)
    path = out / _progress(out)["shards"][0]["file"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(OutputError, match=r"data-00000\.arrow is damaged.*--overwrite"):
        _tokenize(corpus, out, resume=True)
    monkeypatch.setenv("GENEFORMER_FAST_VERIFY", "0")
    _tokenize(corpus, out, resume=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_progress_with_another_digit_is_not_gone_on_with(corpus, tmp_path):
    out = tmp_path / "out"
    _interrupted(corpus, out)
    path, row = out / "UNFINISHED.json", _progress(out)["row"]
    path.write_text(path.read_text().replace(f'"row": {row}', f'"row": {row + 1}'))
    with pytest.raises(OutputError, match=r"UNFINISHED\.json is damaged or was changed.*--overwrite"):
        _tokenize(corpus, out, resume=True)


def test_resume_without_anything_begun_just_begins(corpus, tmp_path):
    _tokenize(corpus, tmp_path / "out", resume=True)
    _tokenize(corpus, tmp_path / "whole")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_datasets_refuses_an_unfinished_folder(corpus, tmp_path):
    datasets = pytest.importorskip("datasets")
    _interrupted(corpus, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        datasets.load_from_disk(str(tmp_path / "out"))
    _tokenize(corpus, tmp_path / "out", resume=True)
    assert len(datasets.load_from_disk(str(tmp_path / "out"))) == len(open_tokens(tmp_path / "out"))
