"""Quantized layers in place of a model's own: which there are, made from weights, or empty for a file to fill."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from geneformer_kernels import quantize_weight, quantize_weight_fp8
from torch import nn

from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import CheckpointError, UnsupportedError
from geneformer_fast.layers import QuantizedEmbedding, QuantizedLinear
from geneformer_fast.quantization.choices import SCHEMES, Choice, folds_into

#: A block's linear layers, in the order in which they run.
BLOCK_LAYERS = ("qkv", "out", "up", "down")


def layers_of(encoder: Encoder) -> dict[str, nn.Linear | nn.Embedding]:
    """Name -> layer or table, of all that may be quantized; those of eight bits already are among them."""
    names = [f"blocks.{index}.{layer}" for index in range(encoder.config.n_layers) for layer in BLOCK_LAYERS]
    names += [f"embeddings.{table}" for table in ("token", "position") if hasattr(encoder.embeddings, table)]
    found = {name: encoder.get_submodule(name) for name in names}
    if encoder.head is not None:
        found |= {
            f"head.{name}": module for name, module in encoder.head.named_modules() if isinstance(module, nn.Linear)
        }
    return {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear | nn.Embedding)}


def default_choices(encoder: Encoder, scheme: str, *, keep_embeddings: bool = False) -> dict[str, Choice]:
    """What becomes of each layer when nothing was measured.

    Blocks follow the scheme. Tables are int8, and so is a decoder over the vocabulary. Heads are left as they are:
    they run once per row that is asked for, hold less than 1 % of the weights, and what is rounded there is the last
    error, averaged away by nothing after it.

    Parameters
    ----------
    encoder
        Need have no weights (``meta``).
    scheme
        One of :data:`~geneformer_fast.quantization.choices.SCHEMES`.
    keep_embeddings
        Whether tables, and with them a tied decoder, stay in floating point.

    Raises
    ------
    UnsupportedError
        There is no such scheme.
    """
    if scheme not in SCHEMES:
        raise UnsupportedError(f"scheme must be one of {', '.join(SCHEMES)}, not {scheme!r}")
    choices = {}
    for name, layer in layers_of(encoder).items():
        choices[name] = Choice(scheme, reason="follows the scheme")
        if isinstance(layer, nn.Embedding):
            asked, looked_up = Choice("half", reason="asked for"), Choice("int8-weights", reason="rows are looked up")
            choices[name] = asked if keep_embeddings else looked_up
        elif name == "head.decoder" and layer.out_features > 1:
            choices[name] = Choice("int8-weights", reason="what it reads is not rounded: ranks are read off its result")
        elif name.startswith("head."):
            choices[name] = Choice("half", reason="runs once per row that is asked for; its error would be the last")
    return choices


def all_choices(
    encoder: Encoder, scheme: str, given: Mapping[str, Choice] | None = None, *, keep_embeddings: bool = False
) -> dict[str, Choice]:
    """:func:`default_choices`, with those that somebody made in their places.

    Raises
    ------
    UnsupportedError
        A choice names no layer, or smooths by factors that are not positive, are of another width, or that its layer
        cannot use.
    """
    choices, layers = default_choices(encoder, scheme, keep_embeddings=keep_embeddings), layers_of(encoder)
    for name, choice in (given or {}).items():
        if name not in layers:
            raise UnsupportedError(f"a choice is for {name!r}, but this encoder has no such layer")
        _check_smooth(name, choice, layers[name])
        choices[name] = choice
    return choices


def _check_smooth(name: str, choice: Choice, layer: nn.Linear | nn.Embedding) -> None:
    smooth = choice.smooth
    if smooth is None:
        return
    if isinstance(layer, nn.Embedding) or not choice.is_quantized:
        kind = "a table" if isinstance(layer, nn.Embedding) else "kept as it is"
        raise UnsupportedError(f"the choice for {name} has smooth, but the layer is {kind}")
    if smooth.shape != (layer.in_features,):
        raise UnsupportedError(f"the choice for {name}: smooth {[*smooth.shape]} must be [{layer.in_features}]")
    if not smooth.is_meta and not bool((smooth.isfinite() & (smooth > 0)).all()):
        raise UnsupportedError(f"the choice for {name}: every number of smooth must be finite and positive")


def hollow(encoder: Encoder, choices: Mapping[str, Choice]) -> Encoder:
    """Put empty quantized layers in place of an encoder's own, for ``load_state_dict(assign=True)`` to fill.

    Parameters
    ----------
    encoder
        Changed in place, and given back; on ``meta`` as a rule, where the layers are empty too. Nothing of it learns
        any more.
    choices
        As :func:`all_choices` gives them; of ``smooth`` only whether it is there counts.
    """
    for name, layer in layers_of(encoder).items():
        choice = choices[name]
        if choice.is_quantized:
            with torch.device(layer.weight.device):
                made = _empty(layer, choice, has_smooth=_stays(name, choice, encoder))
            encoder.set_submodule(name, made)
    return encoder.requires_grad_(False)


def quantized(encoder: Encoder, choices: Mapping[str, Choice]) -> Encoder:
    """A copy of an encoder with quantized layers; the one given is not changed, and its weights are not copied.

    Parameters
    ----------
    encoder
        In floating point.
    choices
        As :func:`all_choices` gives them.

    Raises
    ------
    CheckpointError
        A weight holds NaN or infinity.
    """
    layers = layers_of(encoder)
    factors = {name: factor.to(layers[name].weight.device) for name, factor in row_factors(encoder, choices).items()}
    # What the copy finds here it takes as copied.
    made: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        if choices[name].is_quantized:
            made[id(layer)] = _layer(name, layer, choices[name], factors.get(name), encoder)
        elif name in factors:
            made[id(layer)] = _scaled(copy.deepcopy(layer), factors[name])
    return copy.deepcopy(encoder, made).requires_grad_(False)


def _stays(name: str, choice: Choice, encoder: Encoder) -> bool:
    """Whether a layer has a factor that its input is multiplied by."""
    return choice.smooth is not None and folds_into(name, encoder.config) is None


def row_factors(encoder: Encoder, choices: Mapping[str, Choice]) -> dict[str, torch.Tensor]:
    """Name -> [N] on the CPU, what rows of a layer are multiplied by for the sake of the layers after it."""
    factors: dict[str, torch.Tensor] = {}
    layers = layers_of(encoder)
    for name, choice in choices.items():
        place = None if choice.smooth is None else folds_into(name, encoder.config)
        if choice.smooth is not None and place is not None:
            source, rows = place
            factor = factors.setdefault(source, torch.ones(len(layers[source].weight)))
            factor[rows] *= choice.smooth.to(factor)
    return factors


def _empty(
    layer: nn.Linear | nn.Embedding, choice: Choice, *, has_smooth: bool
) -> QuantizedLinear | QuantizedEmbedding:
    made: QuantizedLinear | QuantizedEmbedding
    if isinstance(layer, nn.Embedding):
        made = QuantizedEmbedding(
            layer.num_embeddings, layer.embedding_dim, scheme=choice.kind, compute_dtype=layer.weight.dtype,
            padding_idx=layer.padding_idx,
        )  # fmt: skip
    else:
        made = QuantizedLinear(
            layer.in_features, layer.out_features, scheme=choice.kind, compute_dtype=layer.weight.dtype,
            has_bias=layer.bias is not None, has_smooth=has_smooth,
        )  # fmt: skip
    return made.train(layer.training)


@torch.no_grad()
def _layer(
    name: str, layer: nn.Linear | nn.Embedding, choice: Choice, factor: torch.Tensor | None, encoder: Encoder
) -> nn.Module:
    """A quantized layer with the weights of another."""
    has_smooth = _stays(name, choice, encoder)
    with torch.device("meta"):
        made = _empty(layer, choice, has_smooth=has_smooth)
    weight = layer.weight.float()
    smooth = None if choice.smooth is None else choice.smooth.to(weight)
    made.weight_q, made.weight_scale = quantized_weight(
        weight if smooth is None else weight / smooth, made.weight_q.dtype, f"{name}.weight"
    )
    made.smooth = smooth.clone() if smooth is not None and has_smooth else None
    if factor is not None:  # exact: whole rows are multiplied
        made.weight_scale = made.weight_scale * factor
    if isinstance(layer, nn.Linear) and layer.bias is not None:
        bias = layer.bias.float().clone() if factor is None else layer.bias.float() * factor
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


@torch.no_grad()
def _scaled(layer: nn.Linear | nn.Embedding, factor: torch.Tensor) -> nn.Module:
    """A layer in floating point, its rows multiplied."""
    layer.weight.mul_(factor[:, None])
    if isinstance(layer, nn.Linear) and layer.bias is not None:
        layer.bias.mul_(factor)
    return layer


def quantized_weight(weight: torch.Tensor, dtype: torch.dtype, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] in int8 or float8_e4m3fn, and the float32 scale [N] of its rows.

    Raises
    ------
    CheckpointError
        It holds NaN or infinity; says ``name``.
    """
    try:
        return quantize_weight_fp8(weight) if dtype == torch.float8_e4m3fn else quantize_weight(weight)
    except ValueError:
        raise CheckpointError(f"{name} holds NaN or infinity, which eight bits cannot stand for") from None
