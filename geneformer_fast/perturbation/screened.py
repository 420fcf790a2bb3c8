"""What a screen says of all genes of some cells, or of pairs of them: means of its estimates, largest effects first."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from geneformer_fast.errors import InputError
from geneformer_fast.perturbation.screen import GradientScreen
from geneformer_fast.perturbation.selection import packed_cells
from geneformer_fast.progress import Progress
from geneformer_fast.tokenization.arrow import TokenFolder

_CELLS_AT_ONCE = 256
#: Pairs are looked for among the genes with the largest effects by themselves: so many, or so many per pair wanted.
LEAST_PAIRED, PAIRED_PER_BEST = 256, 4
#: Never more than these: all pairs of them are kept, 8 bytes each for every state.
_MOST_PAIRED = 4_096


@dataclass(frozen=True)
class Screened:
    """Genes, or pairs of genes, by what a screen says of them.

    Attributes
    ----------
    tokens
        [N, 1] or [N, 2] int64, those with the largest effects first.
    estimates
        [N, S] float64, means over the cells that have the gene, or both.
    n_cells
        [N] int64, how many these are.
    """

    tokens: np.ndarray
    estimates: np.ndarray
    n_cells: np.ndarray

    def to_dict(self, best: int) -> dict[str, Any]:
        """Plain values, of the best of them."""
        shown = zip(self.tokens[:best].tolist(), self.estimates[:best].tolist(), self.n_cells[:best], strict=True)
        is_pairs = self.tokens.shape[1] > 1
        rows = [
            {**({"tokens": tokens} if is_pairs else {"token": tokens[0]}), "estimates": values, "n_cells": int(n)}
            for tokens, values, n in shown
        ]
        return {"screen": "gradient", "n_pairs" if is_pairs else "n_genes": len(self.tokens), "best": rows}


def screened_genes(
    screen: GradientScreen, folder: TokenFolder, cells: np.ndarray, *, goal: int = 0, progress: bool | None = None
) -> Screened:
    """Genes of some cells of a folder, by the size of their mean effect on the state ``goal``."""
    tally = _Tally(screen)
    for genes, changes in _changes_of(screen, folder, cells, progress):
        tally.add(genes, changes)
    return tally.screened(goal)


def screened_pairs(
    screen: GradientScreen,
    folder: TokenFolder,
    cells: np.ndarray,
    *,
    goal: int = 0,
    best: int,
    anchor: int | None = None,
    progress: bool | None = None,
) -> Screened:
    """Pairs of genes of some cells of a folder, by the size of their mean effect on the state ``goal``.

    To first order the changes that two genes make add up. Pairs are those of the genes whose own mean effects are
    largest (:data:`PAIRED_PER_BEST` for every pair wanted, at least :data:`LEAST_PAIRED`), or of the anchor with each
    of all genes. What each gene changes in each cell is kept in a temporary file meanwhile.

    Raises
    ------
    InputError
        No cell has the anchor and another gene.
    """
    tally, sizes = _Tally(screen), []
    with tempfile.TemporaryFile() as kept:
        for genes, changes in _changes_of(screen, folder, cells, progress):
            tally.add(genes, changes)
            if anchor is None or anchor in genes:
                sizes.append(len(genes))
                kept.write(genes.astype(np.int64).tobytes())
                kept.write(changes.astype(np.float32).tobytes())
        kept.seek(0)
        stored = _stored(kept, sizes, screen.n_changes)
        if anchor is not None:
            return _with_anchor(screen, stored, anchor, goal)
        n_genes = min(max(LEAST_PAIRED, PAIRED_PER_BEST * best), _MOST_PAIRED)
        return _pairs_of(screen, stored, np.sort(tally.screened(goal).tokens[:n_genes, 0]), goal)


class _Tally:
    """Sums over cells of what is estimated for single genes."""

    def __init__(self, screen: GradientScreen) -> None:
        self._screen = screen
        self._genes: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def add(self, genes: np.ndarray, changes: np.ndarray) -> None:
        # The first gene is in front already.
        first = int(self._screen.kind == "overexpress")
        self._genes.append(genes[first:])
        self._values.append(self._screen.values(changes[first:]))

    def screened(self, goal: int) -> Screened:
        genes, place, n_cells = np.unique(np.concatenate(self._genes), return_inverse=True, return_counts=True)
        sums = np.zeros((len(genes), self._screen.n_values))
        np.add.at(sums, place, np.concatenate(self._values))
        return _by_size(self._screen, genes[:, None], sums / n_cells[:, None], n_cells, goal)


def _with_anchor(
    screen: GradientScreen, stored: Iterator[tuple[np.ndarray, np.ndarray]], anchor: int, goal: int
) -> Screened:
    """Pairs of an anchor with every other gene of the cells that have it."""
    genes_of, values_of = [], []
    for genes, changes in stored:
        is_anchor = genes == anchor
        genes_of.append(genes[~is_anchor])
        values_of.append(screen.values(changes[~is_anchor] + changes[is_anchor]))
    if not any(map(len, genes_of)):
        raise InputError(f"no cell has the anchor (token {anchor}) and another gene")
    others, place, n_cells = np.unique(np.concatenate(genes_of), return_inverse=True, return_counts=True)
    sums = np.zeros((len(others), screen.n_values))
    np.add.at(sums, place, np.concatenate(values_of))
    pairs = np.stack([np.full_like(others, anchor), others], 1)
    return _by_size(screen, pairs, sums / n_cells[:, None], n_cells, goal)


def _pairs_of(
    screen: GradientScreen, stored: Iterator[tuple[np.ndarray, np.ndarray]], among: np.ndarray, goal: int
) -> Screened:
    """Pairs among some genes, ascending tokens, in the cells that have both."""
    sums = np.zeros((screen.n_values, len(among), len(among)))
    counts = np.zeros((len(among), len(among)), dtype=np.int64)
    for genes, changes in stored:
        is_among = np.isin(genes, among)
        place, mine = np.searchsorted(among, genes[is_among]), changes[is_among].astype(np.float64)
        if screen.has_states:
            values = (mine[:, None] + mine[None, :]).transpose(2, 0, 1)
        else:
            # The mean of (a + b) squared over directions, of all pairs at once.
            products = mine @ mine.T / mine.shape[1]
            own = np.diag(products)
            values = 1 - (own[:, None] + 2 * products + own[None, :])[None] / 2
        grid = np.ix_(place, place)
        counts[grid] += 1
        for number, each in enumerate(values):
            sums[number][grid] += each
    first, second = np.nonzero(np.triu(counts, 1))
    n_cells = counts[first, second]
    estimates = sums[:, first, second].T / n_cells[:, None]
    return _by_size(screen, np.stack([among[first], among[second]], 1), estimates, n_cells, goal)


def _by_size(
    screen: GradientScreen, tokens: np.ndarray, estimates: np.ndarray, n_cells: np.ndarray, goal: int
) -> Screened:
    sizes = np.abs(estimates[:, goal] - (0.0 if screen.has_states else 1.0))
    order = np.argsort(-np.nan_to_num(sizes), kind="stable")
    return Screened(tokens[order], estimates[order], n_cells[order])


def _changes_of(
    screen: GradientScreen, folder: TokenFolder, cells: np.ndarray, progress: bool | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    with Progress(len(cells), "screening", "cells", progress) as bar:
        for _, packed in packed_cells(folder, cells, _CELLS_AT_ONCE):
            for each in packed.to(screen.encoder.device).cells():
                yield screen.changes(each)
                bar.update(1)


def _stored(kept: Any, sizes: list[int], n_changes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for n in sizes:
        genes = np.frombuffer(kept.read(8 * n), dtype=np.int64)
        yield genes, np.frombuffer(kept.read(4 * n * n_changes), dtype=np.float32).reshape(n, n_changes)
