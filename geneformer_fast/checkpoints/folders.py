"""Loading and saving whatever a folder holds, or a model is."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from geneformer_fast import families
from geneformer_fast.arguments import checked
from geneformer_fast.checkpoints import hf, native
from geneformer_fast.checkpoints.present import ADAPTER, CONFIG
from geneformer_fast.config import usable_device, warn_if_emulated
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import CheckpointError


@checked
def load(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    verify: bool | None = None,
) -> Encoder:
    """Load a checkpoint folder of Geneformer, of any BERT encoder, or of this project.

    Parameters
    ----------
    path
        Folder with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``, sharded or not: a BertModel,
        BertForMaskedLM, BertForSequenceClassification or BertForTokenClassification, or what :func:`save` wrote of an
        encoder that BERT cannot express. Or a folder of weights of eight bits: what :func:`geneformer_fast.quantize`
        wrote, any of compressed-tensors with a scale per channel (``int-quantized``, ``float-quantized``), or int8 of
        torchao. It is read tensor by tensor: no more is in memory than the quantized model and one tensor.
    dtype
        Dtype of weights and matrix products: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float64"``, ``"auto"``
        (the fastest here), or None for what the files hold; one that this CPU emulates is warned of. Embedding tables,
        LayerNorm and the residual stream stay float32. Weights of eight bits stay as they are; their layers compute in
        it (None: in float32).
    device
        Where to put it; None takes a GPU if there is one.
    verify
        Whether weights are compared with their checksums: those that :func:`save` puts beside them
        (``SHA256SUMS``), and those within ``pytorch_model.bin``. None: unless the environment says
        ``GENEFORMER_FAST_VERIFY=0``. Folders without checksums pass.

    Returns
    -------
    Encoder
        In evaluation mode, with the head the checkpoint has.

    Raises
    ------
    CheckpointError
        Files are missing, truncated or do not fit together; names the file, the tensor and both shapes. Weights are
        quantized in another way, such as that of bitsandbytes.
    UnsupportedError
        There is no such device or dtype here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place, device = Path(path), usable_device(device)
    family = families.recognise(place)
    if family is not None and family.load is not None:
        encoder = family.load(place, dtype=dtype, device=device, verify=verify)
    elif _is_ours(place):
        encoder = native.load_native(place, dtype=dtype, device=device, verify=verify)
    else:
        encoder = hf.load(place, dtype=dtype, device=device, verify=verify)
    family = family or families.family_of(encoder.config)
    for note in () if family is None else family.notes:
        warnings.warn(f"{place}: {note}", stacklevel=3)
    warn_if_emulated(encoder.dtype, encoder.device)
    return encoder


def _is_ours(place: Path) -> bool:
    """Whether a folder is of our own names; one that is of nobody is refused here.

    Raises
    ------
    CheckpointError
        There is no folder, no ``config.json`` in it, or none of an architecture that is known.
    """
    known = ", ".join(family.title for family in families.all_families())
    understood = f"understood are checkpoints of {known}, any BERT, and what geneformer_fast saved"
    if place.is_dir() and not (place / CONFIG).exists() and not (place / ADAPTER).exists():
        raise CheckpointError(f"{place} has no {CONFIG}, and no family here knows what it holds; {understood}")
    kind = hf.read_settings(place).get("model_type", "bert")
    if kind not in (native.MODEL_TYPE, "bert"):
        raise CheckpointError(f"{place / CONFIG}: model_type is {kind!r}, which no family here knows; {understood}")
    return kind == native.MODEL_TYPE


@checked
def save(encoder: Encoder, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Save a model as ``config.json`` and ``model.safetensors``, with its checksum in ``SHA256SUMS``.

    A post-norm encoder over tokens becomes a Hugging Face folder, which transformers loads; one that was loaded and not
    changed gives back every tensor bit for bit, in its dtype and under its name. Other encoders (BioNeMo's,
    AIDO.Cell's) are saved under our own names, which :func:`load` reads. Weights of eight bits are saved as such, in
    the convention of compressed-tensors, with which transformers loads the folder.

    Parameters
    ----------
    encoder
        The model.
    path
        Folder, made if absent.
    overwrite
        Whether to replace weights that are there already.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    OutputError
        The folder holds a model already.
    """
    family = families.family_of(encoder.config)
    if family is not None and family.save is not None and (family.is_saved is None or family.is_saved(encoder)):
        return family.save(encoder, Path(path), overwrite=overwrite)
    if hf.is_bert(encoder):
        return hf.save(encoder, path, overwrite=overwrite)
    return native.save_native(encoder, path, overwrite=overwrite)
