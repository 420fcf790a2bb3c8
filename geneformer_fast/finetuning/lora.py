"""Adapters of low rank (LoRA) by PEFT: fine-tuning that leaves the encoder's own weights as they are.

An adapter adds ``B A x`` to what a linear layer makes of ``x``, with A [R, K] and B [N, R]. In the end it is added to
the weight, so that the model is one like any other, and kept beside it, in the layout and names of PEFT. Queries, keys
and values are one product here and so have one A together; in PEFT's names they are three adapters with equal A.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from geneformer_fast.checkpoints.hf import is_bert
from geneformer_fast.checkpoints.mapping import Entry, bert_entries
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.files.writing import whole_folder, write_tensors
from geneformer_fast.heads import CellClassifier

#: Folder of the adapter, beside that of the model.
FOLDER = "adapter"
# The products of a block; the scale of an adapter is this many times 1, whatever its rank: alpha is that many ranks.
_LAYERS, _SCALE = ("qkv", "out", "up", "down"), 2
_TASKS = {"cells": "SEQ_CLS", "genes": "TOKEN_CLS"}
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """What was learned of an encoder's blocks, apart from their weights.

    Attributes
    ----------
    rank, alpha
        R, and R times the factor on B A.
    weights
        Layer, such as ``"blocks.0.qkv"`` -> A [R, K] and B [N, R].
    """

    rank: int
    alpha: int
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]


def check_lora(rank: int | None, base: Encoder, n_frozen: int) -> None:
    """Refuse, before anything is trained, adapters that cannot be.

    Raises
    ------
    UnsupportedError
        PEFT is not installed; the rank is none for these layers, or every block is frozen; the model is quantized.
    """
    if rank is None:
        return
    from importlib.util import find_spec

    if find_spec("peft") is None:
        raise UnsupportedError("LoRA needs peft, which is not installed: pip install 'geneformer-fast[lora]'")
    most = min(base.config.width, base.config.ff_width)
    if not 1 <= rank <= most:
        raise UnsupportedError(f"lora (--lora) must be a rank from 1 to {most}, the width of the layers, not {rank}")
    if base.quantization is not None:
        raise UnsupportedError(
            f"adapters are added to weights in the end, and those of a quantized model ({base.quantization.scheme}) do "
            "not change; take the model before it was quantized, and quantize what comes out"
        )
    if n_frozen >= base.config.n_layers:
        raise UnsupportedError(
            f"lora (--lora) teaches blocks, and all {base.config.n_layers} are frozen; freeze fewer, or leave it out"
        )


def add_adapters(encoder: Encoder, rank: int, n_frozen: int, *, seed: int) -> None:
    """Put adapters around the linear layers of the blocks that are not frozen; of the encoder only they learn.

    The head on top learns as before. At the start the model computes what it did.

    Parameters
    ----------
    encoder
        Changed in place.
    rank
        R.
    n_frozen
        Blocks from the bottom without adapters.
    seed
        Of A; B is 0.
    """
    from peft import LoraConfig, inject_adapter_in_model

    head = [] if encoder.head is None else [p for p in encoder.head.parameters() if p.requires_grad]
    names = [f"blocks.{index}.{layer}" for index in range(n_frozen, encoder.config.n_layers) for layer in _LAYERS]
    config = LoraConfig(r=rank, lora_alpha=_SCALE * rank, lora_dropout=0.0, target_modules=names)
    devices = [encoder.device] if encoder.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, encoder)
    for parameter in head:
        parameter.requires_grad_(True)


def merge_adapters(encoder: Encoder) -> Adapter:
    """Add adapters to the weights they stand beside, and take them out; the encoder is a plain one again.

    Parameters
    ----------
    encoder
        After :func:`add_adapters`; changed in place.
    """
    found, rank, alpha = {}, 0, 0
    for name, layer in list(_adapted(encoder)):
        (adapter,) = layer.lora_A
        first, second = (part[adapter].weight.detach() for part in (layer.lora_A, layer.lora_B))
        found[name], rank, alpha = (first, second), layer.r[adapter], layer.lora_alpha[adapter]
        layer.merge(safe_merge=True)
        parent, _, attribute = name.rpartition(".")
        setattr(encoder.get_submodule(parent), attribute, layer.get_base_layer())
    if hasattr(encoder, "peft_config"):
        del encoder.peft_config
    for parameter in encoder.parameters():
        parameter.requires_grad_(True)
    return Adapter(rank, alpha, found)


def _adapted(encoder: Encoder) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for name, module in encoder.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def save_adapter(adapter: Adapter, encoder: Encoder, folder: Path, base: str | os.PathLike[str] | None) -> Path:
    """Write a folder that ``PeftModel.from_pretrained`` puts around the pretrained model, whole or not at all.

    Around transformers' BertForSequenceClassification or BertForTokenClassification of the pretrained folder, with as
    many labels; around an encoder of this package where BERT cannot express it.

    Parameters
    ----------
    adapter
        What was learned of the blocks.
    encoder
        The model with the adapter merged, whose head goes along.
    folder
        Replaced if it is there.
    base
        The pretrained model, as PEFT is to find it.
    """
    from peft import LoraConfig

    kind = "cells" if isinstance(encoder.head, CellClassifier) else "genes"
    table = bert_entries(encoder.config, kind, "bert.") if is_bert(encoder) else None
    tensors, layers = _named(adapter, table)
    heads = _heads(encoder, table)
    config = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=0.0, target_modules=layers,
        modules_to_save=sorted({name.rpartition(".")[0] for name in heads}), inference_mode=True,
        base_model_name_or_path=None if base is None else str(base), task_type=_TASKS[kind] if table else None,
    )  # fmt: skip
    with whole_folder(folder) as made:
        config.save_pretrained(str(made))
        stored = {f"{_PREFIX}{name}": tensor.clone() for name, tensor in {**tensors, **heads}.items()}
        write_tensors(made / "adapter_model.safetensors", stored, {"format": "pt"})
    return folder


def _named(adapter: Adapter, table: list[Entry] | None) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Tensors and layers as the base model calls them: BERT has queries, keys and values apart."""
    theirs = {entry.ours: entry.theirs for entry in table or ()}
    tensors, layers = {}, []
    for name, (first, second) in adapter.weights.items():
        names = [each.removesuffix(".weight") for each in theirs.get(f"{name}.weight", (name,))]
        for layer, rows in zip(names, second.chunk(len(names)), strict=True):
            tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = first, rows
            layers.append(layer)
    return tensors, layers


def _heads(encoder: Encoder, table: list[Entry] | None) -> dict[str, torch.Tensor]:
    """What was learned on top, which PEFT keeps whole."""
    theirs = {entry.ours: entry.theirs[0] for entry in table or ()}
    state: Mapping[str, torch.Tensor] = encoder.state_dict()
    return {theirs.get(name, name): tensor for name, tensor in state.items() if name.startswith("head.")}
