"""Embedding, as ``geneformer-fast embed`` does it: cells read, sorted, encoded and pooled, batch by batch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geneformer_fast import families
from geneformer_fast.encoder import Encoder
from geneformer_fast.extract.encoding import MOST_WORKERS, TOKEN_BUDGET, WINDOW_CELLS, EncodingRun, token_batches
from geneformer_fast.extract.pooling import choose_pool
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.request import EMBED, SECONDS, Request
from geneformer_fast.profiling.scenarios.cells import ProfileCells, to_embed
from geneformer_fast.profiling.scenarios.passes import measured, tried


class Embedding:
    """One encoder over the cells of a request.

    Parameters
    ----------
    request
        What was asked for.
    encoder
        On its device, in its dtype.
    cells
        What is embedded.
    """

    mode = EMBED

    def __init__(self, request: Request, encoder: Encoder, cells: ProfileCells) -> None:
        self.request, self.encoder, self.cells = request, encoder, cells
        self.layer: str | int = request.layer or families.family_reading(encoder.config).layer
        self.n_layers = encoder.config.layer_index(self.layer)
        self.token_budget = request.token_budget or TOKEN_BUDGET.get(encoder.device.type, TOKEN_BUDGET["cpu"])
        self.pool = choose_pool(None, encoder.config, cells.identity["special"].get("cls"))
        self.n_cells = min(request.cells or cells.n_cells, cells.n_cells)

    def with_budget(self, token_budget: int) -> Embedding:
        """The same with other batches."""
        other = copy.copy(self)
        other.token_budget = token_budget
        return other

    @property
    def name(self) -> str:
        """The model, as it was named."""
        return str(self.request.model)

    def n_steps(self, chosen: np.ndarray) -> int:
        """Batches of a pass over some cells."""
        lengths = self.cells.lengths()[chosen]
        windows = (lengths[start : start + WINDOW_CELLS] for start in range(0, len(lengths), WINDOW_CELLS))
        return sum(sum(1 for _ in token_batches(window, self.token_budget)) for window in windows)

    def steps(self, chosen: np.ndarray, *, is_alone: bool = False) -> Iterator[dict[str, Any]]:
        """One pass: the lengths of each batch, once it is embedded."""
        run = self._run(chosen)
        if is_alone:
            run.workers = 0
        with contextlib.closing(run.batches()) as batches:
            for numbers, _ in batches:
                yield {"lengths": run.cells.lengths[numbers]}

    def embeddings(self, chosen: np.ndarray) -> np.ndarray:
        """[len(chosen), C] of some cells."""
        return self._run(chosen).to_memory()

    def _run(self, chosen: np.ndarray) -> EncodingRun:
        cells = to_embed(self.cells, chosen)
        return EncodingRun(self.encoder, cells, self.pool, self.layer, self.token_budget, progress=False)

    def settings(self) -> dict[str, Any]:
        """What was chosen, for the report."""
        return {
            "token_budget": self.token_budget, "layer": str(self.layer), "blocks_computed": self.n_layers,
            "pool": self.pool, "batches_at_once": self._at_once(),
        }  # fmt: skip

    def _at_once(self) -> int:
        """Batches that are computed at the same time, but for those that are watched: one each."""
        return min(torch.get_num_threads(), MOST_WORKERS) if self.encoder.device.type == "cpu" else 1

    def report(self, trace: Path | None = None) -> Report:
        """Measure it."""
        return measured(
            self, self.n_cells, steps=self.request.steps, seconds=self.request.seconds or SECONDS, trace=trace,
            model=self.encoder, name=self.name, mode=self.mode, n_layers=self.n_layers, tokens=self.cells.what,
            settings=self.settings(),
        )  # fmt: skip

    def cells_per_s(self) -> float:
        """Of a few batches, in a moment."""
        return tried(self, self.n_cells).cells_per_s
