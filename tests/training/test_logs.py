"""Logs hold what happened, once, with its share of what the device reaches."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from ground import SHORT, Ground

from geneformer_fast.training.logs import JsonLines


def test_a_log_has_every_step_once(ground: Ground, tmp_path: Path) -> None:
    history = ground.fit(
        ground.model(), dataclasses.replace(SHORT, log_every=3), eval_cells=ground.eval_cells, out=tmp_path / "run"
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [3, 6, 8]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [4, 8]
    for line in steps:
        record = history.steps[line["step"] - 1]
        assert {key: line[key] for key in dataclasses.asdict(record)} == dataclasses.asdict(record)
        assert line["tokens_per_s"] == record.n_tokens / record.seconds
        assert 0 < line["mfu"] == line["hfu"] < 2


def test_lines_of_steps_that_are_made_again_go(tmp_path: Path) -> None:
    log = JsonLines(tmp_path)
    for step in (1, 2, 3):
        log.step({"step": step, "loss": float("nan") if step == 2 else 1.0})
    log.evaluation({"step": 3, "loss": 2.0})
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "step", "st')  # cut off by a kill
    JsonLines(tmp_path, first_step=2).close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, None)]


def test_the_bar_says_speed_and_share_of_the_peak(ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    ground.fit(ground.model(), dataclasses.replace(SHORT, progress=True), eval_cells=ground.eval_cells)
    said = capsys.readouterr().err
    assert "8/8" in said
    for words in ("loss=", "tokens/s=", "MFU="):
        assert words in said
    ground.fit(ground.model(), dataclasses.replace(SHORT, steps=1, progress=False))
    assert capsys.readouterr().err == ""
