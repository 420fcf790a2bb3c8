"""What is told to Weights & Biases, by a module in its place: what it is given is what its own API takes."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from ground import SHORT, Ground

import geneformer_fast as gf
from geneformer_fast.cli import main
from geneformer_fast.errors import OutputError, UnsupportedError

RECIPE = dataclasses.replace(SHORT, wandb="cells", log_every=2, progress=False)


class Run:
    """A run as ``wandb.init`` gives it: steps may only grow."""

    def __init__(self, **options: Any) -> None:
        self.options, self.logged, self.is_finished = options, list[tuple[int, dict[str, Any]]](), False

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        assert not self.is_finished
        assert step is not None
        if not self.logged or step >= self.logged[-1][0]:
            self.logged.append((step, data))

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    found: list[Run] = []
    module: Any = ModuleType("wandb")
    module.errors = SimpleNamespace(Error=type("Error", (Exception,), {}))

    def init(*, project: str, id: str, resume: str, name: str, config: dict[str, Any]) -> Run:
        json.dumps(config)
        found.append(Run(project=project, id=id, resume=resume, name=name, config=config))
        return found[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return found


def test_it_is_told_what_the_log_says(ground: Ground, tmp_path: Path, runs: list[Run]) -> None:
    ground.fit(ground.model(), RECIPE, eval_cells=ground.eval_cells, out=tmp_path / "run")
    (run,) = runs
    assert run.is_finished
    assert (run.options["project"], run.options["resume"]) == ("cells", "allow")
    assert run.options["name"] == str(tmp_path / "run")
    assert run.options["config"]["learning_rate"] == RECIPE.learning_rate
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == len(run.logged) == 6
    for line, (step, told) in zip(lines, run.logged, strict=True):
        group = "train" if line["kind"] == "step" else "evaluation"
        assert step == line["step"]
        known = {k: v for k, v in line.items() if k not in ("kind", "step") and v is not None}
        assert told == {f"{group}/{name}": value for name, value in known.items()}


def test_a_run_that_goes_on_is_the_same_one_and_another_project_another(
    ground: Ground, tmp_path: Path, runs: list[Run]
) -> None:
    def stop(at: int) -> Callable[[Any], None]:
        def on_step(record: Any) -> None:
            if record.step == at:
                raise KeyboardInterrupt

        return on_step

    saving = dataclasses.replace(RECIPE, save_every=2, log_every=1)
    with pytest.raises(KeyboardInterrupt):
        ground.fit(ground.model(), saving, out=tmp_path / "run", on_step=stop(5))
    assert runs[0].is_finished
    ground.fit(ground.model(), saving, out=tmp_path / "run", resume=True)
    assert runs[0].options["id"] == runs[1].options["id"]
    assert [step for step, _ in runs[1].logged] == [5, 6, 7, 8]
    # Where it is told, and whether, is no part of what a run is.
    for project in ("others", None):
        ground.fit(ground.model(), dataclasses.replace(saving, wandb=project), out=tmp_path / "run", resume=True)
    assert len(runs) == 3
    assert runs[2].options["project"] == "others"
    assert runs[2].options["id"] != runs[0].options["id"]


def test_what_it_refuses_is_said_in_one_sentence(
    ground: Ground, tmp_path: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["wandb"]

    def refused(**options: Any) -> Run:
        raise module.errors.Error("api_key not configured (no-tty)")

    monkeypatch.setattr(module, "init", refused)
    with pytest.raises(UnsupportedError, match=r"api_key not configured.*wandb login.*WANDB_MODE=offline"):
        ground.fit(ground.model(), RECIPE, out=tmp_path / "run")
    (tmp_path / "run" / "wandb.json").write_text("{")
    with pytest.raises(OutputError, match=r"wandb\.json cannot be read"):
        ground.fit(ground.model(), RECIPE, out=tmp_path / "run", resume=True)


def test_without_the_library_nothing_is_made(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'geneformer-fast\[wandb\]'"):
        ground.fit(ground.model(), RECIPE, out=tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    ground.fit(ground.model(), dataclasses.replace(RECIPE, wandb=None, steps=1), out=tmp_path / "run")


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_the_commands_name_the_project(
    command: str, ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def stop(*_: Any, **options: Any) -> None:
        seen.update(options)
        raise UnsupportedError("far enough")

    monkeypatch.setattr("geneformer_fast.training.pretrain.pretrain", stop)
    monkeypatch.setattr("geneformer_fast.finetuning.cells.finetune_cells", stop)
    monkeypatch.setattr("geneformer_fast.cli.places.check_labels", lambda tokens, columns: None)
    tokens, model = str(ground.tokens.path), str(gf.save(ground.model(), tmp_path / "model"))
    arguments = {
        "pretrain": ["pretrain", tokens, "--config", model],
        "finetune": ["finetune", "cells", tokens, "--model", model, "--label", "a"],
    }[command]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--wandb", "cells"]) == 2
    found = seen["wandb"] if command == "pretrain" else seen["recipe"].wandb
    assert found == "cells"
