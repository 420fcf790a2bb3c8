"""Reading ahead: pieces of steps become batches in worker threads while the model computes.

Threads rather than processes: reading (``pread``) and numpy on packed arrays release the interpreter lock, nothing is
pickled or forked beside a GPU context, and where a run stands is a step number.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np
import torch

from geneformer_fast.data.batches import Piece
from geneformer_fast.data.random import CellRandom
from geneformer_fast.ragged import Ragged
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.tokenization.pipeline import ordered_map

Collate = Callable[[Ragged, np.ndarray, CellRandom], Any]


def as_tensor(values: np.ndarray) -> torch.Tensor:
    """What cells hold as a model takes it: ids in 64 bits, values of families that read them as they are."""
    return torch.from_numpy(values if values.dtype.kind == "f" else values.astype(np.int64))


def read_ragged(tokens: TokenFolder, cells: np.ndarray) -> Ragged:
    """Cells of a folder as one packed batch of int64 tokens, or of what a family reads instead."""
    values, cu_seqlens = tokens.read(cells)
    longest = int(np.diff(cu_seqlens).max(initial=0))
    return Ragged(as_tensor(values), torch.from_numpy(cu_seqlens.astype(np.int32)), longest)


def load_pieces(
    tokens: TokenFolder,
    pieces: Iterable[Piece],
    collate: Collate,
    *,
    seed: int,
    workers: int = 1,
    is_pinned: bool = False,
) -> Generator[tuple[Piece, Any]]:
    """Batches of pieces, in order.

    Parameters
    ----------
    tokens
        Where the cells are.
    pieces
        Which, from a :class:`BatchPlan`; iterated in a thread of its own.
    collate
        Takes packed tokens, cells and their random numbers; called in worker threads.
    seed
        Of the random numbers.
    workers
        Threads that read and collate; 0 does so when a batch is asked for. At most ``workers + 2`` batches exist.
    is_pinned
        Whether batches that can be are put into page-locked memory.
    """

    def load(piece: Piece) -> tuple[Piece, Any]:
        batch = collate(read_ragged(tokens, piece.cells), piece.cells, piece.random(seed))
        return piece, batch.pin_memory() if is_pinned and hasattr(batch, "pin_memory") else batch

    if workers == 0:
        yield from map(load, pieces)
    else:
        yield from ordered_map(load, pieces, workers=workers)
