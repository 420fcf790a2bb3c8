"""What flows back through the largest projection of a cell's keys, from which all others are counted."""

from __future__ import annotations

import torch


def cell_of(cu_seqlens: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """[T] int64, the cell of every token."""
    tokens = torch.arange(n_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), tokens, right=True)


def largest_of_cells(top: torch.Tensor, cu_seqlens: torch.Tensor, *, is_batch: bool) -> torch.Tensor:
    """[B], the largest of each cell's, or of all, of ``top`` [H, T]; -inf for a cell without tokens."""
    n_cells, per_token = len(cu_seqlens) - 1, top.amax(0)
    if is_batch:
        return per_token.amax().expand(n_cells).contiguous()
    found = torch.full((n_cells,), float("-inf"), dtype=top.dtype, device=top.device)
    return found.scatter_reduce_(0, cell_of(cu_seqlens, top.shape[1]), per_token, "amax")


def add_flow_through_largest(
    dk: torch.Tensor,
    k: torch.Tensor,
    projection: torch.Tensor,
    top: torch.Tensor,
    largest: torch.Tensor,
    flow: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    is_batch: bool,
) -> None:
    """Add to the gradient of the keys with the largest projections what makes all other features smaller.

    Parameters
    ----------
    dk, k
        [T, H, D].
    projection
        [m, D].
    top
        [H, T], the largest projection of every key.
    largest
        [B], that of the cell, or of all.
    flow
        [H, T], the sum over features of gradient times exponential: the gradient of the largest one is minus its sum.
    """
    n_heads, n_tokens = top.shape
    cell = cell_of(cu_seqlens, n_tokens)
    # The first of the places where it is, should there be several; none where something was NaN.
    places = torch.arange(n_heads * n_tokens, device=k.device).view(n_heads, n_tokens)
    nowhere = n_heads * n_tokens
    places = torch.where(top == largest[cell], places, nowhere).amin(0)
    if is_batch:
        place, total = places.amin()[None], flow.sum()[None]
    else:
        place = torch.full((len(largest),), nowhere, device=k.device).scatter_reduce_(0, cell, places, "amin")
        lengths = cu_seqlens.diff().long()
        total = torch.segment_reduce(flow.sum(0), "sum", lengths=lengths, unsafe=True)
    is_found = place < nowhere
    place = torch.where(is_found, place, 0)
    heads, tokens = place // n_tokens, place % n_tokens
    wide, scale = projection.to(flow.dtype), k.shape[-1] ** -0.25
    best = (k[tokens, heads].to(flow.dtype) @ wide.T).argmax(-1)
    gradient = torch.where(is_found, -scale * total, 0.0)[:, None] * wide[best]
    dk.index_put_((tokens, heads), gradient.to(dk.dtype), accumulate=True)
