"""What ``args.json`` and ``vocab.json`` of scGPT say, and which of it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_fast.config import BOUNDS, EncoderConfig
from geneformer_fast.errors import CheckpointError
from geneformer_fast.families.scgpt.table import ARGS, SPECIAL, VOCAB
from geneformer_fast.files import schema

if TYPE_CHECKING:
    import torch

_LAYER = re.compile(r"transformer_encoder\.layers\.(\d{1,6})\.")
_MOST_TOKENS = 2**24
#: What to do where a folder is of another model.
ADVICE = "take a published checkpoint, or one fine-tuned from it"


@dataclass
class Args:
    """What is read of ``args.json``; the other settings of a training are passed over and given back."""

    embsize: schema.whole(*BOUNDS["width"])  # type: ignore[valid-type]
    nheads: schema.whole(*BOUNDS["n_heads"])  # type: ignore[valid-type]
    d_hid: schema.whole(*BOUNDS["ff_width"])  # type: ignore[valid-type]
    nlayers: schema.whole(*BOUNDS["n_layers"])  # type: ignore[valid-type]
    dropout: schema.number(*BOUNDS["dropout"]) = 0.2  # type: ignore[valid-type]
    n_layers_cls: schema.whole(1, 1000) | None = 3  # type: ignore[valid-type]
    pad_token: str = SPECIAL["pad"]
    pad_value: schema.number() = -2  # type: ignore[valid-type]
    mask_value: schema.number() = -1  # type: ignore[valid-type]
    n_bins: schema.whole(2, BOUNDS["n_bins"][1]) = 51  # type: ignore[valid-type]
    max_seq_len: schema.whole(2, BOUNDS["max_len"][1]) = 1200  # type: ignore[valid-type]
    input_style: str = "binned"
    input_emb_style: str = "continuous"
    cell_emb_style: str = "cls"
    mvc_decoder_style: str = "inner product"
    norm_scheme: str = "post"
    fast_transformer_backend: str = "flash"
    pre_norm: bool = False
    explicit_zero_prob: bool = False


#: Setting -> what it may say, and why nothing else.
_READ = {
    "pre_norm": ((False,), "its norms replace the stream they read, which no block here computes"),
    "norm_scheme": (("post",), "its norms replace the stream they read, which no block here computes"),
    "input_style": (("binned",), "values would have to be prepared in another way than by bins"),
    "input_emb_style": (("continuous", "category"), "embeddings of genes would be multiplied by values"),
    "cell_emb_style": (("cls",), "an embedding that is a mean over padding too depends on the batch"),
    "mvc_decoder_style": (("inner product", "inner product, detach"), "the original's own forward pass fails with it"),
    "fast_transformer_backend": (("flash", "pytorch"), "its linear attention is another model"),
}


def check_settings(settings: Mapping[str, Any], where: Path) -> None:
    """Refuse, by name, what ``args.json`` says and nothing here computes.

    Raises
    ------
    CheckpointError
        A setting is missing, of the wrong kind, or means another model.
    """
    schema.check(Args, settings, where, CheckpointError)
    for name, (allowed, why) in _READ.items():
        if settings.get(name, allowed[0]) not in allowed:
            read = " and ".join(repr(each) for each in allowed)
            raise CheckpointError(f"{where}: {name} is {settings[name]!r}, and only {read} is read: {why}; {ADVICE}")
    if settings["embsize"] % settings["nheads"]:
        raise CheckpointError(f"{where}: embsize {settings['embsize']} is not divisible by {settings['nheads']} heads")


def read_vocabulary(path: Path) -> dict[str, int]:
    """Token to id of a ``vocab.json``; special tokens that it lacks come after the others, as in the original.

    Raises
    ------
    CheckpointError
        Ids do not run from 0 on, each once.
    """
    found = schema.read_json(path, CheckpointError, dict[str, schema.whole(0, _MOST_TOKENS)])  # type: ignore[misc]
    if sorted(found.values()) != list(range(len(found))) or not found:
        raise CheckpointError(f"{path}: ids must run from 0 to one less than the number of tokens, each once")
    for token in SPECIAL.values():
        found.setdefault(token, len(found))
    return found


def fingerprint_of(vocabulary: Mapping[str, int]) -> str:
    """SHA-256 over special tokens, genes and ids, as folders of prepared cells carry it."""
    special = sorted((name[1:-1], i) for name, i in vocabulary.items() if re.fullmatch(r"<\w+>", name))
    rows = sorted(f"{i}\t{name}\n" for name, i in vocabulary.items() if not re.fullmatch(r"<\w+>", name))
    return sha256(f"scgpt\n{special}\n{''.join(rows)}".encode()).hexdigest()


def config_from(
    settings: Mapping[str, Any], vocabulary: Mapping[str, int], tensors: Mapping[str, torch.Tensor], folder: Path
) -> EncoderConfig:
    """The configuration of a folder: what ``args.json`` says, held against the weights and the vocabulary."""
    args = {item: settings.get(item, default) for item, default in vars(Args).items() if not item.startswith("_")}
    pad = args["pad_token"]
    if pad not in vocabulary:
        raise CheckpointError(f"{folder / ARGS}: pad_token is {pad!r}, which {VOCAB} does not have")
    table = tensors.get("encoder.embedding.weight")
    if table is None or table.ndim != 2:
        raise CheckpointError(f"{folder}: tensor 'encoder.embedding.weight', the table of genes, is missing")
    if len(table) != len(vocabulary):
        raise CheckpointError(
            f"{folder}: the table of genes has {len(table):,} rows, but {VOCAB} has {len(vocabulary):,} tokens with "
            f"{', '.join(SPECIAL.values())}; the files do not belong together"
        )
    n_found = 1 + max((int(match[1]) for name in tensors if (match := _LAYER.match(name))), default=-1)
    if n_found != settings["nlayers"]:
        raise CheckpointError(
            f"{folder / ARGS}: nlayers is {settings['nlayers']}, but the weights have {n_found} layers"
        )
    is_table = args["input_emb_style"] == "category"
    bins = tensors.get("value_encoder.embedding.weight")
    return EncoderConfig(
        n_layers=settings["nlayers"],
        width=settings["embsize"],
        n_heads=settings["nheads"],
        ff_width=settings["d_hid"],
        vocab_size=len(vocabulary),
        max_len=len(vocabulary),  # nothing but the number of genes bounds a cell,
        activation="relu",
        eps=1e-5,
        embedding_norm=False,
        n_token_types=0,
        inputs="pairs-category" if is_table else "pairs",
        n_bins=len(bins) if is_table and bins is not None and bins.ndim else args["n_bins"],
        dropout=float(args["dropout"]),
        attention_dropout=float(args["dropout"]),
        pad_id=vocabulary[pad],
        tied_decoder=False,
        vocabulary="scgpt",
        vocabulary_fingerprint=fingerprint_of(vocabulary),
        family="scgpt",
    )
