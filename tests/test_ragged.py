"""Packing and unpacking."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_fast import Ragged

lengths = st.lists(st.integers(0, 9), min_size=0, max_size=8)


def cells_of(sizes: list[int]) -> list[torch.Tensor]:
    return [torch.arange(1, n + 1) + 100 * i for i, n in enumerate(sizes)]


@settings(deadline=None)
@given(lengths)
def test_packed_padded_and_back(sizes: list[int]) -> None:
    cells = cells_of(sizes)
    ragged = Ragged.from_cells(cells)
    assert ragged.n_cells == len(sizes)
    assert ragged.n_tokens == sum(sizes)
    assert ragged.max_len == max(sizes, default=0)
    assert ragged.lengths.tolist() == sizes
    padded = ragged.to_padded(-1)
    assert padded.shape == (len(sizes), max(sizes, default=0))
    again = Ragged.from_padded(padded, ragged.mask())
    assert torch.equal(again.values, ragged.values)
    assert again.lengths.tolist() == sizes
    for cell, view in zip(cells, ragged.cells(), strict=True):
        assert torch.equal(cell, view)


@settings(deadline=None)
@given(lengths)
def test_positions_and_cell_index(sizes: list[int]) -> None:
    ragged = Ragged.from_cells(cells_of(sizes))
    assert ragged.positions().tolist() == [i for n in sizes for i in range(n)]
    assert ragged.cell_index().tolist() == [cell for cell, n in enumerate(sizes) for _ in range(n)]


def test_padding_with_hidden_states_and_left_padding() -> None:
    values = torch.randn(2, 4, 3)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    ragged = Ragged.from_padded(values, mask)
    assert torch.equal(ragged.values[:2], values[0, 2:])
    assert ragged.to_padded(length=6).shape == (2, 6, 3)


def test_what_does_not_fit_is_refused() -> None:
    ragged = Ragged.from_cells([[1, 2, 3]])
    with pytest.raises(ValueError, match="longest cell has 3"):
        ragged.to_padded(length=2)
    with pytest.raises(ValueError, match="2 values do not fit 3"):
        ragged.with_values(torch.zeros(2))
    with pytest.raises(ValueError, match="add up to 4"):
        Ragged.from_lengths(torch.zeros(3), [4])
    with pytest.raises(ValueError, match="do not agree"):
        Ragged.from_padded(torch.zeros(2, 3), torch.ones(2, 4))
