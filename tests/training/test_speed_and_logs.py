"""Operations are counted as torch counts them; logs hold what happened, once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from ground import SHORT, Ground

from geneformer_fast import EncoderConfig
from geneformer_fast.training.logs import JsonLines
from geneformer_fast.training.speed import encoder_flops, head_flops, peak_flops, training_flops


def test_operations_are_those_torch_counts() -> None:
    """Of transformers' model, forward and backward, with all cells of one length and all rows asked for."""
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    n_cells, length, width, vocab = 3, 16, 32, 50
    stock = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=vocab, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=length, attn_implementation="eager",
        )
    )  # fmt: skip
    ids = torch.randint(4, vocab, (n_cells, length))
    config = EncoderConfig(n_layers=2, width=width, n_heads=2, ff_width=48, vocab_size=vocab, max_len=length)
    n_tokens = n_cells * length
    ours = encoder_flops(config, n_tokens, n_cells * length**2) + head_flops(config, n_tokens)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        stock(ids)
    assert forward.get_total_flops() == ours
    with FlopCounterMode(display=False) as both:
        stock(ids, labels=ids).loss.backward()
    assert both.get_total_flops() == 3 * ours


def test_swiglu_has_a_second_matrix_up() -> None:
    config = EncoderConfig.preset("aido-cell-3m")
    plain = dataclasses.replace(config, activation="gelu")
    difference = encoder_flops(config, 7, 49) - encoder_flops(plain, 7, 49)
    assert difference == 2 * 7 * config.n_layers * config.width * config.ff_width


def test_what_is_not_known_is_not_said(ground: Ground) -> None:
    model = ground.model()
    assert training_flops(model, 10, 100, 2) > 0
    assert training_flops(torch.nn.Linear(2, 2), 10, 100, 2) is None
    model.blocks[0].qkv.weight.requires_grad_(False)
    assert training_flops(model, 10, 100, 2) is None


def test_the_peak_is_measured_without_the_run_noticing() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.rand(3), expected)
    assert 1e8 < peak < 1e14
    assert peak_flops(torch.device("cpu"), torch.float32) == peak


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
        assert 0 < line["mfu"] < 2


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
    ground.fit(ground.model(), dataclasses.replace(SHORT, is_showing_progress=True), eval_cells=ground.eval_cells)
    said = capsys.readouterr().err
    assert "8/8" in said
    for words in ("loss=", "tokens/s=", "MFU="):
        assert words in said
    ground.fit(ground.model(), dataclasses.replace(SHORT, steps=1, is_showing_progress=False))
    assert capsys.readouterr().err == ""
