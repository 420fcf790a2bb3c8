"""Checkpoints of NeMo: archives of NeMo 1 (``.nemo``), folders of NeMo 2, and plain files of the same tensors.

Nothing is executed and nothing is unpacked by a name of its own: members of an archive are read where they lie, and
configurations are JSON or YAML of plain values.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from geneformer_fast.checkpoints.distributed import METADATA, read_metadata, read_sharded
from geneformer_fast.checkpoints.megatron import Said, is_of_model, joined, named
from geneformer_fast.checkpoints.pytorch import read_saved, read_stream
from geneformer_fast.checkpoints.weights import ADVICE, FILES, check_against_sums, read_tensors
from geneformer_fast.errors import CheckpointError
from geneformer_fast.files.archives import Archive, Unpacked, opened_archive
from geneformer_fast.files.checksums import SUMS, read_sums
from geneformer_fast.files.schema import read_json
from geneformer_fast.files.tensors import read_tensors as read_safetensors
from geneformer_fast.files.writing import is_plain_name

CONFIG = "model_config.yaml"
#: Files of tensors that may stand alone.
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_WEIGHTS = "model_weights.ckpt"
_RANK = re.compile(rf"(?:(?:mp_rank_\d+|tp_rank_\d+_pp_rank_(?P<stage>\d+))/)?{re.escape(_WEIGHTS)}$")
_SHARDED = "model_weights/"
_MOST_TEXT = 64 << 20
_ATTRIBUTE = re.compile(r"Attr\(name='(\w+)'\)$")
_GEOMETRY = ("num_layers", "hidden_size", "num_attention_heads")
# How a config.json in Hugging Face's manner calls what Megatron names otherwise.
_SYNONYMS = {
    "num_hidden_layers": "num_layers",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "seq_length",
    "layer_norm_eps": "layernorm_epsilon",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "initializer_range": "init_method_std",
    "hidden_act": "activation",
}


def read_nemo(path: Path, *, verify: bool = False) -> tuple[dict[str, torch.Tensor], Said]:
    """Tensors, and what the configuration says, of a ``.nemo`` archive or of a folder that one was unpacked into.

    Raises
    ------
    CheckpointError
        It is damaged, holds what leads out of it, holds no weights or two, or layers divided among stages.
    """
    with _opened(path) as archive:
        weights = sorted(name for name in archive.sizes if _RANK.match(name))
        has_shards = f"{_SHARDED}{METADATA}" in archive.sizes
        if (len(weights) > 1 and _WEIGHTS in weights) or (weights and has_shards):
            names = ", ".join((*weights[:3], *((_SHARDED,) if has_shards else ())))
            raise CheckpointError(f"{path} holds weights twice ({names}), and does not say which are the model's")
        if any(int(match["stage"] or 0) for name in weights if (match := _RANK.match(name))):
            raise CheckpointError(
                f"{path}: its layers are divided among stages (pipeline parallelism); convert it to one rank with "
                "NeMo's tools"
            )
        said = (
            _said_in_yaml(archive.read(CONFIG, _MOST_TEXT), f"{path}: {CONFIG}") if CONFIG in archive.sizes else Said()
        )
        if has_shards:
            return _read_shards(archive, path, verify), said
        if not weights:
            raise CheckpointError(f"{path} holds no {_WEIGHTS}: {_found_instead(archive)}")
        ranks = []
        for name in weights:
            where = f"{path}: {name}"
            with archive.open(name) as file:
                ranks.append(
                    named(state_in(read_stream(file, archive.sizes[name], where, verify=verify), where), where)
                )
        return joined(ranks, path), said


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Archive | Unpacked]:
    if path.is_dir():
        yield Unpacked(path, CheckpointError)
    else:
        with opened_archive(path, CheckpointError) as archive:
            yield archive


def _found_instead(archive: Archive | Unpacked) -> str:
    if any(name.startswith(_SHARDED) and name.endswith(".zarray") for name in archive.sizes):
        return "its weights are sharded in zarr, which Megatron gave up; convert it with NeMo's tools"
    return f"there are {', '.join(sorted(archive.sizes)[:5])}; download the model again"


def _read_shards(archive: Archive | Unpacked, path: Path, verify: bool) -> dict[str, torch.Tensor]:
    """A distributed checkpoint inside an archive: its files are copied out meanwhile, under names that are no paths."""
    with tempfile.TemporaryDirectory(prefix="geneformer-fast-") as scratch:
        for name in archive.sizes:
            bare = name.removeprefix(_SHARDED)
            if name.startswith(_SHARDED) and is_plain_name(bare):
                archive.copy(name, Path(scratch) / bare)
        try:
            return read_distributed(Path(scratch), verify=verify)
        except CheckpointError as reason:
            raise CheckpointError(str(reason).replace(scratch, f"{path}: {_SHARDED.rstrip('/')}")) from None


def read_distributed(folder: Path, *, verify: bool = False) -> dict[str, torch.Tensor]:
    """The model's tensors of a folder of torch.distributed.checkpoint; states of optimizers are not read."""
    wanted = [tensor for name, tensor in read_metadata(folder).items() if is_of_model(name)]
    return named(dict(read_sharded(folder, wanted, verify=verify)), folder)


def weights_of(folder: Path) -> Path | None:
    """Where the distributed checkpoint of a NeMo 2 folder lies; None where there is none."""
    return next((place for place in (folder / "weights", folder) if (place / METADATA).is_file()), None)


def read_nemo2(folder: Path, *, verify: bool = False) -> tuple[dict[str, torch.Tensor], Said]:
    """Tensors of a NeMo 2 folder (``weights/`` and ``context/``), and what its context says of the model."""
    weights = weights_of(folder)
    assert weights is not None
    said = next((found for place in _contexts(folder) if (found := read_context(place))), Said())
    return read_distributed(weights, verify=verify), said


def _contexts(folder: Path) -> tuple[Path, ...]:
    return folder / "context", folder.parent / "context", folder


def read_context(folder: Path) -> Said | None:
    """What ``io.json`` or ``model.yaml`` of NeMo 2 says of a model; None where there is neither, or not about one."""
    for name in ("io.json", "model.yaml"):
        path = folder / name
        if not path.is_file():
            continue
        if name == "io.json":
            fields = _of_objects(read_json(path, CheckpointError).get("objects"))
        else:
            fields = _of_yaml(_yaml(_text_of(path), str(path)))
        if fields:
            return Said(fields, str(path), is_followed=True)
    return None


def _text_of(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MOST_TEXT:
            raise CheckpointError(
                f"{path} is larger than {_MOST_TEXT >> 20} MiB, so it is not the configuration of a model"
            )
        return path.read_bytes()
    except OSError as reason:
        raise CheckpointError(f"{path} cannot be read: {reason.strerror or reason}") from None


def _of_objects(objects: Any) -> dict[str, Any]:
    """The fields of the one object that describes a model, as fiddle writes objects: ``["Attr(name='x')", value]``."""
    best: dict[str, Any] = {}
    for entry in objects.values() if isinstance(objects, dict) else ():
        items = entry.get("items") if isinstance(entry, dict) else None
        fields = {}
        for item in items if isinstance(items, list) else ():
            is_pair = isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)
            if is_pair and (match := _ATTRIBUTE.match(item[0])):
                fields[match[1]] = _plain(item[1], objects)
        if all(name in fields for name in _GEOMETRY) and len(fields) > len(best):
            best = fields
    return {name: value for name, value in best.items() if value is not None}


def _plain(value: Any, objects: Mapping[str, Any]) -> Any:
    """A number or text; the name of a function or class; None for what is neither."""
    if not isinstance(value, dict):
        return None
    if value.get("type") == "leaf":
        return value.get("value")
    if value.get("type") == "ref":
        value = objects.get(str(value.get("key")))
        value = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return f"{value.get('module')}.{value['name']}"
    return None


def _of_yaml(content: Any) -> dict[str, Any]:
    """The fields of the mapping that describes a model, however deep it is."""
    level, depth = [content], 0
    while level and depth < 16:
        for entry in level:
            if isinstance(entry, dict) and all(name in entry for name in _GEOMETRY):
                return {name: found for name, value in entry.items() if (found := _of_target(value)) is not None}
        level = [v for e in level for v in (e.values() if isinstance(e, dict) else e if isinstance(e, list) else ())]
        depth += 1
    return {}


def _of_target(value: Any) -> Any:
    if isinstance(value, dict):
        return value.get("_target_")
    # What refers to another field ("${model.seq_length}") says nothing by itself.
    return None if isinstance(value, str) and value.startswith("${") else value


def _said_in_yaml(text: bytes, where: str) -> Said:
    return Said(_of_yaml(_yaml(text, where)), where)


def _yaml(text: bytes, where: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise CheckpointError(
            f"{where} is YAML, which needs PyYAML: pip install pyyaml (or geneformer-fast[hf], which brings it)"
        ) from None
    try:
        return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as reason:
        told = str(reason).partition("\n")[0]
        raise CheckpointError(f"{where} is no YAML of plain values ({told}); {ADVICE}") from None


def read_plain(place: Path, *, verify: bool = False) -> tuple[dict[str, torch.Tensor], Said]:
    """Tensors of a file of a state dict, or of a folder with one in it, and what a configuration beside them says."""
    folder = place if place.is_dir() else place.parent
    if place.is_dir() and any((place / name).exists() for name in FILES):
        return named(dict(read_tensors(place, verify=verify)), place), _said_beside(folder)
    path = place if place.is_file() else _only_file(place)
    if verify:
        check_against_sums(
            path, read_sums(folder, CheckpointError).get(path.name) if (folder / SUMS).exists() else None
        )
    if path.suffix == ".safetensors":
        state = dict(read_safetensors(path, CheckpointError, ADVICE))
    else:
        state = state_in(read_saved(path), str(path))
    return named(state, path), _said_beside(folder)


def _only_file(folder: Path) -> Path:
    files = plain_files(folder)
    if len(files) != 1:
        told = ", ".join(path.name for path in files[:4]) or "none"
        raise CheckpointError(f"{folder} should hold one file of weights; there are {told}. Name the one that is meant")
    return files[0]


def plain_files(folder: Path) -> list[Path]:
    """Files of tensors in a folder, whatever their names."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())


def _said_beside(folder: Path) -> Said:
    path = folder / "config.json"
    if path.is_file():
        content = read_json(path, CheckpointError)
        return Said({_SYNONYMS.get(name, name): value for name, value in content.items()}, str(path))
    for name in (CONFIG, "hparams.yaml"):
        if (folder / name).is_file():
            return _said_in_yaml(_text_of(folder / name), str(folder / name))
    return next((found for place in _contexts(folder)[::2] if (found := read_context(place))), Said())


def state_in(content: Any, where: str) -> dict[str, Any]:
    """The state dict in what a file holds: itself, or what Lightning and others put it under.

    Raises
    ------
    CheckpointError
        It holds none.
    """
    for name in ("state_dict", "model", "module", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{where} is not a state dict of tensors by name")
    return dict(content)
