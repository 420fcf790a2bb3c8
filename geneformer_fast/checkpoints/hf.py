"""Hugging Face BERT checkpoints, which is what Geneformer publishes: load them, save them back bit-identical.

Reads the files itself, so that transformers is not needed.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from geneformer_fast import families
from geneformer_fast.checkpoints import quantized
from geneformer_fast.checkpoints.mapping import BERT_BIAS, Entry, bert_entries, to_ours, to_theirs
from geneformer_fast.checkpoints.present import check_present
from geneformer_fast.checkpoints.skeleton import skeleton
from geneformer_fast.checkpoints.stored import stored_tensors
from geneformer_fast.checkpoints.tied import DECODER_BIAS, DECODER_WEIGHT, bias_in, sort_leftovers
from geneformer_fast.checkpoints.transformer_engine import as_bert, is_transformer_engine
from geneformer_fast.checkpoints.weights import (
    CONFIG,
    check_floats,
    check_layers,
    n_classes_of,
    read_tensors,
    warn_of_changes,
    write_model,
)
from geneformer_fast.config import BOUNDS, EncoderConfig, matmul_dtype
from geneformer_fast.embeddings import RankTokens
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import CheckpointError, UnsupportedError
from geneformer_fast.files import schema
from geneformer_fast.files.checksums import is_verifying
from geneformer_fast.heads import CellClassifier, GeneClassifier, MLMHead, Pooler
from geneformer_fast.layers import quantization_of

ARCHITECTURES = {
    "BertModel": "pooler",
    "BertForMaskedLM": "mlm",
    "BertForSequenceClassification": "cells",
    "BertForTokenClassification": "genes",
}
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_HEADS: dict[type, str] = {MLMHead: "mlm", CellClassifier: "cells", GeneClassifier: "genes", Pooler: "pooler"}
OWN_KEY = "geneformer_fast"
#: What safetensors files of transformers say in their header.
METADATA = {"format": "pt"}
_LAYER = re.compile(r"(?:bert\.)?encoder\.layer\.(\d{1,6})\.")


@dataclass
class Source:
    """What a loaded checkpoint held besides our parameters, so that saving gives the same tensors and settings back.

    Attributes
    ----------
    architecture
        Class name in transformers.
    settings
        The checkpoint's config.json.
    prefix
        ``"bert."`` or empty.
    dtypes
        Dtype of every tensor in the files.
    extras
        What nothing computes with, kept as it was: buffers (``position_ids``), and the bias beside a decoder that has
        another one.
    aliases
        Tied tensors that the files spell out (the decoder's weight and bias).
    bias
        The tensor that is added to the logits of masked genes.
    """

    architecture: str
    settings: dict[str, Any]
    prefix: str
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    bias: str = BERT_BIAS


def load(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    verify: bool | None = None,
) -> Encoder:
    """:func:`geneformer_fast.load` for a folder of BertModel, BertForMaskedLM, or a BERT classifier."""
    folder = Path(path)
    settings = read_settings(folder)
    if quantized.is_quantized(settings, folder / CONFIG):
        return _load_quantized(folder, settings, dtype, device, verify)
    config_from_settings(settings, folder / CONFIG)
    tensors = read_tensors(folder, verify=verify)
    if is_transformer_engine(tensors):
        settings, tensors = as_bert(settings, tensors, folder)
    check_floats(tensors, folder)
    encoder, table = opened(settings, tensors, folder)
    if is_verifying(verify):
        warn_of_changes(folder, encoder.config, settings)
    shapes = {name: parameter.shape for name, parameter in encoder.state_dict().items()}
    state = to_ours(tensors, table, shapes, source=str(folder))
    sort_leftovers(tensors, {name for entry in table for name in entry.theirs}, encoder, folder, tensors.__getitem__)
    encoder.load_state_dict(state, assign=True)
    stored = tensors[table[0].theirs[0]].dtype
    encoder.to(device).cast(matmul_dtype(dtype, device) or stored)
    return encoder.eval()


def _load_quantized(
    folder: Path,
    settings: dict[str, Any],
    dtype: str | torch.dtype | None,
    device: str | torch.device,
    verify: bool | None,
) -> Encoder:
    """A folder of weights of eight bits, tensor by tensor: nothing is ever there in full precision."""
    with stored_tensors(folder, verify=verify) as stored:
        tensors, kinds = quantized.in_our_terms(stored, settings, folder)
        encoder, table = opened(settings, tensors, folder)
        if is_verifying(verify):
            warn_of_changes(folder, encoder.config, settings)
        used = quantized.fill(encoder, table, tensors, kinds, folder)
        if is_verifying(verify):
            quantized.warn_of_report(folder, encoder)
        sort_leftovers(tensors, used, encoder, folder, tensors.read)
    encoder.to(device).cast(matmul_dtype(dtype, device) or torch.float32)
    return encoder.eval()


def opened(settings: dict[str, Any], tensors: Mapping[str, torch.Tensor], folder: Path) -> tuple[Encoder, list[Entry]]:
    """An encoder without numbers, its source noted, and the table of its tensors.

    Names and shapes of tensors count, and of two biases whether they are the same.
    """
    config = config_from_settings(settings, folder / CONFIG)
    check_layers(tensors, config.n_layers, _LAYER, folder)
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""
    architecture = _architecture(settings, tensors, folder)
    head: str | None = ARCHITECTURES[architecture]
    if head == "pooler" and f"{prefix}pooler.dense.weight" not in tensors:
        head = None
    n_classes = n_classes_of(tensors, "classifier.weight", folder)
    encoder = skeleton(config, head, n_classes=n_classes)
    bias = bias_in(tensors)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    encoder.source = Source(architecture, settings, prefix, dtypes, bias=bias)
    return encoder, bert_entries(config, head, prefix, bias=bias)


def save(encoder: Encoder, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """:func:`geneformer_fast.save` for what BERT can express (:func:`is_bert`); else a CheckpointError."""
    settings, tensors = as_saved(encoder)
    return write_model(Path(path), encoder.config, settings, tensors, overwrite=overwrite, metadata=METADATA)


def as_saved(encoder: Encoder) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config.json and the tensors of an encoder's folder; shapes and dtypes of one without numbers."""
    source = encoder.source or _fresh_source(encoder)
    state, table = encoder.state_dict(), table_of(encoder)
    settings = settings_from_encoder(encoder, source)
    if quantization_of(encoder) is None:
        tensors = to_theirs(state, table)
        if DECODER_WEIGHT in source.aliases:
            tensors[DECODER_WEIGHT] = state["embeddings.token.weight"]
    else:
        tensors, settings[quantized.KEY] = quantized.to_theirs(encoder, table, source.prefix)
        # What is not of eight bits is loaded by others in float32, as scales are.
        settings.pop("torch_dtype", None)
        settings["dtype"] = "float32"
    if DECODER_BIAS in source.aliases:
        tensors[DECODER_BIAS] = state["head.bias"]
    tensors = {name: _as_stored(tensor, source.dtypes.get(name)) for name, tensor in tensors.items()}
    return settings, {**tensors, **source.extras}


def table_of(encoder: Encoder) -> list[Entry]:
    """Which of an encoder's parameters is which tensor of its folder."""
    source = encoder.source or _fresh_source(encoder)
    return bert_entries(encoder.config, head_name(encoder), source.prefix, bias=source.bias)


def read_settings(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder."""
    check_present(folder)
    return schema.read_json(folder / CONFIG, CheckpointError)


@dataclass
class OwnSettings:
    """What a BERT config.json of ours says under :data:`OWN_KEY`."""

    vocabulary: str | None = None
    vocabulary_fingerprint: str | None = None
    family: str | None = None


@dataclass
class BertSettings:
    """What is read of a BERT config.json, with the bounds of :class:`EncoderConfig`."""

    num_hidden_layers: schema.whole(*BOUNDS["n_layers"])  # type: ignore[valid-type]
    hidden_size: schema.whole(*BOUNDS["width"])  # type: ignore[valid-type]
    num_attention_heads: schema.whole(*BOUNDS["n_heads"])  # type: ignore[valid-type]
    intermediate_size: schema.whole(*BOUNDS["ff_width"])  # type: ignore[valid-type]
    vocab_size: schema.whole(*BOUNDS["vocab_size"])  # type: ignore[valid-type]
    max_position_embeddings: schema.whole(*BOUNDS["max_len"])  # type: ignore[valid-type]
    model_type: str = "bert"
    position_embedding_type: str | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: schema.number(*BOUNDS["eps"], above=0) = 1e-12  # type: ignore[valid-type]
    type_vocab_size: schema.whole(1, BOUNDS["n_token_types"][1]) = 2  # type: ignore[valid-type]
    hidden_dropout_prob: schema.number(*BOUNDS["dropout"]) = 0.1  # type: ignore[valid-type]
    attention_probs_dropout_prob: schema.number(*BOUNDS["attention_dropout"]) = 0.1  # type: ignore[valid-type]
    pad_token_id: schema.whole(0, 2**31) | None = None  # type: ignore[valid-type]
    initializer_range: schema.number(*BOUNDS["init_std"]) = 0.02  # type: ignore[valid-type]
    tie_word_embeddings: bool = True
    architectures: list[str] | None = None
    id2label: dict[str, str | int] | None = None
    label2id: dict[str, int | str] | None = None
    geneformer_fast: OwnSettings | None = None


def config_from_settings(settings: Mapping[str, Any], where: Path) -> EncoderConfig:
    """An :class:`EncoderConfig` from a BERT config.json, whose path is ``where``."""
    kind = settings.get("model_type", "bert")
    if kind != "bert":
        raise CheckpointError(f"{where}: model_type is {kind!r}; this loader reads bert")
    schema.check(BertSettings, settings, where, CheckpointError)
    positions = settings.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise CheckpointError(f"{where}: position_embedding_type {positions!r} is not supported, only 'absolute'")
    activation = settings.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"{where}: hidden_act {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    own = settings.get(OWN_KEY) or {}
    vocab_size, pad_id = settings["vocab_size"], settings.get("pad_token_id") or 0
    if pad_id >= vocab_size:
        raise CheckpointError(f"{where}: pad_token_id is {pad_id}; input should be below vocab_size, {vocab_size}")
    try:
        return EncoderConfig(
            n_layers=settings["num_hidden_layers"],
            width=settings["hidden_size"],
            n_heads=settings["num_attention_heads"],
            ff_width=settings["intermediate_size"],
            vocab_size=vocab_size,
            max_len=settings["max_position_embeddings"],
            activation=ACTIVATIONS[activation],
            head_activation=ACTIVATIONS[activation],
            eps=float(settings.get("layer_norm_eps", 1e-12)),
            n_token_types=settings.get("type_vocab_size", 2),
            dropout=float(settings.get("hidden_dropout_prob", 0.1)),
            attention_dropout=float(settings.get("attention_probs_dropout_prob", 0.1)),
            pad_id=pad_id,
            init_std=float(settings.get("initializer_range", 0.02)),
            tied_decoder=settings.get("tie_word_embeddings", True),
            vocabulary=own.get("vocabulary", families.vocabulary_of_rows(vocab_size)),
            vocabulary_fingerprint=own.get("vocabulary_fingerprint"),
            family=own.get("family"),
        )
    except UnsupportedError as error:  # what the fields say together
        raise CheckpointError(f"{where}: {error}") from None


def settings_from_encoder(encoder: Encoder, source: Source) -> dict[str, Any]:
    """A BERT config.json for an encoder; what the source's config.json says beyond us is kept."""
    config = encoder.config
    settings = {key: value for key, value in source.settings.items() if key != quantized.KEY}
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
    if ACTIVATIONS.get(settings.get("hidden_act", "")) == config.activation:
        activation = settings["hidden_act"]
    settings.update(
        architectures=[source.architecture],
        model_type="bert",
        num_hidden_layers=config.n_layers,
        hidden_size=config.width,
        num_attention_heads=config.n_heads,
        intermediate_size=config.ff_width,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_len,
        hidden_act=activation,
        layer_norm_eps=config.eps,
        type_vocab_size=config.n_token_types,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        pad_token_id=config.pad_id,
        initializer_range=config.init_std,
        tie_word_embeddings=config.tied_decoder,
    )
    # The published vocabularies differ in size, which is all a stock config.json says of them.
    known = families.vocabulary_of_rows(config.vocab_size)
    own = {"vocabulary": config.vocabulary, "vocabulary_fingerprint": config.vocabulary_fingerprint}
    own |= {"family": config.family} if config.family else {}
    if own != {"vocabulary": known, "vocabulary_fingerprint": None}:
        settings[OWN_KEY] = own
    if isinstance(encoder.head, CellClassifier | GeneClassifier) and "id2label" not in settings:
        labels = [f"LABEL_{i}" for i in range(encoder.head.classifier.out_features)]
        settings["id2label"] = {str(i): label for i, label in enumerate(labels)}
        settings["label2id"] = {label: i for i, label in enumerate(labels)}
    return settings


def _architecture(settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], folder: Path) -> str:
    """The class a checkpoint is of: what config.json says, or what the tensors show."""
    named = (settings.get("architectures") or [None])[0]
    if named in ARCHITECTURES:
        return named
    if named is not None:
        raise CheckpointError(f"{folder}: architecture {named!r} is not one of {', '.join(ARCHITECTURES)}")
    if "cls.predictions.bias" in tensors:
        return "BertForMaskedLM"
    if "classifier.weight" in tensors:
        has_pooler = any(name.endswith("pooler.dense.weight") for name in tensors)
        return "BertForSequenceClassification" if has_pooler else "BertForTokenClassification"
    return "BertModel"


def head_name(encoder: Encoder) -> str | None:
    """Name of an encoder's head, as :class:`Encoder` takes it."""
    if encoder.head is None:
        return None
    return _HEADS.get(type(encoder.head)) or getattr(encoder.head, "head_name", type(encoder.head).__name__)


def is_bert(encoder: Encoder) -> bool:
    """Whether BERT can express an encoder: post-norm over tokens, one activation, relu or gelu, token types."""
    config = encoder.config
    if not isinstance(encoder.embeddings, RankTokens) or type(encoder.head) not in (type(None), *_HEADS):
        return False
    if config.activation not in ACTIVATIONS.values() or config.head_activation != config.activation:
        return False
    bert = dataclasses.replace(
        config, norm="post", embedding_norm=True, final_norm=False, inputs="tokens",
        attention="softmax", attention_width=None, qkv_bias=True, n_features=0,
    )  # fmt: skip
    return config == bert and config.n_token_types > 0


def _fresh_source(encoder: Encoder) -> Source:
    if not is_bert(encoder):
        raise CheckpointError("BERT cannot express this encoder: it is post-norm over tokens with relu or gelu")
    head = head_name(encoder)
    architecture = next((name for name, kind in ARCHITECTURES.items() if kind == head), "BertModel")
    # Without the second name transformers 5 would add zeros to the logits of a decoder that is not tied.
    aliases = (DECODER_BIAS,) if head == "mlm" and not encoder.config.tied_decoder else ()
    return Source(architecture, {}, "" if architecture == "BertModel" else "bert.", aliases=aliases)


def _as_stored(tensor: torch.Tensor, stored: torch.dtype | None) -> torch.Tensor:
    # Norms and tables of a half-precision checkpoint are float32 in memory; they go back to what the file had.
    if stored is not None and stored.itemsize < tensor.dtype.itemsize and tensor.is_floating_point():
        return tensor.to(stored)
    return tensor
