"""The list of tiles that attention's kernels walk through, longest cells first."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_inputs import LENGTHS, cumulative
from geneformer_kernels.ops.varlen_attention import launches


@pytest.mark.parametrize("lengths", [LENGTHS, [3] * 20, [0, 100, 0, 100, 1], [16, 32, 17, 15], [7]])
def test_list_of_tiles(device: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Longest cells first, ties in order, every tile once; more cells, and more tiles, than one block holds."""
    monkeypatch.setattr(launches, "BLOCK_CELLS", 4)
    found = launches.varlen_attention_tiles(cumulative(lengths, device), sum(lengths), 16).cpu()
    starts = [0, *itertools.accumulate(lengths)]
    expected = [
        [starts[i], lengths[i], row]
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for row in range(0, lengths[i], 16)
    ]
    n_tiles = int(found[0, 0])
    assert n_tiles < len(found)
    assert found[1 : 1 + n_tiles, :3].tolist() == expected


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("bounds", [[0, 50, 20, 40], [-9, 99], [7, 3, 1 << 30], [0, 40, 0, 40, 0, 40]])
def test_wrong_cumulative_lengths_stay_inside(device: str, bounds: list[int]) -> None:
    """On a card nobody checks them: numbers may be wrong, but tiles lie within the tokens, and within their list."""
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    found = launches.varlen_attention_tiles(cu_seqlens, 40, 16).cpu()
    n_tiles = int(found[0, 0])
    assert 0 <= n_tiles <= len(found) - 1 == 40 // 16 + len(bounds) - 1
    for start, length, row, _ in found[1 : 1 + n_tiles].tolist():
        assert 0 <= start <= start + row < start + length <= 40
