"""Archives and folders of BioNeMo that are truncated, wrong or malicious: one error each, and nothing is executed."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bionemo_files as files
import pytest
import torch
from bionemo_files import State

from geneformer_fast import load
from geneformer_fast.errors import CheckpointError

SIZES = {
    "embedding.word_embeddings.weight": (32, 16),
    "embedding.position_embeddings.weight": (24, 16),
    "encoder.final_layernorm.weight": (16,),
    "encoder.final_layernorm.bias": (16,),
    "lm_head.dense.weight": (16, 16),
    "lm_head.dense.bias": (16,),
    "lm_head.layer_norm.weight": (16,),
    "lm_head.layer_norm.bias": (16,),
    "output_layer.bias": (32,),
}
_BLOCK = {
    "self_attention.linear_qkv.layer_norm_weight": (16,),
    "self_attention.linear_qkv.layer_norm_bias": (16,),
    "self_attention.linear_qkv.weight": (48, 16),
    "self_attention.linear_qkv.bias": (48,),
    "self_attention.linear_proj.weight": (16, 16),
    "self_attention.linear_proj.bias": (16,),
    "mlp.linear_fc1.layer_norm_weight": (16,),
    "mlp.linear_fc1.layer_norm_bias": (16,),
    "mlp.linear_fc1.weight": (32, 16),
    "mlp.linear_fc1.bias": (32,),
    "mlp.linear_fc2.weight": (16, 32),
    "mlp.linear_fc2.bias": (16,),
}


@pytest.fixture
def state() -> State:
    generator = torch.Generator().manual_seed(3)
    sizes = SIZES | {f"encoder.layers.{i}.{name}": size for i in range(2) for name, size in _BLOCK.items()}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Executes:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def refused(place: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load(place, device="cpu", dtype="float32")
    assert "\n" not in str(caught.value)


def config() -> bytes:
    return files.NEMO1_CONFIG.format(activation="gelu").encode()


def weights(state: State) -> bytes:
    return files.saved(files.nemo1_names(state))


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def archive_with(path: Path, state: State, **member: Any) -> Path:
    """A good archive with one member more."""
    with tarfile.open(path, "w:") as tar:
        add(tar, "./model_config.yaml", config())
        add(tar, "./model_weights.ckpt", weights(state))
        add(tar, **member)
    return path


@pytest.mark.parametrize(
    ("member", "match"),
    [
        (dict(name="../evil", content=b"x"), "leads out of the archive"),
        (dict(name="/etc/evil", content=b"x"), "leads out of the archive"),
        (dict(name="a/../../evil", content=b"x"), "leads out of the archive"),
        (dict(name="link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link"),
        (dict(name="link", type=tarfile.LNKTYPE, linkname="model_config.yaml"), "is a link"),
        (dict(name="pipe", type=tarfile.FIFOTYPE), "no plain file"),
        (dict(name="device", type=tarfile.CHRTYPE), "no plain file"),
        (dict(name="model_weights.ckpt", content=b"x"), "two members of the name 'model_weights.ckpt'"),
        (dict(name="mp_rank_00/model_weights.ckpt", content=b"x"), "holds weights twice"),
        (dict(name="model_weights/.metadata", content=b"x"), "holds weights twice"),
    ],
)
def test_members_that_no_model_needs_are_refused(
    tmp_path: Path, state: State, member: dict[str, Any], match: str
) -> None:
    before = sorted(tmp_path.parent.iterdir())
    refused(archive_with(tmp_path / "model.nemo", state, **member), match)
    assert sorted(tmp_path.parent.iterdir()) == before


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_archives_that_end_too_early_are_named(tmp_path: Path, state: State, mode: str) -> None:
    whole = files.nemo1_archive(tmp_path / "whole.nemo", state, mode=mode).read_bytes()
    for n_bytes in (0, 1, 100, 700, len(whole) // 2, len(whole) * 3 // 4):
        path = tmp_path / f"{n_bytes}.nemo"
        path.write_bytes(whole[:n_bytes])
        refused(path, str(path))


def test_a_flipped_bit_of_weights_is_found(tmp_path: Path, state: State) -> None:
    path = files.nemo1_archive(tmp_path / "model.nemo", state)
    content = bytearray(path.read_bytes())
    numbers = state["encoder.layers.1.mlp.linear_fc2.weight"].numpy().tobytes()
    content[content.index(numbers) + 5] ^= 8
    path.write_bytes(content)
    refused(path, "the checksum of .* does not fit")


def test_archives_that_fill_disks_are_refused(tmp_path: Path, state: State) -> None:
    packed = tmp_path / "packed.nemo"
    packed.write_bytes(gzip.compress(bytes(20 << 20)))
    refused(packed, "unpacks to more than 64 times its size")
    declared = tmp_path / "declared.nemo"
    header = tarfile.TarInfo("./model_weights.ckpt")
    header.size = 1 << 40
    declared.write_bytes(header.tobuf() + b"PK" + bytes(10_000))
    refused(declared, "ends within 'model_weights.ckpt', which should have 1,099,511,627,776 bytes")
    other = tmp_path / "page.nemo"
    other.write_text("<!doctype html><title>404</title>")
    refused(other, "a web page and no data")
    nothing = files.write_nemo(tmp_path / "nothing.nemo", {"model_config.yaml": config()})
    refused(nothing, "holds no model_weights.ckpt: there are model_config.yaml")
    stages = {f"tp_rank_00_pp_rank_00{i}/model_weights.ckpt": weights(state) for i in range(2)}
    refused(files.write_nemo(tmp_path / "stages.nemo", stages), "divided among stages")
    zarr = files.write_nemo(tmp_path / "zarr.nemo", {"model_weights/a.b/.zarray": b"{}"})
    refused(zarr, "sharded in zarr")


def test_no_pickle_is_executed(tmp_path: Path, state: State) -> None:
    mark = tmp_path / "executed"
    evil = Executes(mark)
    inside = files.write_nemo(
        tmp_path / "evil.nemo", {"model_config.yaml": config(), "model_weights.ckpt": files.saved({"a": evil, **state})}
    )
    refused(inside, "holds more than weights, and was not loaded")
    old = files.write_nemo(
        tmp_path / "old.nemo", {"model_config.yaml": config(), "model_weights.ckpt": pickle.dumps({"a": evil})}
    )
    refused(old, "model_weights.ckpt")
    folder = files.nemo2_folder(tmp_path / "nemo2", lambda at: files.write_sharded(at, files.stacked(state)))
    (folder / "weights" / ".metadata").write_bytes(pickle.dumps(evil))
    refused(folder, r"refused. This pickle asks for the global (posix|nt).system")
    (folder / "weights" / ".metadata").write_bytes(b"cbuiltins\neval\n(S'1'\ntR.")
    refused(folder, "asks for the global builtins.eval")
    yaml = b"!!python/object/apply:os.system ['touch " + str(mark).encode() + b"']"
    named = files.write_nemo(tmp_path / "yaml.nemo", {"model_config.yaml": yaml, "model_weights.ckpt": weights(state)})
    refused(named, "no YAML of plain values")
    assert not mark.exists()


def test_pieces_that_would_execute_are_refused(tmp_path: Path, state: State) -> None:
    mark = tmp_path / "executed"
    folder = files.nemo2_folder(tmp_path / "nemo2", lambda at: files.write_by_hand(at, *files.pieces_of(state)))
    path = folder / "weights" / "__0_0.distcp"
    content = path.read_bytes()
    evil = files.saved(Executes(mark))
    path.write_bytes(evil + content[len(evil) :])
    refused(folder, "__0_0.distcp")
    assert not mark.exists()


def _metadata(folder: Path) -> Any:
    return pickle.loads((folder / "weights" / ".metadata").read_bytes())


def _write(folder: Path, metadata: Any) -> None:
    (folder / "weights" / ".metadata").write_bytes(pickle.dumps(metadata))


def test_sharded_folders_that_do_not_add_up_are_named(tmp_path: Path, state: State) -> None:
    def made(name: str) -> tuple[Path, Any]:
        place = tmp_path / name
        folder = files.nemo2_folder(place, lambda at: files.write_by_hand(at, *files.pieces_of(state)))
        return folder, _metadata(folder)

    table = "module.embedding.word_embeddings.weight"
    folder, found = made("missing file")
    (folder / "weights" / "__1_0.distcp").unlink()
    refused(folder, r"__1_0.distcp (named by .metadata )?is missing")
    folder, found = made("truncated file")
    path = folder / "weights" / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-3000])
    refused(folder, "truncated|ends within")
    folder, found = made("missing piece")
    found.state_dict_metadata[table].chunks.pop()
    _write(folder, found)
    refused(folder, r"pieces of 'module.embedding.word_embeddings.weight' do not make up its shape \[32, 16\]")
    folder, found = made("overlap")
    chunk = found.state_dict_metadata[table].chunks[1]
    old = next(index for index in found.storage_data if index.fqn == table and index.offset == chunk.offsets)
    place = found.storage_data.pop(old)
    chunk.offsets = torch.Size([8, 0])
    found.storage_data[type(old)(table, chunk.offsets)] = place
    _write(folder, found)
    refused(folder, "overlap")
    folder, found = made("beyond")
    found.state_dict_metadata[table].size = torch.Size([31, 16])
    _write(folder, found)
    refused(folder, r"reach beyond its shape \[31, 16\]")
    folder, found = made("elsewhere")
    for place in found.storage_data.values():
        place.relative_path = "../other/__0_0.distcp"
    _write(folder, found)
    refused(folder, "no file of this folder")
    folder, found = made("huge")
    found.state_dict_metadata[table].size = torch.Size([1 << 30, 1 << 9])
    found.state_dict_metadata[table].chunks[0].sizes = torch.Size([1 << 30, 1 << 9])
    _write(folder, found)
    refused(folder, "more than the files beside it hold")
    folder, found = made("another dtype")
    found.state_dict_metadata[table].properties.dtype = torch.bfloat16
    _write(folder, found)
    refused(folder, "its files do not belong together")
    folder, found = made("packed")
    next(iter(found.storage_data.values())).transform_descriptors = ["zstd"]
    _write(folder, found)
    refused(folder, "packed by an extension of torch")
    folder, found = made("nowhere")
    found.storage_data.clear()
    _write(folder, found)
    refused(folder, "does not say where a piece of")
    folder, found = made("numbers")
    found.state_dict_metadata[table].properties.dtype = torch.int8
    _write(folder, found)
    refused(folder, "holds int8; read are float64")
    folder, found = made("other object")
    _write(folder, {"a": 1})
    refused(folder, "holds no Metadata")
    folder, found = made("cut off")
    path = folder / "weights" / ".metadata"
    path.write_bytes(path.read_bytes()[:-40])
    refused(folder, "truncated or corrupt")


def test_configurations_that_do_not_fit_are_named(tmp_path: Path, state: State) -> None:
    def with_config(name: str, old: str, new: str) -> Path:
        text = config().decode().replace(old, new)
        assert text != config().decode()
        content = {"model_config.yaml": text.encode(), "model_weights.ckpt": weights(state)}
        return files.write_nemo(tmp_path / f"{name}.nemo", content)

    refused(with_config("layers", "num_layers: 2", "num_layers: 3"), "num_layers is 3 but the weights have 2")
    refused(with_config("heads", "num_attention_heads: 4", "num_attention_heads: 5"), "which do not divide 16")
    refused(with_config("channels", "kv_channels: null", "kv_channels: 8"), "kv_channels is 8")
    refused(with_config("rms", "normalization: layernorm", "normalization: rmsnorm"), "norms that are no LayerNorms")
    refused(with_config("rope", "learned_absolute", "rope"), "position_embedding_type is 'rope'")
    refused(with_config("post", "pre_ln", "post_ln"), "transformer_block_type is 'post_ln'")
    refused(with_config("eps", "layernorm_epsilon: 1e-12", "layernorm_epsilon: 7.5"), "eps must be")
    folder = files.nemo2_folder(tmp_path / "nemo2", lambda at: files.write_sharded(at, files.stacked(state)))
    files.write_context(folder / "context", activation=("torch.nn.functional", "silu"))
    refused(folder, "activation_func is 'torch.nn.functional.silu'; read are gelu and relu")
    files.write_context(folder / "context", {**files.NEMO2_FIELDS, "layernorm_zero_centered_gamma": True})
    refused(folder, "norms whose weights are stored less one")
    (folder / "context" / "io.json").write_text("{")
    refused(folder, "cannot be read as JSON")
    torch.save(state, tmp_path / "alone.pt")
    refused(tmp_path / "alone.pt", "nothing says how many attention heads")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    load(tmp_path / "alone.pt", device="cpu")


def test_tensors_that_do_not_fit_are_named(tmp_path: Path, state: State) -> None:
    def saved(name: str, **changes: Any) -> Path:
        content = {key: value for key, value in {**state, **changes}.items() if value is not None}
        return files.nemo1_archive(tmp_path / f"{name}.nemo", content)

    table, layer = "embedding.word_embeddings.weight", "encoder.layers.1.mlp.linear_fc2.bias"
    refused(saved("none", **{table: None}), "no BERT of Megatron")
    refused(saved("layer", **{layer: None}), f"tensor '{layer}' of shape .16. is missing")
    refused(saved("flat", **{table: torch.ones(32)}), "is no matrix")
    refused(saved("unknown", other=torch.ones(3)), "tensor 'other' of shape .3. has no place")
    lora = {"encoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight": torch.ones(2, 16)}
    refused(saved("lora", **lora), "of an adapter")
    refused(saved("eight", **{layer: torch.ones(16, dtype=torch.int8)}), "holds int8")
    twice = {**files.nemo1_names(state), "model.module.embedding.word_embeddings.weight": torch.ones(32, 16)}
    path = files.write_nemo(
        tmp_path / "twice.nemo", {"model_config.yaml": config(), "model_weights.ckpt": files.saved(twice)}
    )
    refused(path, "once more")
    ranks = {f"mp_rank_0{i}/model_weights.ckpt": weights(files.rank_of(state, i, 2)) for i in range(2)}
    other = {**files.rank_of(state, 1, 2), "lm_head.dense.bias": torch.ones(16)}
    ranks["mp_rank_01/model_weights.ckpt"] = weights(other)
    refused(files.write_nemo(tmp_path / "ranks.nemo", ranks), "'lm_head.dense.bias' differs between ranks")
    folder = tmp_path / "two"
    folder.mkdir()
    for name in "ab":
        files.nemo1_archive(folder / f"{name}.nemo", state)
    refused(folder, r"several archives \(a.nemo, b.nemo\)")
