"""Geneformer with Transformer Engine's layers, as bionemo-recipes exports it: the weights of BERT under other names.

Its blocks normalise after each addition as BERT's do; queries, keys and values are one projection whose rows are
interleaved per head, or three parameters of one layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from geneformer_fast.errors import CheckpointError

_LAYER = re.compile(r"((?:bert\.)?encoder\.layer\.\d{1,6}\.)(self_attention|layernorm|layernorm_mlp)\.(.+)$")
_FUSED = re.compile(r"qkv\.(weight|bias)$")
_SEPARATE = re.compile(r"qkv\.(query|key|value)_(weight|bias)$")
_NAMES = {
    "self_attention.proj": "attention.output.dense",
    "layernorm": "attention.output.LayerNorm",
    "layernorm_mlp.fc1": "intermediate.dense",
    "layernorm_mlp.fc2": "output.dense",
    "layernorm_mlp.layer_norm": "output.LayerNorm",
}
_EXTRA = "_extra_state"
# What their config.json says beside BERT's, and what stock readers would follow into code that is not needed.
_SETTINGS = ("auto_map", "use_te_layers", "fuse_qkv_params", "micro_batch_size", "framework")


def is_transformer_engine(tensors: Mapping[str, Any]) -> bool:
    """Whether names of tensors are of BERT with such layers."""
    return any(_LAYER.match(name) for name in tensors)


def as_bert(
    settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], folder: Path
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config.json and the tensors of BERT that an export holds, number for number.

    Raises
    ------
    CheckpointError
        It is of the training recipe, whose blocks are others and let cells attend to padding; or a tensor has no place
        in such a block.
    """
    n_heads = settings.get("num_attention_heads")
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_EXTRA):
            continue
        match = _LAYER.match(name)
        if match is None:
            renamed[name] = tensor
            continue
        _refuse_recipe(name, folder)
        prefix, rest = match[1], f"{match[2]}.{match[3]}"
        if fused := _FUSED.search(rest):
            parts = _separated(name, tensor, n_heads, folder)
            renamed |= {f"{prefix}attention.self.{part}.{fused[1]}": rows for part, rows in parts.items()}
        elif separate := _SEPARATE.search(rest):
            renamed[f"{prefix}attention.self.{separate[1]}.{separate[2]}"] = tensor
        else:
            module, _, kind = rest.rpartition(".")
            if module not in _NAMES:
                raise CheckpointError(f"{folder}: tensor {name!r} has no place in a block of Transformer Engine's")
            renamed[f"{prefix}{_NAMES[module]}.{kind}"] = tensor
    return {name: value for name, value in settings.items() if name not in _SETTINGS}, renamed


def _separated(name: str, fused: torch.Tensor, n_heads: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Queries, keys and values out of rows [heads, 3, head dim]."""
    if not isinstance(n_heads, int) or n_heads < 1 or not fused.ndim or len(fused) % (3 * n_heads):
        raise CheckpointError(
            f"{folder}: tensor {name!r} of shape {list(fused.shape)} is not of queries, keys and values of {n_heads} "
            "heads; config.json and the weights do not belong together"
        )
    per_head = fused.reshape(n_heads, 3, -1, *fused.shape[1:]).transpose(0, 1)
    return {
        part: rows.reshape(-1, *fused.shape[1:]) for part, rows in zip(("query", "key", "value"), per_head, strict=True)
    }


def _refuse_recipe(name: str, folder: Path) -> None:
    if "layernorm_qkv" in name or re.search(r"layernorm_mlp\.(?:fc[12]_|layer_norm_)(?:weight|bias)$", name):
        raise CheckpointError(
            f"{folder}: tensor {name!r} is of a training recipe of bionemo-recipes, in whose blocks cells attend to "
            "the padding of their batch: what such a model says of a cell depends on how long its batch mates are, so "
            "there is no number to reproduce. Train with use_te_layers=False, or export the "
            "model of bionemo-recipes/models/geneformer"
        )
