"""Folders of models with weights of eight bits: read tensor by tensor into a model that has no numbers yet, and saved.

A quantized layer is three tensors: ``X.weight`` int8 or float8_e4m3fn, ``X.weight_scale`` [N, 1], and ``X.smooth`` [K]
where what it reads is multiplied beforehand. Their names are those of the checkpoint, with q, k and v apart in BERT.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geneformer_fast.checkpoints import described, torchao
from geneformer_fast.checkpoints.described import KEY, Kinds, config_of, kinds_in, refuse_others
from geneformer_fast.checkpoints.mapping import Entry, to_ours
from geneformer_fast.checkpoints.stored import Stored
from geneformer_fast.checkpoints.weights import CONFIG, has_schemes_beside
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import CheckpointError
from geneformer_fast.heads import MLMHead
from geneformer_fast.layers import EightBits
from geneformer_fast.quantization.build import hollow, layers_of
from geneformer_fast.quantization.choices import Choice
from geneformer_fast.quantization.report import REPORT, Report

WEIGHT, SCALE, SMOOTH = "weight", "weight_scale", "smooth"
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
#: The name under which transformers looks for the scale of a decoder that is the token table.
TIED_DECODER = "cls.predictions.decoder"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_APART = "config.json and the weights do not belong together"


def is_quantized(settings: Mapping[str, Any], where: Path) -> bool:
    """Whether config.json says that weights have eight bits.

    Raises
    ------
    CheckpointError
        They are quantized in a way that nothing here reads.
    """
    if settings.get(KEY) is None:
        return False
    refuse_others(settings, where)
    return True


def in_our_terms(stored: Stored, settings: Mapping[str, Any], folder: Path) -> tuple[Stored, Kinds]:
    """A folder's tensors by the names that compressed-tensors gives them, and which layers are quantized."""
    if settings[KEY]["quant_method"] == torchao.METHOD:
        return torchao.in_our_terms(stored, folder)
    return stored, kinds_in(settings, folder / CONFIG)


def fill(encoder: Encoder, table: Iterable[Entry], stored: Stored, kinds: Kinds, folder: Path) -> set[str]:
    """Put quantized layers in place of those of a model without numbers, and read all numbers into it.

    Parameters
    ----------
    encoder
        On the meta device; changed.
    table
        Which of its parameters is which tensor.
    stored, kinds
        What :func:`in_our_terms` gives.
    folder
        Where they come from.

    Returns
    -------
    set of str
        Names of the tensors that were read.

    Raises
    ------
    CheckpointError
        Tensors are missing, have other shapes, or hold what no weight or scale can be.
    """
    table = list(table)
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    to_ours(stored, table, shapes, source=str(folder))  # on the meta device: only the shapes
    entries = {entry.ours.removesuffix(f".{WEIGHT}"): entry for entry in table if entry.ours.endswith(f".{WEIGHT}")}
    choices = {
        name: _choice(entries[name], class_of(layer), stored, kinds, folder)
        for name, layer in layers_of(encoder).items()
        if name in entries
    }
    if not any(choice.is_quantized for choice in choices.values()):
        raise CheckpointError(
            f"{folder / CONFIG} says that weights are quantized, but none of them are; remove its {KEY}, or take the "
            "weights that belong to it"
        )
    hollow(encoder, choices)
    used, state = set(), {}
    for entry in table:
        layer, _, part = entry.ours.rpartition(".")
        if part == WEIGHT and layer in choices and choices[layer].is_quantized:
            made = encoder.get_submodule(layer)
            kinds_read = (WEIGHT, SCALE) if getattr(made, SMOOTH) is None else (WEIGHT, SCALE, SMOOTH)
            state.update(_quantized(layer, entry, stored, folder, has_smooth=SMOOTH in kinds_read))
            used |= {beside(name, each) for name in entry.theirs for each in kinds_read}
            continue
        _check_floats(entry, stored, folder)
        tensor = entry.read({name: stored.read(name) for name in entry.theirs})
        state[entry.ours] = tensor.float() if isinstance(encoder.get_submodule(layer), EightBits) else tensor
        used |= set(entry.theirs)
    encoder.load_state_dict(state, assign=True)
    return used & set(stored)


def warn_of_report(folder: Path, encoder: Encoder) -> None:
    """Warn where ``quantization.json`` says something else of a folder's layers than ``config.json``.

    Only where nothing about them is noted beside the checksums: that is the later word, as models are saved over
    others. A report that cannot be read is none: it decides no numbers.
    """
    if has_schemes_beside(folder):
        return
    try:
        report = Report.read(folder)
    except CheckpointError:
        return
    layers = {} if encoder.quantization is None else encoder.quantization.layers
    known = layers_of(encoder)
    for layer in report.layers:
        now = layers.get(layer.name, "half")
        if layer.name in known and layer.kind != now:
            warnings.warn(
                f"{folder / CONFIG} says that {layer.name} is {now}, but it was made {layer.kind} ({REPORT}). If that "
                f"is not meant, restore {CONFIG}; else remove {REPORT}",
                stacklevel=5,
            )
            return


def _choice(entry: Entry, kind: str, stored: Stored, kinds: Kinds, folder: Path) -> Choice:
    """What the files hold of one layer."""
    schemes, width = set(), stored[entry.theirs[0]].shape[1]
    for name in entry.theirs:
        module, dtype = name.removesuffix(f".{WEIGHT}"), stored[name].dtype
        scheme, has = kinds.kind_of(module, kind), str(dtype).removeprefix("torch.")
        if scheme is None and dtype in EIGHT_BITS:
            raise CheckpointError(f"{folder}: tensor {name!r} holds {has}, but {CONFIG} does not say that; {_APART}")
        wanted = torch.float8_e4m3fn if scheme == "fp8" else torch.int8
        if scheme is not None and dtype != wanted:
            told = str(wanted).removeprefix("torch.")
            raise CheckpointError(f"{folder}: tensor {name!r} holds {has}, but {CONFIG} says {told}; {_APART}")
        if scheme == "fp8" and kind == described.TABLE:
            raise CheckpointError(f"{folder}: tensor {name!r} is a table in float8; tables are read in int8 or floats")
        schemes.add(scheme or "half")
        has_smooth, smooth = kinds.is_smoothed(module, kind), beside(name, SMOOTH)
        if has_smooth and smooth not in stored:
            raise CheckpointError(f"{folder}: tensor {smooth!r} of shape {[width]} is missing; {_APART}")
        if smooth in stored and not has_smooth:
            raise CheckpointError(f"{folder}: tensor {smooth!r} is there, but {CONFIG} does not say so; {_APART}")
    if len(schemes) > 1:
        raise CheckpointError(
            f"{folder}: {', '.join(entry.theirs)} are {' and '.join(sorted(schemes))}; one of them only"
        )
    return Choice(schemes.pop(), torch.empty(width, device="meta") if has_smooth else None)


def _quantized(layer: str, entry: Entry, stored: Stored, folder: Path, *, has_smooth: bool) -> dict[str, torch.Tensor]:
    """The numbers of one quantized layer, each read to where it stays."""
    parts = [stored[name] for name in entry.theirs]
    weight = torch.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype)
    scale, smooths, start = torch.empty(len(weight), dtype=torch.float32), [], 0
    for name, part in zip(entry.theirs, parts, strict=True):
        rows = slice(start, start := start + len(part))
        stored.read_into(name, weight[rows])
        scale[rows] = _factors(beside(name, SCALE), len(part), stored, folder)
        if has_smooth and beside(name, SMOOTH) in stored:
            smooths.append(_factors(beside(name, SMOOTH), weight.shape[1], stored, folder))
    if weight.is_floating_point() and ((weight.view(torch.int8) & 0x7F) == 0x7F).any():
        raise CheckpointError(f"{folder}: tensor {entry.theirs[0]!r} holds NaN")
    if smooths and (len(smooths) < len(parts) or any(not torch.equal(each, smooths[0]) for each in smooths)):
        raise CheckpointError(f"{folder}: {', '.join(entry.theirs)} read the same rows, but differ in {SMOOTH}")
    state = {f"{layer}.weight_q": weight, f"{layer}.weight_scale": scale}
    return {**state, f"{layer}.{SMOOTH}": smooths[0]} if smooths else state


def _factors(name: str, n: int, stored: Stored, folder: Path) -> torch.Tensor:
    """[n] float32, positive and finite."""
    if name not in stored:
        raise CheckpointError(f"{folder}: tensor {name!r} of shape {[n, 1]} is missing; {_APART}")
    found = stored[name]
    if [*found.shape] not in ([n], [n, 1]) or found.dtype not in _FLOATS:
        has = f"{str(found.dtype).removeprefix('torch.')} {[*found.shape]}"
        raise CheckpointError(f"{folder}: tensor {name!r} is {has}; it should be floats {[n, 1]}")
    factors = stored.read(name).reshape(n).float()
    bad = ~(factors.isfinite() & (factors > 0))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise CheckpointError(
            f"{folder}: tensor {name!r} holds {factors[row].item():g} in row {row}, but scales are finite and above 0; "
            "the file is damaged: copy it again, or quantize the model again"
        )
    return factors


def _check_floats(entry: Entry, stored: Stored, folder: Path) -> None:
    for name in entry.theirs:
        if stored[name].dtype not in _FLOATS:
            has = str(stored[name].dtype).removeprefix("torch.")
            raise CheckpointError(f"{folder}: tensor {name!r} holds {has}; it should hold floats")


def to_theirs(
    encoder: Encoder, table: Iterable[Entry], prefix: str | None = None
) -> tuple[dict[str, torch.Tensor], Any]:
    """A quantized model's tensors under a checkpoint's names, and what config.json is to say of them.

    Parameters
    ----------
    encoder
        With quantized layers.
    table
        Which of its parameters is which tensor.
    prefix
        Of a folder of BERT; None for our own.
    """
    state, tensors = encoder.state_dict(), {}
    entries: dict[str, Entry] = {}
    for entry in table:
        layer, _, part = entry.ours.rpartition(".")
        if part == WEIGHT and isinstance(encoder.get_submodule(layer), nn.Linear | nn.Embedding):
            entries[layer] = entry
        if entry.ours in state:
            tensors.update(entry.write(state[entry.ours]))
            continue
        tensors.update(entry.write(state[f"{layer}.weight_q"]))
        scales = entry.write(state[f"{layer}.weight_scale"][:, None])
        tensors.update({beside(name, SCALE): scale for name, scale in scales.items()})
        if f"{layer}.{SMOOTH}" in state:
            tensors.update({beside(name, SMOOTH): state[f"{layer}.{SMOOTH}"] for name in entry.theirs})
    layers = {name: encoder.get_submodule(name) for name in entries}
    kinds = {name: layer.scheme if isinstance(layer, EightBits) else None for name, layer in layers.items()}
    smoothed = [name for name in entries if f"{name}.{SMOOTH}" in state]
    if prefix is not None and is_tied(encoder) and kinds["embeddings.token"]:
        tensors[f"{TIED_DECODER}.{SCALE}"] = state["embeddings.token.weight_scale"][:, None]
    return tensors, quantization_config(encoder, entries, kinds, smoothed, prefix)


def quantization_config(
    encoder: Encoder,
    entries: Mapping[str, Entry],
    kinds: Mapping[str, str | None],
    smoothed: Iterable[str],
    prefix: str | None,
) -> dict[str, Any]:
    """What config.json says of a model whose layers have certain schemes, by our names (None: floats)."""
    theirs = {name: [each.removesuffix(f".{WEIGHT}") for each in entries[name].theirs] for name in entries}
    of_class: dict[str, dict[str, str | None]] = {described.LINEAR: {}, described.TABLE: {}}
    for name, modules in theirs.items():
        of_class[class_of(encoder.get_submodule(name))].update(dict.fromkeys(modules, kinds[name]))
    if prefix is not None and is_tied(encoder):
        of_class[described.LINEAR][TIED_DECODER] = "int8-weights" if kinds["embeddings.token"] else None
    return config_of(
        of_class[described.LINEAR],
        of_class[described.TABLE],
        smoothed=[module for name in smoothed for module in theirs[name]],
        prefix=prefix,
    )


def is_tied(encoder: Encoder) -> bool:
    """Whether the token table decodes, too."""
    return isinstance(encoder.head, MLMHead) and encoder.config.tied_decoder and encoder.config.inputs == "tokens"


def class_of(layer: nn.Module) -> str:
    """What compressed-tensors calls a layer's class."""
    return described.LINEAR if isinstance(layer, nn.Linear) else described.TABLE


def beside(weight: str, kind: str) -> str:
    """``X.weight`` -> ``X.kind``."""
    return f"{weight.removesuffix(WEIGHT)}{kind}"
