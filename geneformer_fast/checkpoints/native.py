"""Folders for encoders that BERT cannot express: our own configuration and names, in a Hugging Face-like shape."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from geneformer_fast.checkpoints import hf, quantized
from geneformer_fast.checkpoints.mapping import Entry
from geneformer_fast.checkpoints.skeleton import skeleton
from geneformer_fast.checkpoints.stored import stored_tensors
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
from geneformer_fast.heads import CellClassifier, GeneClassifier, heads_of
from geneformer_fast.layers import EightBits, quantization_of

#: ``model_type`` of config.json.
MODEL_TYPE = "geneformer_fast"
METADATA: dict[str, str] = {}


_LAYER = re.compile(r"blocks\.(\d{1,6})\.")
_CLASSIFIER = "head.classifier.weight"


@dataclass
class NativeSettings:
    """What is read of a config.json of ours."""

    encoder: dict[str, Any]
    head: str | None
    n_classes: schema.whole(1) | None = None  # type: ignore[valid-type]


def save_native(encoder: Encoder, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Save ``config.json`` and ``model.safetensors`` under our own names; :func:`geneformer_fast.load` reads them.

    Raises
    ------
    OutputError
        The folder holds a model already.
    """
    settings, tensors = as_saved(encoder)
    return write_model(Path(path), encoder.config, settings, tensors, overwrite=overwrite)


def as_saved(encoder: Encoder) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config.json and the tensors of an encoder's folder; shapes and dtypes of one without numbers."""
    head = hf.head_name(encoder)
    settings: dict[str, Any] = {"model_type": MODEL_TYPE, "encoder": encoder.config.to_dict(), "head": head}
    state = encoder.state_dict()
    if quantization_of(encoder) is not None:
        state, settings[quantized.KEY] = quantized.to_theirs(encoder, table_of(encoder))
    if isinstance(encoder.head, CellClassifier | GeneClassifier):
        settings["n_classes"] = encoder.head.classifier.out_features
    return settings, state


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
    settings = hf.read_settings(folder)
    if quantized.is_quantized(settings, folder / CONFIG):
        return _load_quantized(folder, settings, dtype, device, verify)
    _config_of(settings, folder)
    tensors = read_tensors(folder, verify=verify)
    check_floats(tensors, folder)
    encoder, _ = opened(settings, tensors, folder)
    if is_verifying(verify):
        warn_of_changes(folder, encoder.config, settings)
    encoder.load_state_dict(tensors, assign=True)
    stored = tensors["blocks.0.qkv.weight"].dtype
    encoder.to(device).cast(matmul_dtype(dtype, device) or stored)
    return encoder.eval()


def _load_quantized(
    folder: Path,
    settings: dict[str, Any],
    dtype: str | torch.dtype | None,
    device: str | torch.device,
    verify: bool | None,
) -> Encoder:
    """A folder of weights of eight bits, tensor by tensor."""
    with stored_tensors(folder, verify=verify) as stored:
        tensors, kinds = quantized.in_our_terms(stored, settings, folder)
        encoder, table = opened(settings, tensors, folder, is_quantized=True)
        if is_verifying(verify):
            warn_of_changes(folder, encoder.config, settings)
        used = quantized.fill(encoder, table, tensors, kinds, folder)
        if is_verifying(verify):
            quantized.warn_of_report(folder, encoder)
        if unknown := sorted(set(tensors) - used):
            raise CheckpointError(f"{folder}: tensor {unknown[0]!r} has no place in this model")
    encoder.to(device).cast(matmul_dtype(dtype, device) or torch.float32)
    return encoder.eval()


def _config_of(settings: dict[str, Any], folder: Path) -> EncoderConfig:
    path = folder / CONFIG
    schema.check(NativeSettings, settings, path, CheckpointError)
    return EncoderConfig.from_dict(settings["encoder"], where=f"{path}: encoder")


def opened(
    settings: dict[str, Any], tensors: Mapping[str, torch.Tensor], folder: Path, *, is_quantized: bool = False
) -> tuple[Encoder, list[Entry]]:
    """An encoder without numbers, and the table of its tensors, whose names and shapes count only."""
    path, config = folder / CONFIG, _config_of(settings, folder)
    check_layers(tensors, config.n_layers, _LAYER, folder)
    n_classes = n_classes_of(tensors, _CLASSIFIER, folder)
    if settings.get("n_classes") not in (None, n_classes):
        raise CheckpointError(f"{path}: n_classes is {settings['n_classes']:,}, but the weights have {n_classes}")
    if settings["head"] not in (None, *heads_of(config)):
        raise CheckpointError(f"{path}: head is {settings['head']!r}; there are {', '.join(heads_of(config))}")
    encoder = skeleton(config, settings["head"], n_classes=n_classes)
    for name, parameter in encoder.state_dict().items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != tuple(parameter.shape):
            raise CheckpointError(f"{folder}: {name!r} has shape {found}, the model needs {tuple(parameter.shape)}")
    unknown = sorted(set(tensors) - set(encoder.state_dict()))
    if unknown and not is_quantized:
        raise CheckpointError(f"{folder}: tensor {unknown[0]!r} has no place in this model")
    return encoder, table_of(encoder)


def table_of(encoder: Encoder) -> list[Entry]:
    """Our names are the checkpoint's, but for weights of eight bits, which are ``X.weight`` there as all others."""
    names = []
    for name in encoder.state_dict():
        layer, _, part = name.rpartition(".")
        if isinstance(encoder.get_submodule(layer), EightBits) and part in ("weight_scale", "smooth"):
            continue
        names.append(f"{layer}.weight" if part == "weight_q" else name)
    return [Entry(name, (name,)) for name in names]
