"""Folders for encoders that BERT cannot express: our own configuration and names, in a Hugging Face-like shape."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from geneformer_fast.checkpoints import hf
from geneformer_fast.checkpoints.weights import read_tensors, write_model
from geneformer_fast.config import EncoderConfig, matmul_dtype
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import CheckpointError, UnsupportedError

#: ``model_type`` of config.json.
MODEL_TYPE = "geneformer_fast"


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
        settings["n_classes"] = len(state["head.classifier.weight"])
    return write_model(Path(path), settings, state, overwrite=overwrite)


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
    try:
        config = EncoderConfig.from_dict(settings["encoder"])
        with torch.device("meta"):
            encoder = Encoder(config, settings["head"], n_classes=int(settings.get("n_classes", 2)))
    except (KeyError, TypeError, ValueError, UnsupportedError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be understood: {error}") from None
    tensors = read_tensors(folder, verify=verify)
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
