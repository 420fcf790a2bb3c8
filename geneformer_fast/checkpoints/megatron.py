"""Megatron's BERT as BioNeMo trains it: its tensors under all their names, and what its configurations say."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from geneformer_fast.errors import CheckpointError

EMBEDDING, POSITIONS = "embedding.word_embeddings.weight", "embedding.position_embeddings.weight"
DECODER, DECODER_BIAS = "output_layer.weight", "output_layer.bias"
# What wraps the model, one around the other: Lightning's module, Megatron's, one for half precision.
_WRAPPERS = re.compile(r"^(?:(?:state_dict|model|module|language_model)\.)+")
_LAYERS = re.compile(r"encoder\.layers\.(\d{1,6})\.")
# Layers of one kind are stacked into one tensor where they are saved sharded.
_STACKED = re.compile(r"encoder\.layers\.(?!\d)")
# NeMo 1's names, and those of Megatron's own layers, to the ones of Transformer Engine, in which norms are part of the
# layers that read them.
_SPELLINGS = (
    (".query_key_value.", ".linear_qkv."),
    (".self_attention.dense.", ".self_attention.linear_proj."),
    (".dense_h_to_4h.", ".linear_fc1."),
    (".dense_4h_to_h.", ".linear_fc2."),
    (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
    (".post_attention_layernorm.", ".mlp.linear_fc1.layer_norm_"),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
    ("lm_head.layernorm.", "lm_head.layer_norm."),
    ("lm_head.bias", DECODER_BIAS),
    ("lm_head.weight", DECODER),
)
#: What is in such checkpoints beside the model.
_OTHERS = re.compile(r"(?:^|\.)(?:optimizer|optimizer_states|lr_schedulers|rng_state|rerun_state_machine\w*)(?:\.|$)")
_EXTRA = re.compile(r"_extra_state(?:/|$)")
# Of a layer divided among ranks: the axis that is, in Megatron's tensor parallelism.
_DIVIDED = {
    **dict.fromkeys((EMBEDDING, DECODER, DECODER_BIAS), 0),
    **dict.fromkeys(("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias"), 0),
    **dict.fromkeys(("linear_proj.weight", "linear_fc2.weight"), 1),
}


def is_of_model(name: str) -> bool:
    """Whether a tensor is of the model: no state of an optimizer, no scales of float8."""
    return not _OTHERS.search(name) and not _EXTRA.search(name)


def spelled(name: str) -> str:
    """A tensor's name as Transformer Engine's layers have it, without what wraps the model."""
    bare = _WRAPPERS.sub("", name)
    for theirs, ours in _SPELLINGS:
        bare = bare.replace(theirs, ours)
    return bare


def named(tensors: dict[str, Any], where: str | Path) -> dict[str, torch.Tensor]:
    """The model's tensors under Transformer Engine's names, layer by layer.

    Parameters
    ----------
    tensors
        As they are in a checkpoint; what is of no model, and empty states, are left out. It is emptied meanwhile, so
        that no tensor is in memory twice.
    where
        The file or folder to name in errors.

    Raises
    ------
    CheckpointError
        Two of them are one tensor, or something is no tensor.
    """
    found: dict[str, torch.Tensor] = {}
    for name in list(tensors):
        value = tensors.pop(name)
        if not isinstance(name, str) or not is_of_model(name) or value is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{where}: {name!r} is a {type(value).__name__}, not a tensor")
        for new, tensor in _unstacked(spelled(name), value):
            if new in found:
                raise CheckpointError(f"{where}: {name!r} is {new!r} once more; the file is no state dict of one model")
            found[new] = tensor
    return found


def _unstacked(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """One tensor of each layer, in memory of its own, where all of them are stacked."""
    if not _STACKED.match(name) or not tensor.ndim:
        return [(name, tensor)]
    rest = _STACKED.sub("", name, count=1)
    return [(f"encoder.layers.{i}.{rest}", layer.clone()) for i, layer in enumerate(tensor)]


def joined(ranks: Sequence[Mapping[str, torch.Tensor]], where: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a model whose layers are divided among ranks (tensor parallelism), put together.

    Raises
    ------
    CheckpointError
        Ranks hold other tensors, or differ in what all of them should have.
    """
    first = ranks[0]
    if len(ranks) == 1:
        return dict(first)
    whole = {}
    for name in first:
        parts = [rank[name] for rank in ranks if name in rank]
        if len(parts) < len(ranks) or any(len(rank) != len(first) for rank in ranks):
            raise CheckpointError(
                f"{where}: its ranks do not hold the same tensors, such as {name!r}: the layers are divided among "
                "stages too (pipeline parallelism); convert the checkpoint to one rank with NeMo's tools"
            )
        axis = next((axis for end, axis in _DIVIDED.items() if name.endswith(end)), None)
        if axis is not None:
            whole[name] = torch.cat(parts, axis)
        elif all(torch.equal(parts[0], part) for part in parts[1:]):
            whole[name] = parts[0]
        else:
            raise CheckpointError(f"{where}: {name!r} differs between ranks; they are not of one checkpoint")
    return whole


@dataclass(frozen=True)
class Geometry:
    """What the tensors themselves say of a model."""

    n_layers: int
    width: int
    ff_width: int
    vocab_size: int
    max_len: int


def geometry_of(tensors: Mapping[str, torch.Tensor], where: str | Path) -> Geometry:
    """The geometry of a model by the shapes of its tensors.

    Raises
    ------
    CheckpointError
        A tensor that says it is missing, or is no matrix.
    """

    def matrix(name: str) -> tuple[int, int]:
        if name not in tensors:
            raise CheckpointError(f"{where}: tensor {name!r} is missing; it is no BERT of Megatron, or not all of it")
        if tensors[name].ndim != 2 or not tensors[name].numel():
            raise CheckpointError(f"{where}: tensor {name!r} has shape {list(tensors[name].shape)}, and is no matrix")
        return tuple(tensors[name].shape)  # type: ignore[return-value]

    vocab_size, width = matrix(EMBEDDING)
    n_layers = 1 + max((int(match[1]) for name in tensors if (match := _LAYERS.match(name))), default=-1)
    ff_width, _ = matrix("encoder.layers.0.mlp.linear_fc1.weight")
    max_len, _ = matrix(POSITIONS)
    return Geometry(n_layers, width, ff_width, vocab_size, max_len)


@dataclass(frozen=True)
class Said:
    """What a configuration says of a model.

    Attributes
    ----------
    fields
        Under Megatron's names; what cannot be read (references to other fields) is left out.
    where
        The file it stands in, for errors; None where there is none.
    is_followed
        Whether the activation it names is the one that was used: NeMo 2 does what its configuration says, NeMo 1
        computed GELU whatever that said.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    where: str | None = None
    is_followed: bool = False

    def number(self, *names: str, kind: type = int) -> Any:
        """The first field of these names that holds a number; None where none does."""
        for name in names:
            value = self.fields.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return kind(value)
            if isinstance(value, str) and kind is float:  # 1e-12 without a point is text to YAML
                try:
                    return float(value)
                except ValueError:
                    continue
        return None


#: Fields of which only these values can be computed: what else they mean.
_ONLY: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("normalization", lambda v: "rms" not in str(v).lower(), "norms that are no LayerNorms"),
    ("transformer_block_type", lambda v: v in ("pre_ln", None), "blocks that normalise elsewhere than before layers"),
    ("apply_residual_connection_post_layernorm", lambda v: not v, "residual additions of the normalised stream"),
    ("layernorm_zero_centered_gamma", lambda v: not v, "norms whose weights are stored less one"),
    ("qk_layernorm", lambda v: not v, "norms of queries and keys"),
    ("gated_linear_unit", lambda v: not v, "a gated feed-forward layer"),
    ("position_embedding_type", lambda v: v in ("learned_absolute", "learned_parameters", None), "other positions"),
    ("num_query_groups", lambda v: v is None, "keys and values shared among heads"),
    ("add_bias_linear", lambda v: v is not False, "layers without biases"),
)


def check_said(said: Said, geometry: Geometry) -> None:
    """Hold what a configuration says against the tensors, and refuse what nothing here computes.

    Raises
    ------
    CheckpointError
        Names the field, and what it says.
    """
    for name, is_known, meaning in _ONLY:
        if name in said.fields and not is_known(said.fields[name]):
            heads = said.number("num_attention_heads")
            if name == "num_query_groups" and said.fields[name] in (heads, "null"):
                continue
            raise CheckpointError(
                f"{said.where}: {name} is {said.fields[name]!r}, which means {meaning}; no published BioNeMo "
                "Geneformer has that, and nothing here computes it"
            )
    pairs = (
        ("num_layers", geometry.n_layers),
        ("hidden_size", geometry.width),
        ("ffn_hidden_size", geometry.ff_width),
        ("seq_length", geometry.max_len),
    )
    for name, found in pairs:
        value = said.number(name)
        # Positions may be more than the cells a model was trained on have.
        is_fitting = value is None or value == found or (name == "seq_length" and value <= found)
        if not is_fitting:
            raise CheckpointError(
                f"{said.where}: {name} is {value:,} but the weights have {found:,}; the configuration and the weights "
                "do not belong together"
            )


def activation_of(said: Said) -> tuple[str, str]:
    """The activation of the blocks, and one sentence that says which was taken and why."""
    value = said.fields.get("activation_func", said.fields.get("activation"))
    named = str(value).rpartition(".")[2].lower() if value is not None else None
    fused = said.fields.get("bias_activation_fusion", said.fields.get("bias_gelu_fusion", True))
    # Fused with the bias, Megatron's GELU is its approximation by tanh.
    gelu = "gelu" if fused is False else "gelu_tanh"
    told = "GELU" if fused is False else "GELU by tanh, as fused with the bias"
    head = "the head computes GELU by the error function"
    if named is None:
        return gelu, f"its blocks compute {told} and {head}; its configuration names no activation"
    if named in ("gelu", "fast-gelu", "bias_gelu"):
        return gelu, f"its blocks compute {told} and {head}, as its configuration says; cards that name ReLU are wrong"
    if said.is_followed and named == "relu":
        return "relu", f"its blocks compute ReLU, as {said.where} says, and {head}"
    if said.is_followed:
        raise CheckpointError(f"{said.where}: activation_func is {value!r}; read are gelu and relu")
    return gelu, (
        f"its blocks compute {told} and {head}, though {said.where} names {value!r}: NeMo 1 did not follow that field, "
        "and the weights need GELU"
    )
