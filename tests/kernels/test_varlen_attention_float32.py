"""Attention in float32 by compiled loops, on a CPU with AVX2, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from geneformer_kernels import varlen_attention, varlen_attention_qkv
from geneformer_kernels.dispatch import ImplUnavailableError, use_impl
from geneformer_kernels.ops.varlen_attention import reference, sdpa
from geneformer_kernels.ops.varlen_attention.host_float32 import _BLOCK_ROWS, _BLOCKS, _CHUNK, _LONG
from geneformer_kernels.ops.varlen_attention.plan import LONG, is_for_loops
from geneformer_kernels.target import Target, target_of
from tolerance import Witness, assert_as_good_as

# Around every step: rows of a tile and of a block, keys of a panel and of a chunk.
LENGTHS = [
    5, 0, 1, 6, 7, 15, 16, 17, 33, _BLOCK_ROWS - 1, _BLOCK_ROWS, _BLOCK_ROWS + 1, 130, _CHUNK, _CHUNK + 1, 530
]  # fmt: skip

pytestmark = pytest.mark.skipif(not target_of("cpu").has_float32_loops, reason="needs a CPU with AVX2")


def inputs(n_heads: int, head_dim: int, lengths: list[int] = LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    """A fused projection [T, 3, H, D] with means away from zero, which hide no missing mask, and the cells' bounds."""
    generator = torch.Generator().manual_seed(head_dim)
    qkv = torch.randn(sum(lengths), 3, n_heads, head_dim, generator=generator) + 0.5
    return qkv, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


def attend(qkv: torch.Tensor, bounds: torch.Tensor, scale: float) -> torch.Tensor:
    return varlen_attention_qkv(qkv, cu_seqlens=bounds, scale=scale, impl="numba")


def exact(qkv: torch.Tensor, bounds: torch.Tensor, scale: float) -> torch.Tensor:
    return reference.varlen_attention(*qkv.double().unbind(1), bounds, scale)


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the cells that torch computed instead."""
    lengths: list[int] = []
    plain = sdpa._sdpa_per_cell

    def recorded(q: torch.Tensor, *rest: object) -> torch.Tensor:
        lengths.append(len(q))
        return plain(q, *rest)

    monkeypatch.setattr(sdpa, "_sdpa_per_cell", recorded)
    return lengths


@pytest.mark.parametrize(("n_heads", "head_dim"), [(4, 64), (2, 32), (1, 16), (3, 48), (2, 80), (2, 128)])
def test_forward(n_heads: int, head_dim: int, left: list[int]) -> None:
    qkv, bounds = inputs(n_heads, head_dim)
    scale = head_dim**-0.5
    out = attend(qkv, bounds, scale)
    assert not left
    witness = Witness(reference.varlen_attention, *qkv.unbind(1), bounds, scale)
    assert_as_good_as(out, witness, exact(qkv, bounds, scale))


@pytest.mark.parametrize("more", [1, 5 * _BLOCK_ROWS + 3, _BLOCKS * _BLOCK_ROWS])
def test_cells_of_many_keys(more: int, left: list[int]) -> None:
    """Several blocks meet a chunk of keys; a row's numbers are those of any block."""
    length = _LONG + more
    qkv, bounds = inputs(1, 32, [length])
    found = attend(qkv, bounds, 0.2)
    assert not left
    for rows in (slice(0, 30), slice(2000, 2030), slice(length - 30, length)):
        expected = torch.softmax(qkv[rows, 0, 0].double() @ qkv[:, 1, 0].double().T * 0.2, -1) @ qkv[:, 2, 0].double()
        torch.testing.assert_close(found[rows, 0].double(), expected, atol=2e-6, rtol=2e-5)
    moved = torch.cat([qkv[:, :1].roll(7, 0), qkv[:, 1:]], 1)
    assert torch.equal(attend(moved, bounds, 0.2), found.roll(7, 0))


def test_long_cells_are_left_to_the_loops() -> None:
    """Also where torch is first for others; a name, a gradient and other dtypes decide as ever."""
    length = LONG + 5
    qkv, bounds = inputs(1, 16, [length])
    assert torch.equal(varlen_attention_qkv(qkv, cu_seqlens=bounds, scale=0.2), attend(qkv, bounds, 0.2))
    cpu = Target.cpu(["avx2", "fma", "avx512"])
    assert is_for_loops("float32", length, cpu)
    assert not is_for_loops("float32", LONG, cpu)
    assert not is_for_loops("bfloat16", length, cpu)
    assert not is_for_loops("float32", length, Target.cpu(["avx512"]))
    assert not is_for_loops("float32", length, Target.cuda(90))
    by_torch = varlen_attention_qkv(qkv, cu_seqlens=bounds, scale=0.2, impl="torch")
    torch.testing.assert_close(by_torch, attend(qkv, bounds, 0.2), atol=2e-6, rtol=1e-4)
    with use_impl("torch"):
        assert torch.equal(varlen_attention_qkv(qkv, cu_seqlens=bounds, scale=0.2), by_torch)
    grown = varlen_attention_qkv(qkv[:50].clone().requires_grad_(), cu_seqlens=torch.tensor([0, 50]))
    assert grown.requires_grad


def test_only_what_the_loops_serve() -> None:
    qkv, bounds = inputs(2, 24, [3, 4])
    with pytest.raises(ImplUnavailableError, match="multiples of 16"):
        attend(qkv, bounds, 0.2)
    qkv, bounds = inputs(2, 32, [3, 4])
    with pytest.raises(ImplUnavailableError, match="no gradient"):
        attend(qkv.clone().requires_grad_(), bounds, 0.2)
    with pytest.raises(ImplUnavailableError, match="no dropout"):
        varlen_attention_qkv(qkv, cu_seqlens=bounds, dropout_p=0.1, impl="numba")
    with pytest.raises(ImplUnavailableError, match="in float32"):
        attend(qkv.bfloat16(), bounds, 0.2)
    with pytest.raises(ImplUnavailableError, match="autocast"), torch.autocast("cpu", torch.bfloat16):
        attend(qkv, bounds, 0.2)


def test_any_strides() -> None:
    """A head may begin anywhere; what has other strides is copied."""
    qkv, bounds = inputs(2, 32)
    expected = attend(qkv, bounds, 0.2)
    shifted = torch.empty(qkv.numel() + 1)[1:].view_as(qkv).copy_(qkv)
    heads_last = qkv.transpose(2, 3).contiguous().transpose(2, 3)
    padded = torch.full((len(qkv), 3, 2, 35), float("nan"))[..., 1:33].copy_(qkv)
    for other in (shifted, heads_last, padded):
        assert torch.equal(attend(other, bounds, 0.2), expected)
    row = qkv[:1].expand(7, -1, -1, -1)
    assert torch.equal(attend(row, torch.tensor([0, 7]), 0.2), attend(row.contiguous(), torch.tensor([0, 7]), 0.2))


@pytest.mark.parametrize("lengths", [LENGTHS, [77]])
def test_threads_and_neighbours_change_nothing(lengths: list[int]) -> None:
    qkv, bounds = inputs(4, 64, lengths)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            with torch.inference_mode():
                found.append(attend(qkv, bounds, 0.125))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        alone = attend(qkv[start:stop], torch.tensor([0, stop - start]), 0.125)
        assert torch.equal(alone, found[0][start:stop])


def test_keys_are_centred(left: list[int]) -> None:
    """An offset that all keys of a cell share is nothing to the softmax, and no reason to compute otherwise."""
    qkv, bounds = inputs(4, 64)
    qkv[:, 0] += 2
    qkv[:, 1] += 64
    plain = reference.varlen_attention(*qkv.unbind(1), bounds, 0.125)
    truth = exact(qkv, bounds, 0.125)
    error, stock = ((x.double() - truth).abs().max() for x in (attend(qkv, bounds, 0.125), plain))
    assert error < stock / 2
    assert not left


@pytest.mark.parametrize("factor", [4, 20, 300])
def test_weights_beyond_float32(factor: float, left: list[int]) -> None:
    """Scores of any size: cells whose unshifted weights are too large are computed with a shift."""
    qkv, bounds = inputs(2, 64)
    qkv[:, 0] *= factor
    out, truth = attend(qkv, bounds, 0.125), exact(qkv, bounds, 0.125)
    witness = Witness(reference.varlen_attention, *qkv.unbind(1), bounds, 0.125)
    assert out.isfinite().all()
    assert bool(left) == (factor > 4)
    assert_as_good_as(out, witness, truth)


def test_sums_of_weights_beyond_float32(left: list[int]) -> None:
    """Every weight is a number and so is every result, as values are small: the sum of the weights alone is not."""
    qkv = torch.zeros(40, 3, 1, 16)
    qkv[:, 0, :, 0] = 1
    qkv[:20, 1, :, 0], qkv[20:, 1, :, 0] = 87.6, -87.6  # e**87.6 < 2**127, but twenty of them are more than 2**128
    qkv[:, 2] = torch.linspace(1e-3, 2e-3, 40)[:, None, None]
    bounds = torch.tensor([0, 40])
    out, truth = attend(qkv, bounds, 1.0), exact(qkv, bounds, 1.0)
    assert left == [40]
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=0)


def test_values_as_large_as_float32_has(left: list[int]) -> None:
    """Weights are not divided before they meet values: where that overflows, torch computes the cell."""
    qkv, bounds = inputs(2, 64, [20, 40])
    qkv[bounds[1] :, 2] *= 1e37
    out, truth = attend(qkv, bounds, 0.125), exact(qkv, bounds, 0.125)
    assert left == [40]
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-6 * truth.abs().max().item())


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7F800000], ids=hex)
def test_nan_stays_in_its_cell(part: int, bits: int) -> None:
    """NaN with bits of its own, which powers of two would make numbers of, and infinity: as torch has them."""
    qkv, bounds = inputs(2, 64)
    cell = LENGTHS.index(130)
    start, stop = bounds[cell].item(), bounds[cell + 1].item()
    clean = attend(qkv, bounds, 0.125)
    qkv.numpy().view(np.uint32)[start + 40, part, 1, 3] = bits
    out = attend(qkv, bounds, 0.125)
    own = torch.tensor([0, 130])
    expected = varlen_attention(*qkv[start:stop].unbind(1), cu_seqlens=own, scale=0.125, impl="torch")
    torch.testing.assert_close(out[start:stop], expected, equal_nan=True)
    assert not out[start:stop].isfinite().all()
    assert torch.equal(out[:start], clean[:start])
    assert torch.equal(out[stop:], clean[stop:])
