"""What a run will be: cells, variants, tokens, rows, and what they take, known before anything is computed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from geneformer_fast.errors import InputError
from geneformer_fast.extract.encoding import cores_as_workers
from geneformer_fast.perturbation.edits import Edits
from geneformer_fast.perturbation.selection import ChosenCells, cells_at_once, packed_cells
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.tokenization.pipeline import ordered_map

if TYPE_CHECKING:
    from geneformer_fast.perturbation.engine import PerturbationRun

# Of a row on the disk, as the writer compresses it: measured on cells of 300 to 1,500 genes.
_BYTES_OF_CELL_VALUE, _BYTES_OF_GENE_VALUE = 7, 3
# Shares of all tokens, the longest cells first, where the cells stand that are timed.
_TIMED_AT = (0.0, 0.8)
_PHRASES = {
    "where": "that where takes",
    "state": "in the state to start from",
    "genes": "with the genes for it",
    "max_cells": "drawn",
    "window": "in the window",
}


@dataclass(frozen=True)
class Plan:
    """The cells of a run, and what is to be computed of each.

    Attributes
    ----------
    chosen
        The cells, by rank.
    n_variants, n_tokens
        [n] int64, by rank: variants of each cell, and their tokens.
    n_cell_values, n_gene_values
        [n] int64, by rank: rows of values of the cell itself, and of its genes.
    seconds
        How long it will take (:func:`estimated_seconds`); None where nobody has measured.
    """

    chosen: ChosenCells
    n_variants: np.ndarray
    n_tokens: np.ndarray
    n_cell_values: np.ndarray
    n_gene_values: np.ndarray
    seconds: float | None = None

    @property
    def n_rows(self) -> np.ndarray:
        """[n] int64, by rank: rows of values of both kinds."""
        return self.n_cell_values + self.n_gene_values

    @property
    def n_bytes(self) -> int:
        """About what the values take on the disk."""
        n_cell_values, n_gene_values = int(self.n_cell_values.sum()), int(self.n_gene_values.sum())
        return n_cell_values * _BYTES_OF_CELL_VALUE + n_gene_values * _BYTES_OF_GENE_VALUE

    def of_ranks(self, ranks: np.ndarray) -> Plan:
        """The same for some of the cells; nobody has measured these."""
        chosen = ChosenCells(self.chosen.cells[ranks], self.chosen.lengths[ranks], self.chosen.left)
        counts = (self.n_variants, self.n_tokens, self.n_cell_values, self.n_gene_values)
        return Plan(chosen, *(count[ranks] for count in counts))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        found: dict[str, Any] = {
            "n_cells": len(self.chosen),
            "n_cells_without_variants": int((self.n_variants == 0).sum()),
            "n_variants": int(self.n_variants.sum()),
            "n_tokens": int(self.n_tokens.sum()),
            "longest_cell": int(self.chosen.lengths.max(initial=0)),
            "n_rows": int(self.n_rows.sum()),
            "n_bytes": self.n_bytes,
            "cells_left": dict(self.chosen.left),
        }
        return found if self.seconds is None else found | {"estimated_seconds": round(self.seconds, 1)}

    def text(self) -> str:
        """The same in words, a line for each thing."""
        said = self.to_dict()
        steps = [f"{count:,} {_PHRASES[name]}" for name, count in self.chosen.left.items() if name in _PHRASES]
        of = f" of {self.chosen.left['tokens']:,} ({', then '.join(steps)})" if steps else ""
        lines = [
            f"{said['n_cells']:,} cells{of}; the longest has {said['longest_cell']:,} tokens",
            f"{said['n_variants']:,} perturbed cells of {said['n_tokens']:,} tokens",
        ]
        if without := said["n_cells_without_variants"]:
            lines.append(f"{without:,} of the cells have nothing to perturb: too few genes, or none of those asked for")
        size = f"{said['n_rows']:,} values, about {in_words(self.n_bytes, _SIZES)}"
        if self.seconds is not None:
            rate = said["n_variants"] / self.seconds if self.seconds else 0.0
            size += f"; about {in_words(self.seconds, _TIMES)} at {rate:,.1f} perturbed cells/s"
        return "\n".join([*lines, size])


def plan_of(
    folder: TokenFolder, chosen: ChosenCells, edits: Edits, *, n_states: int = 0, has_gene_values: bool = False
) -> Plan:
    """Count what is to be computed; cells are read once, and nothing else is done with them.

    Parameters
    ----------
    folder, chosen
        The cells.
    edits
        What is done to each.
    n_states
        States that shifts are taken to; 0 without any.
    has_gene_values
        Whether every gene of every variant has a value.

    Raises
    ------
    InputError
        No cell has anything to perturb.
    """
    counts: list[np.ndarray] = []
    for _, packed in packed_cells(folder, chosen.cells, cells_at_once(edits)):
        edited = edits.on(packed)
        n_gene_values = edited.n_common * int(has_gene_values)
        each = (edited.n_variants, edited.n_tokens, edited.n_variants * max(1, n_states), n_gene_values)
        counts.append(np.stack(each))
    plan = Plan(chosen, *np.concatenate(counts, axis=1))
    if not plan.n_variants.any():
        raise InputError(f"{folder.path}: none of {len(chosen):,} cells has a gene to {edits.kind}")
    return plan


def estimated_seconds(run: PerturbationRun, plan: Plan) -> float:
    """How long a run will take, from the time of batches of a long and of a shorter cell, after one that warms up.

    Time grows with tokens and, by attention, with tokens times the length of their cell; both are found from the two.
    """
    ranks = _timed_ranks(plan)
    _seconds_per_token(run, ranks[0])
    seconds = [_seconds_per_token(run, rank) for rank in ranks]
    lengths = plan.chosen.lengths[ranks].astype(np.float64)
    slope = 0.0
    if lengths[0] > lengths[-1]:
        slope = max(0.0, (seconds[0] - seconds[-1]) / (lengths[0] - lengths[-1]))
    of_token = np.maximum(seconds[-1] + slope * (plan.chosen.lengths - lengths[-1]), 0.0)
    return float((plan.n_tokens * of_token).sum())


def _timed_ranks(plan: Plan) -> list[int]:
    """Ranks of the longest cell that has variants, and of one that a given share of all tokens stands before."""
    before = np.cumsum(plan.n_tokens) - plan.n_tokens
    there = np.flatnonzero(plan.n_tokens)
    places = np.searchsorted(before[there], np.array(_TIMED_AT) * plan.n_tokens.sum(), side="right") - 1
    return there[np.maximum(places, 0)].tolist()


def _seconds_per_token(run: PerturbationRun, rank: int) -> float:
    """Time a batch of a cell's variants for each worker."""
    group = run.group(rank, rank + 1)
    first, last = next(group.edited.slices(run.token_budget))

    def work(_: int) -> int:
        with torch.inference_mode():
            variants = group.edited.variants(first, last)
            run.effects(group, variants)
            return max(1, variants.tokens.n_tokens)

    device = run.encoder.device
    with cores_as_workers(device) as cores, torch.inference_mode():
        group.originals(run.originals)
        workers = min(cores, run.workers)
        batches = range(max(1, workers))
        begin = time.perf_counter()
        n_tokens = sum(ordered_map(work, batches, workers=workers) if workers else map(work, batches))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / n_tokens


_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
_TIMES = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def in_words(amount: float, units: tuple[tuple[float, str], ...]) -> str:
    """An amount in the largest unit that it has one of."""
    size, name = next((unit for unit in units if amount >= unit[0]), units[-1])
    number = amount / size
    is_whole = number >= 20 or number == int(number)
    return f"{number:,.0f} {name}" if is_whole else f"{number:,.1f} {name}"
