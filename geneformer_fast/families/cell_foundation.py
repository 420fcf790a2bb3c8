"""Folders of CellFoundation, the class of AIDO.Cell in GenBio's ModelGenerator, read and written.

Reads the files itself, so that neither transformers nor ModelGenerator is needed.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from geneformer_fast.checkpoints import hf
from geneformer_fast.checkpoints.mapping import BERT_BIAS, Entry, affine, to_ours, to_theirs
from geneformer_fast.checkpoints.skeleton import skeleton
from geneformer_fast.checkpoints.tied import DECODER_BIAS, bias_in
from geneformer_fast.checkpoints.weights import (
    CONFIG,
    check_floats,
    check_layers,
    read_tensors,
    warn_of_changes,
    write_model,
)
from geneformer_fast.config import BOUNDS, EncoderConfig, matmul_dtype
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import CheckpointError, UnsupportedError
from geneformer_fast.files import schema
from geneformer_fast.files.checksums import is_verifying

#: ``model_type`` of config.json.
MODEL_TYPE = "cellfoundation"
#: Classes that their library saves, and the head of each.
ARCHITECTURES: dict[str, str | None] = {"CellFoundationModel": None, "CellFoundationForMaskedLM": "mlm"}
#: Values that stand for a masked and for a padded gene.
MASK, PAD = -1, -2
#: Depth tokens behind the genes: positions beyond ``max_position_embeddings``.
N_DEPTH_TOKENS = 2
_LAYER = re.compile(r"(?:bert\.)?encoder\.layer\.(\d{1,6})\.")
_PRESET = "aido-cell-3m"
# What a fresh config.json says beside the geometry, as the class's own defaults are, which nothing here computes with.
_UNUSED = {
    "vocab_size": 16,
    "type_vocab_size": 2,
    "use_cache": True,
    "rotary_percent": 1.0,
    "seq_len_interpolation_factor": None,
}


@dataclass
class CellFoundationSettings:
    """What is read of a config.json; what is not said there is what the class takes for itself, RMSNorm for one."""

    num_hidden_layers: schema.whole(*BOUNDS["n_layers"])  # type: ignore[valid-type]
    hidden_size: schema.whole(*BOUNDS["width"])  # type: ignore[valid-type]
    num_attention_heads: schema.whole(*BOUNDS["n_heads"])  # type: ignore[valid-type]
    intermediate_size: schema.whole(*BOUNDS["ff_width"])  # type: ignore[valid-type]
    max_position_embeddings: schema.whole(1, BOUNDS["max_len"][1] - N_DEPTH_TOKENS)  # type: ignore[valid-type]
    model_type: str = MODEL_TYPE
    normalization_type: str = "RMSNorm"
    position_embedding_type: str = "absolute"
    hidden_act: str = "swiglu"
    add_linear_bias: bool = True
    layer_norm_eps: schema.number(*BOUNDS["eps"], above=0) = 1e-5  # type: ignore[valid-type]
    bin_num: schema.whole(*BOUNDS["n_bins"]) = 100  # type: ignore[valid-type]
    bin_alpha: schema.number(*BOUNDS["bin_alpha"]) = 1.0  # type: ignore[valid-type]
    mask_token_id: schema.number() = MASK  # type: ignore[valid-type]
    pad_token_id: schema.number() = PAD  # type: ignore[valid-type]
    hidden_dropout_prob: schema.number(*BOUNDS["dropout"]) = 0.0  # type: ignore[valid-type]
    attention_probs_dropout_prob: schema.number(*BOUNDS["attention_dropout"]) = 0.0  # type: ignore[valid-type]
    initializer_range: schema.number(*BOUNDS["init_std"]) = 0.02  # type: ignore[valid-type]
    is_decoder: bool = False
    architectures: list[str] | None = None
    geneformer_fast: hf.OwnSettings | None = None


# Settings under which the class computes something else, and what of them is served.
_SERVED: tuple[tuple[str, Any, str], ...] = (
    ("model_type", MODEL_TYPE, "this loader reads cellfoundation"),
    ("normalization_type", "LayerNorm", "the published AIDO.Cell models have LayerNorm, and RMSNorm is not served"),
    ("position_embedding_type", "absolute", "the published AIDO.Cell models have a table of positions"),
    ("hidden_act", "swiglu", "no other activation is served"),
    ("add_linear_bias", True, "linear layers without biases are not served"),
    ("mask_token_id", MASK, "another value for masked genes is not served"),
    ("pad_token_id", PAD, "another value for padded genes is not served"),
    ("is_decoder", False, "decoders are not served"),
)


def entries(config: EncoderConfig, head: str | None = "mlm") -> list[Entry]:
    """The table of tensors, as a model with a head has them; ``decoder.bias`` there is ``cls.predictions.bias``."""
    source = "bert.gene_embedding."
    table = [
        *affine("embeddings.linear1", f"{source}linear1"),
        *affine("embeddings.linear2", f"{source}linear2"),
        *(
            Entry(f"embeddings.{name}.weight", (f"{source}{name}.weight",))
            for name in ("lookup_table", "mask_embedding", "pad_embedding")
        ),
        Entry("embeddings.position.weight", ("bert.position_embedding.weight",)),
    ]
    for i in range(config.n_layers):
        theirs, ours = f"bert.encoder.layer.{i}.", f"blocks.{i}."
        table += affine(f"{ours}attention_norm", f"{theirs}attention.ln")
        table += affine(f"{ours}qkv", *(f"{theirs}attention.self.{part}" for part in ("query", "key", "value")))
        table += affine(f"{ours}out", f"{theirs}attention.output.dense")
        table += affine(f"{ours}ff_norm", f"{theirs}ln")
        table += affine(f"{ours}up", f"{theirs}mlp.gate_proj", f"{theirs}mlp.up_proj")
        table += affine(f"{ours}down", f"{theirs}mlp.down_proj")
    table += affine("final_norm", "bert.encoder.ln")
    if head == "mlm":
        table += affine("head.dense", "cls.predictions.transform.dense")
        table += affine("head.norm", "cls.predictions.transform.LayerNorm")
        table.append(Entry("head.decoder.weight", ("cls.predictions.decoder.weight",)))
        table.append(Entry("head.bias", ("cls.predictions.bias",)))
    return table


def load(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    verify: bool | None = None,
) -> Encoder:
    """:func:`geneformer_fast.load` for a folder of CellFoundationModel or CellFoundationForMaskedLM."""
    folder = Path(path)
    settings = hf.read_settings(folder)
    config_from_settings(settings, folder / CONFIG)
    tensors = read_tensors(folder, verify=verify)
    check_floats(tensors, folder)
    encoder, table = opened(settings, tensors, folder)
    if is_verifying(verify):
        warn_of_changes(folder, encoder.config, settings)
    shapes = {name: parameter.shape for name, parameter in encoder.state_dict().items()}
    state = to_ours(tensors, table, shapes, source=str(folder))
    _sort_leftovers(tensors, {name for entry in table for name in entry.theirs}, encoder, folder)
    encoder.load_state_dict(state, assign=True)
    stored = next(tensors[entry.theirs[0]].dtype for entry in table if entry.ours == "blocks.0.qkv.weight")
    encoder.to(device).cast(matmul_dtype(dtype, device) or stored)
    return encoder.eval()


def opened(settings: dict[str, Any], tensors: Mapping[str, torch.Tensor], folder: Path) -> tuple[Encoder, list[Entry]]:
    """An encoder without numbers, its source noted, and the table of its tensors, whose names count only."""
    config = config_from_settings(settings, folder / CONFIG)
    check_layers(tensors, config.n_layers, _LAYER, folder)
    architecture = _architecture(settings, tensors, folder)
    encoder = skeleton(config, ARCHITECTURES[architecture])
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    encoder.source = hf.Source(architecture, settings, prefix, dtypes, bias=bias_in(tensors))
    return encoder, table_of(encoder)


def save(encoder: Encoder, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """:func:`geneformer_fast.save` for what the class can be (:func:`is_expressible`)."""
    settings, tensors = as_saved(encoder)
    return write_model(Path(path), encoder.config, settings, tensors, overwrite=overwrite, metadata=hf.METADATA)


def as_saved(encoder: Encoder) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config.json and the tensors of an encoder's folder."""
    source, state = _source_of(encoder), encoder.state_dict()
    tensors = to_theirs(state, table_of(encoder))
    for alias in source.aliases:
        tensors[alias] = state["head.bias"]
    tensors = {name: _as_stored(tensor, source.dtypes.get(name)) for name, tensor in tensors.items()}
    return settings_from_encoder(encoder, source), tensors


def table_of(encoder: Encoder) -> list[Entry]:
    """Which of an encoder's parameters is which tensor of its folder."""
    source = _source_of(encoder)

    def named(name: str) -> str:
        if name == BERT_BIAS:
            return source.bias
        return name if source.prefix else name.removeprefix("bert.")

    table = entries(encoder.config, hf.head_name(encoder))
    return [dataclasses.replace(entry, theirs=tuple(map(named, entry.theirs))) for entry in table]


def is_expressible(encoder: Encoder) -> bool:
    """Whether a CellFoundation can be this encoder."""
    config = encoder.config
    if encoder.quantization is not None or hf.head_name(encoder) not in ARCHITECTURES.values():
        return False
    free = {name: getattr(config, name) for name in _FREE}
    return config == EncoderConfig.preset(_PRESET, **free) and config.max_len > N_DEPTH_TOKENS


# What of a configuration a config.json says; the rest is the same in all of them.
_FREE = (
    *("n_layers", "width", "n_heads", "ff_width", "max_len", "eps", "n_bins", "bin_alpha", "dropout"),
    *("attention_dropout", "init_std", "vocabulary", "vocabulary_fingerprint"),
)


def config_from_settings(settings: Mapping[str, Any], where: Path) -> EncoderConfig:
    """An :class:`EncoderConfig` from a config.json of CellFoundation, whose path is ``where``.

    Raises
    ------
    CheckpointError
        A field does not fit, or says that the class computes what is not served here.
    """
    said = schema.build(CellFoundationSettings, settings, where, CheckpointError)
    for name, served, why in _SERVED:
        found = getattr(said, name)
        if found != served:
            said_so = "" if name in settings else ", which the class takes where nothing is said,"
            raise CheckpointError(f"{where}: {name} is {found!r}{said_so} but has to be {served!r}: {why}")
    own = settings.get(hf.OWN_KEY) or {}
    try:
        return EncoderConfig.preset(
            _PRESET,
            n_layers=said.num_hidden_layers,
            width=said.hidden_size,
            n_heads=said.num_attention_heads,
            ff_width=said.intermediate_size,
            max_len=said.max_position_embeddings + N_DEPTH_TOKENS,
            eps=float(said.layer_norm_eps),
            n_bins=said.bin_num,
            bin_alpha=float(said.bin_alpha),
            dropout=float(said.hidden_dropout_prob),
            attention_dropout=float(said.attention_probs_dropout_prob),
            init_std=float(said.initializer_range),
            vocabulary=own.get("vocabulary", EncoderConfig.preset(_PRESET).vocabulary),
            vocabulary_fingerprint=own.get("vocabulary_fingerprint"),
        )
    except UnsupportedError as error:  # what the fields say together
        raise CheckpointError(f"{where}: {error}") from None


def settings_from_encoder(encoder: Encoder, source: hf.Source) -> dict[str, Any]:
    """A config.json for an encoder; what the source's config.json says beyond us is kept."""
    config = encoder.config
    settings = {
        **(source.settings or _UNUSED),
        "architectures": [source.architecture],
        "model_type": MODEL_TYPE,
        "num_hidden_layers": config.n_layers,
        "hidden_size": config.width,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.ff_width,
        "max_position_embeddings": config.max_len - N_DEPTH_TOKENS,
        "normalization_type": "LayerNorm",
        "position_embedding_type": "absolute",
        "hidden_act": "swiglu",
        "add_linear_bias": True,
        "layer_norm_eps": config.eps,
        "bin_num": config.n_bins,
        "bin_alpha": config.bin_alpha,
        "mask_token_id": MASK,
        "pad_token_id": PAD,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.init_std,
    }
    own = {"vocabulary": config.vocabulary, "vocabulary_fingerprint": config.vocabulary_fingerprint}
    if own != {"vocabulary": EncoderConfig.preset(_PRESET).vocabulary, "vocabulary_fingerprint": None}:
        settings[hf.OWN_KEY] = own
    else:
        settings.pop(hf.OWN_KEY, None)
    return settings


def _architecture(settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], folder: Path) -> str:
    """The class a folder is of: what config.json says, or what the tensors show."""
    named = (settings.get("architectures") or [None])[0]
    if named in ARCHITECTURES:
        return str(named)
    if named is not None:
        raise CheckpointError(
            f"{folder}: architecture {named!r} is not one of {', '.join(ARCHITECTURES)}; save its encoder alone, as "
            "one of these, and train a head on it with geneformer-fast finetune"
        )
    has_head = any(name.startswith("cls.predictions.") for name in tensors)
    return "CellFoundationForMaskedLM" if has_head else "CellFoundationModel"


def _source_of(encoder: Encoder) -> hf.Source:
    """What an encoder was loaded from, or what a fresh one would have been."""
    source, head = encoder.source, hf.head_name(encoder)
    architecture = next(name for name, kind in ARCHITECTURES.items() if kind == head)
    if isinstance(source, hf.Source) and source.architecture in ARCHITECTURES:
        is_same = source.architecture == architecture
        return source if is_same else dataclasses.replace(source, architecture=architecture, prefix="bert.", aliases=())
    return hf.Source(architecture, {}, "" if head is None else "bert.")


def _sort_leftovers(tensors: Mapping[str, torch.Tensor], used: set[str], encoder: Encoder, folder: Path) -> None:
    """Note the decoder's bias where it is spelled out beside the parameter it is; refuse what would be lost."""
    aliases = []
    for name in sorted(set(tensors) - used):
        if {name, encoder.source.bias} != {BERT_BIAS, DECODER_BIAS} or encoder.source.bias not in tensors:
            raise CheckpointError(
                f"{folder}: tensor {name!r} of shape {list(tensors[name].shape)} has no place in a "
                f"{encoder.source.architecture} of {encoder.config.n_layers} layers"
            )
        if not torch.equal(tensors[name], tensors[encoder.source.bias]):
            raise CheckpointError(
                f"{folder}: {DECODER_BIAS!r} differs from {BERT_BIAS!r}, and both are one parameter of the head; "
                "remove the one that is not meant"
            )
        aliases.append(name)
    encoder.source.aliases = tuple(aliases)


def _as_stored(tensor: torch.Tensor, stored: torch.dtype | None) -> torch.Tensor:
    # Norms and tables of a half-precision folder are float32 in memory; they go back to what the file had.
    return tensor if stored is None or stored.itemsize >= tensor.dtype.itemsize else tensor.to(stored)
