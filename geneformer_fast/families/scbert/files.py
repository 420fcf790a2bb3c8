"""Files of scBERT: ``panglao_pretrain.pth`` and what its fine-tuning saves, read as they are and written back alike.

There is no configuration beside the tensors, whose shapes say all of it. A file is a dictionary whose
``model_state_dict`` is the state dict of a PerformerLM, or that state dict itself. ``pos_emb.emb.weight`` (gene2vec) is
float64 in the published file.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from geneformer_fast.checkpoints.mapping import to_ours, to_theirs
from geneformer_fast.checkpoints.pytorch import is_archive, read_saved
from geneformer_fast.checkpoints.skeleton import skeleton
from geneformer_fast.checkpoints.weights import check_against_sums, check_floats
from geneformer_fast.config import EncoderConfig, matmul_dtype
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import CheckpointError, OutputError, UnsupportedError
from geneformer_fast.families.scbert.heads import N_FIRST, N_SECOND, GeneConvolution
from geneformer_fast.families.scbert.names import files_in
from geneformer_fast.families.scbert.published import PUBLISHED
from geneformer_fast.families.scbert.table import entries
from geneformer_fast.files.checksums import SUMS, is_verifying, read_sums, sums_text
from geneformer_fast.files.locks import folder_lock
from geneformer_fast.files.writing import whole_file

STATE = "model_state_dict"
#: Name of a new file.
WEIGHTS = "scbert.pth"
_CONFIG = "config.json"
_MODULE = "module."
_POSITIONS = "pos_emb.emb.weight"
_CALLS = "performer.calls_since_last_redraw"
_LAYER = re.compile(r"performer\.net\.layers\.(\d{1,6})\.")
_OTHERS = "it is of a Performer with other settings than scBERT's"


@dataclass
class Source:
    """What a loaded file held besides our parameters, so that saving gives the same tensors back.

    Attributes
    ----------
    name
        Of the file.
    prefix
        ``"module."`` before every name, as DistributedDataParallel leaves it, or empty.
    is_wrapped
        Whether the state dict lies in a dictionary under :data:`STATE`.
    order
        Names of all tensors, in order.
    dtypes
        Dtype of every tensor.
    positions
        gene2vec as it was: its float64 numbers come back where the model's are still the same.
    extras
        The counter of calls since random features were drawn.
    settings
        Nothing: there is no configuration beside the tensors.
    """

    name: str = WEIGHTS
    prefix: str = ""
    is_wrapped: bool = True
    order: tuple[str, ...] = ()
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    positions: torch.Tensor | None = None
    extras: dict[str, torch.Tensor] = field(default_factory=lambda: {_CALLS: torch.tensor(0)})
    settings: dict[str, Any] = field(default_factory=dict)


def load(
    place: Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    verify: bool | None = None,
) -> Encoder:
    """:func:`geneformer_fast.load` for a file of scBERT, or a folder with one.

    The optimizer's and scheduler's state, which its fine-tuning saves too, is passed over.

    Raises
    ------
    CheckpointError
        The file is damaged or holds more than weights; a tensor is missing, of another shape, or has no place.
    """
    path = _only(files_in(place), place)
    if is_verifying(verify):
        check_against_sums(path, read_sums(path.parent, CheckpointError).get(path.name))
    tensors, source = _read(path)
    config = config_of(tensors, path)
    head, n_classes = _head_of(tensors, path)
    encoder = skeleton(config, head, n_classes=n_classes)
    if head == "cells":
        _check_classifier(encoder, tensors, path)
    table = entries(config, head)
    used = {name for entry in table for name in entry.theirs}
    if unknown := sorted(set(tensors) - used - {_CALLS}):
        raise CheckpointError(f"{path}: tensor {unknown[0]!r} has no place in scBERT; {_OTHERS}")
    check_floats({name: tensors[name] for name in used & set(tensors)}, path)
    shapes = {name: parameter.shape for name, parameter in encoder.state_dict().items()}
    encoder.load_state_dict(to_ours(tensors, table, shapes, source=str(path)), assign=True)
    encoder.source = source
    stored = tensors["performer.net.layers.0.0.fn.to_q.weight"].dtype
    encoder.to(device).cast(matmul_dtype(dtype, device) or stored)
    return encoder.eval()


def save(encoder: Encoder, folder: Path, *, overwrite: bool = False) -> Path:
    """:func:`geneformer_fast.save` in scBERT's own form, for a model of any origin that has one of its heads.

    Tensors have the names, order and dtypes they came with, and the random features; the file's name is kept. States of
    an optimizer are not.

    Raises
    ------
    OutputError
        The folder holds a model already.
    """
    source = encoder.source if isinstance(encoder.source, Source) else Source()
    tensors = as_saved(encoder, source)
    weights, sums = folder / source.name, folder / SUMS
    with folder_lock(folder):
        if (folder / _CONFIG).exists():
            raise OutputError(f"{folder} holds a model of another format ({_CONFIG}); choose another folder")
        others = [path for path in files_in(folder) if path.name != source.name]
        if others:
            raise OutputError(f"{folder} holds another model of scBERT ({others[0].name}); choose another folder")
        if weights.exists() and not overwrite:
            raise OutputError(f"{folder} holds a model already; choose another folder or pass overwrite=True")
        with whole_file(sums) as checked, whole_file(weights) as written:
            torch.save({STATE: tensors} if source.is_wrapped else tensors, written)
            checked.write_text(sums_text({source.name: written}), encoding="utf-8")
    return folder


def as_saved(encoder: Encoder, source: Source) -> OrderedDict[str, torch.Tensor]:
    """An encoder's tensors as they stand in the file."""
    head = "cells" if isinstance(encoder.head, GeneConvolution) else "mlm"
    table = entries(encoder.config, head)
    found = {**source.extras, **to_theirs(encoder.state_dict(), table)}
    found = {name: _as_stored(tensor, source.dtypes.get(name)) for name, tensor in found.items()}
    positions, ours = source.positions, encoder.state_dict()["embeddings.position.weight"].detach().cpu()
    if positions is not None and positions.shape == ours.shape and torch.equal(positions.to(ours.dtype), ours):
        found[_POSITIONS] = positions
    known = [name for name in source.order if name in found]
    order = [*known, *(name for name in found if name not in source.order)]
    return OrderedDict((f"{source.prefix}{name}", found[name]) for name in order)


def config_of(tensors: Mapping[str, torch.Tensor], path: Path) -> EncoderConfig:
    """What the shapes of tensors say.

    Raises
    ------
    CheckpointError
        One that is needed for it is missing, or they contradict each other.
    """

    def shape(name: str, n_axes: int = 2) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(f"{path}: tensor {name!r} is missing; {_OTHERS}, or a part of a file")
        found = tuple(tensors[name].shape)
        if len(found) != n_axes or not all(found):
            raise CheckpointError(f"{path}: tensor {name!r} has shape {list(found)}, which is not scBERT's")
        return found

    first = "performer.net.layers.0."
    vocab_size, width = shape("token_emb.weight")
    max_len, _ = shape(_POSITIONS)
    n_features, head_dim = shape(f"{first}0.fn.fast_attention.projection_matrix")
    inner, _ = shape(f"{first}0.fn.to_q.weight")
    ff_width, _ = shape(f"{first}1.fn.fn.w1.weight")
    layers = {int(match[1]) for name in tensors if (match := _LAYER.match(name))}
    if inner % head_dim:
        raise CheckpointError(f"{path}: {inner} rows of queries are no whole number of heads of {head_dim}")
    try:
        return replace(
            PUBLISHED,
            n_layers=max(layers) + 1,
            width=width,
            n_heads=inner // head_dim,
            ff_width=ff_width,
            vocab_size=vocab_size,
            max_len=max_len,
            pad_id=vocab_size - 1,
            attention_width=inner,
            n_features=n_features,
            # Of another number of genes it is another list.
            vocabulary=PUBLISHED.vocabulary if max_len == PUBLISHED.max_len else None,
        )
    except UnsupportedError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read(path: Path) -> tuple[dict[str, torch.Tensor], Source]:
    """Tensors by their names without a prefix, and what else a file says."""
    content = read_saved(path, mmap=is_archive(path))
    is_wrapped = isinstance(content, dict) and STATE in content
    state = content[STATE] if is_wrapped else content
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise CheckpointError(f"{path} holds no state dict of tensors by name, whether under {STATE!r} or by itself")
    prefix = _MODULE if state and all(name.startswith(_MODULE) for name in state) else ""
    # Copies: what is mapped holds the whole file, with an optimizer's state perhaps.
    tensors = {name.removeprefix(prefix): tensor.clone() for name, tensor in state.items()}
    positions = tensors.get(_POSITIONS)
    return tensors, Source(
        name=path.name,
        prefix=prefix,
        is_wrapped=is_wrapped,
        order=tuple(tensors),
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
        positions=positions if positions is not None and positions.dtype == torch.float64 else None,
        extras={_CALLS: tensors[_CALLS]} if _CALLS in tensors else {},
    )


def _head_of(tensors: Mapping[str, torch.Tensor], path: Path) -> tuple[str | None, int]:
    """The head that a file has, and its classes."""
    if "to_out.fc3.weight" in tensors:
        weight = tensors["to_out.fc3.weight"]
        if weight.ndim != 2 or not len(weight):
            raise CheckpointError(f"{path}: tensor 'to_out.fc3.weight' has shape {list(weight.shape)}, not 2 axes")
        return "cells", len(weight)
    return ("mlm" if "to_out.weight" in tensors else None), 2


def _check_classifier(encoder: Encoder, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """The classifier's layers have the widths of the published one, over as many positions as the encoder has."""
    wanted = {"to_out.fc1.weight": [N_FIRST, encoder.config.max_len], "to_out.fc2.weight": [N_SECOND, N_FIRST]}
    for name, shape in wanted.items():
        if name in tensors and list(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {list(tensors[name].shape)}, and scBERT's classifier of "
                f"{encoder.config.max_len:,} positions has {shape}"
            )


def _only(found: list[Path], place: Path) -> Path:
    if not found:
        raise CheckpointError(f"{place} holds no file of scBERT's tools, such as panglao_pretrain.pth")
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise CheckpointError(f"{place} holds several models of scBERT ({names}); name the file itself")
    return found[0]


def _as_stored(tensor: torch.Tensor, stored: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach().cpu().contiguous()
    if stored is None or not tensor.is_floating_point():
        return tensor.clone()
    return tensor.to(stored, copy=True)
