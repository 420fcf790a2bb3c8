"""Models with weights of eight bits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from geneformer_fast.arguments import checked
from geneformer_fast.checkpoints import load
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.layers import check_compute_dtype
from geneformer_fast.quantization.build import all_choices, quantized
from geneformer_fast.quantization.calibrate import calibrate as measured_on
from geneformer_fast.quantization.choices import Choice
from geneformer_fast.ragged import Ragged
from geneformer_fast.tokenization.arrow import TokenFolder


@checked
def quantize(
    model: Encoder | str | os.PathLike[str],
    *,
    scheme: str = "int8",
    calibrate: str | os.PathLike[str] | TokenFolder | Ragged | Sequence[Ragged] | None = None,
    keep_embeddings: bool = False,
    choices: Mapping[str, Choice] | None = None,
    bar: float | None = None,
    least_cosine: float | None = None,
    n_cells: int | None = None,
) -> Encoder:
    """A model with weights of eight bits: a quarter of the memory of float32.

    Parameters
    ----------
    model
        An encoder, which stays as it is, or a checkpoint folder.
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
    bar, least_cosine, n_cells
        As in :func:`geneformer_fast.quantization.calibrate.calibrate`; None leaves them to it.

    Returns
    -------
    Encoder
        On the device, in the mode and with the compute dtype of the model; :meth:`Encoder.cast` and ``.to`` change
        these and leave the weights what they are. Nothing of it learns, but what is put on top of it may.

    Raises
    ------
    UnsupportedError
        The model is quantized already, or computes in float64; there is no such scheme, or no layer of a choice; an
        option would do nothing.
    CheckpointError
        A weight holds NaN or infinity, or the folder cannot be read.
    InputError, VocabularyError
        Of ``calibrate``: there are no cells, or they belong to another model.

    References
    ----------
    Dettmers et al., "LLM.int8()", arXiv:2208.07339; Xiao et al., "SmoothQuant", arXiv:2211.10438; Micikevicius et al.,
    "FP8 formats for deep learning", arXiv:2209.05433.
    """
    asked = {"bar": bar, "least_cosine": least_cosine, "n_cells": n_cells}
    measuring: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if calibrate is None and measuring:
        raise UnsupportedError(f"{next(iter(measuring))} is about measuring layers: pass cells as calibrate= too")
    if calibrate is not None and choices is not None:
        raise UnsupportedError("choices are made by calibrate, or given: leave one of them out")
    encoder = model if isinstance(model, Encoder) else load(model)
    if encoder.quantization is not None:
        raise UnsupportedError(
            f"this model is quantized already ({encoder.quantization.scheme}); quantize the one it was made from"
        )
    if encoder.dtype == torch.float64:
        raise UnsupportedError('this model computes in float64; cast("float32") it before it is quantized')
    check_compute_dtype(encoder.dtype)
    if calibrate is not None:
        choices = measured_on(encoder, calibrate, scheme=scheme, keep_embeddings=keep_embeddings, **measuring).choices
    return quantized(encoder, all_choices(encoder, scheme, choices, keep_embeddings=keep_embeddings))
