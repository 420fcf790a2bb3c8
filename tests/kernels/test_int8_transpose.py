"""Weights of int8 as panels: what stands where, for every number of panels and steps."""

from __future__ import annotations

import pytest
import torch
from geneformer_kernels.cpu.int8_transpose import pack_panels


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize(("n_panels", "n_blocks"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_panels(n_panels: int, n_blocks: int, is_wide: bool) -> None:
    taken = 2 if is_wide else 4
    n_columns, width, apart = 16 * n_panels, 16 * n_blocks * taken, 16 * n_blocks * taken + 3
    # Rows begin anywhere, and other numbers stand between them.
    weight = torch.randint(-128, 128, (n_columns, apart), dtype=torch.int8)
    panels = torch.full((n_columns * width + 64,), 99, dtype=torch.int16 if is_wide else torch.int8)
    pack_panels(weight.data_ptr(), apart, n_panels, width // taken, is_wide, panels.data_ptr())
    expected = weight[:, :width].to(panels.dtype).view(n_panels, 16, -1, taken).transpose(1, 2)
    assert torch.equal(panels[:-64], expected.flatten())
    assert (panels[-64:] == 99).all()
