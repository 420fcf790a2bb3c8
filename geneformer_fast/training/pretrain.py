"""Pretraining on masked genes, from a token folder to a model folder."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geneformer_fast import families
from geneformer_fast.arguments import checked
from geneformer_fast.checkpoints import hf, load, save
from geneformer_fast.checkpoints.model_card import ModelCard
from geneformer_fast.checkpoints.native import MODEL_TYPE
from geneformer_fast.checkpoints.skeleton import skeleton
from geneformer_fast.checkpoints.weights import CONFIG
from geneformer_fast.config import PRESETS, EncoderConfig
from geneformer_fast.data.identity import identity_of
from geneformer_fast.data.kinds import TokenKinds
from geneformer_fast.data.values import preparation_in
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError, VocabularyError
from geneformer_fast.files.checksums import fingerprint_of_tensors
from geneformer_fast.files.schema import read_json
from geneformer_fast.files.writing import whole_folder
from geneformer_fast.tokenization.arrow import TokenFolder, open_tokens
from geneformer_fast.tokenization.vocabulary import SAVED_FILE
from geneformer_fast.training.card import pretrained_card
from geneformer_fast.training.cells import split_cells
from geneformer_fast.training.checkpoint import whole_weights
from geneformer_fast.training.distributed import Ranks, local_device, process_group
from geneformer_fast.training.history import StepRecord
from geneformer_fast.training.loop import fit
from geneformer_fast.training.masked_genes import MaskedGenes
from geneformer_fast.training.named import recipe_of
from geneformer_fast.training.profiled import checked_place
from geneformer_fast.training.recipe import Recipe
from geneformer_fast.training.run_folder import writing_alone

FINAL = "final"


@checked
def pretrain(
    tokens: str | os.PathLike[str] | TokenFolder,
    out: str | os.PathLike[str],
    *,
    config: EncoderConfig | str | os.PathLike[str] = families.DEFAULT_PRESET,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    init: str | os.PathLike[str] | None = None,
    adapt_vocabulary: bool = False,
    eval_share: float | None = None,
    eval_tokens: str | os.PathLike[str] | TokenFolder | None = None,
    eval_column: tuple[str, Sequence[Any]] | None = None,
    device: str | torch.device | None = None,
    resume: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
    on_eval: Callable[[dict[str, float]], None] | None = None,
    tell: Callable[[str], None] | None = None,
    profile: str | os.PathLike[str] | bool = False,
    progress: bool | None = None,
    **changes: Any,
) -> Path:
    """Train an encoder to name masked genes.

    Under ``torchrun`` every process calls this with the same arguments.

    Parameters
    ----------
    tokens
        What ``tokenize`` made.
    out
        Folder of the run: ``final/`` is the model, ``log.jsonl`` what happened, ``checkpoints/`` where to continue.
    config
        The model: an :class:`EncoderConfig`, a preset's name, a ``config.json``, or the folder that holds one. Weights
        are fresh.
    recipe
        How: a :class:`Recipe`, the name of a published one (:data:`RECIPES`), or a JSON file of fields. None takes the
        one published under the name of ``config``, or the defaults.
    init
        A checkpoint folder to go on from; its configuration replaces ``config``.
    adapt_vocabulary
        Give the model the vocabulary of the tokens (its size, name and fingerprint) in place of the preset's.
    eval_share
        Share of cells held out for the validation loss, chosen by the recipe's seed; 0 for none. None: 1 %, at most
        10,000 cells.
    eval_tokens
        A token folder to validate on instead.
    eval_column
        A column of the tokens and the values whose cells are held out instead, such as ``("donor", ["d7"])``.
    device
        None: a GPU if there is one, under torchrun one per process.
    resume
        Continue from the last checkpoint in ``out``, if there is one.
    on_step, on_eval
        As in :func:`fit`.
    tell
        Called, before the first step, with how many cells are trained and validated on; such as ``print``.
    profile
        Where a report of how fast it trains goes: a ``.json``, an ``.html``, or a folder for both; True: ``profile/``
        in ``out``. One that is there already is refused, or with ``resume`` stays and nothing is profiled.
    progress
        Whether to show a progress bar; None is what the recipe says, and if that is None too, one on a terminal, and
        lines of the log elsewhere.
    **changes
        Fields of the recipe to change, such as ``epochs=1`` or ``batch_cells=64``.

    Returns
    -------
    Path
        ``out/final``: a Hugging Face folder where BERT can express the model, else one that ``load`` reads.

    Raises
    ------
    VocabularyError
        The tokens belong to another vocabulary than the model.
    InputError, OutputError, TrainingError, UnsupportedError
        As :func:`fit` raises them.

    References
    ----------
    Theodoris et al., Nature 618 (2023); Devlin et al., arXiv:1810.04805.
    """
    place = local_device(device)
    with process_group(place) as ranks:
        profile = checked_place(profile, Path(out), ranks=ranks, device=place, is_resuming=resume)
        folder = tokens if isinstance(tokens, TokenFolder) else open_tokens(tokens)
        how = recipe_of(recipe, config, changes if progress is None else {**changes, "progress": progress})
        model = _model(folder, config, init, adapt_vocabulary, how.seed)
        identity = identity_of(folder, model.config)
        other = _other_folder(eval_tokens, model.config)
        train_cells, eval_cells = split_cells(folder, how.seed, eval_share, other, eval_column)
        if tell is not None:
            tell(_told(folder, train_cells, other, eval_cells))
        # Fresh weights are the seed's, which the recipe names; how torch draws them may differ between machines.
        begins_with = "fresh" if init is None else fingerprint_of_tensors(model.state_dict())
        with writing_alone(Path(out), ranks, place):
            history = fit(
                model.to(place),
                folder,
                MaskedGenes(TokenKinds.of(identity, model.config), how.masking),
                how,
                train_cells=train_cells,
                eval_cells=eval_cells,
                eval_tokens=other,
                out=out,
                resume=resume,
                on_step=on_step,
                on_eval=on_eval,
                begins_with=begins_with,
                profile=profile,
            )
            vocabulary = _vocabulary_file(identity, init, config)
            card = pretrained_card(
                Path(out) / FINAL, model, folder, how, history, n_train=len(train_cells),
                n_eval=len(eval_cells) if eval_cells is not None else 0 if other is None else other.n_cells, init=init,
            )  # fmt: skip
            return _save_final(model, Path(out), vocabulary, card, ranks)


def config_of(config: EncoderConfig | str | os.PathLike[str]) -> EncoderConfig:
    """A configuration from a preset's name, a config.json, or the folder that holds one."""
    if isinstance(config, EncoderConfig):
        return config
    path = Path(config)
    # A folder may have a model's name.
    if not path.exists() and str(config) in PRESETS:
        return EncoderConfig.preset(str(config))
    if not path.exists():
        raise UnsupportedError(
            f"no configuration {str(config)!r}: it is neither a file or folder nor one of {', '.join(PRESETS)}"
        )
    settings = hf.read_settings(path) if path.is_dir() else read_json(path, UnsupportedError)
    file = path / CONFIG if path.is_dir() else path
    if settings.get("model_type") == MODEL_TYPE:
        return EncoderConfig.from_dict(settings.get("encoder", {}), where=f"{file}: encoder")
    if "n_layers" in settings:
        return EncoderConfig.from_dict(settings, where=file)
    return hf.config_from_settings(settings, file)


def _told(
    tokens: TokenFolder, train_cells: np.ndarray, other: TokenFolder | None, eval_cells: np.ndarray | None
) -> str:
    n_train = len(train_cells)
    if other is not None:
        return f"training {n_train:,} cells; validation {other.n_cells:,} cells of {other.path}"
    n_eval = 0 if eval_cells is None else len(eval_cells)
    shares = [n / max(1, tokens.n_cells) for n in (n_train, n_eval)]
    return f"training {n_train:,} cells ({shares[0]:.1%}); validation {n_eval:,} cells ({shares[1]:.1%})"


def _model(
    tokens: TokenFolder,
    config: EncoderConfig | str | os.PathLike[str],
    init: str | os.PathLike[str] | None,
    adapt_vocabulary: bool,
    seed: int,
) -> Encoder:
    said = preparation_in(tokens)
    if said is not None and (reason := families.family(said["family"]).refused.get("pretrain")) is not None:
        raise UnsupportedError(f"{tokens.path} holds values: {reason}")
    if init is not None:
        if adapt_vocabulary:
            raise UnsupportedError("a checkpoint's vocabulary cannot be changed; leave either init or the change out")
        model = load(init, dtype="float32", device="cpu")
        families.refuse(model.config, "pretrain")
        if hf.head_name(model) != "mlm":
            raise UnsupportedError(f"{init} has no head for masked genes; pretraining goes on from one that has")
        if model.quantization is not None:
            raise UnsupportedError(
                f"{init} is quantized ({model.quantization.scheme}), and eight bits do not learn: pretraining "
                "goes on from the model before it was quantized"
            )
        return model
    chosen = config_of(config)
    families.refuse(chosen, "pretrain")
    if chosen.inputs != "tokens":
        raise UnsupportedError("pretraining masks ranked tokens; this configuration reads values")
    if adapt_vocabulary:
        chosen = _adapted(chosen, tokens)
    identity_of(tokens, chosen)  # before memory is spent on weights
    torch.manual_seed(seed)
    return Encoder(chosen, head="mlm")


def _adapted(config: EncoderConfig, tokens: TokenFolder) -> EncoderConfig:
    identity = tokens.vocabulary
    if identity is None:
        raise VocabularyError(
            f"{tokens.path} does not say which vocabulary made its tokens, so no model can be made for it; tokenize "
            "with geneformer-fast, which writes that down"
        )
    return dataclasses.replace(
        config,
        vocab_size=identity["n_tokens"],
        vocabulary=identity["name"],
        vocabulary_fingerprint=identity["fingerprint"],
        pad_id=identity["special"]["pad"],
    )


def _other_folder(
    eval_tokens: str | os.PathLike[str] | TokenFolder | None, config: EncoderConfig
) -> TokenFolder | None:
    if eval_tokens is None:
        return None
    folder = eval_tokens if isinstance(eval_tokens, TokenFolder) else open_tokens(eval_tokens)
    identity_of(folder, config)
    return folder


def _vocabulary_file(identity: Mapping[str, Any], *places: Any) -> Path | None:
    """A saved vocabulary of these tokens in the folders that were named, so that the model can have it beside it."""
    for place in places:
        if not isinstance(place, str | os.PathLike):
            continue
        path = Path(place)
        path = (path if path.is_dir() else path.parent) / SAVED_FILE
        if path.exists():
            from geneformer_fast.tokenization.vocabulary import Vocabulary

            if Vocabulary.from_folder(path.parent).fingerprint == identity.get("fingerprint"):
                return path
    return None


def _save_final(model: Encoder, out: Path, vocabulary: Path | None, card: ModelCard, ranks: Ranks) -> Path:
    """The model's folder, there whole or not at all."""
    weights = whole_weights(model)
    path = out / FINAL
    if ranks.is_first:
        plain = skeleton(model.config, head="mlm")
        plain.load_state_dict(weights, assign=True)
        plain.source = model.source
        with whole_folder(path) as partial:
            save(plain, partial)
            if vocabulary is not None:
                shutil.copyfile(vocabulary, partial / SAVED_FILE)
            card.save(partial)
    ranks.barrier()
    return path
