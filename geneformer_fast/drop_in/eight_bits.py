"""Layers that transformers loads with the package compressed-tensors, made to compute on their eight bits.

That package widens all weights of a model in its first forward pass. An accelerated model keeps them: each layer stays
the object that it is, with the same parameters, and is of another class until :func:`give_back`.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from geneformer_fast.layers import EightBits, check_compute_dtype
from geneformer_fast.quantization.hugging_face import InParameters, TheirEmbedding, TheirLinear

_PACKAGE, _HOOK, _KEPT = "compressed_tensors", "ct_decompress_hook", "_before_accelerate"
_CLASSES: dict[type[nn.Module], type[InParameters]] = {nn.Linear: TheirLinear, nn.Embedding: TheirEmbedding}
_SCHEMES = {("int", None): "int8-weights", ("int", "int"): "int8", ("float", "float"): "fp8"}
_OURS = ("scheme", "compute_dtype", "mode")
# By these the package finds what it would widen.
_THEIRS = ("forward", "quantization_scheme", "quantization_status")


class Before(NamedTuple):
    """What a layer was."""

    kind: type[nn.Module]
    attributes: dict[str, Any]
    parameters: dict[str, nn.Parameter]


def take_over(model: nn.Module) -> None:
    """Make a model's layers of eight bits compute as ours do; one that cannot stays what it is, with a warning."""
    layers = {name: module for name, module in model.named_modules() if _is_quantized(module)}
    if not layers:
        return
    bert: Any = getattr(model, "bert", model)
    dtype = bert.embeddings.LayerNorm.weight.dtype
    reasons: dict[str, list[str]] = {}
    for name, layer in layers.items():
        reason = _why_not(layer, dtype)
        if reason is None:
            _make_ours(layer, dtype)
        else:
            reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        kept = f"{len(names)} of its layers ({names[0]} ...)" if len(names) > 1 else names[0]
        message = f"{type(model).__name__}: {kept} will be computed as {_PACKAGE} does it, widened, because {reason}"
        warnings.warn(message, UserWarning, stacklevel=4)
    hook = vars(model).get(_HOOK)
    if hook is None and len(layers) > sum(map(len, reasons.values())):
        message = (
            f"{type(model).__name__}: {_PACKAGE} has a hook on the model around it, which will wrap its layers in the "
            f"first forward pass; accelerate that model, or take the hook out: model.{_HOOK}.remove()"
        )
        warnings.warn(message, UserWarning, stacklevel=4)
    if hook is not None and not any(map(_is_quantized, model.modules())):
        vars(model)[_KEPT] = model._forward_pre_hooks.get(hook.id)
        hook.remove()
        delattr(model, _HOOK)


def give_back(model: nn.Module) -> None:
    """Undo :func:`take_over`."""
    for module in model.modules():
        before = vars(module).get(_KEPT)
        if isinstance(before, Before):
            _make_theirs(module, vars(module).pop(_KEPT))
    hook = vars(model).pop(_KEPT, None)
    if hook is not None and not hasattr(model, _HOOK):
        setattr(model, _HOOK, model.register_forward_pre_hook(hook))


def _is_quantized(module: nn.Module) -> bool:
    """Whether it is a layer that the package has rounded, and that is not ours already."""
    return getattr(module, "quantization_scheme", None) is not None and not isinstance(module, EightBits)


def _why_not(layer: Any, dtype: torch.dtype) -> str | None:
    """Why a layer has to compute as the package does it; None where it need not."""
    status = str(getattr(getattr(layer, "quantization_status", None), "value", None))
    if status == "decompressed":
        return "a forward pass has widened them already: accelerate a model before it is called"
    rounding = layer.quantization_scheme
    weights, rows = rounding.weights, rounding.input_activations
    if type(layer) not in _CLASSES or weights is None or status != "compressed" or rounding.output_activations:
        return f"they are {type(layer).__qualname__} and {status}"
    if any(each is not None and (each.num_bits != 8 or not each.symmetric) for each in (weights, rows)):
        return "what is served are eight bits and symmetric scales"
    kinds = str(getattr(weights.type, "value", weights.type)), rows and str(getattr(rows.type, "value", rows.type))
    how = [str(getattr(each.strategy, "value", each.strategy)) for each in (weights, rows) if each is not None]
    if kinds not in _SCHEMES or how[0] != "channel" or how[1:] not in ([], ["token"]) or (rows and not rows.dynamic):
        return f"weights are {kinds[0]} per {how[0]}" + (f", rows {kinds[1]} per {how[1]}" if rows else "")
    if layer.weight.dtype not in (torch.int8, torch.float8_e4m3fn) or layer.weight_scale.numel() != len(layer.weight):
        return f"weights are {str(layer.weight.dtype).removeprefix('torch.')}"
    if dtype == torch.float64:
        return "the model computes in float64"
    return None


def _make_ours(layer: Any, dtype: torch.dtype) -> None:
    check_compute_dtype(dtype)
    rows = layer.quantization_scheme.input_activations
    kind = "float" if layer.weight.dtype == torch.float8_e4m3fn else "int"
    own = _CLASSES[type(layer)]
    attributes = {name: vars(layer).pop(name) for name in _THEIRS if name in vars(layer)}
    vars(layer)[_KEPT] = Before(type(layer), attributes, dict(layer._parameters))
    for name, parameter in layer._parameters.items():
        if parameter is not None and name != "bias":
            value = parameter.detach() if name == "weight" else parameter.detach().float()
            is_kept = not parameter.requires_grad and value.dtype == parameter.dtype
            layer._parameters[name] = parameter if is_kept else nn.Parameter(value, requires_grad=False)
    layer.__class__ = own
    layer.scheme, layer.compute_dtype = _SCHEMES[kind, None if rows is None else kind], dtype
    layer.mode = None
    layer.register_buffer("smooth", None)


def _make_theirs(layer: Any, before: Before) -> None:
    for name, parameter in before.parameters.items():
        now = layer._parameters.get(name)
        if parameter is None or now is None or now is parameter:
            continue
        if parameter.device != now.device:
            parameter.data = now.detach().to(parameter.dtype)
        layer._parameters[name] = parameter
    del layer._buffers["smooth"]
    for name in _OURS:
        delattr(layer, name)
    layer.__class__ = before.kind
    vars(layer).update(before.attributes)
