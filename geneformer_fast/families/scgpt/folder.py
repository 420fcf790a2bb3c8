"""Folders of scGPT: ``args.json``, ``vocab.json`` and ``best_model.pt``, read as they are and written back alike.

The original fills in what fits a model and passes over the rest in silence, so that a wrong file gives random numbers.
Here every tensor has a place, is kept for what computes elsewhere, or is refused by name.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from geneformer_fast.checkpoints.mapping import Entry, to_ours, to_theirs
from geneformer_fast.checkpoints.skeleton import skeleton
from geneformer_fast.checkpoints.weights import check_against_sums, check_floats, read_pytorch
from geneformer_fast.config import EncoderConfig, matmul_dtype
from geneformer_fast.decoders import ExpressionDecoder, LayeredClassifier
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import CheckpointError, OutputError, UnsupportedError
from geneformer_fast.families.scgpt.args import ADVICE, check_settings, config_from, read_vocabulary
from geneformer_fast.families.scgpt.table import ARGS, CONFIG, VOCAB, entries
from geneformer_fast.files import schema
from geneformer_fast.files.checksums import SUMS, is_verifying, read_sums, sums_text
from geneformer_fast.files.locks import folder_lock
from geneformer_fast.files.writing import whole_file

#: Names of the weights; the first that is there is read. The annotation tutorial writes the second.
WEIGHTS = ("best_model.pt", "model.pt")
#: Beginnings of tensors that are kept and given back: heads, and what only some trainings compute with.
_KEPT = ("decoder.", "mvc_decoder.", "cls_decoder.", "flag_encoder.", "grad_reverse_discriminator.")
#: Those without which the numbers differ from what the model's authors computed with them.
_BATCHES = ("dsbn.", "bn.", "batch_encoder.")
#: Beginnings of tensors of models that are something else.
_OTHERS = {
    "pert_encoder.": "a model of genetic perturbations, which adds an embedding of what was perturbed",
    "mod_encoder.": "a model of several modalities, which adds an embedding of each",
}


@dataclass
class Source:
    """What a loaded folder held besides our parameters, so that saving gives the same files back.

    Attributes
    ----------
    settings
        The parsed ``args.json``.
    files
        ``args.json`` and ``vocab.json`` as they were.
    weights
        Name of the file of weights.
    names
        Name of every tensor, in order, to its name in the table (:func:`.table.entries`).
    dtypes
        Dtype of every tensor in the file.
    extras
        Tensors that are no part of the encoder, by their names in the file: all heads, and what is kept.
    """

    settings: dict[str, Any]
    files: dict[str, bytes]
    weights: str
    names: dict[str, str]
    dtypes: dict[str, torch.dtype]
    extras: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def by_table(self) -> dict[str, torch.Tensor]:
        """:attr:`extras` by the names of the table."""
        return {self.names[name]: tensor for name, tensor in self.extras.items()}


def load(
    folder: Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    verify: bool | None = None,
) -> Encoder:
    """:func:`geneformer_fast.load` for a folder of scGPT.

    Its head is the annotation head where that tells classes apart, else the decoder of expression, if there is one that
    reads the encoder alone. :func:`use_head` takes another.

    Raises
    ------
    CheckpointError
        Files are missing, damaged or do not belong together; a tensor is missing, of another shape, or has no place.
    """
    settings = schema.read_json(folder / ARGS, CheckpointError)
    check_settings(settings, folder / ARGS)
    vocabulary = read_vocabulary(folder / VOCAB)
    path = _weights_in(folder)
    if is_verifying(verify):
        check_against_sums(path, read_sums(folder, CheckpointError).get(path.name))
    stored = read_pytorch(path)
    names = table_names(stored, path)
    tensors = {names[name]: tensor for name, tensor in stored.items()}
    config = config_from(settings, vocabulary, tensors, folder)
    body = {theirs for entry in entries(config) for theirs in entry.theirs}
    _check_known(tensors, body, path)
    check_floats({name: tensor for name, tensor in tensors.items() if name in body}, folder)
    files = {name: (folder / name).read_bytes() for name in (ARGS, VOCAB)}
    # Copies: a head that learns must not change what the file held.
    extras = {name: tensor.clone() for name, tensor in stored.items() if names[name] not in body}
    source = Source(settings, files, path.name, names, {n: t.dtype for n, t in stored.items()}, extras)
    head, n_classes, n_layers = _head_in(source, config)
    if settings.get("explicit_zero_prob") and head is not None and "decoder.zero_logit.0.weight" not in tensors:
        raise CheckpointError(
            f"{folder / ARGS}: explicit_zero_prob is true, but the weights tell no probability of zero"
        )
    encoder = _empty(config, head, n_classes, n_layers)
    shapes = {name: parameter.shape for name, parameter in encoder.state_dict().items()}
    table = entries(config, head, n_cls_layers=n_layers)
    encoder.load_state_dict(to_ours(tensors, table, shapes, source=str(path), settings=ARGS), assign=True)
    encoder.source = source
    if kept := sorted({name.split(".")[0] for name in tensors if name.startswith(_BATCHES)}):
        warnings.warn(
            f"{path}: {', '.join(kept)} of a training on several batches are kept and not computed with, as in scGPT's "
            "own embed_data; hidden states differ from those of that training",
            stacklevel=3,
        )
    first = tensors["transformer_encoder.layers.0.self_attn.in_proj_weight"].dtype
    encoder.to(device).cast(matmul_dtype(dtype, device) or first)
    return encoder.eval()


def save(encoder: Encoder, folder: Path, *, overwrite: bool = False) -> Path:
    """:func:`geneformer_fast.save` for an encoder that came from a folder of scGPT, fine-tuned or not.

    ``args.json`` and ``vocab.json`` are copied. Tensors have the names and dtypes they came with; those of a new head
    are added, and an annotation head takes the place of the one that was there.

    Raises
    ------
    OutputError
        The folder holds a model already.
    """
    source = encoder.source
    assert isinstance(source, Source)
    tensors = as_saved(encoder)
    paths = {name: folder / name for name in (source.weights, SUMS, VOCAB, ARGS)}
    with folder_lock(folder):
        if (folder / CONFIG).exists():
            raise OutputError(f"{folder} holds a model of another format ({CONFIG}); choose another folder")
        if any(path.exists() for path in paths.values()) and not overwrite:
            raise OutputError(f"{folder} holds a model already; choose another folder or pass overwrite=True")
        # The last to appear is args.json, without which a folder is no model.
        with (
            whole_file(paths[ARGS]) as args,
            whole_file(paths[VOCAB]) as vocabulary,
            whole_file(paths[SUMS]) as sums,
            whole_file(paths[source.weights]) as weights,
        ):
            torch.save(tensors, weights)
            sums.write_text(sums_text({source.weights: weights}), encoding="utf-8")
            vocabulary.write_bytes(source.files[VOCAB])
            args.write_bytes(source.files[ARGS])
    return folder


def as_saved(encoder: Encoder) -> OrderedDict[str, torch.Tensor]:
    """An encoder's tensors as they stand in the file."""
    source = encoder.source
    table = table_of(encoder)
    ours = to_theirs(encoder.state_dict(), table)
    spelled = {in_table: name for name, in_table in source.names.items()}
    prefix = "module." if all(name.startswith("module.") for name in source.names) else ""
    live = {spelled.get(name, f"{prefix}{name}"): tensor for name, tensor in ours.items()}
    has_classes = isinstance(encoder.head, LayeredClassifier)
    kept = {
        name: tensor
        for name, tensor in source.extras.items()
        if not (has_classes and source.names[name].startswith("cls_decoder."))
    }
    found = {**kept, **live}
    order = [*(name for name in source.names if name in found), *(name for name in found if name not in source.names)]
    return OrderedDict((name, _as_stored(found[name], source.dtypes.get(name))) for name in order)


def table_of(encoder: Encoder) -> list[Entry]:
    """Which of an encoder's parameters is which tensor of its file."""
    head = encoder.head
    n_layers = len(head.hidden) + 1 if isinstance(head, LayeredClassifier) else 3
    return entries(encoder.config, None if head is None else head_name(head), n_cls_layers=n_layers)


def head_name(head: torch.nn.Module) -> str | None:
    """A head's name among those of the family; None for one of another kind, which this format has no place for."""
    if isinstance(head, LayeredClassifier):
        return "cells"
    if isinstance(head, ExpressionDecoder):
        return f"expression{'-mvc' * (head.cells is not None)}{'-zeros' * (head.zeros is not None)}"
    return None


def use_head(encoder: Encoder, name: str) -> Encoder:
    """Put another head of the checkpoint on an encoder, in place.

    Parameters
    ----------
    encoder
        Loaded from a folder of scGPT.
    name
        ``"cells"``: the annotation head; ``"expression"``: the decoder of expression, with that of cells (MVC) and
        probabilities of zero where the checkpoint has them.

    Raises
    ------
    UnsupportedError
        The checkpoint has no such head, or one that reads labels of batches too.
    """
    source = encoder.source
    if not isinstance(source, Source) or name not in ("cells", "expression"):
        raise UnsupportedError('heads are "cells" and "expression", of an encoder that came from a folder of scGPT')
    found, n_classes, n_layers = _head_in(source, encoder.config, only=name)
    if found is None:
        raise UnsupportedError(f"this checkpoint has no head {name!r}, or one that reads labels of batches too")
    made = _empty(encoder.config, found, n_classes, n_layers).head
    assert made is not None
    table = [e for e in entries(encoder.config, found, n_cls_layers=n_layers) if e.ours.startswith("head.")]
    shapes = {f"head.{key}": tensor.shape for key, tensor in made.state_dict().items()}
    state = to_ours(source.by_table, table, shapes, source=source.weights, settings=ARGS)
    made.load_state_dict({key.removeprefix("head."): tensor.clone() for key, tensor in state.items()}, assign=True)
    dtype, mode = encoder.dtype, encoder.training
    encoder.head = made.to(encoder.device)
    encoder.cast(dtype)
    return encoder.train(mode)


def table_names(names: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Every name in a file to the one of the table: without ``module.``, and attention as torch spells it.

    FlashAttention 1 writes ``self_attn.Wqkv.weight``, its successor behind scGPT's adapter
    ``self_attn._impl.Wqkv.weight``, torch ``self_attn.in_proj_weight``: all are q, k and v stacked.

    Raises
    ------
    CheckpointError
        Two names mean the same tensor.
    """
    found: dict[str, str] = {}
    for name in names:
        plain = name.removeprefix("module.").replace(".self_attn._impl.", ".self_attn.")
        found[name] = plain.replace(".self_attn.Wqkv.", ".self_attn.in_proj_")
    seen: dict[str, str] = {}
    for name, plain in found.items():
        if plain in seen:
            raise CheckpointError(
                f"{path}: {seen[plain]!r} and {name!r} are one tensor in two spellings; keep one of them"
            )
        seen[plain] = name
    return found


def _weights_in(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).exists():
            return folder / name
    raise CheckpointError(f"{folder} has {ARGS} and {VOCAB}, but no {' or '.join(WEIGHTS)}; download the weights too")


def _check_known(tensors: Mapping[str, torch.Tensor], body: set[str], path: Path) -> None:
    """Refuse tensors that have no place, before anything is built."""
    for name in tensors:
        # The generative pretraining's attention across genes, which borrows the projections of the other.
        if name in body or name.startswith((*_KEPT, *_BATCHES)) or ".self_attn.cross_attn." in name:
            continue
        if what := next((what for start, what in _OTHERS.items() if name.startswith(start)), None):
            raise CheckpointError(f"{path}: tensor {name!r} is of {what}, and is not read here; {ADVICE}")
        raise CheckpointError(
            f"{path}: tensor {name!r} has no place in scGPT as {ARGS} describes it (which would pass over it); "
            "args.json and the weights do not belong together"
        )


def _head_in(source: Source, config: EncoderConfig, *, only: str | None = None) -> tuple[str | None, int, int]:
    """(name of a head that the checkpoint has, its classes, its linear layers); the name is None where it has none."""
    tensors, square = source.by_table, [config.width, config.width]
    out = tensors.get("cls_decoder.out_layer.weight")
    if only != "expression" and out is not None and out.ndim == 2 and "cls_decoder.cls_token_matrix" not in tensors:
        n_layers = 1 + len([name for name in tensors if re.fullmatch(r"cls_decoder\._decoder\.\d+\.weight", name)]) // 2
        if len(out) > 1 or only == "cells":  # the original gives models that tell nothing apart a head of one output
            return "cells", len(out), n_layers
    fc = tensors.get("decoder.fc.0.weight")
    if only == "cells" or fc is None or [*fc.shape] != square:
        return None, 2, 3
    w, style = tensors.get("mvc_decoder.W.weight"), "mvc_decoder.gene2query.weight"
    has_mvc = w is not None and [*w.shape] == square and style in tensors
    has_zeros = "decoder.zero_logit.0.weight" in tensors
    return f"expression{'-mvc' * has_mvc}{'-zeros' * has_zeros}", 2, 3


def _empty(config: EncoderConfig, head: str | None, n_classes: int, n_layers: int) -> Encoder:
    """An encoder without numbers, whose annotation head has as many layers as the file's."""
    encoder = skeleton(config, head, n_classes=n_classes)
    if head == "cells" and n_layers != 3:
        with torch.device("meta"):
            encoder.head = LayeredClassifier(config, n_classes, n_layers=n_layers)
        encoder.head.head_name = head  # type: ignore[assignment]
    return encoder


def _as_stored(tensor: torch.Tensor, stored: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach().cpu().contiguous()
    is_wider = stored is not None and tensor.is_floating_point() and stored.itemsize < tensor.dtype.itemsize
    # A view would bring the whole of what it is a part of into the file.
    return tensor.to(stored) if is_wider else tensor.clone()
