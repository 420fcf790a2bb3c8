"""The model that a run is profiled with: a checkpoint folder, or a preset with random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from geneformer_fast import families
from geneformer_fast.checkpoints import hf, load
from geneformer_fast.config import PRESETS, EncoderConfig, usable_device, warn_if_emulated
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.quantization.convert import has_own_format
from geneformer_fast.training.pretrain import config_of


def is_folder(name: str) -> bool:
    """Whether a name is that of a checkpoint folder, rather than of a preset.

    Raises
    ------
    UnsupportedError
        It is neither.
    """
    if Path(name).is_dir() or families.recognise(Path(name)) is not None:
        return True
    if name in PRESETS:
        return False
    raise UnsupportedError(
        f"--model {name} is neither a checkpoint folder nor a preset; presets are {', '.join(PRESETS)}"
    )


def geometry_of(name: str) -> EncoderConfig:
    """The configuration of a preset or folder; nothing else of it is read, but of a format of its family's own."""
    if is_folder(name) and has_own_format(Path(name)):
        return load(name, device="cpu").config
    return config_of(name)


def place_of(device: str | None) -> torch.device:
    """Where to compute; None is a GPU if there is one.

    Raises
    ------
    UnsupportedError
        There is no such device here.
    """
    return usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def model_to_embed(name: str, *, dtype: str | None, device: torch.device) -> Encoder:
    """A model as ``embed`` loads it."""
    if is_folder(name):
        return load(name, dtype=dtype or "auto", device=device)
    model = _random(name, None, device).cast(dtype or "auto").eval()
    warn_if_emulated(model.dtype, device)
    return model


def model_to_train(name: str, *, device: torch.device) -> Encoder:
    """A model as ``pretrain`` trains it: float32 parameters, a head for masked genes.

    Raises
    ------
    UnsupportedError
        It is quantized, or has another head.
    """
    if not is_folder(name):
        families.refuse(EncoderConfig.preset(name), "pretrain")
        return _random(name, "mlm", device)
    model = load(name, dtype="float32", device=device)
    families.refuse(model.config, "pretrain")
    if model.quantization is not None:
        raise UnsupportedError(
            f"{name} is quantized ({model.quantization.scheme}), and eight bits do not learn: profile the training of "
            "the model before it was quantized, or --mode embed"
        )
    if hf.head_name(model) != "mlm":
        raise UnsupportedError(f"{name} has no head for masked genes, which --mode train trains; profile --mode embed")
    return model


def _random(preset: str, head: str | None, device: torch.device) -> Encoder:
    """A preset's geometry with random weights, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder(EncoderConfig.preset(preset), head=head).to(device)
