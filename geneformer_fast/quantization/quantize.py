"""Models with weights of eight bits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geneformer_fast.arguments import checked, renamed
from geneformer_fast.checkpoints import load, save
from geneformer_fast.checkpoints.hf import is_bert
from geneformer_fast.checkpoints.mapping import Entry
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import CheckpointError, UnsupportedError
from geneformer_fast.files.writing import followed, whole_folder
from geneformer_fast.layers import check_compute_dtype
from geneformer_fast.quantization.build import all_choices, quantized
from geneformer_fast.quantization.calibrate import FLAGS
from geneformer_fast.quantization.calibrate import calibrate as measured_on
from geneformer_fast.quantization.card import quantized_card
from geneformer_fast.quantization.choices import Choice
from geneformer_fast.quantization.convert import (
    alone_in,
    bytes_of,
    dtypes_of,
    has_own_format,
    quantize_folder,
    refuse_float64,
    refuse_quantized,
)
from geneformer_fast.quantization.hugging_face import check_theirs, encoder_of, quantized_theirs
from geneformer_fast.quantization.places import check_out, others_in
from geneformer_fast.quantization.report import Report
from geneformer_fast.ragged import Ragged
from geneformer_fast.tokenization.arrow import TokenFolder


@renamed(n_cells="max_cells")
@checked
def quantize(
    model: Encoder | nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    scheme: str = "int8",
    calibrate: str | os.PathLike[str] | TokenFolder | Ragged | Sequence[Ragged] | None = None,
    keep_embeddings: bool = False,
    choices: Mapping[str, Choice] | None = None,
    bar: float | None = None,
    least_cosine: float | None = None,
    max_cells: int | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Encoder | nn.Module | Path:
    """A model with weights of eight bits: a quarter of the memory of float32.

    Parameters
    ----------
    model
        An encoder, or transformers' BertModel, BertForMaskedLM, BertForSequenceClassification or
        BertForTokenClassification, either of which stays as it is; or a checkpoint folder.
    out
        Folder to write, for :func:`geneformer_fast.load`, and for transformers with the package compressed-tensors. Of
        a folder nothing but a few megabytes is in memory meanwhile, unless it is measured; what else lies in it is
        copied. ``quantization.json`` there tells what became of each layer.
    scheme
        ``"int8"``: weights are int8 with a scale per output channel, and rows of activations are rounded to int8 as
        they come, for products of integers; where these are slower than products in the compute dtype, weights are
        widened for such products instead. ``"int8-weights"``: always the latter. ``"fp8"``: float8 (e4m3) in place of
        int8, for Ada and Hopper.
    calibrate
        Cells to measure layers on, a token folder or packed cells: a layer whose product loses too much is smoothed,
        or stays in floating point, and so do the worst ones as long as embeddings are turned too far. None: all layers
        follow the scheme, unseen.
    keep_embeddings
        Whether embedding tables, and with them the decoder that shares one, stay float32. Otherwise they are int8 with
        a scale per row, whatever the scheme.
    choices
        Layer -> what becomes of it, where that is not what the scheme says, in place of ``calibrate``.
    bar, least_cosine, max_cells
        As in :func:`geneformer_fast.quantization.calibrate.calibrate`; None leaves them to it.
    device
        Where a folder is measured, or loaded to; the CPU where that is not said.
    overwrite
        Whether ``out`` may hold a model.
    progress
        Whether to show progress bars of ``calibrate``; None shows them on a terminal, and lines of the log elsewhere.

    Returns
    -------
    Path or Encoder
        ``out``; without it the model, on the device, in the mode and with the compute dtype of the one given
        (:meth:`Encoder.cast` and ``.to`` change these and leave the weights what they are). Nothing of it learns, but
        what is put on top of it may. Of a BERT of transformers a BERT, for :func:`geneformer_fast.accelerate`, PEFT and
        ``save_pretrained``, whose folder is the one that ``out`` would be.

    Raises
    ------
    UnsupportedError
        The model is quantized already, or computes in float64; there is no such scheme, or no layer of a choice; an
        option would do nothing.
    CheckpointError
        A weight holds NaN or infinity, or the folder cannot be read.
    OutputError
        ``out`` holds something already, or lies where the model is.
    InputError, VocabularyError
        Of ``calibrate``: there are no cells, or they belong to another model.

    References
    ----------
    Dettmers et al., "LLM.int8()", arXiv:2208.07339; Xiao et al., "SmoothQuant", arXiv:2211.10438; Micikevicius et al.,
    "FP8 formats for deep learning", arXiv:2209.05433.
    """
    asked = {"bar": bar, "least_cosine": least_cosine, "max_cells": max_cells}
    measuring: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if calibrate is None and measuring:
        name = next(iter(measuring))
        raise UnsupportedError(
            f"{name} ({FLAGS[name]}) is about measuring layers: pass cells as calibrate (--calibrate TOKENS) too"
        )
    if calibrate is not None and choices is not None:
        raise UnsupportedError("choices are made by calibrate, or given: leave one of them out")
    if isinstance(model, nn.Module) and device is not None:
        raise UnsupportedError("device is where a folder is loaded to; move the model before it is quantized")
    if out is None and overwrite:
        raise UnsupportedError("overwrite is about a folder: name one as out=")
    folder = None if isinstance(model, nn.Module) else Path(model)
    # Another format has no place for eight bits: such a model is loaded, and becomes a folder of ours.
    has_our_format = folder is not None and not has_own_format(folder)
    if out is not None:
        if has_our_format:
            assert folder is not None
            refuse_quantized(folder)
        out = followed(Path(out))
        check_out(out, folder, overwrite=overwrite)
        if folder is not None and calibrate is None and device is not None:
            raise UnsupportedError("device is where a folder is measured: pass cells as calibrate= too")
        if folder is not None and calibrate is None and has_our_format:
            options: dict[str, Any] = {"scheme": scheme, "keep_embeddings": keep_embeddings, "overwrite": overwrite}
            quantize_folder(folder, out, choices=choices, **options)
            return out
    encoder, table = _opened(model, device)
    _check_floats(encoder, folder)
    calibration = None
    if calibrate is not None:
        calibration = measured_on(
            encoder, calibrate, scheme=scheme, keep_embeddings=keep_embeddings, progress=progress, **measuring
        )
        choices = calibration.choices
    if folder is not None and out is not None and has_our_format:
        del encoder, model, table  # its numbers are read again, some rows at a time
        quantize_folder(folder, out, scheme=scheme, choices=choices, calibration=calibration, overwrite=overwrite)
        return out
    chosen = all_choices(encoder, scheme, choices, keep_embeddings=keep_embeddings)
    made: nn.Module
    if table is None:
        made = ours = quantized(encoder, chosen)
    else:
        assert isinstance(model, nn.Module)
        made, ours = quantized_theirs(model, encoder, table, chosen)
    _check_finite(ours)
    if out is None:
        return made
    with alone_in(out, None, overwrite=overwrite), whole_folder(out) as unfinished:
        save(ours, unfinished)
        for path in () if folder is None else others_in(folder):
            shutil.copyfile(path, unfinished / path.name)
        report = Report.of(scheme, chosen, bytes_of(encoder), bytes_of(ours), calibration, dtypes=dtypes_of(ours))
        report.save(unfinished)
        quantized_card(out, report, folder, is_bert=is_bert(ours)).save(unfinished)
    return out


def _opened(
    model: nn.Module | str | os.PathLike[str], device: str | torch.device | None
) -> tuple[Encoder, list[Entry] | None]:
    """What is to be quantized as an encoder, and of transformers' model which parameter is which."""
    if isinstance(model, Encoder):
        return model, None
    if isinstance(model, nn.Module):
        check_theirs(model)
        return encoder_of(model)
    return load(model, device="cpu" if device is None else device), None


def _check_floats(encoder: Encoder, folder: Path | None) -> None:
    """Refuse what cannot be quantized."""
    if encoder.quantization is not None:
        raise UnsupportedError(
            f"this model is quantized already ({encoder.quantization.scheme}); quantize the one it was made from"
        )
    refuse_float64(encoder, folder)
    check_compute_dtype(encoder.dtype)


def _check_finite(made: Encoder) -> None:
    """Refuse NaN and infinity in what was left in floating point, too."""
    for name, tensor in made.state_dict().items():
        if tensor.is_floating_point() and tensor.itemsize > 1 and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{name} holds NaN or infinity; no model can use that")
