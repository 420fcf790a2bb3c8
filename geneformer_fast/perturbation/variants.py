"""Cells after one edit each, as indices into the cells they came from: nothing is copied gene by gene."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from geneformer_fast.ragged import Ragged

#: A place that no gene has; larger than every place, so that it is last when places are sorted.
NOWHERE = 2**40


@dataclass(frozen=True)
class Variants:
    """Some numbered variants of a batch of cells.

    A variant is compared with an *original*: the cell it came from or, where so many genes are put in front that the
    last ones fall off, that cell without the same last genes. The latter are ``shortened``.

    Attributes
    ----------
    tokens
        The variants, V cells of T tokens, on the device of the cells. One may be empty: a cell of one gene without it.
    origin
        [V] int64, on the device: which cell of the batch each came from.
    original
        [V] int64, on the device: which original each is compared with, among the cells of the batch and, behind them,
        those that are shortened.
    shortened
        Originals that lost their last genes; None where there are none.
    source
        [T] int64, on the device: where each token stands among the values of the batch and, behind them, those of the
        shortened cells, always within the original of its variant; -1 is a gene that the cell did not have.
    is_common
        [T] booleans, on the device: genes that are in the variant and in its original and were not perturbed.
    perturbed
        [V, k] int64, on the host: the perturbed tokens in the order that was asked for, filled up with -1.
    item
        [V] int64, on the host: which list, pair or set of :attr:`Edits.items` it is; -1 where all genes were asked for.
    dose
        [V] int64, on the host: which of :attr:`Edits.doses` it has; 0 where there are none.
    """

    tokens: Ragged
    origin: torch.Tensor
    original: torch.Tensor
    shortened: Ragged | None
    source: torch.Tensor
    is_common: torch.Tensor
    perturbed: torch.Tensor
    item: torch.Tensor
    dose: torch.Tensor

    def __len__(self) -> int:
        return self.tokens.n_cells


@dataclass(frozen=True)
class Moves:
    """Where genes of some cells stand and where they are to stand; [V, k] each, on the host.

    Attributes
    ----------
    tokens
        The genes; -1 fills up.
    places
        Index of each within its cell; :data:`NOWHERE` for those that the cell does not have.
    targets
        Index of each within the edited cell, no two the same; :data:`NOWHERE` for those that it does not have.
    """

    tokens: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class Edited:
    """Cells after their moves: tokens, [T] where each stood among the values (-1: nowhere), [T] what is common."""

    tokens: Ragged
    source: torch.Tensor
    is_common: torch.Tensor


def edited(cells: Ragged, cell: torch.Tensor, moves: Moves, lengths: torch.Tensor, *, front: int, back: int) -> Edited:
    """Genes taken from their places and put where they are to stand; all others keep their order and close ranks.

    Parameters
    ----------
    cells
        Packed tokens.
    cell
        [V] int64, on the host: the cell of each variant.
    moves
        What is moved. Genes beyond ``lengths`` fall off, except for the special tokens at the back.
    lengths
        [V] int64, on the host: tokens of each edited cell.
    front, back
        Special tokens before and behind the genes, which stay there.
    """
    device, n_tokens = cells.values.device, int(lengths.sum())
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    starts, on_device = starts.to(device), lengths.to(device)
    numbers = torch.arange(len(lengths), device=device)
    variant = torch.repeat_interleave(numbers, on_device, output_size=n_tokens)
    length = on_device[variant]
    place = torch.arange(n_tokens, device=device) - starts[variant]
    is_back = place >= length - back
    targets, sorted_places = (x.to(device) for x in (moves.targets, moves.places.sort(1).values))
    # How many of those that are put somewhere stand before it: what is left is a place among those that are not moved,
    # and every gene that was taken out before that one moves it on by one.
    source = place.clone()
    for column in targets.unbind(1):
        source -= (column[variant] < place).long()
    for column in sorted_places.unbind(1):
        source += (source >= column[variant]).long()
    cell_starts, cell_lengths = cells.starts.long().cpu()[cell], cells.lengths.long().cpu()[cell]
    if back:
        source = torch.where(is_back, place + (cell_lengths.to(device)[variant] - length), source)
    source += cell_starts.to(device)[variant]
    is_moved = torch.zeros(n_tokens, dtype=torch.bool, device=device)
    # Each gene that is put somewhere is a single token: it is written where it stands.
    row, column = (moves.targets < NOWHERE).nonzero(as_tuple=True)
    old = moves.places[row, column]
    old = torch.where(old < NOWHERE, old + cell_starts[row], -1).to(device)
    new = moves.targets[row, column].to(device) + starts.long()[row.to(device)]
    source[new] = old
    is_moved[new] = True
    values = cells.values[source.clamp(min=0)] if len(cells.values) else cells.values.new_zeros(n_tokens)
    values[new] = moves.tokens[row, column].to(values)
    is_common = ~(is_moved | is_back | (place < front))
    longest = int(lengths.max()) if len(lengths) else 0
    return Edited(Ragged(values, starts, longest), source, is_common)
