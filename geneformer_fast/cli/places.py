"""Inputs that are not there and outputs that may not be written, said before anything heavy is imported."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from geneformer_fast.errors import InputError, UnsupportedError, VocabularyError

# What Linux has where there is a card that torch calls cuda: NVIDIA's, also below Windows, and AMD's.
_DEVICES = Path("/dev")
_CARDS = ("nvidia[0-9]*", "nvidiactl", "nvhost*", "nvmap", "dxg", "kfd")


def check_counts(inputs: Sequence[str]) -> None:
    """Files, folders and patterns of counts lead to something.

    Raises
    ------
    InputError
        One does not.
    """
    from geneformer_fast.counts.discovery import expand_inputs

    expand_inputs(inputs)


def check_counts_or_tokens(inputs: Sequence[str]) -> bool:
    """Counts, or one folder of tokens, are there; returns whether they are tokens.

    Raises
    ------
    InputError
        They are not.
    """
    from geneformer_fast.extract.options import is_token_folder

    if len(inputs) == 1 and is_token_folder(inputs[0]):
        return True
    if not any(map(is_token_folder, inputs)):  # which is refused where both are known
        check_counts(inputs)
    return False


def check_tokens(folder: str) -> None:
    """A finished folder of tokens is there.

    Raises
    ------
    OutputError
        It is not.
    """
    from geneformer_fast.tokenization import manifest

    manifest.check_finished(Path(folder))


def check_dictionary(folder: str | None, *, may_be_file: bool = False) -> None:
    """A folder of gene dictionaries is there, or none was named; a file serves families that read values.

    Raises
    ------
    VocabularyError
        It is not.
    """
    from geneformer_fast.tokenization.bundled import is_archive

    if folder is None or Path(folder).is_dir() or (may_be_file and Path(folder).is_file()):
        return
    if not is_archive(Path(folder)):
        raise VocabularyError(f"{folder}: no such folder; give the folder that holds the gene dictionaries")


def check_model(folder: str) -> None:
    """A checkpoint folder is there.

    Raises
    ------
    CheckpointError
        It is not.
    """
    from geneformer_fast.checkpoints.present import check_present
    from geneformer_fast.families import recognise

    if recognise(Path(folder)) is None:
        check_present(Path(folder))


def check_device(name: str | None) -> None:
    """A device has this name and, of CUDA's, this machine and this torch have any, as far as is seen without torch.

    Raises
    ------
    UnsupportedError
        None has, or none can be used.
    """
    if name is None:
        return
    kind = re.fullmatch(r"([a-z]+)(:[0-9]+)?", name)
    if kind is None or kind[1] == "gpu":
        raise UnsupportedError(f"no device is called {name!r}; use cpu, cuda, or cuda:N")
    if kind[1] != "cuda":
        return
    reason = None
    if _torch_version().endswith("+cpu"):
        reason = f"torch {_torch_version()} is built for CPUs; install one that is built for CUDA"
    elif sys.platform == "linux" and not any(any(_DEVICES.glob(pattern)) for pattern in _CARDS):
        reason = "this machine has no card, or its driver is not loaded"
    if reason is not None:
        raise UnsupportedError(f"device {name!r} cannot be used here ({reason}). Use cpu, or leave the device out")


def _torch_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def check_labels(tokens: str, columns: Iterable[str]) -> None:
    """Tokens carry columns, as far as the description beside them says what they carry.

    Raises
    ------
    InputError
        They do not.
    """
    from geneformer_fast.files.schema import read_json
    from geneformer_fast.finetuning.carried import why_not_carried

    described = Path(tokens) / "dataset_info.json"
    if not described.is_file():
        return
    features = read_json(described, InputError).get("features")
    if not isinstance(features, dict):
        return
    for column in columns:
        if why_not := why_not_carried(tokens, column, features, role="label"):
            raise InputError(why_not)


def check_layer(layer: str | None, model: str | None) -> None:
    """A model has the layer that is named, as far as its folder or preset says how many there are.

    Raises
    ------
    UnsupportedError
        It has not.
    """
    from geneformer_fast import families
    from geneformer_fast.checkpoints.present import n_layers_in
    from geneformer_fast.config import PRESETS, EncoderConfig

    if layer is None or model is None:
        return
    if (n_layers := n_layers_in(Path(model))) is not None:  # a folder may have a preset's name
        EncoderConfig.preset(families.DEFAULT_PRESET, n_layers=n_layers).layer_index(layer)
    elif model in PRESETS:
        PRESETS[model].layer_index(layer)


def check_file(path: str | None, option: str) -> None:
    """A file that an option names is there, or none was named.

    Raises
    ------
    UnsupportedError
        It is not.
    """
    if path is not None and not Path(path).is_file():
        raise UnsupportedError(f"{option} {path}: there is no such file")
