"""The prediction that ``geneformer-fast profile --predict`` is asked for."""

from __future__ import annotations

import contextlib

from geneformer_fast import families
from geneformer_fast.profiling.lengths import Lengths
from geneformer_fast.profiling.prediction.answer import Cells, Prediction, cells_like
from geneformer_fast.profiling.prediction.predict import predict
from geneformer_fast.profiling.prediction.tokenizing import predict_tokenizing
from geneformer_fast.profiling.request import TOKENIZE, Request
from geneformer_fast.profiling.scenarios.cells import check_readable
from geneformer_fast.profiling.scenarios.models import geometry_of
from geneformer_fast.tokenization.arrow import open_tokens

#: Whose geometry is taken where nobody names a model.
MODEL = families.DEFAULT_PRESET


def predicted(request: Request) -> Prediction:
    """What many cells would take.

    Raises
    ------
    UnsupportedError
        Nothing like that was measured, or there is no such model.
    InputError, VocabularyError
        The token folder cannot be read, or has cells that are too long for the model.
    """
    assert request.card is not None
    assert request.cells is not None
    lengths = Lengths.parsed(request.lengths or "real")
    if request.mode == TOKENIZE:
        return predict_tokenizing(
            request.card, request.cells, lengths, preset=request.preset, threads=request.threads
        )  # fmt: skip
    model = request.model or MODEL
    config = geometry_of(model)
    cells = cells_like(request.cells, lengths, config.max_len) if request.tokens is None else _as_in(request)
    return predict(
        request.card, cells, model, config, mode=request.mode, layer=request.layer or "penultimate",
        dtype=request.dtype, threads=request.threads, batch_tokens=request.token_budget,
    )  # fmt: skip


def _as_in(request: Request) -> Cells:
    """Cells as long as those of a token folder."""
    assert request.tokens is not None
    assert request.cells is not None
    config = geometry_of(request.model or MODEL)
    with contextlib.closing(open_tokens(request.tokens)) as folder:
        check_readable(folder, config)
        return Cells(request.cells, folder.lengths(), f"as in {folder.path.name}")
