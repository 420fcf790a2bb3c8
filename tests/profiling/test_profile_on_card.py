"""On a card: times are the device's, nobody waits for it within the window, and its memory and energy are told."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from geneformer_fast import Encoder, EncoderConfig, Ragged
from geneformer_fast.profiling.figures import Missing
from geneformer_fast.profiling.run import profile

pytestmark = pytest.mark.gpu

CONFIG = EncoderConfig(n_layers=4, width=256, n_heads=4, ff_width=512, vocab_size=1000, max_len=2048)


def figure(value: Any) -> float:
    assert not isinstance(value, Missing), value
    return float(value)


def batch(n_cells: int = 32, length: int = 1000) -> Ragged:
    ids = torch.arange(n_cells * length) % CONFIG.vocab_size
    return Ragged.from_lengths(ids, [length] * n_cells).to("cuda")


def test_training_is_measured_by_the_devices_clock() -> None:
    model = Encoder(CONFIG, "mlm").cuda().train()
    optimizer, tokens = torch.optim.AdamW(model.parameters(), lr=1e-4), batch()
    rows = torch.arange(0, tokens.n_tokens, 7, device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            model.mlm_loss(model(tokens), rows, tokens.values[rows]).backward()
        optimizer.step()

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        step()
    torch.cuda.synchronize()
    plain = (time.perf_counter() - begin) / 20
    with profile(model, n_warmup=3, n_steps=200) as run:
        for _ in range(3 + 200 + 4):
            step()
            run.step(head_rows=len(rows))
    report = run.report
    spent = report.time
    assert report.subject.dtype == "bfloat16"
    assert spent.wall_s / 200 == pytest.approx(plain, rel=0.05)
    known = [figure(value) for value in spent.parts.values() if not isinstance(value, Missing)]
    assert sum(known) == pytest.approx(spent.wall_s, rel=0.02)
    for part in ("forward", "backward", "optimizer"):
        assert figure(spent.parts[part]) > 0
    assert 0.01 < figure(report.flops.mfu) < 1
    assert {"varlen_attention", "varlen_attention backward"} <= {each.name for each in report.operations}
    memory = report.memory
    assert sum(map(figure, memory.parts.values())) == pytest.approx(figure(memory.peak_bytes), rel=0.05)
    assert isinstance(report.energy.watts, Missing) or 10 < report.energy.watts < 2000


def test_nobody_waits_for_the_device_within_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, tokens, n_waits = Encoder(CONFIG).cuda().eval(), batch(), 0
    wait = torch.cuda.synchronize

    def counted(*args: Any) -> None:
        nonlocal n_waits
        n_waits += 1
        wait(*args)

    monkeypatch.setattr(torch.cuda, "synchronize", counted)
    with profile(encoder, n_warmup=2, n_steps=30, n_active=0, energy=False, ceilings=False) as run:
        for index in range(32):
            with torch.inference_mode():
                encoder(tokens)
            run.step()
            if index == 1:
                n_waits = 0
        assert n_waits <= 3  # at the end of the window, and where the memory of the next step is looked at
    assert run.report.tokens.n_real == 30 * tokens.n_tokens
