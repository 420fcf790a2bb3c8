"""A changed byte in a model's weights is seen; folders without checksums, or changed on purpose, load as before."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from geneformer_fast import Encoder, EncoderConfig, load, save
from geneformer_fast.errors import CheckpointError, OutputError
from geneformer_fast.files.checksums import SUMS, VERIFY

CONFIGS = {
    "bert": EncoderConfig(n_layers=1, width=16, n_heads=2, ff_width=24, vocab_size=30, max_len=20),
    "native": EncoderConfig.preset(
        "bionemo-10m", n_layers=1, width=16, n_heads=2, ff_width=24, vocab_size=30, max_len=20
    ),
}


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save(Encoder(CONFIGS[request.param], "mlm"), tmp_path / "model")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_sha256sum_agrees(folder: Path) -> None:
    assert (folder / SUMS).read_text().endswith("  model.safetensors\n")
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=folder, check=True)


def test_a_flipped_bit_is_refused_unless_nobody_looks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(folder / "model.safetensors", -3)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged.*on purpose remove SHA256SUMS"):
        load(folder)
    load(folder, verify=False)
    monkeypatch.setenv(VERIFY, "0")
    load(folder)
    with pytest.raises(CheckpointError, match="is damaged"):
        load(folder, verify=True)
    monkeypatch.delenv(VERIFY)
    (folder / SUMS).unlink()
    load(folder)


def test_an_edited_config_is_no_damage(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "note": "mine"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)


def test_a_config_that_changes_the_numbers_is_warned_of(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    changed = {**settings, "num_attention_heads": 4}
    if "encoder" in settings:
        changed = {**settings, "encoder": {**settings["encoder"], "n_heads": 4}}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.warns(
        UserWarning, match=r"config\.json was changed after .*: n_heads 2 then, 4 now\. .* remove SHA256SUMS"
    ):
        assert load(folder).config.n_heads == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, verify=False)
    (folder / SUMS).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)


def test_every_shard_is_compared(tmp_path: Path) -> None:
    folder = save(Encoder(CONFIGS["bert"], "mlm"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[:7], names[7:])):
        shard = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        index |= dict.fromkeys(part, shard)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    done = subprocess.run(["sha256sum", "model-0.safetensors", "model-1.safetensors"], cwd=folder, capture_output=True)
    (folder / SUMS).write_bytes(done.stdout)
    load(folder)
    flip(folder / "model-1.safetensors", -1)
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is damaged"):
        load(folder)


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7])
def test_pytorchs_own_checksums_are_compared(tmp_path: Path, place: float) -> None:
    folder = save(Encoder(CONFIGS["bert"], "mlm"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path)
    load(folder)
    largest = max(tensors.values(), key=torch.Tensor.numel)
    start = path.read_bytes().find(largest.numpy().tobytes())
    assert start > 0
    flip(path, start + int(place * largest.nbytes))
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin is damaged: the checksum of .*/data/\d+ does not fit"
    ):
        load(folder)
    load(folder, verify=False)


def test_older_pytorch_files_have_none(tmp_path: Path) -> None:
    folder = save(Encoder(CONFIGS["bert"], "mlm"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(load(folder).token_table, tensors["bert.embeddings.word_embeddings.weight"])


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for name, config in CONFIGS.items():
            for path in save(Encoder(config, "mlm"), tmp_path / name).iterdir():
                assert stat.S_IMODE(path.stat().st_mode) == 0o640, path
    finally:
        os.umask(before)


def test_what_a_failed_save_replaces_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(folder / "model.safetensors"))

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OutputError, match=rf"{folder}/model\.safetensors cannot be written: the disk is full"):
        save(Encoder(CONFIGS["bert"]), folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_two_saves_at_once_do_not_mix(tmp_path: Path) -> None:
    models = [Encoder(CONFIGS["bert"], "mlm") for _ in range(4)]
    refused = []

    def write(model: Encoder) -> None:
        try:
            save(model, tmp_path / "model", overwrite=True)
        except OutputError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=write, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) < 4
    assert all("is being written by another process" in text for text in refused)
    found = load(tmp_path / "model").token_table
    assert any(torch.equal(found, model.token_table) for model in models)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [SUMS, "config.json", "model.safetensors"]
