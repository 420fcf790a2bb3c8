"""Checkpoints: killed at any moment, a run goes on as if nothing had happened; what is damaged is named."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import killed_run
import numpy as np
import own_process
import pytest
import torch
from ground import SHORT, Ground
from safetensors.torch import load_file, save_file

from geneformer_fast import load, pretrain
from geneformer_fast.errors import CheckpointError
from geneformer_fast.training.checkpoint import (
    checkpoints_in,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
)
from geneformer_fast.training.distributed import Ranks
from geneformer_fast.training.optimizer import make_optimizer

LONG = dataclasses.replace(SHORT, epochs=7, save_every=4, eval_every=6, keep=2, progress=False)


def log(run: Path) -> list[dict]:
    """Lines of a log without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s", "mfu", "hfu")} for line in lines]


def start(ground: Ground, folder: Path, dies_at: int = 0) -> BaseProcess:
    files = (ground.tokens.path, folder / "killed", folder / "config.json", folder / "recipe.json")
    return own_process.begin(killed_run.run, *files, torch.get_num_threads(), dies_at)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of products come out in an order that depends on the number of threads, of OpenMP and of MKL."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_killed_twice_it_ends_with_the_same_bits(ground: Ground, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ground.config().to_dict()))
    (tmp_path / "recipe.json").write_text(json.dumps(LONG.to_dict()))
    options = dict(config=ground.config(), recipe=LONG, eval_share=0.2, device="cpu")
    pretrain(ground.tokens, tmp_path / "whole", **options)
    run = tmp_path / "killed"

    # Killed from outside, wherever it is, once it is past its first checkpoint.
    child = start(ground, tmp_path)
    while child.is_alive() and not ((run / "log.jsonl").exists() and len(log_lines(run)) > 6):
        time.sleep(0.002)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    first = [path.name for path in checkpoints_in(run / "checkpoints")]
    assert first
    assert "final" not in os.listdir(run)

    # Goes on, and is killed when its second new checkpoint is written but has no name yet.
    child = start(ground, tmp_path, 2)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert list((run / "checkpoints").glob(".step-*.part"))
    assert [path.name for path in checkpoints_in(run / "checkpoints")][-1] > first[-1]

    torch.manual_seed(999)  # another process's random state is of no account
    random.seed(999)
    pretrain(ground.tokens, run, resume=True, **options)
    assert log(run) == log(tmp_path / "whole")
    assert len(log(run)) == 28 + 5
    assert [path.name for path in checkpoints_in(run / "checkpoints")] == ["step-00000024", "step-00000028"]
    assert not list((run / "checkpoints").glob(".*"))
    ours, whole = (load(folder / "final").state_dict() for folder in (run, tmp_path / "whole"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in ours.items())


def log_lines(run: Path) -> list[str]:
    return (run / "log.jsonl").read_text().splitlines()


def test_random_states_come_back(ground: Ground, tmp_path: Path) -> None:
    model = ground.model()
    optimizer = make_optimizer(model, SHORT)
    np.random.seed(3)  # noqa: NPY002 - the legacy generator is what is saved
    np.random.standard_normal(1)  # noqa: NPY002 - leaves half a pair behind
    random.seed(4)
    random.gauss(0, 1)
    path = save_checkpoint(tmp_path, 5, model, optimizer, {"mine": [1, 2]}, Ranks(), keep=1)

    def draw() -> tuple:
        legacy = np.random.standard_normal(5)  # noqa: NPY002
        return torch.rand(3).tolist(), [random.gauss(0, 1) for _ in range(3)], random.random(), legacy.tolist()

    expected = draw()
    draw()
    state = load_checkpoint(path, model, optimizer, Ranks())
    assert draw() == expected
    assert (state["step"], state["mine"]) == (5, [1, 2])


def test_the_last_k_are_kept(ground: Ground, tmp_path: Path) -> None:
    ground.fit(ground.model(), dataclasses.replace(SHORT, save_every=1, keep=3), out=tmp_path / "run")
    names = [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000006", "step-00000007", "step-00000008"]
    for path in checkpoints_in(tmp_path / "run" / "checkpoints"):
        assert sorted(file.name for file in path.iterdir()) == [
            *("SHA256SUMS", "model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json")
        ]


@pytest.fixture(scope="module")
def trained(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that has ended, to be copied, and its history."""
    run = tmp_path_factory.mktemp("trained") / "run"
    return run, ground.fit(ground.model(), dataclasses.replace(SHORT, save_every=3), out=run)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(
    ground: Ground, trained: tuple[Path, Any], tmp_path: Path, file: str
) -> None:
    run, history = shutil.copytree(trained[0], tmp_path / "run"), trained[1]
    *_, before, last = checkpoints_in(run / "checkpoints")
    (last / file).write_bytes((last / file).read_bytes()[:40])
    with pytest.raises(CheckpointError, match=rf"{last.name}/{file}.*remove this checkpoint's folder"):
        ground.fit(ground.model(), dataclasses.replace(SHORT, save_every=3), out=run, resume=True)
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    again = ground.fit(ground.model(), dataclasses.replace(SHORT, save_every=3), out=run, resume=True)
    assert again.losses == history.losses[int(before.name[-1]) :]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"])
def test_a_flipped_bit_is_seen(ground: Ground, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ground.model()
    optimizer = make_optimizer(model, SHORT)
    path = save_checkpoint(tmp_path, 12, model, optimizer, {"seconds": 1.5}, Ranks(), keep=1)
    content = bytearray((path / file).read_bytes())
    at = content.index(b"1.5") if file == "state.json" else len(content) - 2
    content[at] ^= 2
    (path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file} is damaged.*remove this checkpoint's folder"):
        load_checkpoint(path, model, optimizer, Ranks())
    monkeypatch.setenv("GENEFORMER_FAST_VERIFY", "0")
    load_checkpoint(path, model, optimizer, Ranks())


WRONG_STATES = {
    "missing": lambda name, state: None,
    "short": lambda name, state: state[:-1],
    "deep": lambda name, state: state[None],
    "other kind": lambda name, state: state.to(torch.float32),
    "negative": lambda name, state: None if state.dtype == torch.uint8 else -state.abs() - 1,
    "large": lambda name, state: None if state.dtype == torch.uint8 else state + 2.0**33,
    "infinite": lambda name, state: torch.full_like(state, math.inf) if state.is_floating_point() else None,
    "position": lambda name, state: state + torch.tensor([0] * 624 + [625]) if name == "python" else None,
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_random_states_that_are_none_are_refused_before_any_is_set(
    ground: Ground, tmp_path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ground.model()
    optimizer = make_optimizer(model, SHORT)
    path = save_checkpoint(tmp_path, 12, model, optimizer, {}, Ranks(), keep=1)
    monkeypatch.setenv("GENEFORMER_FAST_VERIFY", "0")
    states = load_file(path / "random.safetensors")
    for name, state in states.items():
        kind = name.removesuffix(".0")
        changed = WRONG_STATES[wrong](kind, state)
        if changed is None and wrong != "missing":
            continue
        rest = {other: tensor for other, tensor in states.items() if other != name}
        save_file(rest if changed is None else {**rest, name: changed.to(changed.dtype)}, path / "random.safetensors")
        before = random.getstate(), torch.get_rng_state()
        may_be = wrong in ("negative", "large") and kind.endswith("gauss")  # any finite number is one
        if may_be:
            load_checkpoint(path, model, optimizer, Ranks())
            continue
        with pytest.raises(CheckpointError, match=rf"random\.safetensors: the random state {name} is .*remove this"):
            load_checkpoint(path, model, optimizer, Ranks())
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("wrong", ["kind", "missing", "shape", "dtype"])
def test_moments_that_are_none_are_refused(
    ground: Ground, trained: tuple[Path, Any], tmp_path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ground.model()
    shutil.copytree(trained[0], tmp_path / "run")
    *_, path = checkpoints_in(tmp_path / "run" / "checkpoints")
    monkeypatch.setenv("GENEFORMER_FAST_VERIFY", "0")
    moments = load_file(path / "optimizer.safetensors")
    name = "blocks.0.qkv.weight.exp_avg"
    moment = moments.pop(name)
    change = {"kind": {f"{name}_of_another": moment}, "missing": {}, "shape": {name: moment[:-1].clone()}}
    change["dtype"] = {name: moment.long()}
    save_file({**moments, **change[wrong]}, path / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: blocks\.0\.qkv\.weight\.exp_avg.* AdamW keeps"):
        load_checkpoint(path, model, make_optimizer(model, SHORT), Ranks())


def test_a_flipped_bit_in_the_best_weights_is_seen(ground: Ground, tmp_path: Path) -> None:
    model, path = ground.model(), tmp_path / "best-00000001.safetensors"
    save_weights(path, model, Ranks())
    load_weights(path, model)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"best-00000001\.safetensors is damaged"):
        load_weights(path, model)


def test_a_checkpoint_of_other_layers_is_refused(ground: Ground, tmp_path: Path) -> None:
    model = ground.model()
    optimizer = make_optimizer(model, SHORT)
    path = save_checkpoint(tmp_path, 1, model, optimizer, {}, Ranks(), keep=1)
    deeper = ground.model(n_layers=3)
    with pytest.raises(CheckpointError, match=r"'blocks\.2\.attention_norm\.bias' has shape None, but in the model"):
        load_checkpoint(path, deeper, make_optimizer(deeper, SHORT), Ranks())
    for parameter in model.embeddings.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(CheckpointError, match="other frozen layers"):
        load_checkpoint(path, model, make_optimizer(model, SHORT), Ranks())


def test_the_best_weights_come_back(ground: Ground, tmp_path: Path) -> None:
    """Training longer and too fast makes it worse; the best evaluation's weights are returned."""
    recipe = dataclasses.replace(
        SHORT, epochs=30, learning_rate=0.05, eval_every=2, patience=3, is_best_restored=True, save_every=2
    )
    losses = []
    for out in (None, tmp_path / "run"):
        model = ground.model()
        history = ground.fit(model, recipe, eval_cells=ground.eval_cells, out=out)
        assert history.is_stopped_early
        assert len(history.steps) == history.best["step"] + 3 * 2 < 120
        again = ground.fit(
            model, dataclasses.replace(SHORT, steps=1, learning_rate=1e-30), eval_cells=ground.eval_cells
        )
        losses.append((again.evaluations[0]["loss"], history.best["loss"], history.evaluations[-1]["loss"]))
    for found, best, last in losses:
        assert found == pytest.approx(best, rel=1e-6)
        assert last > best
    # A run that has stopped stays so.
    resumed = ground.fit(ground.model(), recipe, eval_cells=ground.eval_cells, out=tmp_path / "run", resume=True)
    assert resumed.is_stopped_early
    assert not resumed.steps
    assert [path.name for path in (tmp_path / "run").glob("best-*")] == [
        f"best-{int(history.best['step']):08d}.safetensors"
    ]
