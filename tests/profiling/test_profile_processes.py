"""Several processes that train together: each measures its own part, and the first one writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import own_process
import pytest
import toys
import two_profiled

import geneformer_fast as gf
from geneformer_fast import EncoderConfig
from geneformer_fast.profiling.figures import Missing
from geneformer_fast.profiling.report import Report

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def prepared(place: Path) -> tuple[str, Path]:
    """Tokens, and a folder with a configuration for them."""
    words, out = toys.vocabulary(), place / "out"
    out.mkdir()
    gf.tokenize(toys.cells(40), place / "tokens", dictionary=words, progress=False)
    config = EncoderConfig(
        n_layers=1, width=32, n_heads=2, ff_width=48, vocab_size=words.n_tokens, max_len=words.max_len,
        vocabulary=words.name, vocabulary_fingerprint=words.fingerprint,
    )  # fmt: skip
    (out / "config.json").write_text(json.dumps(config.to_dict()))
    return str(place / "tokens"), out


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    tokens, out = prepared(tmp_path_factory.mktemp("processes"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        own_process.begin(two_profiled.main, tokens, out, environment={**shared, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    for rank in ranks:
        rank.join(timeout=300)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return out


def check_communication(report: Report) -> None:
    """It is told, took some of the time, and has rows of its own."""
    communication = report.time.parts["communication"]
    assert not isinstance(communication, Missing)
    assert 0 < communication < report.time.wall_s
    known = [value for value in report.time.parts.values() if not isinstance(value, Missing)]
    assert sum(known) == pytest.approx(report.time.wall_s, rel=0.02)
    assert any(each.name.startswith("c10d::") for each in report.operations)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loop_in_two_processes_is_measured_by_each(rank: int, out: Path) -> None:
    report = Report.load(out / f"loop.{rank}.json")
    assert (report.time.n_steps, report.cells.n) == (4, 4 * (rank + 1))
    check_communication(report)


def test_pretraining_in_two_processes_writes_one_report_by_the_first(out: Path) -> None:
    report = Report.load(out / "fast.json")
    settings = report.subject.settings
    assert (settings["processes"], settings["parallel"]) == (2, "ddp")
    check_communication(report)
    lines = [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"][3:8]
    # The first process has about half of the cells of every step, and of their tokens.
    assert report.cells.n < sum(line["n_cells"] for line in steps)
    assert report.tokens.n_real == pytest.approx(sum(line["n_tokens"] for line in steps) / 2, rel=0.25)


def test_a_place_that_is_taken_is_refused_by_all_before_anything_is_written(out: Path) -> None:
    assert "fast.json exists already: name another place" in (out / "refused.0").read_text()
    assert "cannot be written, as the first process says" in (out / "refused.1").read_text()
    assert not (out / "never").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_command_measures_one_process_and_says_what_measures_several(rank: int, out: Path) -> None:
    said = (out / f"command.{rank}").read_text()
    assert said.startswith("2 error: geneformer-fast profile measures one process")
    assert "pretrain --profile" in said
    assert "geneformer_fast.profile" in said


@pytest.mark.slow
def test_torchrun_begins_them(tmp_path: Path) -> None:
    """By the documented command, in fresh processes."""
    tokens, out = prepared(tmp_path)
    paths = [str(path) for path in (ROOT, ROOT / "kernels", ROOT / "tests", HERE)]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
            *(str(HERE / "two_profiled.py"), tokens, str(out)),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[:6000]
    check_communication(Report.load(out / "fast.json"))
