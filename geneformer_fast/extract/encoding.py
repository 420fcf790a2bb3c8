"""One pass of an encoder over cells: windows, batches by token budget, pooling."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from geneformer_kernels.cpu.onednn import keep_few_products

from geneformer_fast import __version__, families
from geneformer_fast.data.loader import as_tensor
from geneformer_fast.embeddings import RankTokens
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import InputError
from geneformer_fast.extract.batch_memory import batch_memory
from geneformer_fast.extract.budget import MemoryBudget, Need
from geneformer_fast.extract.cells import Cells
from geneformer_fast.extract.files import ArrayWriter, RowWriter
from geneformer_fast.extract.pooling import Place, pooled
from geneformer_fast.progress import Progress
from geneformer_fast.ragged import Ragged
from geneformer_fast.tokenization.pipeline import ordered_map

# Cells are sorted by length within a window of this many, so that memory does not grow with the number of cells.
WINDOW_CELLS = 8192
# On the CPU a batch's activations should stay in the second-level cache; a GPU wants enough tokens to fill it.
TOKEN_BUDGET = {"cpu": 4096, "cuda": 131_072}
# More Python threads than this would wait for the interpreter lock; further cores share a batch.
MOST_WORKERS = 8
# Values of a window of cells, at most: as many as 8,192 of the longest cells of Geneformer V2 have.
WINDOW_VALUES = WINDOW_CELLS * 4096
# Of the first cell, what is encoded before a budget of memory is divided.
_FIRST_TOKENS = 256
# Of a window's rows, in the result and in a writer: the block, what it is turned into, and twice that compressed.
_COPIES = 6

Result = TypeVar("Result")
# First and last cell of the window, places in it, tokens, and which of these are measured (None: all).
Batch = tuple[tuple[int, int], np.ndarray, Ragged, torch.Tensor | None]


class EncodingRun:
    """One pass of an encoder over cells."""

    #: What progress says is being done.
    what = "embedding"

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
        self.reading = families.family_reading(encoder.config)
        self.token_budget = token_budget or TOKEN_BUDGET.get(encoder.device.type, TOKEN_BUDGET["cpu"])
        self._asked_budget, self.window_cells, self.workers = token_budget, WINDOW_CELLS, MOST_WORKERS
        self.memory: MemoryBudget | None = None

    def keep_within(self, memory: MemoryBudget | None, *, result_bytes: int = 0, waiting_bytes: int = 0) -> None:
        """Choose tokens of a batch, batches at a time and cells of a window so that a budget of memory holds.

        A first batch, of some tokens of the first cell, brings everything into memory that stays there: weights that
        were mapped only, compiled loops, libraries that are loaded late. A second one shows what of it later batches
        use: compiling, and starting, take much that is never needed again.

        Parameters
        ----------
        memory
            The budget; None keeps what was chosen without one.
        result_bytes
            Of what is there in the end, in memory.
        waiting_bytes
            Of what is made of one token and waits to be taken.

        Raises
        ------
        UnsupportedError
            The budget is too small; says which one is not.
        """
        lengths = self.cells.lengths
        if memory is None or not len(lengths):
            return
        first, _ = self.cells.read(np.arange(1))
        batch = Ragged.from_cells([as_tensor(first[:_FIRST_TOKENS])])
        self._check(batch)
        with torch.inference_mode(), cores_as_workers(self.encoder.device, is_keeping=False) as workers:
            batch = batch.to(self.encoder.device)
            for _ in range(2):
                memory.memory.settle()
                hidden = self.encoder(batch, layer=self.layer)
                if self.pool != "gene":  # whose means are over cells, and made elsewhere
                    self._pooled(hidden, batch, None)
        longest = max(int(lengths.max()), self._asked_budget or 0)
        # Tokens of the window that is read and of the one in work; a writer has copies of the rows it is given.
        cell = 3 * first[:1].nbytes * int(lengths.max()) + _COPIES * 4 * self.width
        is_host = self.encoder.device.type == "cpu"  # where results and windows are
        # A thread computes for one batch at a time, however many batches there are.
        of_batches = batch_memory(self.encoder, int(lengths.max()))
        need = Need(
            fixed=memory.memory.used() + (of_batches.thread * torch.get_num_threads() if is_host else 0),
            peak=memory.memory.peak(),
            token=of_batches.row + 3 * waiting_bytes,
            batch=of_batches.call,
            cell=cell if is_host else 0,
            result=result_bytes if is_host else 0,
            longest=longest,
            n_cells=len(lengths),
        )
        chosen = memory.plan(need, tokens=self.token_budget, workers=workers, window_cells=WINDOW_CELLS)
        self.token_budget, self.workers, self.window_cells = chosen.token_budget, chosen.workers, chosen.window_cells
        self.memory = memory

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
            "quantization": scheme_of(encoder),
            "vocabulary": str(vocabulary.get("name")),
            "vocabulary_fingerprint": str(vocabulary.get("fingerprint")),
            "cells": len(self.cells.lengths),
            **self.cells.selection,
        }

    def to_memory(self) -> np.ndarray:
        """[n_rows, C] float32 embeddings of cells."""
        writer = ArrayWriter(self.cells.n_rows, self.width)
        self.stream(writer)
        return writer.array

    def batches(self) -> Generator[tuple[np.ndarray, np.ndarray]]:
        """(cells, their [B, C] embeddings) of one batch after another, as :meth:`stream` computes them.

        With ``workers`` set to 0 they are computed by the thread that asks for them, one at a time.
        """
        for (first, _), part, embeddings in self._results(self._pooled):
            yield first + part, embeddings

    def stream(self, writer: RowWriter) -> None:
        """Embed cells window by window and hand them on in order."""
        for numbers, results in itertools.groupby(self._results(self._pooled), key=lambda result: result[0]):
            window = np.arange(*numbers)
            block = np.empty((len(window), self.width), dtype=np.float32)
            for _, part, embeddings in results:
                block[part] = embeddings
            writer.write(self.cells.rows[window], block)

    def genes(self) -> tuple[np.ndarray, np.ndarray]:
        """Gene embeddings.

        Returns
        -------
        means, n_cells
            [n_tokens, C] float32, each token's mean hidden state over the cells that hold it, NaN where none does and
            for special tokens; [n_tokens] int64, how many cells hold it. Of models over values genes are in the order
            of their list, and cells hold those whose value is above 0.
        """
        n_tokens = self.n_tokens
        sums = torch.zeros(n_tokens, self.width, dtype=torch.float64)
        counts = torch.zeros(n_tokens, dtype=torch.int64)
        for _, _, (ids, hidden) in self._results(self._genes_of):
            sums.index_add_(0, ids, hidden)
            counts += torch.bincount(ids, minlength=n_tokens)
        special = [] if self._is_dense else [i for i in self.cells.special_ids if i < n_tokens]
        counts[special] = 0
        means = sums.div_(counts[:, None])
        means[counts == 0] = float("nan")
        return means.float().numpy(), counts.numpy()

    @property
    def n_tokens(self) -> int:
        """Rows of gene embeddings."""
        config = self.encoder.config
        return config.max_len - self._n_behind if self._is_dense else config.vocab_size

    @property
    def _is_dense(self) -> bool:
        """Whether every cell has a place for every gene."""
        if self.cells.values is not None:
            return self.cells.values.preparation.is_dense
        return self.encoder.config.inputs == "values"

    @property
    def _n_behind(self) -> int:
        """Positions behind the genes of a cell."""
        if self.cells.values is not None and self._is_dense:
            return self.cells.values.preparation.n_extra
        return self.reading.n_behind

    def _genes_of(self, hidden: Ragged, tokens: Ragged, _: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Genes that a batch's cells express, and their hidden states in float64, on the host."""
        if not self._is_dense:
            ids = tokens.values if tokens.values.ndim == 1 else tokens.values[:, 0].long()
            return ids.cpu(), hidden.values.cpu().double()
        is_there = Place(tokens, n_behind=self._n_behind).is_gene() & (tokens.values > 0)
        return tokens.positions()[is_there].cpu(), hidden.values[is_there].cpu().double()

    def _results(
        self, finish: Callable[[Ragged, Ragged, torch.Tensor | None], Result]
    ) -> Iterator[tuple[tuple[int, int], np.ndarray, Result]]:
        """(first and last cell of the window, places in it, what ``finish`` makes of hidden states and tokens).

        Of values it is also given which of the positions are measured.
        """

        def work(batch: Batch) -> tuple[tuple[int, int], np.ndarray, Result]:
            window, part, tokens, measured = batch
            held = contextlib.nullcontext() if self.memory is None else self.memory.batch(tokens.n_tokens)
            with held, torch.inference_mode():
                tokens = tokens.to(self.encoder.device)
                measured = None if measured is None else measured.to(self.encoder.device)
                return window, part, finish(self.encoder(tokens, layer=self.layer), tokens, measured)

        def results_of(workers: int) -> Generator[tuple[tuple[int, int], np.ndarray, Result]]:
            if workers:
                return ordered_map(work, self._batches(), workers=workers)
            return (work(batch) for batch in self._batches())

        with (
            cores_as_workers(self.encoder.device, self.workers, is_keeping=self.memory is None) as workers,
            Progress(len(self.cells.lengths), self.what, "cells", self.progress) as bar,
            contextlib.closing(results_of(workers)) as results,
        ):
            for window, part, result in results:
                yield window, part, result
                bar.update(len(part))

    def _windows(self) -> Iterator[tuple[int, int]]:
        """Ranges of cells that are read and sorted together, of bounded memory however long cells are."""
        start, ends = 0, np.cumsum(self.cells.lengths)
        while start < len(ends):
            done = int(ends[start - 1]) if start else 0
            most = max(1, int(np.searchsorted(ends, done + WINDOW_VALUES, side="right")) - start)
            stop = min(start + min(self.window_cells, most), len(ends))
            yield start, stop
            start = stop

    def _batches(self) -> Iterator[Batch]:
        """Batches of at most the token budget, longest cells of a window first."""
        for window in self._windows():
            values, cu_seqlens = self.cells.read(np.arange(*window))
            lengths = np.diff(cu_seqlens)
            room = self.token_budget if self.memory is None else self.memory.room()
            for part in token_batches(lengths, max(1, min(self.token_budget, room))):
                pieces = [values[cu_seqlens[i] : cu_seqlens[i + 1]] for i in part]
                tokens = Ragged.from_lengths(as_tensor(np.concatenate(pieces)), torch.from_numpy(lengths[part]))
                self._check(tokens)
                yield window, part, tokens, self._measured(window[0] + part)

    def _measured(self, cells: np.ndarray) -> torch.Tensor | None:
        """Which positions of some cells are not of genes that their files lack, where that matters."""
        of_values = self.cells.values
        found = None if of_values is None or self.pool in ("cls", "gene") else of_values.measured(cells)
        return None if found is None else torch.from_numpy(found)

    def _check(self, tokens: Ragged) -> None:
        """Refuse tokens that do not fit, while they are still on the host: a GPU would only die of them."""
        if isinstance(self.encoder.embeddings, RankTokens):
            self.encoder.embeddings.check(tokens)
        cls_id = self.cells.cls_id
        first = tokens.values[tokens.starts.long()]
        if self.pool == "cls" and cls_id is not None and (first if first.ndim == 1 else first[:, 0]).ne(cls_id).any():
            raise InputError(
                f"pool 'cls' needs token {cls_id} (CLS) at the start of every cell, and some cells start "
                "with a gene; use pool 'mean' or tokenize again"
            )

    def _pooled(self, hidden: Ragged, tokens: Ragged, measured: torch.Tensor | None) -> np.ndarray:
        """[B, C] float32 embeddings of the cells of one batch."""
        place = Place(tokens, self.cells.special_ids, self._n_behind, measured)
        return pooled(hidden, self.pool, place, is_normalised=self.reading.normalise).cpu().numpy()


def scheme_of(encoder: Encoder) -> str:
    """How a model is quantized, in a word, for provenance: a scheme of :func:`geneformer_fast.quantize`, or none."""
    return "none" if encoder.quantization is None else encoder.quantization.scheme


@contextlib.contextmanager
def cores_as_workers(device: torch.device, most: int = MOST_WORKERS, *, is_keeping: bool = True) -> Iterator[int]:
    """How many batches to encode at the same time: at most ``most``; 0 for none beside the calling thread.

    On a CPU each core takes a batch of its own, with torch held to one thread meanwhile, which saves the cores from
    waiting for each other after every small operation; where there are fewer batches than cores, they share them. A GPU
    takes one batch at a time. ``is_keeping``: what a batch frees is kept for the next.
    """
    n_threads = torch.get_num_threads()
    workers = min(n_threads, most)
    if device.type == "cpu":
        if is_keeping:
            keep_freed_memory()
        keep_few_products()
    if device.type != "cpu" or workers <= 1:
        yield min(1, workers)
        return
    torch.set_num_threads(n_threads // workers)
    try:
        yield workers
    finally:
        torch.set_num_threads(n_threads)


def keep_freed_memory() -> None:
    """Let the C library keep what one batch frees for the next, instead of handing it back to the system.

    glibc raises the sizes from which it maps and unmaps memory when it sees a large block freed (up to 32 MB); without
    that every batch pays for fresh pages again, 6 % of the time (V1-10M, 4,096 tokens, EPYC, 2026-11-24).
    """
    torch.empty(32_000_000, dtype=torch.uint8)


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
