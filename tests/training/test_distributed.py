"""Two processes compute what one computes: DDP and FSDP2, over gloo."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import own_process
import pytest
import two_processes
from ground import Ground
from two_processes import HELD_OUT, RUN, forget_last

from geneformer_fast import load, pretrain

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NO_DROPOUT = dict(dropout=0.0, attention_dropout=0.0)
PRE_NORM = dict(norm="pre", activation="gelu_tanh", head_activation="gelu", embedding_norm=False, final_norm=True)


@pytest.fixture(scope="module")
def runs(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of one process, ``one`` and ``one-pre-norm``, and beside them those of two."""
    import torch.distributed.fsdp  # noqa: F401 - once, before the two processes are forked off

    out = runs_of_one(ground, tmp_path_factory.mktemp("runs"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        own_process.begin(
            two_processes.main, str(ground.tokens.path), out, environment={**shared, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in "01"
    ]
    for rank in ranks:
        rank.join(timeout=300)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return out


def runs_of_one(ground: Ground, out: Path) -> Path:
    for name, config in (("post", ground.config(**NO_DROPOUT)), ("pre", ground.config(**NO_DROPOUT, **PRE_NORM))):
        (out / f"{name}.json").write_text(json.dumps(config.to_dict()))
    pretrain(ground.tokens, out / "one", config=out / "post.json", **HELD_OUT, **RUN)
    pretrain(ground.tokens, out / "one-pre-norm", config=out / "pre.json", **HELD_OUT, **RUN)
    shutil.copytree(out / "one", out / "from-one")
    forget_last(out / "from-one")
    return out


@pytest.mark.slow
def test_torchrun_begins_them(ground: Ground, tmp_path: Path) -> None:
    """By the documented command, in fresh processes."""
    out = runs_of_one(ground, tmp_path)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
            *(str(HERE / "two_processes.py"), str(ground.tokens.path), str(out)),
        ],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[:6000]
    found, expected = ([loss for _, _, loss in losses(out / name)] for name in ("ddp", "one"))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def losses(run: Path) -> list[tuple[str, int, float]]:
    """Kind, step and loss of every line of a run's log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"], line["loss"]) for line in lines]


@pytest.mark.parametrize(
    ("run", "reference"),
    [("ddp", "one"), ("fsdp", "one"), ("pre-norm", "one-pre-norm"), ("again", "fsdp"), ("from-one", "one")],
)
def test_losses_and_weights_are_those_of_one_process(runs: Path, run: str, reference: str) -> None:
    found, expected = losses(runs / run), losses(runs / reference)
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    assert len({kind for kind, _, _ in found}) == 2
    # The order of sums differs, and Adam lets roundings of small gradients grow.
    np.testing.assert_allclose([entry[2] for entry in found], [entry[2] for entry in expected], rtol=1e-5)
    ours, theirs = (load(runs / name / "final").state_dict() for name in (run, reference))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 1e-4, name


def test_ranks_share_the_tokens(runs: Path) -> None:
    """The same cells and tokens per step, though every rank has seen only some of them."""

    def sizes(run: str) -> list[tuple[int, int]]:
        lines = [json.loads(line) for line in (runs / run / "log.jsonl").read_text().splitlines()]
        return [(line["n_cells"], line["n_tokens"]) for line in lines if line["kind"] == "step"]

    assert sizes("ddp") == sizes("fsdp") == sizes("one")


def test_fewer_cells_than_processes_are_refused_by_all(runs: Path) -> None:
    for rank in (0, 1):
        assert "1 cells cannot be shared among 2 processes" in (runs / f"few.{rank}").read_text()


def test_a_folder_that_somebody_writes_is_refused_by_all(runs: Path) -> None:
    assert "being written by another process" in (runs / "taken.0").read_text()
    assert "cannot be written, as the first process says" in (runs / "taken.1").read_text()
    assert not list((runs / "taken").iterdir())
