"""What ``geneformer-fast profile`` runs: embedding, training and tokenizing, by the functions that do these anyway."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numba
import torch

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.profiling.request import EMBED, TOKENIZE, Request
from geneformer_fast.profiling.scenarios.cells import open_profile_cells
from geneformer_fast.profiling.scenarios.embed import Embedding
from geneformer_fast.profiling.scenarios.models import model_to_embed, model_to_train, place_of
from geneformer_fast.profiling.scenarios.tokenize import Tokenizing, opened_counts
from geneformer_fast.profiling.scenarios.train import Training

__all__ = ["Embedding", "Request", "Tokenizing", "Training", "opened"]

Scenario = Embedding | Training | Tokenizing


@contextlib.contextmanager
def opened(request: Request) -> Iterator[Scenario]:
    """What a request is about, with its model loaded and its cells at hand.

    Raises
    ------
    UnsupportedError
        An option cannot be followed; there is no such preset, device or dtype; several processes were started.
    InputError, OutputError, VocabularyError, CheckpointError
        As the functions that read cells and models raise them.
    """
    request.check()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnsupportedError(
            "geneformer-fast profile measures one process; several that train together are profiled under torchrun by "
            "geneformer-fast pretrain --profile FILE, or by geneformer_fast.profile(model) around a loop of your own"
        )
    with threads(request.threads):
        if request.mode == TOKENIZE:
            with opened_counts(request) as tokenizing:
                yield tokenizing
            return
        place, name = place_of(request.device), str(request.model)
        if request.mode == EMBED:
            encoder = model_to_embed(name, dtype=request.dtype, device=place)
            encoder.config.layer_index(request.layer or "last")  # said before cells are read
        else:
            encoder = model_to_train(name, device=place)
        with open_profile_cells(
            encoder.config, tokens=request.tokens, lengths=request.lengths, n_cells=request.cells
        ) as cells:
            yield Embedding(request, encoder, cells) if request.mode == EMBED else Training(request, encoder, cells)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """As many threads in torch and in compiled loops; None: as they are."""
    if count is None:
        yield
        return
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(count)
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])
