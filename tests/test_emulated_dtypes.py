"""A dtype that this CPU emulates is said wherever a model is brought into it: one that takes many times as long."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
import toys
from geneformer_kernels import target
from safetensors.torch import load_file, save_file

from geneformer_fast import Encoder, EncoderConfig, config, embed, load, save
from geneformer_fast.profiling.scenarios import models

SMALL = dict(n_layers=1, width=32, n_heads=2, ff_width=48, vocab_size=50, max_len=64)


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig(**SMALL), head="mlm").eval()


def on_cpu_with(monkeypatch: pytest.MonkeyPatch, *features: str, has_float16: bool = False) -> None:
    monkeypatch.setattr(config, "has_float16", lambda: has_float16)
    monkeypatch.setattr(target, "target_of", lambda device: target.Target("cpu", features=frozenset(features)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_loading(encoder: Encoder, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(encoder, tmp_path / "wide")
    shutil.copytree(tmp_path / "wide", tmp_path / "narrow")
    (tmp_path / "narrow" / "SHA256SUMS").unlink()
    weights = load_file(tmp_path / "narrow" / "model.safetensors")
    narrow = {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}
    save_file(narrow, tmp_path / "narrow" / "model.safetensors", {"format": "pt"})
    on_cpu_with(monkeypatch, "avx2")
    for folder, asked in (("wide", dtype), ("narrow", None)):  # what a checkpoint holds counts as well
        with pytest.warns(UserWarning, match=f"no {dtype} of its own: .* slower .*; take dtype 'float32', or 'auto'"):
            load(tmp_path / folder, dtype=asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for asked in ("float32", "float64", "auto"):
            load(tmp_path / "narrow", dtype=asked)
        on_cpu_with(monkeypatch, "avx512_bf16", has_float16=True)
        load(tmp_path / "wide", dtype=dtype)


def test_a_model_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    words, cells = toys.vocabulary(), toys.cells(5)
    on_cpu_with(monkeypatch, "avx2")
    with pytest.warns(UserWarning, match="no bfloat16 of its own"):
        embed(cells, toys.encoder(words).cast("bfloat16"), dictionary=words)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this CPU has no")
        embed(cells, toys.encoder(words), dictionary=words)


def test_a_model_to_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu_with(monkeypatch, "avx2")
    with pytest.warns(UserWarning, match="no bfloat16 of its own"):
        models.model_to_embed("aido-cell-3m", dtype="bfloat16", device=torch.device("cpu"))
