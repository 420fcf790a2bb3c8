"""Folders for encoders that BERT cannot express: our own configuration and names, in a Hugging Face-like shape."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from geneformer_fast.checkpoints import hf
from geneformer_fast.checkpoints.skeleton import skeleton
from geneformer_fast.checkpoints.weights import (
    CONFIG,
    check_floats,
    check_layers,
    n_classes_of,
    read_tensors,
    warn_of_changes,
    write_model,
)
from geneformer_fast.config import EncoderConfig, matmul_dtype
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import CheckpointError
from geneformer_fast.files import schema
from geneformer_fast.files.checksums import is_verifying

#: ``model_type`` of config.json.
MODEL_TYPE = "geneformer_fast"


_LAYER = re.compile(r"blocks\.(\d{1,6})\.")
_CLASSIFIER = "head.classifier.weight"


@dataclass
class NativeSettings:
    """What is read of a config.json of ours."""

    encoder: dict[str, Any]
    head: Literal["mlm", "cells", "genes", "pooler"] | None
    n_classes: schema.whole(1) | None = None  # type: ignore[valid-type]


def save_native(encoder: Encoder, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Save ``config.json`` and ``model.safetensors`` under our own names; :func:`geneformer_fast.load` reads them.

    Raises
    ------
    OutputError
        The folder holds a model already.
    """
    head = hf.head_name(encoder)
    settings: dict[str, Any] = {"model_type": MODEL_TYPE, "encoder": encoder.config.to_dict(), "head": head}
    state = encoder.state_dict()
    if head in ("cells", "genes"):
        settings["n_classes"] = len(state[_CLASSIFIER])
    return write_model(Path(path), encoder.config, settings, state, overwrite=overwrite)


def load_native(
    folder: Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    verify: bool | None = None,
) -> Encoder:
    """Load a folder of :func:`save_native`, in evaluation mode.

    Raises
    ------
    CheckpointError
        Files are damaged or do not fit together.
    """
    path = folder / CONFIG
    settings = hf.read_settings(folder)
    schema.check(NativeSettings, settings, path, CheckpointError)
    config = EncoderConfig.from_dict(settings["encoder"], where=f"{path}: encoder")
    tensors = read_tensors(folder, verify=verify)
    check_layers(tensors, config.n_layers, _LAYER, folder)
    check_floats(tensors, folder)
    if is_verifying(verify):
        warn_of_changes(folder, config)
    n_classes = n_classes_of(tensors, _CLASSIFIER, folder)
    if settings.get("n_classes") not in (None, n_classes):
        raise CheckpointError(f"{path}: n_classes is {settings['n_classes']:,}, but the weights have {n_classes}")
    encoder = skeleton(config, settings["head"], n_classes=n_classes)
    for name, parameter in encoder.state_dict().items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != tuple(parameter.shape):
            raise CheckpointError(f"{folder}: {name!r} has shape {found}, the model needs {tuple(parameter.shape)}")
    if unknown := sorted(set(tensors) - set(encoder.state_dict())):
        raise CheckpointError(f"{folder}: tensor {unknown[0]!r} has no place in this model")
    encoder.load_state_dict(tensors, assign=True)
    stored = tensors["blocks.0.qkv.weight"].dtype
    encoder.to(device).cast(matmul_dtype(dtype, device) or stored)
    return encoder.eval()
