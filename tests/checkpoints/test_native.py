"""Folders of encoders that BERT cannot express: what is saved comes back, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from geneformer_fast import Encoder, EncoderConfig, load, save
from geneformer_fast.checkpoints import folders
from geneformer_fast.errors import CheckpointError, OutputError

CONFIGS = {
    "bionemo": EncoderConfig.preset("bionemo-10m", n_layers=2, width=32, n_heads=2, ff_width=48, vocab_size=40),
    "aido": EncoderConfig.preset("aido-cell-3m", n_layers=1, width=32, n_heads=1, ff_width=48, max_len=20),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("head", ["mlm", "cells", "genes", "pooler", None])
def test_what_is_saved_comes_back(tmp_path: Path, name: str, head: str | None) -> None:
    torch.manual_seed(0)
    model = Encoder(CONFIGS[name], head, n_classes=5)
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.config == model.config
    assert type(again.head) is type(model.head)
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("SHA256SUMS", "config.json", "model.safetensors")
    ]


def test_lower_precision_keeps_its_float32_parts(tmp_path: Path) -> None:
    save(Encoder(CONFIGS["bionemo"], "mlm").cast("bfloat16"), tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert again.token_table.dtype == torch.float32
    assert load(tmp_path / "out", dtype="float32").dtype == torch.float32


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    save(Encoder(CONFIGS["bionemo"], "mlm"), tmp_path / "out")
    with pytest.raises(OutputError, match="holds a model already"):
        save(Encoder(CONFIGS["bionemo"], "mlm"), tmp_path / "out")
    save(Encoder(CONFIGS["bionemo"]), tmp_path / "out", overwrite=True)
    assert load(tmp_path / "out").head is None


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = save(Encoder(CONFIGS["bionemo"], "mlm"), tmp_path / "out")
    weights, settings = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())

    def written(**changes: object) -> Path:
        (folder / "config.json").write_text(json.dumps({**settings, **changes}))
        return folder

    with pytest.raises(CheckpointError, match=r"config\.json says 3 layers, but the weights have 2"):
        load(written(encoder={**settings["encoder"], "n_layers": 3}))
    with pytest.raises(CheckpointError, match=r"tensor 'blocks\.1\.attention_norm\.bias' has no place"):
        load(written(encoder={**settings["encoder"], "n_layers": 1}))
    for bad in (dict(encoder={"width": 3}), dict(head="tail"), dict(encoder={**settings["encoder"], "depth": 1})):
        with pytest.raises(CheckpointError, match=r"config\.json|fields this version does not know: depth"):
            load(written(**bad))
    written()
    weights["head.bias"] = weights["head.bias"][:-1]
    save_file(weights, folder / "model.safetensors")
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match=r"'head\.bias' has shape \(39,\), the model needs \(40,\)"):
        load(folder)


def test_a_model_is_put_where_it_is_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As embed does; a card is stood in for by a device that holds no numbers."""
    seen = []
    monkeypatch.setattr(folders, "usable_device", lambda device: seen.append(device) or torch.device("cpu"))
    folder = save(Encoder(CONFIGS["bionemo"]), tmp_path / "model")
    for has_card, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_card=has_card: has_card)
        load(folder)
        load(folder, device="cpu")
        assert seen[-2:] == [expected, "cpu"]
