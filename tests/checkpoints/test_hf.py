"""Checkpoint folders as they are found: old buffers, spelled-out decoders, shards, damage."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from geneformer_fast import Encoder, EncoderConfig, load, save
from geneformer_fast.checkpoints import hf
from geneformer_fast.errors import CheckpointError, OutputError

CONFIG = EncoderConfig(n_layers=2, width=16, n_heads=2, ff_width=24, vocab_size=30, max_len=20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(Encoder(CONFIG, "mlm"), tmp_path / "model")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "SHA256SUMS").unlink(missing_ok=True)  # the change is meant


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def test_old_buffers_and_spelled_out_decoder_come_back(folder: Path, tmp_path: Path) -> None:
    tensors = tensors_of(folder)
    tensors["bert.embeddings.position_ids"] = torch.arange(20)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    rewrite(folder, tensors)
    out = save(load(folder), tmp_path / "out")
    assert_same(tensors, tensors_of(out))
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_settings_that_nobody_reads(folder: Path, tmp_path: Path) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    # People write numbers of classes as text, too.
    path.write_text(json.dumps({**settings, "label2id": {"a": "0", "b": 1}}))
    assert json.loads((save(load(folder), tmp_path / "a") / "config.json").read_text())["label2id"]["a"] == "0"
    path.write_text(json.dumps({**settings, "scale": "?"}).replace('"?"', "1e999"))
    with pytest.raises(CheckpointError, match=r"config\.json cannot say what the model's settings hold"):
        save(load(folder), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_untied_decoder(tmp_path: Path) -> None:
    import dataclasses

    encoder = Encoder(dataclasses.replace(CONFIG, tied_decoder=False), "mlm")
    folder = save(encoder, tmp_path / "untied")
    again = load(folder)
    assert torch.equal(again.head.decoder.weight, encoder.head.decoder.weight)
    settings = json.loads((folder / "config.json").read_text())
    assert settings["tie_word_embeddings"] is False
    settings["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"decoder\.weight.*differs.*word_embeddings"):
        load(folder)


def test_pytorch_bin_and_shards(folder: Path, tmp_path: Path) -> None:
    tensors = tensors_of(folder)
    names = sorted(tensors)
    expected = load(folder).state_dict()
    for kind in ("bin", "bin-shards", "safetensors-shards"):
        other = tmp_path / kind
        other.mkdir()
        (other / "config.json").write_text((folder / "config.json").read_text())
        halves = {"1": names[: len(names) // 2], "2": names[len(names) // 2 :]}
        if kind == "bin":
            torch.save(tensors, other / "pytorch_model.bin")
        elif kind == "bin-shards":
            for half, part in halves.items():
                torch.save({name: tensors[name] for name in part}, other / f"pytorch_model-0000{half}-of-00002.bin")
            index = {n: f"pytorch_model-0000{h}-of-00002.bin" for h, part in halves.items() for n in part}
            (other / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
        else:
            for half, part in halves.items():
                save_file({name: tensors[name] for name in part}, other / f"model-0000{half}-of-00002.safetensors")
            index = {n: f"model-0000{h}-of-00002.safetensors" for h, part in halves.items() for n in part}
            (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        encoder = load(other)
        assert_same(dict(encoder.state_dict()), dict(expected))
        assert_same(tensors_of(save(encoder, tmp_path / f"{kind}-out")), tensors)


def test_half_precision_checkpoint_comes_back_in_half(folder: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(folder).items()}
    rewrite(folder, tensors)
    encoder = load(folder)
    assert encoder.dtype == torch.bfloat16
    assert encoder.token_table.dtype == torch.float32
    assert_same(tensors_of(save(encoder, tmp_path / "out")), tensors)
    assert load(folder, dtype="float32").dtype == torch.float32


def test_settings_are_kept(folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings.update(gradient_checkpointing=False, transformers_version="4.44.2", _name_or_path="somewhere")
    (folder / "config.json").write_text(json.dumps(settings))
    out = save(load(folder), tmp_path / "out")
    assert json.loads((out / "config.json").read_text()) == settings


@pytest.mark.parametrize(("vocab_size", "name"), [(25_426, "geneformer-v1"), (20_275, "geneformer-v2"), (30, None)])
def test_vocabulary_is_known_by_its_size(vocab_size: int, name: str | None, tmp_path: Path) -> None:
    import dataclasses

    save(Encoder(dataclasses.replace(CONFIG, vocab_size=vocab_size), "mlm"), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings.pop("geneformer_fast", None)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert load(tmp_path).config.vocabulary == name


def test_missing_tensor_is_named_with_its_shape(folder: Path) -> None:
    tensors = tensors_of(folder)
    del tensors["bert.encoder.layer.1.attention.self.key.weight"]
    rewrite(folder, tensors)
    with pytest.raises(CheckpointError, match=r"layer\.1\.attention\.self\.key\.weight.*\[16, 16\].*missing"):
        load(folder)


def test_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors["bert.encoder.layer.0.intermediate.dense.weight"] = torch.zeros(25, 16)
    rewrite(folder, tensors)
    with pytest.raises(CheckpointError, match=r"intermediate\.dense\.weight.*\[25, 16\].*\[24, 16\]"):
        load(folder)


def test_more_layers_than_the_configuration_says(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\..*no place"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 1000, -8])
def test_truncated_safetensors(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*(truncated|damaged|empty)"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 10, 500, -50])
def test_truncated_bin(folder: Path, keep: int) -> None:
    path = folder / "pytorch_model.bin"
    torch.save(tensors_of(folder), path)
    (folder / "model.safetensors").unlink()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load(folder)


def test_a_pickle_that_executes_is_not_executed(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (witness,))

    (folder / "model.safetensors").unlink()
    for write in (lambda path: torch.save({"a": Evil()}, path), lambda path: path.write_bytes(pickle.dumps(Evil()))):
        write(folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            load(folder)
        assert not witness.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "swish"}, "hidden_act 'swish'"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"hidden_size": None}, r"config\.json: hidden_size is null; input should be a valid integer"),
        ({"architectures": ["BertForPreTraining"]}, "BertForPreTraining"),
    ],
)
def test_configurations_that_cannot_be_read(folder: Path, change: dict, message: str) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_folders_that_are_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        load(tmp_path / "ctheodoris" / "Geneformer")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(folder)


def test_saving_never_overwrites_unasked(folder: Path) -> None:
    with pytest.raises(OutputError, match="overwrite"):
        save(Encoder(CONFIG, "mlm"), folder)
    save(Encoder(CONFIG, "mlm"), folder, overwrite=True)


def test_pre_norm_is_not_called_bert(tmp_path: Path) -> None:
    config = EncoderConfig.preset("bionemo-10m", n_layers=1, vocab_size=40)
    with pytest.raises(CheckpointError, match="cannot express"):
        hf.save(Encoder(config, "mlm"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
