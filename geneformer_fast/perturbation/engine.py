"""One pass over perturbed cells: groups of cells, batches of their variants by token budget, values piece by piece."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from geneformer_fast.embeddings import RankTokens
from geneformer_fast.encoder import Encoder
from geneformer_fast.extract.encoding import MOST_WORKERS, TOKEN_BUDGET, cores_as_workers
from geneformer_fast.perturbation.compare import Comparison, Effects, Originals, PendingEffects
from geneformer_fast.perturbation.edits import EditedCells, Edits
from geneformer_fast.perturbation.encoder import VariantEncoder
from geneformer_fast.perturbation.official_limits import cut_as_officially
from geneformer_fast.perturbation.variants import Variants
from geneformer_fast.progress import Progress
from geneformer_fast.ragged import Ragged
from geneformer_fast.tokenization.pipeline import ordered_map


class Group:
    """Cells that are read together, whose originals are computed once for all of their variants.

    Parameters
    ----------
    first
        Rank of the first.
    edited
        The cells, on the device, and their variants.
    """

    def __init__(self, first: int, edited: EditedCells) -> None:
        self.first, self.edited = first, edited
        #: [n + 1] the first variant of each cell, and the number of all.
        self.bounds = np.concatenate([[0], np.cumsum(edited.n_variants)])
        self._lock = threading.Lock()
        self._originals: Originals | None = None

    def originals(self, make: Callable[[Ragged], Originals]) -> Originals:
        """Of all its cells; made by whoever asks first."""
        with self._lock:
            if self._originals is None:
                self._originals = make(self.edited.cells)
            return self._originals

    def cells_of(self, start: int, stop: int) -> range:
        """Places in the group of the cells that variants ``start`` to ``stop`` are of."""
        first, last = np.searchsorted(self.bounds, (start, stop - 1), side="right") - 1
        return range(int(first), int(last) + 1)


@dataclass(frozen=True)
class CellEffects:
    """Values of consecutive variants of one cell.

    Attributes
    ----------
    rank
        The cell's place among those that are processed.
    perturbed
        [V, k] int64: what was perturbed in each variant, filled up with -1.
    item, dose
        [V] int64: which list, pair or set, and which of the doses, as in :class:`Variants`.
    effects
        The values; ``effects.variant`` counts these variants.
    """

    rank: int
    perturbed: np.ndarray
    item: np.ndarray
    dose: np.ndarray
    effects: Effects


@dataclass(frozen=True)
class _Batch:
    """Consecutive variants of a group."""

    group: Group
    start: int
    stop: int


class PerturbationRun:
    """One pass of an encoder over variants of cells.

    Which cells stand in one group, and which variants in one batch, follows from the cells and the budget alone, so
    that neither the number of workers nor the place where a run goes on changes a value.

    Parameters
    ----------
    encoder
        The model.
    edits
        What is done to each cell.
    comparison
        What is compared.
    layer
        Whose hidden states are compared, as in :meth:`Encoder.forward`.
    lengths
        [n] tokens of the cells, by rank.
    read
        Takes ranks, gives packed tokens and cumulative lengths.
    token_budget
        Tokens in a batch of several variants; None chooses by device.
    workers
        Most batches at a time; None: one for each core of a CPU, or one on a card.
    progress
        As in :class:`~geneformer_fast.progress.Progress`.
    is_official
        Whether lists that are overexpressed are cut as the official tool cuts them.
    """

    def __init__(
        self,
        encoder: Encoder,
        edits: Edits,
        comparison: Comparison,
        layer: str | int,
        lengths: np.ndarray,
        read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        *,
        token_budget: int | None = None,
        workers: int | None = None,
        progress: bool | None = False,
        is_official: bool = False,
    ) -> None:
        self.encoder, self.edits, self.comparison, self.layer = encoder, edits, comparison, layer
        self.lengths, self.read, self.progress = lengths, read, progress
        self.token_budget = token_budget or TOKEN_BUDGET.get(encoder.device.type, TOKEN_BUDGET["cpu"])
        self.workers = MOST_WORKERS if workers is None else workers
        self._is_cut_officially = (
            is_official and edits.kind == "overexpress" and edits.items is not None and edits.anchor is None
        )
        self.reader = VariantEncoder(encoder, layer, comparison.reads)

    def groups(self) -> list[tuple[int, int]]:
        """First and last rank (exclusive) of cells that have at most the token budget together, or are one cell."""
        found, first, total = [], 0, 0
        for rank, length in enumerate(self.lengths.tolist()):
            if rank > first and total + length > self.token_budget:
                found.append((first, rank))
                first, total = rank, 0
            total += length
        if first < len(self.lengths):
            found.append((first, len(self.lengths)))
        return found

    def group(self, first: int, last: int) -> Group:
        """Cells of some ranks, on the device."""
        values, bounds = self.read(np.arange(first, last))
        packed = torch.from_numpy(values.astype(np.int64))
        tokens = Ragged.from_lengths(packed, torch.from_numpy(np.diff(bounds)))
        # While they are still on the host: a card would only die of tokens that do not fit.
        if isinstance(self.encoder.embeddings, RankTokens):
            self.encoder.embeddings.check(tokens)
        return Group(first, self.edits.on(tokens.to(self.encoder.device), np.arange(first, last)))

    def originals(self, tokens: Ragged) -> Originals:
        """What variants of cells are compared with."""
        return self.comparison.originals(tokens, self.reader(tokens))

    def variants(self, group: Group, start: int, stop: int) -> Variants:
        """Variants of a group, by their numbers."""
        made = group.edited.variants(start, stop)
        if not self._is_cut_officially or self.edits.max_len is None:
            return made
        cells = group.edited.cells
        return cut_as_officially(made, cells, n_back=self.edits.back, max_len=self.edits.max_len)

    def effects(self, group: Group, variants: Variants) -> Effects:
        """Values of some variants of a group."""
        return self._pending(group, variants).on_host()

    def _pending(self, group: Group, variants: Variants) -> PendingEffects:
        originals = group.originals(self.originals)
        if variants.shortened is not None:
            originals = originals + self.originals(variants.shortened)
        return self.comparison.effects(variants, self.reader(variants.tokens), originals)

    def values(self, ranks: np.ndarray | None = None, n_variants: int | None = None) -> Iterator[CellEffects]:
        """Values of cells by rank, those of one cell in one piece or several; cells without variants do not come.

        Parameters
        ----------
        ranks
            Ascending ranks of the cells that are wanted; None means all.
        n_variants
            How many variants these have, for the progress; None: nobody knows.
        """
        is_wanted = np.ones(len(self.lengths), dtype=bool)
        if ranks is not None:
            is_wanted[:] = False
            is_wanted[ranks] = True
        with (
            Progress(n_variants, "perturbing", "perturbed cells", self.progress) as bar,
            contextlib.closing(self._results(is_wanted)) as results,
        ):
            for batch, variants, effects in results:
                n_done = 0
                for place in batch.group.cells_of(batch.start, batch.stop):
                    if is_wanted[batch.group.first + place] and batch.group.edited.n_variants[place]:
                        piece = _of_cell(batch, place, variants, effects)
                        n_done += len(piece.dose)
                        yield piece
                bar.update(n_done)

    def _results(self, is_wanted: np.ndarray) -> Generator[tuple[_Batch, Variants, Effects]]:
        """Values of batch after batch."""

        def work(batch: _Batch) -> tuple[_Batch, Variants, PendingEffects]:
            with torch.inference_mode():
                variants = self.variants(batch.group, batch.start, batch.stop)
                return batch, variants, self._pending(batch.group, variants)

        def results_of(workers: int) -> Generator[tuple[_Batch, Variants, PendingEffects]]:
            batches = self._batches(is_wanted)
            return ordered_map(work, batches, workers=workers) if workers else (work(batch) for batch in batches)

        with (
            cores_as_workers(self.encoder.device) as cores,
            contextlib.closing(results_of(min(cores, self.workers))) as results,
        ):
            # Waited for here, so that a card has its next batch meanwhile.
            for batch, variants, pending in results:
                yield batch, variants, pending.on_host()

    def _batches(self, is_wanted: np.ndarray) -> Iterator[_Batch]:
        for first, last in self.groups():
            if not is_wanted[first:last].any():
                continue
            group = self.group(first, last)
            for start, stop in group.edited.slices(self.token_budget):
                if any(is_wanted[first + place] for place in group.cells_of(start, stop)):
                    yield _Batch(group, start, stop)


def _of_cell(batch: _Batch, place: int, variants: Variants, effects: Effects) -> CellEffects:
    """What a batch holds of one cell of its group."""
    first, last = batch.group.bounds[place : place + 2]
    start, stop = max(int(first), batch.start) - batch.start, min(int(last), batch.stop) - batch.start
    here = slice(start, stop)
    found = Effects(effects.cell[here])
    if effects.variant is not None and effects.affected is not None and effects.genes is not None:
        rows = slice(*np.searchsorted(effects.variant, (start, stop)))
        variant = effects.variant[rows] - np.int32(start)
        found = Effects(effects.cell[here], variant, effects.affected[rows], effects.genes[rows])
    perturbed, item, dose = (x[here].numpy() for x in (variants.perturbed, variants.item, variants.dose))
    return CellEffects(batch.group.first + place, perturbed, item, dose, found)
