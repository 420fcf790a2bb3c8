"""int8 weights widened by a compiled loop: the bits that torch gives."""

from __future__ import annotations

import pytest
import torch
from geneformer_kernels import int8_rows
from geneformer_kernels.cpu import widened_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 256), (3, 37), (1, 1), (0, 5), (4, 0)])
def test_bits_are_torchs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    q = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    scale = torch.exp2(torch.rand(shape[0], generator=generator) * 80 - 40)
    assert widened_rows.is_for_loops(q, dtype)
    found, expected = int8_rows.widened_weight(q, scale, dtype), (q * scale[:, None]).to(dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_with_scales_at_the_edges(dtype: torch.dtype) -> None:
    """Ties of bfloat16 (scales of few bits), numbers beyond the range, and those that are no numbers."""
    q = torch.arange(-128, 128).to(torch.int8).expand(7, 256).contiguous()
    scale = torch.tensor([1.0, 1.0078125, 3.0, 1e-40, 3e38, torch.inf, torch.nan])
    found = int8_rows.widened_weight(q, scale, dtype)
    torch.testing.assert_close(found, (q * scale[:, None]).to(dtype), rtol=0.0, atol=0.0, equal_nan=True)


def test_what_is_left_to_torch() -> None:
    q, scale = torch.ones(4, 6, dtype=torch.int8), torch.rand(4)
    for other, dtype in (
        (q.T.contiguous().T, torch.float32), (q, torch.float16), (q, torch.float64), (q.float(), torch.float32),
        (q.to("meta"), torch.float32),
    ):  # fmt: skip
        assert not widened_rows.is_for_loops(other, dtype)
        found = int8_rows.widened_weight(other, scale.to(other.device), dtype)
        assert (found.shape, found.dtype) == ((4, 6), dtype)
