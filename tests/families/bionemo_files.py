"""Checkpoints of BioNeMo's Geneformer as its tools write them, name by name, out of one state dict."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from formula_weights import formula_weights
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

State = dict[str, torch.Tensor]

#: ``model_config.yaml`` of an archive of NeMo 1; lengths refer to each other there.
NEMO1_CONFIG = """\
micro_batch_size: 8
global_batch_size: 128
tensor_model_parallel_size: 1
pipeline_model_parallel_size: 1
seq_length: 24
max_position_embeddings: ${{.seq_length}}
encoder_seq_length: ${{model.seq_length}}
num_layers: 2
hidden_size: 16
ffn_hidden_size: 32
num_attention_heads: 4
init_method_std: 0.02
hidden_dropout: 0.02
attention_dropout: 0.3
kv_channels: null
apply_query_key_layer_scaling: true
layernorm_epsilon: 1e-12
make_vocab_size_divisible_by: 128
fp32_residual_connection: true
bert_binary_head: false
position_embedding_type: learned_absolute
normalization: layernorm
transformer_block_type: pre_ln
activation: {activation}
tokenizer:
  vocab_file: nemo:0f3c_geneformer.vocab
optim:
  name: fused_adam
  lr: 0.001
"""

#: What a context of NeMo 2 says of a model.
NEMO2_FIELDS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": None,
    "kv_channels": None,
    "seq_length": 24,
    "hidden_dropout": 0.02,
    "attention_dropout": 0.1,
    "layernorm_epsilon": 1e-12,
    "layernorm_zero_centered_gamma": False,
    "normalization": "LayerNorm",
    "qk_layernorm": False,
    "gated_linear_unit": False,
    "add_bias_linear": True,
    "bias_activation_fusion": True,
    "apply_residual_connection_post_layernorm": False,
    "position_embedding_type": "learned_absolute",
    "init_method_std": 0.02,
}
GELU, RELU = ("torch._C._nn", "gelu"), ("torch.nn.functional", "relu")


def tiny_state(fixture: Mapping[str, Any]) -> State:
    """Weights of the numeric reference, under Transformer Engine's names."""
    return formula_weights(
        fixture["keys_sorted"], fixture["shapes"], lambda name: name.endswith(("layer_norm_weight", "norm.weight"))
    )


def nemo1_names(state: State) -> State:
    """NeMo 1's names of the same."""
    pairs = (
        (".self_attention.linear_qkv.layer_norm_", ".input_layernorm."),
        (".mlp.linear_fc1.layer_norm_", ".post_attention_layernorm."),
        (".linear_qkv.", ".query_key_value."),
        (".self_attention.linear_proj.", ".self_attention.dense."),
        (".linear_fc1.", ".dense_h_to_4h."),
        (".linear_fc2.", ".dense_4h_to_h."),
        ("lm_head.layer_norm.", "lm_head.layernorm."),
        ("output_layer.bias", "lm_head.bias"),
    )
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        renamed[f"model.{'' if name.startswith('lm_head') else 'language_model.'}{name}"] = tensor
    return renamed


def local_names(state: State) -> State:
    """Names where Megatron's own layers were trained in place of Transformer Engine's."""
    pairs = (
        (".self_attention.linear_qkv.layer_norm_", ".input_layernorm."),
        (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
    )
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        renamed[f"module.{name}"] = tensor
    return renamed


def write_nemo(path: Path, files: Mapping[str, bytes], *, mode: str = "w:") -> Path:
    """A ``.nemo`` archive of files in a folder, which NeMo packs as ``.``."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        top = tarfile.TarInfo(".")
        top.type, top.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(top)
        for name in {name.rpartition("/")[0] for name in files} - {""}:
            folder = tarfile.TarInfo(f"./{name}")
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def saved(content: Any) -> bytes:
    """What ``torch.save`` writes."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def nemo1_archive(path: Path, state: State, *, activation: str = "gelu", mode: str = "w:") -> Path:
    """An archive as BioNeMo 1 wrote it."""
    files = {
        "model_config.yaml": NEMO1_CONFIG.format(activation=activation).encode(),
        "model_weights.ckpt": saved(nemo1_names(state)),
    }
    return write_nemo(path, files, mode=mode)


def stacked(state: State) -> State:
    """Layers of one kind as one tensor, which is how Megatron saves equal layers sharded."""
    found = {f"module.{name}": tensor for name, tensor in state.items() if ".layers." not in name}
    rests = {name.split(".", 3)[3] for name in state if ".layers." in name}
    for rest in rests:
        layers = [state[f"encoder.layers.{i}.{rest}"] for i in range(2)]
        found[f"module.encoder.layers.{rest}"] = torch.stack(layers)
    return found


def write_sharded(folder: Path, state: Mapping[str, Any]) -> Path:
    """A distributed checkpoint of one process, written by torch."""
    save(dict(state), storage_writer=FileSystemWriter(folder, single_file_per_rank=True), no_dist=True)
    return folder


def write_by_hand(folder: Path, pieces: Mapping[str, list[tuple[tuple[int, ...], torch.Tensor]]], sizes: Any) -> Path:
    """A distributed checkpoint whose tensors lie in pieces, turn by turn in the files of two ranks."""
    folder.mkdir(parents=True)
    streams = {"__0_0.distcp": io.BytesIO(), "__1_0.distcp": io.BytesIO()}
    described: dict[str, Any] = {"module.encoder.layers.mlp.linear_fc1._extra_state/shard_0_2": BytesStorageMetadata()}
    places: dict[Any, Any] = {}
    turn = 0
    for name, parts in pieces.items():
        chunks = []
        for offsets, part in parts:
            file = list(streams)[turn % 2]
            turn += 1
            start = streams[file].tell()
            streams[file].write(saved(part))
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), part.shape))
            index = MetadataIndex(name, torch.Size(offsets), len(chunks) - 1)
            places[index] = _StorageInfo(file, start, streams[file].tell() - start)
        properties = TensorProperties(dtype=parts[0][1].dtype)
        described[name] = TensorStorageMetadata(properties, torch.Size(sizes[name]), chunks)
    metadata = Metadata(
        described, {name: tuple(name.split(".")) for name in pieces}, places, StorageMeta(folder, "a", None, [])
    )
    metadata.mcore_data = {"optimizer.state": {"nd_reformulated_orig_global_shape": torch.Size([4, 2])}}  # type: ignore[attr-defined]
    for file, stream in streams.items():
        (folder / file).write_bytes(stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def pieces_of(state: State) -> tuple[dict[str, list[tuple[tuple[int, ...], torch.Tensor]]], dict[str, torch.Size]]:
    """Stacked layers piece by piece, each matrix among two ranks along its rows."""
    pieces, sizes = {}, {}
    for name, whole in stacked(state).items():
        sizes[name] = whole.shape
        if "layers" not in name:
            half = len(whole) // 2
            pieces[name] = [((0, *[0] * (whole.ndim - 1)), whole[:half].clone())]
            pieces[name].append(((half, *[0] * (whole.ndim - 1)), whole[half:].clone()))
            continue
        half = whole.shape[1] // 2
        pieces[name] = [
            ((layer, start, *[0] * (whole.ndim - 2)), whole[layer : layer + 1, start : start + half].clone())
            for layer in range(2)
            for start in (0, half)
        ]
    return pieces, sizes


def write_context(folder: Path, fields: Mapping[str, Any] = NEMO2_FIELDS, activation: tuple[str, str] = GELU) -> Path:
    """``io.json`` of a NeMo 2 folder, as fiddle writes a graph of objects."""
    items = [[f"Attr(name={name!r})", {"type": "leaf", "value": value}] for name, value in fields.items()]
    items.append(["Attr(name='activation_func')", {"type": "pyref", "module": activation[0], "name": activation[1]}])
    items.append(["Attr(name='model_cls')", {"type": "ref", "key": "model_1"}])

    def entry(module: str, name: str, items: list[Any]) -> dict[str, Any]:
        return {"type": {"module": module, "name": name}, "items": items, "metadata": {"type": "leaf", "value": None}}

    graph = {
        "root": {"type": "ref", "key": "trainer_context_1"},
        "objects": {
            "model_1": entry("bionemo.llm.model.biobert.model", "MegatronBioBertModel", []),
            "geneformer_config_1": entry("bionemo.geneformer.api", "GeneformerConfig", items),
            "module_1": entry(
                "bionemo.llm.lightning",
                "BionemoLightningModule",
                [["Attr(name='config')", {"type": "ref", "key": "geneformer_config_1"}]],
            ),
            "trainer_context_1": entry(
                "nemo.lightning.io.pl", "TrainerContext", [["Attr(name='model')", {"type": "ref", "key": "module_1"}]]
            ),
        },
        "refcounts": {"geneformer_config_1": 1},
        "version": "0.0.1",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "io.json").write_text(json.dumps(graph))
    return folder


def write_model_yaml(folder: Path, fields: Mapping[str, Any] = NEMO2_FIELDS) -> Path:
    """``model.yaml`` of a NeMo 2 folder."""
    lines = [
        "_target_: bionemo.llm.lightning.BionemoLightningModule",
        "config:",
        "  _target_: bionemo.geneformer.api.GeneformerConfig",
    ]
    lines += ["  activation_func:", "    _target_: torch._C._nn.gelu", "    _call_: false"]
    lines += [f"  {name}: {json.dumps(value)}" for name, value in fields.items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.yaml").write_text("\n".join(lines) + "\n")
    return folder


def nemo2_folder(folder: Path, write: Callable[[Path], object]) -> Path:
    """A folder of NeMo 2 whose weights ``write`` makes."""
    folder.mkdir()
    write(folder / "weights")
    (folder / "weights" / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"})
    )
    torch.save({"checkpoint_version": 3.0, "epoch": 0}, folder / "weights" / "common.pt")
    write_context(folder / "context")
    return folder


def rank_of(state: State, rank: int, n_ranks: int) -> State:
    """What one rank of tensor parallelism holds."""
    axes = {"linear_proj.weight": 1, "linear_fc2.weight": 1}
    rows = (
        "word_embeddings.weight",
        "output_layer.bias",
        "linear_qkv.weight",
        "linear_qkv.bias",
        "linear_fc1.weight",
        "linear_fc1.bias",
    )
    axes |= dict.fromkeys(rows, 0)
    found = {}
    for name, tensor in state.items():
        axis = next((axis for end, axis in axes.items() if name.endswith(end)), None)
        found[name] = tensor if axis is None else tensor.chunk(n_ranks, axis)[rank].clone()
    return found
