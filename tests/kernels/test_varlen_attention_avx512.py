"""Attention whose scores stay in registers, on a CPU with avx512_bf16, against float64."""

from __future__ import annotations

import numba
import pytest
import torch
from geneformer_kernels import varlen_attention_qkv
from geneformer_kernels.ops.varlen_attention import host_avx512, reference, sdpa
from geneformer_kernels.ops.varlen_attention.host_avx512 import ROWS, serves, varlen_attention_avx512
from geneformer_kernels.target import cpu_features
from tolerance import Witness, assert_as_good_as

# Around every step: rows in work, registers, tiles; odd numbers end with half a pair.
LENGTHS = [5, 0, 1, ROWS, ROWS + 1, 15, 16, 17, 33, 49, 63, 64, 65, 130, 301]

pytestmark = pytest.mark.skipif(
    "avx512_bf16" not in cpu_features() or not serves(64),
    reason="needs a CPU with avx512_bf16 and a numba with LLVM 17",
)


def inputs(n_heads: int, head_dim: int, lengths: list[int] = LENGTHS) -> tuple[torch.Tensor, list[int]]:
    """A fused projection [T, 3, H, D] with means away from zero, which hide no missing mask, and the cells' bounds."""
    generator = torch.Generator().manual_seed(head_dim)
    qkv = torch.randn(sum(lengths), 3, n_heads, head_dim, generator=generator) + 0.5
    return qkv.bfloat16(), [0, *torch.tensor(lengths).cumsum(0).tolist()]


def exact(qkv: torch.Tensor, bounds: list[int], scale: float) -> torch.Tensor:
    return reference.varlen_attention(*qkv.double().unbind(1), torch.tensor(bounds), scale)


def attend(qkv: torch.Tensor, bounds: list[int], scale: float) -> torch.Tensor:
    return varlen_attention_avx512(*qkv.unbind(1), bounds, scale, 64)


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the cells that were computed by blocks instead."""
    lengths: list[int] = []
    blocked = host_avx512.host.varlen_attention_blocked

    def recorded(q: torch.Tensor, *rest: object) -> torch.Tensor:
        lengths.append(len(q))
        return blocked(q, *rest)

    monkeypatch.setattr(host_avx512.host, "varlen_attention_blocked", recorded)
    return lengths


@pytest.mark.parametrize(("n_heads", "head_dim"), [(4, 64), (2, 32), (1, 16), (3, 48), (2, 80), (1, 112), (2, 128)])
def test_forward(n_heads: int, head_dim: int, left: list[int]) -> None:
    qkv, bounds = inputs(n_heads, head_dim)
    scale = head_dim**-0.5
    out = attend(qkv, bounds, scale)
    assert left == [5, 1]  # cells of fewer rows than are in work at a time, and no others
    witness = Witness(reference.varlen_attention, *qkv.unbind(1), torch.tensor(bounds), scale)
    assert_as_good_as(out, witness, exact(qkv, bounds, scale))


@pytest.mark.parametrize(("n_heads", "head_dim"), [(2, 32), (1, 80), (1, 128)])
def test_cells_of_many_keys(n_heads: int, head_dim: int, left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk of keys, as whole and odd numbers of them and of tiles come."""
    monkeypatch.setattr(host_avx512, "_LONG", 60)
    lengths = [1023, 61, 7, 1025, 97, 2 * 1024 + 17]
    qkv, bounds = inputs(n_heads, head_dim, lengths)
    qkv[:, 1] += 16  # keys are centred
    scale = head_dim**-0.5
    out = attend(qkv, bounds, scale)
    assert left == []
    witness = Witness(reference.varlen_attention, *qkv.unbind(1), torch.tensor(bounds), scale)
    assert_as_good_as(out, witness, exact(qkv, bounds, scale))


def test_a_long_cell_is_one_of_many_keys(left: list[int]) -> None:
    """By itself, and its weights beyond float32 noticed in whatever chunk they are."""
    length = host_avx512._LONG + 101
    qkv, bounds = inputs(1, 32, [length])
    found, rows = attend(qkv, bounds, 0.2), slice(length - 40, length)
    expected = torch.softmax(qkv[rows, 0, 0].double() @ qkv[:, 1, 0].double().T * 0.2, -1) @ qkv[:, 2, 0].double()
    torch.testing.assert_close(found[rows, 0].double(), expected, atol=2e-3, rtol=2e-2)
    assert left == []
    qkv[-1, :2] = 60.0
    attend(qkv, bounds, 1.0)
    assert left == [length]


def test_it_is_what_the_public_function_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, bounds = inputs(4, 64)
    asked = []
    monkeypatch.setattr(
        host_avx512, "varlen_attention_avx512", lambda *call: asked.append(call) or attend(qkv, *call[3:5])
    )
    if sdpa._route("bfloat16", "cpu", None, True, False).route != "registers":
        pytest.skip("this CPU has something faster")
    out = varlen_attention_qkv(qkv, cu_seqlens=torch.tensor(bounds))
    assert len(asked) == 1
    assert torch.equal(out, attend(qkv, bounds, 0.125))


def test_a_numba_for_a_lesser_cpu_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, value in (("CPU_NAME", "generic"), ("CPU_FEATURES", "+sse2"), ("ENABLE_AVX", 0)):
        with monkeypatch.context() as changed:
            changed.setattr(numba.config, setting, value)
            assert not serves(64)
    assert serves(64)
    assert not serves(24)


def test_any_strides() -> None:
    """A head may begin at any even address; what has other strides is copied."""
    qkv, bounds = inputs(2, 32)
    expected = attend(qkv, bounds, 0.2)
    shifted = torch.empty(qkv.numel() + 1, dtype=torch.bfloat16)[1:].view_as(qkv).copy_(qkv)
    heads_last = qkv.transpose(2, 3).contiguous().transpose(2, 3)
    padded = torch.full((len(qkv), 3, 2, 35), float("nan"), dtype=torch.bfloat16)[..., 1:33].copy_(qkv)
    for other in (shifted, heads_last, padded):
        assert torch.equal(attend(other, bounds, 0.2), expected)


@pytest.mark.parametrize("lengths", [LENGTHS, [77]])
def test_threads_change_nothing(lengths: list[int]) -> None:
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


def test_keys_are_centred(left: list[int]) -> None:
    """An offset that all keys of a cell share is nothing to the softmax, and no reason to compute otherwise."""
    qkv, bounds = inputs(4, 64)
    qkv[:, 0] += 2
    qkv[:, 1] += 16
    plain = reference.varlen_attention(*qkv.unbind(1), torch.tensor(bounds), 0.125)
    truth = exact(qkv, bounds, 0.125)
    error, stock = ((x.double() - truth).abs().max() for x in (attend(qkv, bounds, 0.125), plain))
    assert error < stock / 2
    assert left == [5, 1]


@pytest.mark.parametrize("factor", [4, 20, 300])
def test_weights_beyond_float32(factor: float, left: list[int]) -> None:
    """Scores of any size: cells whose unshifted weights overflow are computed with a shift."""
    qkv, bounds = inputs(2, 64)
    qkv[:, 0] *= factor
    out, truth = attend(qkv, bounds, 0.125), exact(qkv, bounds, 0.125)
    witness = Witness(reference.varlen_attention, *qkv.unbind(1), torch.tensor(bounds), 0.125)
    assert out.isfinite().all()
    assert (len(left) > 2) == (factor > 4)
    assert_as_good_as(out, witness, truth)


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("nan", [0x7FC0, 0xFFC0])
def test_nan_stays_in_its_cell(part: int, nan: int) -> None:
    qkv, bounds = inputs(2, 64)
    cell = LENGTHS.index(130)
    row = bounds[cell] + 40
    clean = attend(qkv, bounds, 0.125)
    qkv.view(torch.uint16)[row, part, 1, 3] = nan
    out = attend(qkv, bounds, 0.125)
    inside = slice(bounds[cell], bounds[cell + 1])
    assert out[row if part == 0 else inside, 1].isnan().any(-1).all()
    assert torch.equal(out[: bounds[cell]], clean[: bounds[cell]])
    assert torch.equal(out[bounds[cell + 1] :], clean[bounds[cell + 1] :])
