"""The official tool's rule for lists that are overexpressed in cells near the model's limit; not the right one.

It takes a list's new genes off the end of the original once more after the perturbed cell was cut: of ``max_len`` and
k new genes, a cell of L tokens loses ``min(L + k, max_len) + k - max_len`` genes, and not ``L + k - max_len``; the last
ones, also where they are those of the list. What is compared is then another cell. (Of the similarity of a V1 cell it
also counts the genes that the original lost, by what the model makes of padding; this depends on the other cells of the
batch, and is not reproduced.)
"""

from __future__ import annotations

import dataclasses

import torch

from geneformer_fast.perturbation.variants import Variants
from geneformer_fast.ragged import Ragged

# Tokens are smaller, so that one number holds a variant and a token.
_BASE = 2**32


def cut_as_officially(variants: Variants, cells: Ragged, *, n_back: int, max_len: int) -> Variants:
    """Variants beside originals that lost as many genes as the official tool cuts off.

    Parameters
    ----------
    variants
        Of lists that are overexpressed, beside the right originals.
    cells
        The batch that they were made of.
    n_back
        Special tokens behind the genes.
    max_len
        Tokens that the model reads.
    """
    device, tokens = cells.values.device, variants.tokens
    variant = tokens.cell_index()
    n_new = torch.zeros(len(variants), dtype=torch.int64, device=device)
    n_new.index_add_(0, variant, (variants.source < 0).long())
    n_lost = (tokens.lengths.long() + n_new - max_len).clamp(min=0)
    chosen = (n_lost > 0).nonzero()[:, 0]
    if not len(chosen):
        return variants
    cut = _without_last(cells, variants.origin[chosen], n_lost[chosen], n_back)
    there = cells if variants.shortened is None else _joined(cells, variants.shortened)
    number = torch.full((len(variants),), -1, device=device)
    number[chosen] = torch.arange(len(chosen), device=device)
    # A cell has a gene once: a token of the variant is found in its original by what it is.
    keys, order = (cut.cell_index() * _BASE + cut.values).sort()
    mine = number[variant]
    wanted = mine * _BASE + tokens.values
    place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    is_chosen, is_there = mine >= 0, keys[place] == wanted
    source = torch.where(is_there, there.n_tokens + order[place], -1)
    original = variants.original.clone()
    original[chosen] = there.n_cells + torch.arange(len(chosen), device=device)
    return dataclasses.replace(
        variants,
        original=original,
        source=torch.where(is_chosen, source, variants.source),
        is_common=variants.is_common & (is_there | ~is_chosen),
        shortened=cut if variants.shortened is None else _joined(variants.shortened, cut),
    )


def _without_last(cells: Ragged, cell: torch.Tensor, n_lost: torch.Tensor, n_back: int) -> Ragged:
    """Some cells [N] without their last genes."""
    lengths = cells.lengths.long()[cell] - n_lost
    owner = torch.repeat_interleave(torch.arange(len(cell), device=cell.device), lengths)
    place = torch.arange(len(owner), device=cell.device) - (lengths.cumsum(0) - lengths)[owner]
    old = place + torch.where(place >= lengths[owner] - n_back, n_lost[owner], 0)
    return Ragged.from_lengths(cells.values[cells.starts.long()[cell][owner] + old], lengths.cpu())


def _joined(first: Ragged, second: Ragged) -> Ragged:
    bounds = torch.cat([first.cu_seqlens, second.cu_seqlens[1:] + first.n_tokens])
    return Ragged(torch.cat([first.values, second.values]), bounds, max(first.max_len, second.max_len))
