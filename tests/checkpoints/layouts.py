"""Weights as they are found: safetensors or PyTorch files, old ones too, whole or in shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

KINDS = (
    "model.safetensors",
    "pytorch_model.bin",
    "old.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


def write(folder: Path, kind: str, tensors: dict[str, torch.Tensor]) -> Path:
    """A folder of one of KINDS, sharded in two where it is an index."""
    folder.mkdir()
    if kind == "old.bin":
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        return folder
    name, _, is_sharded = kind.partition(".index")
    parts = [tensors] if not is_sharded else [dict(list(tensors.items())[i::2]) for i in range(2)]
    stem, suffix = name.rsplit(".", 1)
    names = [name] if not is_sharded else [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for part, file in zip(parts, names, strict=True):
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file({key: tensor.contiguous() for key, tensor in part.items()}, folder / file)
    if is_sharded:
        places = {key: file for part, file in zip(parts, names, strict=True) for key in part}
        (folder / kind).write_text(json.dumps({"weight_map": places}))
    return folder
