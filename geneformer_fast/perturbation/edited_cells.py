"""The numbered variants of a batch of cells: how many there are, how long, and any of them without the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from geneformer_fast.perturbation.variants import NOWHERE, Moves, Variants, edited
from geneformer_fast.ragged import Ragged

if TYPE_CHECKING:
    from geneformer_fast.perturbation.edits import Edits

# Lists and cells that are compared at a time.
_PLACES_AT_ONCE = 2**22


class EditedCells:
    """All variants of a batch of cells, numbered cell after cell; none is made before it is asked for.

    Attributes
    ----------
    n_variants
        [B] int64 numpy: variants of each cell.
    n_tokens
        [B] int64 numpy: tokens of all variants of each cell.
    longest
        [B] int64 numpy: tokens of the longest variant of each cell, at least.
    n_common
        [B] int64 numpy: genes that variants share with their originals without being perturbed, over all of a cell's.
    """

    def __init__(self, edits: Edits, cells: Ragged) -> None:
        self.edits, self.cells = edits, cells
        self._values = cells.values.cpu().long()
        self._starts, self._lengths = cells.starts.cpu().long(), cells.lengths.cpu().long()
        self._n_genes = self._lengths - edits.front - edits.back
        self._rows: torch.Tensor | None = None
        # Edits before doses, and of each cell: tokens of its longest variant, of all variants, genes put somewhere.
        if edits.items is not None:
            counts, longest, n_tokens, n_put = self._of_items(edits.items)
        else:
            counts = self._n_edits()
            n_genes = 2 if edits.pairs or edits.anchor is not None else 1
            longest = self._lengths - (n_genes if edits.kind == "delete" else 0)
            n_tokens, n_put = longest * counts, counts * (0 if edits.kind == "delete" else n_genes)
        self._edits_before = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        self.n_variants = (counts * edits.n_doses).numpy()
        self.longest = longest.clamp(min=0).numpy()
        self.n_tokens = (n_tokens * edits.n_doses).numpy()
        self.n_common = self.n_tokens - self.n_variants * (edits.front + edits.back) - (n_put * edits.n_doses).numpy()

    def __len__(self) -> int:
        """Variants of all cells."""
        return int(self._edits_before[-1]) * self.edits.n_doses

    def slices(self, token_budget: int) -> Iterator[tuple[int, int]]:
        """``(start, stop)`` of consecutive variants that have at most so many tokens together, or are a single one."""
        start = number = 0
        room = token_budget
        for count, longest in zip(self.n_variants.tolist(), np.maximum(self.longest, 1).tolist(), strict=True):
            left = count
            while left:
                taken = min(left, room // longest)
                if not taken and number == start:
                    taken = 1
                number, left, room = number + taken, left - taken, room - taken * longest
                if left:
                    yield start, number
                    start, room = number, token_budget
        if number > start:
            yield start, number

    def variants(self, start: int, stop: int) -> Variants:
        """Variants ``start`` to ``stop`` (exclusive) of the batch."""
        edits, device = self.edits, self.cells.values.device
        cell, dose, item, tokens, places = self._numbered(start, stop)
        moves = Moves(tokens, places, self._targets(cell, tokens, places, dose))
        is_put, is_taken = moves.targets < NOWHERE, moves.places < NOWHERE
        lengths = self._lengths[cell] + is_put.sum(1) - is_taken.sum(1)
        base, of, shortened = self.cells, cell, None
        over = lengths - edits.max_len if edits.max_len is not None else torch.zeros_like(lengths)
        # Cells that are too long for the model without any edit are none of this: they keep their length.
        over = torch.minimum(over, is_put.sum(1) - is_taken.sum(1)).clamp(min=0)
        if over.any():
            shortened, of, moves = self._shortened(cell, moves, over)
            base = Ragged(
                torch.cat([self.cells.values, shortened.values]),
                torch.cat([self.cells.cu_seqlens, shortened.cu_seqlens[1:] + len(self.cells.values)]),
                max(self.cells.max_len, shortened.max_len),
            )
        made = edited(base, of, moves, lengths - over, front=edits.front, back=edits.back)
        return Variants(
            made.tokens, cell.to(device), of.to(device), shortened, made.source, made.is_common,
            tokens, item, dose,
        )  # fmt: skip

    def _numbered(self, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        """[V] cell, dose and item, [V, k] perturbed tokens and their places, of some variants by their numbers."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"variants {start} to {stop} of {len(self)}")
        # The doses of one edit are next to each other.
        numbers = torch.arange(start, stop)
        edit, dose = numbers // self.edits.n_doses, numbers % self.edits.n_doses
        cell = torch.searchsorted(self._edits_before, edit, right=True) - 1
        return cell, dose, *self._perturbed(edit, cell)

    def _perturbed(self, numbers: torch.Tensor, cell: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[V] which item, [V, k] tokens and their places within the cell, of edits by their numbers."""
        edits = self.edits
        if edits.items is not None:
            # Where no list is left out, its number is its place among those of the cell.
            item = numbers - self._edits_before[cell] if self._rows is None else self._rows[numbers]
            column = self._column[item]
            places = self._places[cell[:, None], column.clamp(min=0)]
            return item, edits.items[item], torch.where(column >= 0, places, NOWHERE)
        index = numbers - self._edits_before[cell]
        if edits.anchor is not None:
            anchor = self._places[cell, 0]
            other = index + edits.front
            places = torch.stack([anchor, other + (other >= anchor)], 1)
        elif edits.pairs:
            places = torch.stack(_pair(index), 1) + edits.front
        else:
            is_behind_first = edits.kind in ("overexpress", "activate")
            places = (index + edits.front + is_behind_first)[:, None]
        tokens = self._values[self._starts[cell][:, None] + places]
        return torch.full_like(numbers, -1), tokens, places

    def _targets(
        self, cell: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor, dose: torch.Tensor
    ) -> torch.Tensor:
        """[V, k] where the perturbed genes are to stand."""
        edits = self.edits
        if edits.kind == "delete":
            return torch.full_like(places, NOWHERE)
        if edits.kind == "swap":
            return places.flip(1)
        if edits.kind == "overexpress":
            if edits.items is None or edits.anchor is not None or edits.chosen is not None:
                return _order(places) + edits.front
            in_order = torch.arange(places.shape[1]).expand_as(places) + edits.front
            return torch.where(tokens >= 0, in_order, NOWHERE)
        n_genes = self._n_genes[cell]
        share = torch.tensor(edits.doses, dtype=torch.float64)[dose]
        step = (share * n_genes + 0.5).floor().long().clamp(min=1)
        return _moved(places, step if edits.kind == "inhibit" else -step, n_genes, edits.front)

    def _shortened(self, cell: torch.Tensor, moves: Moves, over: torch.Tensor) -> tuple[Ragged, torch.Tensor, Moves]:
        """Originals without the last genes that were not perturbed, which original is whose, and moves within these."""
        edits = self.edits
        rows = over.nonzero().squeeze(1)
        whose, places = cell[rows], moves.places[rows]
        kept = self._lengths[whose] - edits.back - (places < NOWHERE).sum(1) - over[rows]
        # What is perturbed and stands behind the first gene that falls off moves up by as many as fall off before it.
        behind = places - _order(places) - kept[:, None]
        new = torch.where(places < NOWHERE, places - behind.clamp(min=0), NOWHERE)
        # Originals are the same where as many genes fall off and nothing that is perturbed stands among them.
        keys = torch.cat([whose[:, None], over[rows, None], torch.where(behind > 0, places, NOWHERE).sort(1).values], 1)
        distinct, inverse = torch.unique(keys, dim=0, return_inverse=True)
        first = torch.full((len(distinct),), len(rows)).scatter_reduce(0, inverse, torch.arange(len(rows)), "amin")
        stay = Moves(moves.tokens[rows][first], places[first], new[first])
        lengths = self._lengths[whose[first]] - over[rows][first]
        shortened = edited(self.cells, whose[first], stay, lengths, front=edits.front, back=edits.back).tokens
        of = cell.clone()
        of[rows] = self.cells.n_cells + inverse
        moved = moves.places.clone()
        moved[rows] = new
        return shortened, of, Moves(moves.tokens, moved, moves.targets)

    def _places_of(self, genes: torch.Tensor) -> torch.Tensor:
        """[B, G] index of each of some genes (ascending) within each cell."""
        column = torch.searchsorted(genes, self._values).clamp(max=len(genes) - 1)
        found = (genes[column] == self._values).nonzero().squeeze(1)
        cell = torch.searchsorted(self._starts, found, right=True) - 1
        places = torch.full((self.cells.n_cells, len(genes)), NOWHERE)
        places[cell, column[found]] = found - self._starts[cell]
        return places

    def _n_edits(self) -> torch.Tensor:
        """[B] edits of each cell, where all of its genes are asked for."""
        edits = self.edits
        if edits.anchor is not None:
            self._places = self._places_of(torch.tensor([edits.anchor]))
            return torch.where(self._places[:, 0] < NOWHERE, self._n_genes - 1, 0)
        if edits.pairs:
            return self._n_genes * (self._n_genes - 1) // 2
        return (self._n_genes - int(edits.kind not in ("delete", "counts"))).clamp(min=0)

    def _of_items(self, items: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[B] edits of each cell; tokens of the longest variant and of all; genes that are put somewhere in all.

        Lists and cells make a table, of which some rows are there at a time.
        """
        needs, n_cells = self.edits.needs, self.cells.n_cells
        genes, inverse = torch.unique(items, return_inverse=True)
        self._column = torch.where(items >= 0, inverse, -1)
        self._places = self._places_of(genes)
        size, found, rows = (items >= 0).sum(1).int(), torch.zeros((4, n_cells), dtype=torch.int64), []
        step = max(1, _PLACES_AT_ONCE // len(items))
        for start in range(0, n_cells, step):
            some = slice(start, start + step)
            n_present = self._n_present(self._places[some] < NOWHERE)
            lengths, n_put = self._sizes_of_items(self._lengths[some, None].int(), n_present, size)
            if needs != "none":
                is_there = n_present == size if needs == "all" else n_present > 0
                lengths, n_put = lengths * is_there, n_put * is_there
                rows.append(is_there.nonzero()[:, 1])
            count = torch.full((len(n_present),), len(items)) if needs == "none" else is_there.sum(1)
            found[:, some] = torch.stack([count, lengths.amax(1), lengths.sum(1), n_put.sum(1)])
        if needs != "none":
            self._rows = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        return tuple(found.unbind(0))

    def _sizes_of_items(
        self, lengths: torch.Tensor, n_present: torch.Tensor, size: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[b, I] tokens of the variants of lists, and how many genes are put somewhere in each."""
        kind, max_len = self.edits.kind, self.edits.max_len
        if kind == "delete":
            return lengths - n_present, torch.zeros_like(n_present)
        if kind != "overexpress":
            return lengths.expand_as(n_present), n_present
        grown = lengths + size - n_present
        if max_len is not None:
            grown = torch.minimum(grown, lengths.clamp(min=max_len))
        return grown, size.expand_as(n_present)

    def _n_present(self, is_there: torch.Tensor) -> torch.Tensor:
        """[b, I] how many genes of each list are among those [b, G] that cells have."""
        n_present = torch.zeros((len(is_there), len(self._column)), dtype=torch.int32)
        for column in self._column.unbind(1):
            n_present += is_there[:, column.clamp(min=0)] & (column >= 0)
        return n_present


def _pair(number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair i < j with a number; ascending by j, then by i, so that it is the same in cells of all lengths."""
    j = ((1 + (1 + 8 * number.double()).sqrt()) / 2).floor().long()
    # The root is rounded.
    j -= (j * (j - 1) // 2 > number).long()
    j += (j * (j + 1) // 2 <= number).long()
    return number - j * (j - 1) // 2, j


def _order(places: torch.Tensor) -> torch.Tensor:
    """[V, k] how many of the others of a row stand before each."""
    return places.argsort(1).argsort(1)


def _moved(places: torch.Tensor, step: torch.Tensor, n_genes: torch.Tensor, front: int) -> torch.Tensor:
    """[V, k] places after a step; genes that would meet stand behind one another, in their order."""
    is_there = places < NOWHERE
    old, order = places.sort(1)
    wanted = (old + step[:, None]).clamp(min=front)
    index = torch.arange(places.shape[1])
    # Behind the one before it, and with room for those behind it.
    wanted = (wanted - index).cummax(1).values + index
    last = (front + n_genes - is_there.sum(1))[:, None] + index
    wanted = torch.where(old < NOWHERE, torch.minimum(wanted, last), NOWHERE)
    return torch.empty_like(places).scatter(1, order, wanted)
