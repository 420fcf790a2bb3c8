"""Inputs that are not there and outputs that may not be written, said before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from geneformer_fast.errors import UnsupportedError, VocabularyError


def check_counts(inputs: Sequence[str]) -> None:
    """Files, folders and patterns of counts lead to something.

    Raises
    ------
    InputError
        One does not.
    """
    from geneformer_fast.tokenization.sources.discovery import expand_inputs

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


def check_dictionary(folder: str | None) -> None:
    """A folder of gene dictionaries is there, or none was named.

    Raises
    ------
    VocabularyError
        It is not.
    """
    if folder is not None and not Path(folder).is_dir():
        raise VocabularyError(f"{folder}: no such folder; give the folder that holds the gene dictionaries")


def check_model(folder: str) -> None:
    """A checkpoint folder is there.

    Raises
    ------
    CheckpointError
        It is not.
    """
    from geneformer_fast.checkpoints.present import check_present

    check_present(Path(folder))


def check_layer(layer: str | None, model: str | None) -> None:
    """A model has the layer that is named, as far as its folder or preset says how many there are.

    Raises
    ------
    UnsupportedError
        It has not.
    """
    from geneformer_fast.checkpoints.present import n_layers_in
    from geneformer_fast.config import PRESETS, EncoderConfig

    if layer is None or model is None:
        return
    if model in PRESETS:
        PRESETS[model].layer_index(layer)
    elif (n_layers := n_layers_in(Path(model))) is not None:
        EncoderConfig.preset("geneformer-v1-10m", n_layers=n_layers).layer_index(layer)


def check_file(path: str | None, option: str) -> None:
    """A file that an option names is there, or none was named.

    Raises
    ------
    UnsupportedError
        It is not.
    """
    if path is not None and not Path(path).is_file():
        raise UnsupportedError(f"{option} {path}: there is no such file")
