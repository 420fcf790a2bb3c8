"""Folders and files that are something else than a model of ours: said as what they are, with what to do; no file is
called damaged that is only foreign."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from geneformer_fast import Encoder, EncoderConfig, load, save
from geneformer_fast.errors import CheckpointError

CONFIG = EncoderConfig(n_layers=1, width=8, n_heads=2, ff_width=8, vocab_size=9, max_len=9)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 41183536\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As another program would have made it: no checksums."""
    path = save(Encoder(CONFIG, "mlm"), tmp_path / "model")
    (path / "SHA256SUMS").unlink()
    return path


def sharded(folder: Path) -> dict[str, str]:
    """Two shards with their index."""
    tensors = tensors_of(folder / "model.safetensors")
    index = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for shard in set(index.values()):
        save_file({name: tensors[name] for name, place in index.items() if place == shard}, folder / shard)
    (folder / "model.safetensors").unlink()
    write_index(folder, index)
    return index


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """In memory: load_file's are a view of the file, which tests write over."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def write_index(folder: Path, index: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER.encode(), r"is a pointer of git-lfs and not the file itself; run `git lfs pull`"),
        (b"", r"is empty \(0 bytes\).*download or copy it again"),
        (b"<!DOCTYPE html><html>404</html>", r"is a web page and no data.*download the file again"),
        (b"\n <html lang='en'>", r"is a web page"),
        (b"GGUF\x03\0\0\0", r"is a GGUF file of llama\.cpp; take the same model's safetensors"),
        (b"\x89HDF\r\n\x1a\n" + bytes(80), r"is an HDF5 file, as TensorFlow writes weights"),
    ],
)
def test_files_of_other_kinds(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} {message}") as caught:
        load(folder)
    assert "damaged" not in str(caught.value)


def test_a_pytorch_file_under_the_name_of_safetensors(folder: Path) -> None:
    tensors = tensors_of(folder / "model.safetensors")
    for is_zip in (True, False):
        torch.save(tensors, folder / "model.safetensors", _use_new_zipfile_serialization=is_zip)
        with pytest.raises(CheckpointError, match=r"as torch\.save .*name it pytorch_model\.bin"):
            load(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    load(folder)


def test_truncated_files_are_called_so(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="truncated or damaged; download or copy it again"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", r"PEFT adapter and no model; merge it into its base model \(merge_and_unload\)"),
        ("model-q4.gguf", r"model-q4\.gguf is GGUF files of llama\.cpp"),
        ("tf_model.h5", "TensorFlow weights only"),
        ("flax_model.msgpack", "Flax weights only"),
        ("geneformer.safetensors", r"geneformer\.safetensors is safetensors under another name; rename"),
        ("model-00001-of-00002.safetensors", "rename them .*or fetch their index"),
        ("readme.txt", r"neither model\.safetensors nor pytorch_model\.bin, whole or sharded"),
    ],
)
def test_folders_without_weights(folder: Path, name: str, message: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a PEFT adapter and no model"):
        load(tmp_path)


@pytest.mark.parametrize("target", ["model.safetensors", "model-1.safetensors"])
def test_downloads_are_links_into_a_store(folder: Path, target: str) -> None:
    """huggingface_hub keeps files under their hashes elsewhere; a link whose file is gone is named."""
    if target != "model.safetensors":
        sharded(folder)
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / f"blob-{path.name}")
        path.symlink_to(Path("..") / "blobs" / f"blob-{path.name}")
    load(folder)
    (blobs / f"blob-{target}").unlink()
    with pytest.raises(
        CheckpointError, match=rf"{target}.* (is missing|is a link to a file that is not there).*download"
    ):
        load(folder)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/outside.safetensors", "a/b.safetensors", "..", "", "a\\b.safetensors"]
)
def test_names_in_an_index_stay_in_the_folder(folder: Path, name: str) -> None:
    index = sharded(folder)
    shutil.copy(folder / "model-0.safetensors", folder.parent / "outside.safetensors")
    (folder / "a").mkdir()
    shutil.copy(folder / "model-0.safetensors", folder / "a" / "b.safetensors")
    write_index(folder, {key: name if place == "model-0.safetensors" else place for key, place in index.items()})
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map names .* no \.safetensors file of this folder"):
        load(folder)


def _in_another(folder: Path, index: dict[str, str]) -> None:
    name = next(name for name, place in index.items() if place == "model-0.safetensors")
    write_index(folder, {**index, name: "model-1.safetensors"})


def _twice(folder: Path, index: dict[str, str]) -> None:
    name = next(name for name, place in index.items() if place == "model-0.safetensors")
    tensors = tensors_of(folder / "model-1.safetensors")
    save_file({**tensors, name: tensors_of(folder / "model-0.safetensors")[name] + 1}, folder / "model-1.safetensors")


def _unknown(folder: Path, index: dict[str, str]) -> None:
    name = next(iter(index))
    write_index(folder, {key: place for key, place in index.items() if key != name})


def _promised(folder: Path, index: dict[str, str]) -> None:
    write_index(folder, {**index, "bert.more": "model-0.safetensors"})


def _no_shard(folder: Path, index: dict[str, str]) -> None:
    (folder / "model-1.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_in_another, r"model-0\.safetensors: holds tensor .* which the index of shards puts into model-1"),
        (_twice, r"model-1\.safetensors: holds tensor .* which the index of shards puts into model-0"),
        (_unknown, r"holds tensor .* which the index of shards does not know"),
        (_promised, r"tensor 'bert\.more' is missing, which the index puts there"),
        (_no_shard, r"shard model-1\.safetensors named by .*index\.json is missing; download all 2 shards"),
    ],
)
def test_shards_are_what_their_index_says(
    folder: Path, damage: Callable[[Path, dict[str, str]], None], message: str
) -> None:
    index = sharded(folder)
    load(folder)
    damage(folder, index)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_quantized_models(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    for said, message in (
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "quantized by bitsandbytes, .*; take the model before",
        ),
        ({"load_in_4bit": True}, "quantized by bitsandbytes, .* geneformer-fast quantize MODEL --out DIR"),
        ({"quant_method": "gptq"}, r"are quantized \(quant_method 'gptq'\); take the model before"),
        ({"quant_method": "fp8"}, r"are quantized \(quant_method 'fp8'\); take the model before"),
        ("int8", r"are quantized \(quant_method None\)"),
        ({"quant_method": "compressed-tensors"}, "quantization_config: config_groups is missing"),
    ):
        (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": said}))
        with pytest.raises(CheckpointError, match=message):
            load(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = tensors_of(folder / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        save_file({**tensors, name: tensors[name].to(dtype)}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"{name}' holds {str(dtype)[6:]}, so the weights are quantized"):
            load(folder)
    save_file({**tensors, f"{name.removesuffix('weight')}SCB": torch.ones(16)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"dense\.SCB' is a scale of bitsandbytes"):
        load(folder)


def test_a_pytorch_file_that_unpacks_to_more_than_it_holds(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    with pytest.raises(CheckpointError, match="unpacks to more than 64 times its size"):
        load(folder)
