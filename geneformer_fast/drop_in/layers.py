"""transformers' BERT encoder over packed cells: the forward passes that stand in for those of its containers.

Each takes the module it stands in for, so it always sees the submodules of the moment. The stream [T, C] is float32
(float64 in a float64 model) and carries the residual; ``x`` [T, C] is the same in the dtype of the matrix products,
None where the stream itself is that. Leaves and position-wise containers are called on [T, C] where they are not plain.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from geneformer_kernels import (
    feed_forward_layernorm,
    linear,
    residual_layernorm,
    varlen_attention,
    varlen_attention_qkv,
)
from geneformer_kernels.on_device import needs_gradient
from geneformer_kernels.ops.varlen_attention.cells import AttentionCells
from geneformer_kernels.ranges import within
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.bert import modeling_bert

from geneformer_fast.block import feed_forward_of_rows, float_weights
from geneformer_fast.drop_in.attention import padded_attention
from geneformer_fast.drop_in.plain import has_global_hooks, is_ours, is_plain_linear, is_plain_norm, is_unhooked
from geneformer_fast.layers import Rows, wants_rows
from geneformer_fast.ragged import Padding


@dataclass(frozen=True)
class Packed:
    """What every packed call is handed beside its tensors; its presence tells packed calls from stock ones."""

    padding: Padding
    #: The same cells as attention wants them, for all layers of this pass; None where it runs on padded batches.
    cells: AttentionCells | None
    #: Dtype that matrix products read.
    dtype: torch.dtype
    #: Dtype of hidden states in the stock model: what modules that are called expect and what is given back.
    outer: torch.dtype
    #: [B, L] booleans where padding is among the rows: only places of True are attended to. None: all are.
    keys: torch.Tensor | None = None
    wants_weights: bool = False
    wants_states: bool = False


@dataclass(frozen=True)
class Encoded:
    """What the encoder returns: the last stream [T, C], and padded states and attention weights if wanted."""

    stream: torch.Tensor
    #: [B, L, C], what each layer has read.
    states: tuple[torch.Tensor, ...] | None
    #: [B, H, L, L] of each layer.
    weights: tuple[torch.Tensor, ...] | None


def packed_encoder(encoder: Any, stream: torch.Tensor, packed: Packed) -> Encoded:
    """BertEncoder: all layers one after another."""
    x = None if stream.dtype == packed.dtype else stream.to(packed.dtype)
    states, weights = [], []
    for index, layer in enumerate(encoder.layer):
        name = f"block {index}"
        if packed.wants_states:
            state, stream, x = _given_out(stream, x, packed)
            states.append(state)
        # In the first releases served the encoder recomputes, later each layer does so itself.
        if not hasattr(layer, "gradient_checkpointing") and _is_recomputing(encoder):
            recomputed = encoder._gradient_checkpointing_func
            stream, x, scores = within(name, recomputed, layer.__call__, stream, x, packed)
        else:
            stream, x, scores = within(name, layer, stream, x, packed)
        weights.append(scores)
    return Encoded(
        stream, tuple(states) if packed.wants_states else None, tuple(weights) if packed.wants_weights else None
    )


def _given_out(
    stream: torch.Tensor, x: torch.Tensor | None, packed: Packed
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A hidden state [B, L, C], and (stream, x) that depend on it: its gradient is asked for as in the stock model."""
    state = packed.padding.unpack(stream.to(packed.outer))
    if not state.requires_grad:
        return state, stream, x
    return state, *_pair(packed.padding.pack(state), packed)


def packed_layer(layer: Any, stream: torch.Tensor, x: torch.Tensor | None, packed: Packed) -> tuple[Any, ...]:
    """BertLayer: (stream, x, attention weights of each cell or None)."""
    # Where __call__ is torch's own, recomputing belongs into the layer's forward; elsewhere __call__ has done it.
    if _is_recomputing(layer) and type(layer).__call__ is nn.Module.__call__:
        return layer._gradient_checkpointing_func(functools.partial(_layer, layer), stream, x, packed)
    return _layer(layer, stream, x, packed)


def _is_recomputing(module: Any) -> bool:
    return getattr(module, "gradient_checkpointing", False) and module.training


def _layer(layer: Any, stream: torch.Tensor, x: torch.Tensor | None, packed: Packed) -> tuple[Any, ...]:
    stream, x, weights = layer.attention(stream, x, packed)
    return *_feed_forward(layer, stream, x, packed), weights


def packed_attention(attention: Any, stream: torch.Tensor, x: torch.Tensor | None, packed: Packed) -> tuple[Any, ...]:
    """BertAttention: self-attention, projection, residual, LayerNorm; (stream, x, weights or None)."""
    context, weights = attention.self(stream if x is None else x, packed)
    output = attention.output
    if not _is_container(output, modeling_bert.BertSelfOutput):
        return *_pair(output(context, stream.to(packed.outer)), packed), weights
    projected = _linear(output.dense, context)
    return *_add_norm(output, projected, stream, packed), weights


def packed_self_attention(attention: Any, x: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, torch.Tensor | None]:
    """BertSelfAttention: context [T, C] within each cell, and the weights [B, H, L, L] if wanted."""
    n_heads, head_dim = attention.num_attention_heads, attention.attention_head_size
    shape = (len(x), n_heads, head_dim)
    dropout_p = attention.dropout.p if attention.training else 0.0
    options: dict[str, Any] = dict(cu_seqlens=packed.cells, dropout_p=dropout_p)
    projections = attention.query, attention.key, attention.value
    is_padded = packed.wants_weights or packed.keys is not None
    has_biases = {projection.bias is None for projection in projections} if is_plain_linear(*projections) else set()
    weights = None
    if len(has_biases) == 1 and not is_padded and not has_global_hooks():
        weight = torch.cat([projection.weight for projection in projections])
        bias = None if projections[0].bias is None else torch.cat([projection.bias for projection in projections])
        qkv = linear(x, weight, bias).view(len(x), 3, n_heads, head_dim)
        context = varlen_attention_qkv(qkv, **options)
    else:
        read: torch.Tensor | Rows = x
        if is_ours(*projections) and not has_global_hooks():
            read = _rounded_once(projections, x)
        q, k, v = (projection(read).to(packed.dtype).view(shape) for projection in projections)
        if is_padded:
            context, weights = padded_attention(q, k, v, packed.padding, packed.keys, dropout_p, packed.wants_weights)
        else:
            context = varlen_attention(q, k, v, **options)
    return context.reshape(len(x), n_heads * head_dim), weights


def _rounded_once(layers: tuple[Any, ...], x: torch.Tensor) -> torch.Tensor | Rows:
    """What several layers of eight bits read: rows that are rounded for all of them, where they multiply integers."""
    is_shared = all(wants_rows(layer) and layer.smooth is None for layer in layers)
    if not is_shared or needs_gradient(x, *(layer.bias for layer in layers)):
        return x
    return layers[0].rounded(x)


def _feed_forward(
    layer: Any, stream: torch.Tensor, x: torch.Tensor | None, packed: Packed
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """BertIntermediate and BertOutput."""
    up, down, read = layer.intermediate, layer.output, stream if x is None else x
    is_down_known = _is_container(down, modeling_bert.BertOutput)
    activation = _activation(up.intermediate_act_fn) if _is_container(up, modeling_bert.BertIntermediate) else None
    is_known = activation is not None and is_down_known and is_plain_norm(down.LayerNorm, down.dropout)
    if is_known and all(is_plain_linear(each) or is_ours(each) for each in (up.dense, down.dense)):
        assert activation is not None
        weights = float_weights(up.dense, down.dense, read, packed.dtype)
        if weights is None:
            out = feed_forward_of_rows(up.dense, down.dense, read, activation, packed.dtype)
            return _add_norm(down, out, stream, packed)
        normed = feed_forward_layernorm(
            read, stream, *weights, down.LayerNorm.weight, down.LayerNorm.bias, activation=activation,
            eps=down.LayerNorm.eps, norm="post", out_dtype=packed.dtype, dropout_p=_probability(down.dropout),
        )  # fmt: skip
        return _parts(*normed)
    hidden = up(read)
    if not is_down_known:
        return _pair(down(hidden, stream.to(packed.outer)), packed)
    return _add_norm(down, _linear(down.dense, hidden), stream, packed)


def _add_norm(
    container: Any, out: torch.Tensor, stream: torch.Tensor, packed: Packed
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``LayerNorm(dropout(out) + stream)`` with the modules of BertSelfOutput or BertOutput."""
    norm, dropout = container.LayerNorm, container.dropout
    if not is_plain_norm(norm, dropout) or has_global_hooks():
        return _pair(norm(dropout(out) + stream.to(packed.outer)), packed)
    return _parts(
        *residual_layernorm(
            out, stream, norm.weight, norm.bias, eps=norm.eps, norm="post",
            out_dtype=packed.dtype, dropout_p=_probability(dropout),
        )
    )  # fmt: skip


def _linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    if is_plain_linear(module) and not has_global_hooks():
        return linear(x, module.weight, module.bias)
    return module(x)


def _probability(dropout: Any) -> float:
    return dropout.p if dropout.training else 0.0


def _is_container(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a container may be skipped and its submodules used directly."""
    return type(module) is kind and is_unhooked(module) and not has_global_hooks()


def _parts(stream: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(stream, x), one tensor returned once: a recomputed layer cannot return it twice."""
    return stream, None if x is stream else x


def _pair(out: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(stream, x) from what a module returned."""
    stream = out if out.dtype == torch.float64 else out.float()
    return stream, None if stream.dtype == packed.dtype else out.to(packed.dtype)


# Class of transformers' activation module -> the name that our operations give the same function.
_NAMES = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_ACTIVATIONS = {type(ACT2FN[theirs]): ours for theirs, ours in _NAMES.items() if theirs in ACT2FN}


def _activation(function: Any) -> str | None:
    """Our name of an activation module; None where it has to be called."""
    if not isinstance(function, nn.Module) or not is_unhooked(function):
        return None
    if type(function) is nn.GELU:
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(function))
