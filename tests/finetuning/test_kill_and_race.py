"""Campaigns: pretrain, finetune and predict killed at random moments, and two of each at once. Nothing is ever half."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typed_cells import SHORT

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
RECIPE = dataclasses.replace(SHORT, epochs=4)
KILLS = 6  # of every command, at moments spread over what it takes


def start(words: list[str]) -> subprocess.Popen:
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "geneformer_fast", *words], env=environment, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def finished(words: list[str]) -> float:
    """Run a command to its end; returns the seconds it took."""
    begin = time.perf_counter()
    with start(words) as child:
        _, said = child.communicate(timeout=600)
    assert child.returncode == 0, said
    return time.perf_counter() - begin


class Command:
    """A command, how it goes on, and what it leaves that is the same every time."""

    def __init__(self, home: Path, folder: Path, name: str) -> None:
        monitored = {"monitor": "loss", "is_greater_better": False} if name == "pretrain" else {}
        (folder / "recipe.json").write_text(json.dumps({**RECIPE.to_dict(), **monitored}))
        how = ["--recipe", str(folder / "recipe.json"), "--quiet", "--device", "cpu"]
        model, tokens = str(home / "model"), str(home / "tokens")
        self.name = name
        self.words = {
            "pretrain": ["pretrain", tokens, "--config", model, "--save-every", "3", "--eval-share", "0.2", *how],
            "finetune": ["finetune", "cells", tokens, "--model", model, "--label", "kind", "--folds", "2", *how],
            "predict": [
                "predict",
                str(home / "cells.h5ad"),
                "--model",
                str(home / "done" / "final"),
                "--dtype",
                "float32",
            ],
        }[name]
        self.goes_on = ["--overwrite"] if name == "predict" else ["--resume"]

    def out(self, folder: Path) -> Path:
        return folder / "out.parquet" if self.name == "predict" else folder / "out"

    def content(self, folder: Path) -> dict[str, bytes]:
        """What came out, without what depends on the clock."""
        out = self.out(folder)
        if self.name == "predict":
            return {out.name: out.read_bytes()}
        names = ["final/model.safetensors"]
        names += [] if self.name == "pretrain" else ["scores.json", "predictions.parquet", "splits.json"]
        return {name: (out / name).read_bytes() for name in names}


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.endswith((".part", ".partial", ".tmp", ".lock"))]


@pytest.mark.parametrize("name", ["pretrain", "finetune", "predict"])
def test_killed_at_any_moment_it_ends_with_the_same_bits(name, home, done, tmp_path):
    command = Command(home, tmp_path, name)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    seconds = finished([*command.words, "--out", str(command.out(whole))])
    rng = random.Random(name)
    words = [*command.words, "--out", str(command.out(killed)), *command.goes_on]
    for _ in range(KILLS):
        with start(words) as child:
            time.sleep(seconds * rng.uniform(0.3, 1.0))
            child.send_signal(signal.SIGKILL)
            _, said = child.communicate()
        assert child.returncode in (0, -signal.SIGKILL), said
    finished(words)
    assert command.content(killed) == command.content(whole)
    assert not leftovers(killed)


@pytest.mark.parametrize("name", ["pretrain", "finetune", "predict"])
def test_two_at_once_are_one_result_and_one_sentence(name, home, done, tmp_path):
    command = Command(home, tmp_path, name)
    alone = tmp_path / "alone"
    alone.mkdir()
    finished([*command.words, "--out", str(command.out(alone))])
    rng = random.Random(name)
    for number in range(3):
        folder = tmp_path / f"both-{number}"
        folder.mkdir()
        words = [*command.words, "--out", str(command.out(folder))]
        with start(words) as one:
            time.sleep(rng.uniform(0, 1.5))
            with start(words) as other:
                said = [child.communicate()[1] for child in (one, other)]
        codes = sorted(child.returncode for child in (one, other))
        assert codes == [0, 2], said
        refused = next(text for text, child in zip(said, (one, other), strict=True) if child.returncode == 2)
        assert "Traceback" not in "".join(said)
        assert any(text in refused for text in ("by another process", "already", "files that")), refused
        assert len([line for line in refused.splitlines() if line.startswith("error: ")]) == 1
        assert command.content(folder) == command.content(alone)
        assert not leftovers(folder)
