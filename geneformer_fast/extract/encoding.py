"""One pass of an encoder over cells: windows, batches by token budget, pooling."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geneformer_fast import __version__
from geneformer_fast.embeddings import RankTokens
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import InputError
from geneformer_fast.extract.cells import Cells
from geneformer_fast.extract.files import ArrayWriter, RowWriter
from geneformer_fast.ragged import Ragged

# Cells are sorted by length within a window of this many, so that memory does not grow with the number of cells.
WINDOW_CELLS = 8192
# On the CPU a batch's activations should stay in the second-level cache; a GPU wants enough tokens to fill it.
TOKEN_BUDGET = {"cpu": 4096, "cuda": 131_072}


class EncodingRun:
    """One pass of an encoder over cells."""

    def __init__(
        self,
        encoder: Encoder,
        cells: Cells,
        pool: str,
        layer: str | int,
        token_budget: int | None,
        progress: bool | None,
    ) -> None:
        self.encoder, self.cells, self.pool, self.layer, self.progress = encoder, cells, pool, layer, progress
        self.width = encoder.config.width
        self.token_budget = token_budget or TOKEN_BUDGET.get(encoder.device.type, TOKEN_BUDGET["cpu"])

    def provenance(self, model: Encoder | str | os.PathLike[str]) -> dict[str, Any]:
        """What was done, in plain values for ``uns`` and JSON."""
        encoder, vocabulary = self.encoder, self.cells.vocabulary
        return {
            "geneformer_fast": __version__,
            "model": "Encoder" if isinstance(model, Encoder) else Path(model).name,
            "config": json.dumps(encoder.config.to_dict()),
            "layer": str(self.layer),
            "blocks_computed": encoder.config.layer_index(self.layer),
            "pool": self.pool,
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "vocabulary": str(vocabulary.get("name")),
            "vocabulary_fingerprint": str(vocabulary.get("fingerprint")),
            "cells": len(self.cells.lengths),
        }

    def to_memory(self) -> np.ndarray:
        """[n_rows, C] float32 embeddings of cells."""
        writer = ArrayWriter(self.cells.n_rows, self.width)
        self.stream(writer)
        return writer.array

    def stream(self, writer: RowWriter) -> None:
        """Embed cells window by window and hand them on in order."""
        for numbers, windows in self._windows():
            block = np.empty((len(numbers), self.width), dtype=np.float32)
            for part, hidden, tokens in windows:
                block[part] = self._pooled(hidden, tokens).cpu().numpy()
            writer.write(self.cells.rows[numbers], block)

    def genes(self) -> np.ndarray:
        """[n_tokens, C] float32: each token's mean hidden state over the cells that hold it; NaN where none does."""
        n_tokens = self.encoder.config.vocab_size
        sums = torch.zeros(n_tokens, self.width, dtype=torch.float64)
        counts = torch.zeros(n_tokens, dtype=torch.int64)
        for _, windows in self._windows():
            for _, hidden, tokens in windows:
                ids = tokens.values.cpu().long()
                sums.index_add_(0, ids, hidden.values.cpu().double())
                counts += torch.bincount(ids, minlength=n_tokens)
        special = [i for i in self.cells.special_ids if i < n_tokens]
        counts[special] = 0
        means = sums / counts[:, None]
        means[counts == 0] = float("nan")
        return means.float().numpy()

    def _windows(self) -> Iterator[tuple[np.ndarray, Iterator[tuple[np.ndarray, Ragged, Ragged]]]]:
        from tqdm import tqdm

        disable = None if self.progress is None else not self.progress
        with tqdm(total=len(self.cells.lengths), desc="embedding", unit="cell", disable=disable) as bar:
            for start in range(0, len(self.cells.lengths), WINDOW_CELLS):
                numbers = np.arange(start, min(start + WINDOW_CELLS, len(self.cells.lengths)))
                yield numbers, self._batches(numbers, bar)

    def _batches(self, numbers: np.ndarray, bar: Any) -> Iterator[tuple[np.ndarray, Ragged, Ragged]]:
        """(places in the window, hidden states, tokens) for batches of at most the token budget, longest first."""
        values, cu_seqlens = self.cells.read(numbers)
        lengths = np.diff(cu_seqlens)
        for part in token_batches(lengths, self.token_budget):
            pieces = [values[cu_seqlens[i] : cu_seqlens[i + 1]] for i in part]
            packed = torch.from_numpy(np.concatenate(pieces).astype(np.int64))
            tokens = Ragged.from_lengths(packed, torch.from_numpy(lengths[part]))
            self._check(tokens)
            with torch.inference_mode():
                tokens = tokens.to(self.encoder.device)
                hidden = self.encoder(tokens, layer=self.layer)
            yield part, hidden, tokens
            bar.update(len(part))

    def _check(self, tokens: Ragged) -> None:
        """Refuse tokens that do not fit, while they are still on the host: a GPU would only die of them."""
        if isinstance(self.encoder.embeddings, RankTokens):
            self.encoder.embeddings.check(tokens)
        cls_id = self.cells.cls_id
        if self.pool == "cls" and cls_id is not None and tokens.values[tokens.starts.long()].ne(cls_id).any():
            raise InputError(
                f"pool 'cls' needs token {cls_id} (CLS) at the start of every cell, and some cells start "
                "with a gene; use pool 'mean' or tokenize again"
            )

    def _pooled(self, hidden: Ragged, tokens: Ragged) -> torch.Tensor:
        """[B, C] embeddings of the cells of one batch."""
        with torch.inference_mode():
            if self.pool == "cls":
                return hidden.values[hidden.starts.long()].float()
            special = torch.tensor(self.cells.special_ids, device=tokens.values.device)
            weights = (~torch.isin(tokens.values, special)).to(hidden.values.dtype)
            lengths = hidden.lengths.long()
            sums = torch.segment_reduce(hidden.values * weights[:, None], "sum", lengths=lengths)
            return (sums / torch.segment_reduce(weights, "sum", lengths=lengths)[:, None]).float()


def token_batches(lengths: np.ndarray, token_budget: int) -> Iterator[np.ndarray]:
    """Group cells into batches of at most ``token_budget`` tokens, longest cells first; a longer cell stands alone.

    Parameters
    ----------
    lengths
        [n] tokens per cell.
    token_budget
        Most tokens in a batch of several cells.

    Yields
    ------
    numpy.ndarray
        Cell numbers; every cell exactly once.
    """
    order = np.argsort(-lengths, kind="stable")
    start, total = 0, 0
    for stop, cell in enumerate(order):
        length = int(lengths[cell])
        if stop > start and total + length > token_budget:
            yield order[start:stop]
            start, total = stop, 0
        total += length
    if start < len(order):
        yield order[start:]
