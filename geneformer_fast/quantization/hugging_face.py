"""Hugging Face BERTs in memory, with weights of eight bits in the places of their own; transformers is not imported."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from torch import nn

from geneformer_fast.checkpoints import hf
from geneformer_fast.checkpoints.mapping import Entry, to_ours
from geneformer_fast.checkpoints.quantized import KEY, SMOOTH, TIED_DECODER, WEIGHT, is_tied, quantization_config
from geneformer_fast.checkpoints.tied import sort_leftovers
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.layers import EightBits, QuantizedEmbedding, QuantizedLinear, WideCopy, check_compute_dtype
from geneformer_fast.quantization.build import quantized
from geneformer_fast.quantization.choices import Choice

_HOME = "transformers.models.bert.modeling_bert"
_ANOTHER = "a quantized layer cannot be given another weight; quantize the changed model"


class Stored(WideCopy):
    """A parameter of eight bits as an attribute of its layer: who exchanges its data, or writes into it, is refused.

    PEFT would merge an adapter into it that way, rounded to whole numbers, which is nothing. It passes for the
    parameter that it shows; what is written into its ``data``, element by element, is written.
    """

    #: torch asks this of whatever is a parameter.
    _is_param = True
    origin: nn.Parameter

    @classmethod
    def of(cls, parameter: nn.Parameter) -> Stored:
        """What a layer shows of a parameter of its own."""
        made = parameter.detach().as_subclass(cls)
        made.origin = parameter
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As of a :class:`WideCopy`; ``requires_grad`` and the like may be set."""
        if getattr(func, "__name__", "") == "__set__" and func != torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


class InParameters(EightBits):
    """Eight bits under the names, and in the shapes, that compressed-tensors gives them in a model of transformers.

    ``weight`` [N, K] int8 or float8_e4m3fn and ``weight_scale`` [N, 1] are parameters that never learn, so that
    ``state_dict``, ``save_pretrained``, ``tie_weights`` and a model's count of parameters see what they expect. PEFT
    keeps its adapters in float32 beside such weights, and cannot merge them into these.
    """

    def hold(self, n_rows: int, width: int, scheme: str, compute_dtype: torch.dtype, *, has_smooth: bool) -> None:
        """Make room for the weight."""
        check_compute_dtype(compute_dtype)
        self.scheme, self.compute_dtype = scheme, compute_dtype
        is_float8 = scheme == "fp8" and isinstance(self, nn.Linear)
        dtype = torch.float8_e4m3fn if is_float8 else torch.int8
        self._parameters["weight"] = _fixed(torch.empty(n_rows, width, dtype=dtype))
        self.weight_scale = _fixed(torch.empty(n_rows, 1, dtype=torch.float32))
        self.register_buffer("smooth", torch.empty(width, dtype=torch.float32) if has_smooth else None)

    def __setattr__(self, name: str, value: Any) -> None:
        """Weights are tied this way, by transformers, and shared out among processes, by FSDP."""
        value = value.origin if isinstance(value, Stored) else value
        if isinstance(value, nn.Parameter) and hasattr(value, "placements"):
            raise UnsupportedError(
                "FSDP cannot shard layers of eight bits, whose memory compiled loops read; tell it to leave alone what "
                "does not learn: fully_shard(..., ignored_params={p for p in model.parameters() if not "
                "p.requires_grad})"
            )
        if name == "weight" and (not isinstance(value, nn.Parameter) or value.dtype != self.weight_q.dtype):
            raise UnsupportedError(_ANOTHER)
        super().__setattr__(name, value)

    @property
    def weight(self) -> torch.Tensor:
        """[N, K] of eight bits, as it is stored."""
        return Stored.of(cast(nn.Parameter, self._parameters["weight"]))

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        raise UnsupportedError(_ANOTHER)

    @property
    def weight_q(self) -> torch.Tensor:  # type: ignore[override]
        """:attr:`weight`, by the name that :class:`EightBits` has for it."""
        return cast(torch.Tensor, self._parameters["weight"])


class TheirLinear(InParameters, QuantizedLinear):
    """A :class:`QuantizedLinear` in a model of transformers."""


class TheirEmbedding(InParameters, QuantizedEmbedding):
    """A :class:`QuantizedEmbedding` in a model of transformers."""


def _fixed(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def is_theirs(model: Any) -> TypeGuard[nn.Module]:
    """Whether a model is one of transformers' BERTs that there is an encoder for."""
    return type(model).__module__ == _HOME and type(model).__name__ in hf.ARCHITECTURES


def check_theirs(model: nn.Module) -> None:
    """Refuse models that there is no encoder for, or that have eight bits already.

    Raises
    ------
    UnsupportedError
        Says what to do.
    """
    kind = type(model).__qualname__
    if not is_theirs(model):
        advice = "merge_and_unload() the adapters first" if hasattr(model, "peft_config") else "quantize the BERT in it"
        raise UnsupportedError(f"quantize() serves Encoder and transformers' {', '.join(hf.ARCHITECTURES)}: {advice}")
    for option in ("is_decoder", "add_cross_attention"):
        if getattr(model.config, option, False):
            raise UnsupportedError(f"{kind} with config.{option}=True is a decoder; quantize() serves encoders only")
    for name, module in model.named_modules():
        if isinstance(module, EightBits) or getattr(module, "quantization_scheme", None) is not None:
            raise UnsupportedError(f"{name} of this {kind} is quantized already; quantize the model it was made from")
        if isinstance(module, nn.Linear | nn.Embedding) and type(module) not in (nn.Linear, nn.Embedding):
            what = f"a {type(module).__module__}.{type(module).__qualname__}"
            raise UnsupportedError(
                f"{name} of this {kind} is {what}; quantize the plain model, and change it afterwards"
            )


def encoder_of(model: nn.Module) -> tuple[Encoder, list[Entry]]:
    """An encoder with the numbers of a BERT of transformers, and which of its parameters is which of theirs.

    Tensors are shared but for q, k and v, which are one in our layers.
    """
    kind = type(model).__name__
    config: Any = model.config
    settings = {key: value for key, value in config.to_dict().items() if key != KEY}
    settings["id2label"] = {str(code): label for code, label in (settings.get("id2label") or {}).items()}
    tensors, where = model.state_dict(), Path(kind)
    encoder, table = hf.opened({**settings, "architectures": [kind]}, tensors, where)
    shapes = {name: parameter.shape for name, parameter in encoder.state_dict().items()}
    encoder.load_state_dict(to_ours(tensors, table, shapes, source=kind), assign=True)
    sort_leftovers(tensors, {name for entry in table for name in entry.theirs}, encoder, where, tensors.__getitem__)
    if encoder.config.tied_decoder:
        encoder.source.aliases = ()  # one of two names is enough in a folder
    return encoder.train(model.training).cast(encoder.dtype), table


def quantized_theirs(
    model: nn.Module, encoder: Encoder, table: list[Entry], choices: Mapping[str, Choice]
) -> tuple[nn.Module, Encoder]:
    """A copy of a BERT with quantized layers, and the quantized encoder whose numbers it has.

    Parameters
    ----------
    model
        Unchanged.
    encoder, table
        As :func:`encoder_of` makes them of it.
    choices
        As for :func:`geneformer_fast.quantization.build.quantized`.
    """
    ours = quantized(encoder, choices)
    state = ours.state_dict()
    # What the copy finds here it takes as copied.
    made: dict[int, Any] = {}
    entries = {entry.ours.removesuffix(f".{WEIGHT}"): entry for entry in table if entry.ours.endswith(f".{WEIGHT}")}
    for name, entry in entries.items():
        layer = ours.get_submodule(name)
        if isinstance(layer, EightBits):
            for module, own in _parts(layer, entry):
                before: Any = model.get_submodule(module)
                own.compute_dtype = before.weight.dtype
                # Of a decoder: ours has its bias beside it.
                if isinstance(own, TheirLinear) and own.bias is None and before.bias is not None:
                    own.bias = _fixed(before.bias.detach().float().clone())
                made[id(before)] = own.train(before.training)
    table_made = made.get(id(_table(model)))
    if is_tied(ours) and table_made is not None:
        decoder: Any = model.get_submodule(TIED_DECODER)
        made[id(decoder)] = _tied_to(table_made, decoder)
    new = copy.deepcopy(model, made)
    if is_tied(ours) and table_made is not None:
        new.get_submodule(TIED_DECODER.rpartition(".")[0]).bias = new.get_parameter(f"{TIED_DECODER}.bias")
    for entry in table:  # rows of a layer in floating point are multiplied for the sake of the layers after it
        if entry.ours in state and not isinstance(ours.get_submodule(entry.ours.rpartition(".")[0]), EightBits):
            for name, tensor in entry.write(state[entry.ours]).items():
                new.get_parameter(name).data.copy_(tensor)
    kinds = {name: layer.scheme if isinstance(layer, EightBits) else None for name, layer in _layers(ours, entries)}
    smoothed = [name for name in entries if f"{name}.{SMOOTH}" in state]
    config: Any = new.config
    # What save_pretrained writes is what a folder says.
    config.quantization_config = quantization_config(
        ours, {name: entries[name] for name in kinds}, kinds, smoothed, encoder.source.prefix
    )
    return new.requires_grad_(False), ours


def _layers(encoder: Encoder, entries: Mapping[str, Entry]) -> list[tuple[str, nn.Module]]:
    found = [(name, encoder.get_submodule(name)) for name in entries]
    return [(name, layer) for name, layer in found if isinstance(layer, nn.Linear | nn.Embedding)]


def _table(model: nn.Module) -> nn.Module:
    bert: Any = getattr(model, "bert", model)
    return cast(nn.Module, bert.embeddings.word_embeddings)


def _parts(layer: EightBits, entry: Entry) -> list[tuple[str, InParameters]]:
    """Their layers that one of ours is made of: q, k and v are one."""
    names = [each.removesuffix(f".{WEIGHT}") for each in entry.theirs]
    n, found = len(names), []
    for i, name in enumerate(names):
        rows = slice(i * len(layer.weight_q) // n, (i + 1) * len(layer.weight_q) // n)
        with torch.device("meta"):
            own = _like(layer, rows.stop - rows.start)
        own._parameters["weight"] = _fixed(layer.weight_q[rows].clone())
        own.weight_scale = _fixed(layer.weight_scale[rows, None].clone())
        own.smooth = None if layer.smooth is None else layer.smooth.clone()
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            own.bias = _fixed(layer.bias[rows].clone())
        found.append((name, own))
    return found


def _like(layer: EightBits, n_rows: int) -> InParameters:
    options: dict[str, Any] = {"scheme": layer.scheme, "compute_dtype": layer.compute_dtype}
    if isinstance(layer, QuantizedEmbedding):
        return TheirEmbedding(n_rows, layer.embedding_dim, padding_idx=layer.padding_idx, **options)
    assert isinstance(layer, QuantizedLinear)
    options |= {"has_bias": layer.bias is not None, "has_smooth": layer.smooth is not None}
    return TheirLinear(layer.in_features, n_rows, **options)


def _tied_to(table: InParameters, decoder: nn.Linear) -> TheirLinear:
    """A decoder that is the table; its scale is a copy, as transformers looks for one under the decoder's name."""
    with torch.device("meta"):
        made = TheirLinear(
            decoder.in_features, decoder.out_features, scheme="int8-weights", compute_dtype=table.compute_dtype
        )
    made._parameters["weight"] = table._parameters["weight"]
    made.weight_scale = _fixed(table.weight_scale.clone())
    made.bias = _fixed(decoder.bias.detach().float().clone())
    return made.train(decoder.training)
