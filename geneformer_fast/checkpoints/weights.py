"""The files of a model folder: tensors in safetensors or PyTorch files, whole or sharded, with their checksums.

Nothing is executed: PyTorch files are read by ``torch.load`` with ``weights_only``.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from geneformer_fast.checkpoints.described import schemes_in
from geneformer_fast.checkpoints.present import CONFIG
from geneformer_fast.checkpoints.pytorch import ADVICE, check_records, is_archive, read_pytorch
from geneformer_fast.config import EncoderConfig
from geneformer_fast.errors import CheckpointError, OutputError
from geneformer_fast.files import schema
from geneformer_fast.files.checksums import SUMS, VERIFY, check_file, is_verifying, read_sums, sums_text
from geneformer_fast.files.locks import folder_lock
from geneformer_fast.files.streaming import write_pieces
from geneformer_fast.files.tensors import read_tensors as read_safetensors
from geneformer_fast.files.writing import is_plain_name, whole_file, write_tensors

WEIGHTS = "model.safetensors"
#: Names of weights, the first that is there is read; what ends in ``.index.json`` names shards.
FILES = (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BUFFERS = ("position_ids", "token_type_ids")  # whole numbers that old checkpoints keep
_CHANGED = f"copy it again, or if it was changed on purpose remove {SUMS} (or set {VERIFY}=0)"
# How the line of SHA256SUMS begins that notes the configuration.
_NOTED = "# config.json: "
_SCHEMES = "schemes"
_HARMLESS = ("dropout", "attention_dropout", "pad_id", "init_std", "vocabulary", "vocabulary_fingerprint")
# What else lies in a folder without weights, and what to do.
_OTHERS = (
    (
        "adapter_config.json",
        "a PEFT adapter and no model; merge it into its base model (merge_and_unload) and save",
    ),
    ("*.gguf", "GGUF files of llama.cpp; take the same model's safetensors"),
    ("tf_model.h5", "TensorFlow weights only; take the same model's safetensors"),
    ("flax_model.msgpack", "Flax weights only; take the same model's safetensors"),
    ("*.safetensors", "safetensors under another name; rename them to model.safetensors, or fetch their index"),
)


@dataclass
class _Index:
    weight_map: dict[str, str]


def read_tensors(folder: Path, *, verify: bool | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, from one file or from shards.

    Parameters
    ----------
    folder
        The folder.
    verify
        Whether files are compared with their checksums: those in ``SHA256SUMS``, where there is one, and those that
        PyTorch's files have in them. None: unless the environment says ``GENEFORMER_FAST_VERIFY=0``.

    Raises
    ------
    CheckpointError
        Files are missing, damaged, of another kind, or do not belong together.
    """
    files, weight_map = files_of(folder)
    is_checked = is_verifying(verify)
    sums = read_sums(folder, CheckpointError) if is_checked else {}
    tensors: dict[str, torch.Tensor] = {}
    # Checksums are computed while the tensors are copied out of the page cache.
    with ThreadPoolExecutor(1, thread_name_prefix="checksums") as pool:
        checks = (
            [pool.submit(check_against_sums, folder / name, sums.get(name)) for name in files] if is_checked else []
        )
        for name in files:
            found = _read_file(folder / name)
            if weight_map is not None:
                check_shard(folder, name, found, weight_map)
            tensors.update(found)
        for check in checks:
            check.result()
    return tensors


def write_model(
    folder: Path,
    config: EncoderConfig,
    settings: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    overwrite: bool,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write ``config.json``, ``model.safetensors`` and ``SHA256SUMS``, all of them whole or none.

    Other files of the folder stay. ``config.json`` has no checksum, since people and tools edit it; what decides the
    model's numbers is noted beside the checksums, for :func:`warn_of_changes`.

    Raises
    ------
    CheckpointError
        The settings hold what JSON has no number for.
    OutputError
        The folder holds a model already, another process is writing into it, or the system lets nobody write there.
    """
    said = settings_text(settings, folder)
    with folder_lock(folder):
        if (folder / CONFIG).exists() and not overwrite:
            raise OutputError(f"{folder} holds a model already; choose another folder or pass overwrite=True")
        # Renamed from the last to the first: without config.json a folder is no model, and weights that do not fit
        # their checksum are refused, so that nobody takes what a kill leaves for a model.
        with (
            whole_file(folder / CONFIG) as described,
            whole_file(folder / SUMS) as sums,
            whole_file(folder / WEIGHTS) as weights,
        ):
            if settings.get("quantization_config"):
                write_pieces(weights, tensors, metadata)
            else:
                # The library refuses memory that tensors share; spelled-out aliases are written twice, as found.
                write_tensors(
                    weights, {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, metadata
                )
            write_around(config, settings, weights, described, sums, said=said)
    return folder


def write_around(
    config: EncoderConfig, settings: Mapping[str, Any], weights: Path, described: Path, sums: Path, *, said: str
) -> None:
    """Write config.json and the checksum of weights that are there, under whatever names for now.

    ``said`` is what :func:`settings_text` makes of the settings.
    """
    noted = json.dumps(_deciding(config, settings), sort_keys=True)
    sums.write_text(f"{_NOTED}{noted}\n{sums_text({WEIGHTS: weights})}", encoding="utf-8")
    described.write_text(f"{said}\n", encoding="utf-8")


def settings_text(settings: Mapping[str, Any], folder: Path) -> str:
    """The content of config.json.

    Raises
    ------
    CheckpointError
        The settings hold what JSON has no number for.
    """
    try:
        return json.dumps(settings, indent=2, sort_keys=True, allow_nan=False)
    except ValueError as reason:  # such as the 1e999 of a config.json that the model came with
        raise CheckpointError(f"{folder / CONFIG} cannot say what the model's settings hold ({reason})") from None


def warn_of_changes(folder: Path, config: EncoderConfig, settings: Mapping[str, Any]) -> None:
    """Warn where ``config.json`` says something else of the model than when its weights were saved.

    That may be meant, so it is no error; but a digit that changed there changes all numbers without a word.

    Parameters
    ----------
    folder
        Of the model.
    config, settings
        What its config.json says of the encoder, and all it says.
    """
    noted, now = noted_beside(folder), _deciding(config, settings)
    changed = {name: (noted[name], now[name]) for name in now if name in noted and noted[name] != now[name]}
    if _SCHEMES in changed:
        then, here = (value if isinstance(value, dict) else {} for value in changed.pop(_SCHEMES))
        targets = [target for target in sorted({*then, *here}) if then.get(target) != here.get(target)]
        changed |= {f"weights of {target}": (then.get(target), here.get(target)) for target in targets}
    if changed:
        said = ", ".join(f"{name} {then!r} then, {here!r} now" for name, (then, here) in changed.items())
        warnings.warn(
            f"{folder / CONFIG} was changed after the weights beside it were saved: {said}. If that is not meant, "
            f"restore it; else remove {SUMS}",
            stacklevel=4,
        )


def noted_beside(folder: Path) -> dict[str, Any]:
    """What was noted beside the checksums of a folder; nothing where there is no such note."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        noted = json.loads(next(line for line in lines if line.startswith(_NOTED)).removeprefix(_NOTED))
    except (OSError, ValueError, StopIteration, RecursionError):
        return {}
    return noted if isinstance(noted, dict) else {}


def has_schemes_beside(folder: Path) -> bool:
    """Whether it was noted to what the weights of a folder are rounded."""
    return _SCHEMES in noted_beside(folder)


def _deciding(config: EncoderConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration, and of how weights are rounded, decides the numbers that a model computes."""
    schemes = schemes_in(settings)
    found = {name: value for name, value in config.to_dict().items() if name not in _HARMLESS}
    return found if schemes is None else {**found, _SCHEMES: schemes}


def check_layers(tensors: Mapping[str, torch.Tensor], n_layers: int, layer: re.Pattern[str], folder: Path) -> None:
    """See that tensors are of as many layers as the model has, before it is built.

    Parameters
    ----------
    tensors
        By name.
    n_layers
        How many layers the configuration says there are.
    layer
        How names of a layer's tensors begin; its group is the number.
    folder
        Where they come from.

    Raises
    ------
    CheckpointError
        They are of fewer layers.
    """
    n_found = 1 + max((int(match[1]) for name in tensors if (match := layer.match(name))), default=-1)
    if n_found < n_layers:
        raise CheckpointError(
            f"{folder}: {CONFIG} says {n_layers:,} layers, but the weights have {n_found}; config.json and the weights "
            "do not belong together"
        )


def check_floats(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """See that tensors are in floating point.

    Raises
    ------
    CheckpointError
        They are quantized, and ``config.json`` does not say so.
    """
    if packed := next((name for name in tensors if name.endswith(".SCB")), None):
        raise CheckpointError(
            f"{folder}: tensor {packed!r} is a scale of bitsandbytes, in whose layout the weights are; take the model "
            "before that was done, and quantize it with geneformer-fast quantize MODEL --out DIR"
        )
    for name, tensor in tensors.items():
        is_plain = tensor.layout == torch.strided and not tensor.is_quantized
        if not is_plain or not (tensor.dtype in _DTYPES or name.endswith(_BUFFERS)):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{folder}: tensor {name!r} holds {kind}, so the weights are quantized or packed, of which {CONFIG} "
                "says nothing; take the config.json that belongs to them, or the model before that was done"
            )


def n_classes_of(tensors: Mapping[str, torch.Tensor], name: str, folder: Path) -> int:
    """Rows of a classifier's weight; 2 where there is none, as no head looks at it."""
    if name not in tensors:
        return 2
    shape = tuple(tensors[name].shape)
    if len(shape) != 2 or not shape[0]:
        raise CheckpointError(f"{folder}: tensor {name!r} has shape {list(shape)}, a classifier's is [classes, width]")
    return shape[0]


def files_of(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The files that hold a folder's weights; with shards also which tensor is in which."""
    for name in FILES:
        path = folder / name
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path} is a link to a file that is not there; download the model again")
        if not path.exists():
            continue
        if not name.endswith(".index.json"):
            return [name], None
        weight_map = schema.read_json(path, CheckpointError, _Index)["weight_map"]
        shards = sorted(set(weight_map.values()))
        if not shards:
            raise CheckpointError(f"{path}: weight_map names no shards")
        suffix = Path(name.removesuffix(".index.json")).suffix
        for shard in shards:
            # Links are followed, since downloads are kept so; names that lead elsewhere are not.
            if not is_plain_name(shard) or not shard.endswith(suffix):
                raise CheckpointError(f"{path}: weight_map names {shard!r}, which is no {suffix} file of this folder")
            if not (folder / shard).exists():
                raise CheckpointError(
                    f"{folder}: shard {shard} named by {name} is missing; download all {len(shards)} shards"
                )
        return shards, weight_map
    for pattern, what in _OTHERS:
        if found := sorted(folder.glob(pattern)):
            raise CheckpointError(f"{folder} has neither {WEIGHTS} nor pytorch_model.bin; {found[0].name} is {what}")
    raise CheckpointError(f"{folder} has neither {WEIGHTS} nor pytorch_model.bin, whole or sharded")


def check_against_sums(path: Path, sha256: str | None) -> None:
    """Compare a file with its checksum, or with those inside it."""
    if sha256 is not None:
        check_file(path, sha256, CheckpointError, _CHANGED)
    elif path.suffix in (".bin", ".pt", ".pth", ".ckpt") and is_archive(path):
        check_records(path)


def check_shard(folder: Path, shard: str, found: Mapping[str, torch.Tensor], weight_map: Mapping[str, str]) -> None:
    """A shard holds the tensors that the index says, and no others."""
    for name in found:
        if weight_map.get(name) != shard:
            where = f"puts into {weight_map[name]}" if name in weight_map else "does not know"
            raise CheckpointError(f"{folder / shard}: holds tensor {name!r}, which the index of shards {where}")
    missing = next((name for name, place in weight_map.items() if place == shard and name not in found), None)
    if missing is not None:
        raise CheckpointError(f"{folder / shard}: tensor {missing!r} is missing, which the index puts there")


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path, CheckpointError, ADVICE)
    return read_pytorch(path)
