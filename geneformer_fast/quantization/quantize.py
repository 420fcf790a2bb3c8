"""Models with weights of eight bits."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from geneformer_fast.arguments import checked
from geneformer_fast.checkpoints import load
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.layers import check_compute_dtype
from geneformer_fast.quantization.build import all_choices, quantized
from geneformer_fast.quantization.choices import Choice


@checked
def quantize(
    model: Encoder | str | os.PathLike[str],
    *,
    scheme: str = "int8",
    keep_embeddings: bool = False,
    choices: Mapping[str, Choice] | None = None,
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
    keep_embeddings
        Whether embedding tables, and with them the decoder that shares one, stay float32. Otherwise they are int8 with
        a scale per row, whatever the scheme.
    choices
        Layer -> what becomes of it, where that is not what the scheme says.

    Returns
    -------
    Encoder
        On the device, in the mode and with the compute dtype of the model; :meth:`Encoder.cast` and ``.to`` change
        these and leave the weights what they are. Nothing of it learns, but what is put on top of it may.

    Raises
    ------
    UnsupportedError
        The model is quantized already, or computes in float64; there is no such scheme, or no layer of a choice.
    CheckpointError
        A weight holds NaN or infinity, or the folder cannot be read.

    References
    ----------
    Dettmers et al., "LLM.int8()", arXiv:2208.07339; Xiao et al., "SmoothQuant", arXiv:2211.10438; Micikevicius et al.,
    "FP8 formats for deep learning", arXiv:2209.05433.
    """
    encoder = model if isinstance(model, Encoder) else load(model)
    if encoder.quantization is not None:
        raise UnsupportedError(
            f"this model is quantized already ({encoder.quantization.scheme}); quantize the one it was made from"
        )
    if encoder.dtype == torch.float64:
        raise UnsupportedError('this model computes in float64; cast("float32") it before it is quantized')
    check_compute_dtype(encoder.dtype)
    return quantized(encoder, all_choices(encoder, scheme, choices, keep_embeddings=keep_embeddings))
