"""Packing and unpacking."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_fast import Ragged
from geneformer_fast.ragged import Padding

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


masks = st.integers(0, 4).flatmap(
    lambda n_rows: st.integers(1, 6).flatmap(
        lambda length: st.lists(
            st.lists(st.booleans(), min_size=length, max_size=length), min_size=n_rows, max_size=n_rows
        ).map(lambda rows: torch.tensor(rows, dtype=torch.bool).reshape(n_rows, length))
    )
)


@settings(deadline=None)
@given(masks)
def test_padding_goes_out_and_comes_back_wherever_it_is(mask: torch.Tensor) -> None:
    padding = Padding.of(mask, *mask.shape, torch.device("cpu"))
    values = torch.arange(1, mask.numel() + 1).view(mask.shape)[..., None] * torch.tensor([1, 1000])
    packed = padding.pack(values)
    assert torch.equal(packed, values[mask])
    assert torch.equal(padding.unpack(packed), values * mask[..., None])
    assert padding.cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert padding.cu_seqlens.dtype == torch.int32
    assert torch.equal(padding.columns(), mask.nonzero()[:, 1])
    assert padding.has_first == all(row[0] for row in mask.tolist())


def test_a_batch_without_padding_is_not_copied() -> None:
    values = torch.randn(3, 4, 2)
    for mask in (None, torch.ones(3, 4)):
        padding = Padding.of(mask, 3, 4, torch.device("cpu"))
        assert padding.pack(values).data_ptr() == values.data_ptr() == padding.unpack(padding.pack(values)).data_ptr()


def test_gradients_of_packing_and_padding() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]])
    padding = Padding.of(mask, 3, 3, torch.device("cpu"))
    padded = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(padding.pack, padded)
    assert torch.autograd.gradcheck(padding.unpack, packed)
