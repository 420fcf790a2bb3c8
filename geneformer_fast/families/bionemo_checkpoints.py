"""BioNeMo's Geneformer out of whatever it was saved as: an archive of NeMo 1, a folder of NeMo 2, plain tensors."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from geneformer_fast import families
from geneformer_fast.checkpoints import megatron, nemo
from geneformer_fast.checkpoints.mapping import to_ours
from geneformer_fast.checkpoints.megatron import Geometry, Said
from geneformer_fast.checkpoints.skeleton import skeleton
from geneformer_fast.checkpoints.weights import check_floats
from geneformer_fast.config import EncoderConfig, matmul_dtype
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import CheckpointError, UnsupportedError
from geneformer_fast.files.checksums import is_verifying

# What takes no part in hidden states and masked genes, and what that is.
_LEFT_OUT = {
    "regression_head.": "the head that predicts a cell's length from its CLS token",
    "binary_head.": "the head for next sentences",
    "pooler.": "the pooler of the head for next sentences",
}
# Tokens of the published vocabulary; a table has more rows, up to a multiple of what its layers were divided among.
_MOST_PADDED = 2_048


def load(
    place: Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    verify: bool | None = None,
) -> Encoder:
    """:func:`geneformer_fast.load` for BioNeMo's Geneformer.

    Raises
    ------
    CheckpointError
        Files are damaged, do not fit together, or are of a model that nothing here computes.
    """
    is_checked = is_verifying(verify)
    tensors, said = _read(place, is_checked)
    check_floats(tensors, place)
    geometry = megatron.geometry_of(tensors, place)
    megatron.check_said(said, geometry)
    activation, told = megatron.activation_of(said)
    config = _config(geometry, said, activation, place)
    config, left_out = _sorted_out(tensors, config, place)
    encoder = skeleton(config, "mlm" if "lm_head.dense.weight" in tensors else None)
    shapes = {name: parameter.shape for name, parameter in encoder.state_dict().items()}
    entries = families.family("bionemo").entries
    assert entries is not None
    table = entries(config, None if encoder.head is None else "mlm")
    state = to_ours(tensors, table, shapes, source=str(place))
    if unknown := sorted(set(tensors) - {name for entry in table for name in entry.theirs}):
        raise CheckpointError(
            f"{place}: tensor {unknown[0]!r} of shape {list(tensors[unknown[0]].shape)} has no place in a BioNeMo "
            f"Geneformer of {config.n_layers} layers"
        )
    stored = tensors["encoder.layers.0.self_attention.linear_qkv.weight"].dtype
    tensors.clear()
    encoder.load_state_dict(state, assign=True)
    encoder.to(device).cast(matmul_dtype(dtype, device) or stored)
    for what in (told, *left_out):
        warnings.warn(f"{place}: {what}", stacklevel=5)
    return encoder.eval()


def _read(place: Path, verify: bool) -> tuple[dict[str, torch.Tensor], Said]:
    """A checkpoint's tensors under Transformer Engine's names, and what its configuration says."""
    archives = sorted(place.glob("*.nemo")) if place.is_dir() else []
    if place.suffix == ".nemo" or (place / nemo.CONFIG).is_file():
        return nemo.read_nemo(place, verify=verify)
    if place.is_dir() and nemo.weights_of(place) is not None:
        return nemo.read_nemo2(place, verify=verify)
    if archives:
        if len(archives) > 1:
            names = ", ".join(path.name for path in archives[:4])
            raise CheckpointError(f"{place} holds several archives ({names}); name the one that is meant")
        return nemo.read_nemo(archives[0], verify=verify)
    return nemo.read_plain(place, verify=verify)


def _config(geometry: Geometry, said: Said, activation: str, place: Path) -> EncoderConfig:
    n_heads = _n_heads(geometry, said, place)
    kv_channels = said.number("kv_channels")
    if kv_channels not in (None, geometry.width // n_heads):
        raise CheckpointError(
            f"{said.where}: kv_channels is {kv_channels}; read are heads of {geometry.width} / {n_heads} channels"
        )
    layout = families.layout("bionemo")
    n_padded = geometry.vocab_size - (layout.n_tokens or 0)
    attention_dropout = said.number("attention_dropout", kind=float) if said.is_followed else None
    try:
        return EncoderConfig(
            n_layers=geometry.n_layers,
            width=geometry.width,
            n_heads=n_heads,
            ff_width=geometry.ff_width,
            vocab_size=geometry.vocab_size,
            max_len=geometry.max_len,
            norm="pre",
            activation=activation,
            head_activation="gelu",
            eps=_first(said.number("layernorm_epsilon", "layer_norm_epsilon", kind=float), 1e-12),
            embedding_norm=False,
            final_norm=True,
            n_token_types=0,
            dropout=_first(said.number("hidden_dropout", kind=float), 0.02),
            # NeMo 1 took 0.1 whatever its configuration said.
            attention_dropout=_first(attention_dropout, 0.1),
            pad_id=layout.special["pad"],
            init_std=_first(said.number("init_method_std", kind=float), 0.02),
            vocabulary=layout.published if 0 <= n_padded < _MOST_PADDED else None,
            family="bionemo",
        )
    except UnsupportedError as error:
        raise CheckpointError(f"{said.where or place}: {error}") from None


def _first(value: float | None, default: float) -> float:
    return default if value is None else value


def _n_heads(geometry: Geometry, said: Said, place: Path) -> int:
    """Attention heads: no shape shows them, and projections are interleaved by them."""
    n_heads = said.number("num_attention_heads")
    if n_heads is not None and n_heads > 0 and geometry.width % n_heads == 0:
        return n_heads
    if n_heads is not None:
        raise CheckpointError(f"{said.where}: num_attention_heads is {n_heads}, which do not divide {geometry.width}")
    for preset in families.family("bionemo").presets.values():
        if (preset.n_layers, preset.width, preset.ff_width) == (geometry.n_layers, geometry.width, geometry.ff_width):
            return preset.n_heads
    raise CheckpointError(
        f"{place}: nothing says how many attention heads a model of {geometry.n_layers} layers and width "
        f"{geometry.width} has; put its model_config.yaml (of the .nemo archive) or context folder beside the weights, "
        'or a config.json with "num_attention_heads"'
    )


def _sorted_out(
    tensors: dict[str, torch.Tensor], config: EncoderConfig, place: Path
) -> tuple[EncoderConfig, list[str]]:
    """Take away tensors that are copies or of other heads; the configuration with what they say, and what to tell."""
    if adapter := next((name for name in tensors if ".adapter" in name or "lora_" in name), None):
        raise CheckpointError(
            f"{place}: tensor {adapter!r} is of an adapter (LoRA); merge it with NeMo's tools and save again"
        )
    left_out = []
    for prefix, what in _LEFT_OUT.items():
        names = [name for name in tensors if name.startswith(prefix)]
        for name in names:
            del tensors[name]
        if names:
            left_out.append(f"{what} ({prefix}*) is left out, since nothing here computes it; all else is loaded")
    if "lm_head.dense.weight" not in tensors:
        tensors.pop(megatron.DECODER, None)
        tensors.pop(megatron.DECODER_BIAS, None)
    elif _is_tied(tensors):
        tensors.pop(megatron.DECODER, None)
    else:
        config = dataclasses.replace(config, tied_decoder=False)
    return config, left_out


def _is_tied(tensors: Mapping[str, torch.Tensor]) -> bool:
    decoder = tensors.get(megatron.DECODER)
    return decoder is None or torch.equal(decoder, tensors[megatron.EMBEDDING])
