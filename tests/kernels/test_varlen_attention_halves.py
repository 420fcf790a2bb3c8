"""Attention by loops over bfloat16, in registers with avx512_bf16 and on tiles with amx_bf16, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numba
import pytest
import torch
from geneformer_kernels import varlen_attention_qkv
from geneformer_kernels.cpu import amx as tiles
from geneformer_kernels.ops.varlen_attention import amx, host_amx, host_avx512, reference, sdpa
from geneformer_kernels.ops.varlen_attention.host_avx512 import ROWS
from geneformer_kernels.ops.varlen_attention.plan import TorchPlan
from geneformer_kernels.target import cpu_features
from tiles_in_use import in_use, in_use_after_configuring
from tolerance import Witness, assert_as_good_as

# Around every step: rows in work, registers, tiles, blocks; odd numbers end with half a pair.
LENGTHS = [5, 0, 1, ROWS, ROWS + 1, 15, 16, 17, 31, 32, 33, 49, 63, 64, 65, 130, 301]


@dataclass
class Loop:
    """A way to compute it: its module, the name of its function, and of which lengths cells are left to others."""

    module: Any
    function: str
    route: str
    head_dims: tuple[int, ...]
    short: list[int] = field(default_factory=list)

    def attend(self, qkv: torch.Tensor, bounds: list[int], scale: float) -> torch.Tensor:
        return getattr(self.module, self.function)(*qkv.unbind(1), bounds, scale, 64)


REGISTERS = Loop(
    host_avx512, "varlen_attention_avx512", "registers", (64, 32, 16, 48, 80, 112, 128),
    [length for length in LENGTHS if 0 < length < ROWS],
)  # fmt: skip
TILES = Loop(host_amx, "varlen_attention_amx", "tiles", (64, 32, 96, 128, 160, 544))
LOOPS = [
    pytest.param(REGISTERS, id="avx512", marks=pytest.mark.skipif(
        "avx512_bf16" not in cpu_features() or not host_avx512.serves(64),
        reason="needs a CPU with avx512_bf16 and a numba with LLVM 17",
    )),
    pytest.param(TILES, id="amx", marks=pytest.mark.skipif(
        "amx_bf16" not in cpu_features() or not host_amx.serves(64), reason=str(amx.why_not() or "told not to use AMX"),
    )),
]  # fmt: skip
either = pytest.mark.parametrize("loop", LOOPS)
on_tiles = pytest.mark.parametrize("loop", LOOPS[1:])
SHAPES = [
    pytest.param(loop.values[0], n_heads, head_dim, marks=loop.marks, id=f"{loop.id}-{n_heads}-{head_dim}")
    for loop in LOOPS
    for n_heads, head_dim in zip(itertools.cycle((4, 2, 1, 3)), loop.values[0].head_dims, strict=False)
]


def inputs(n_heads: int, head_dim: int, lengths: list[int] = LENGTHS) -> tuple[torch.Tensor, list[int]]:
    """A fused projection [T, 3, H, D] with means away from zero, which hide no missing mask, and the cells' bounds."""
    generator = torch.Generator().manual_seed(head_dim)
    qkv = torch.randn(sum(lengths), 3, n_heads, head_dim, generator=generator) + 0.5
    return qkv.bfloat16(), [0, *torch.tensor(lengths).cumsum(0).tolist()]


def exact(qkv: torch.Tensor, bounds: list[int], scale: float) -> torch.Tensor:
    return reference.varlen_attention(*qkv.double().unbind(1), torch.tensor(bounds), scale)


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


@pytest.mark.parametrize(("loop", "n_heads", "head_dim"), SHAPES)
def test_forward(loop: Loop, n_heads: int, head_dim: int, left: list[int]) -> None:
    qkv, bounds = inputs(n_heads, head_dim)
    scale = head_dim**-0.5
    out = loop.attend(qkv, bounds, scale)
    assert left == loop.short  # cells of fewer rows than are in work at a time, and no others
    witness = Witness(reference.varlen_attention, *qkv.unbind(1), torch.tensor(bounds), scale)
    assert_as_good_as(out, witness, exact(qkv, bounds, scale))


LONG_SHAPES = [
    pytest.param(loop.values[0], n_heads, head_dim, marks=loop.marks, id=f"{loop.id}-{n_heads}-{head_dim}")
    for loop in LOOPS
    for n_heads, head_dim in ((2, 32), (1, 80 if loop.id == "avx512" else 96), (1, 128))
]


@pytest.mark.parametrize(("loop", "n_heads", "head_dim"), LONG_SHAPES)
def test_cells_of_many_keys(
    loop: Loop, n_heads: int, head_dim: int, left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In registers chunk by chunk of keys, as whole and odd numbers of them and of tiles come."""
    monkeypatch.setattr(host_avx512, "_LONG", 60)
    lengths = [1023, 61, 7, 1025, 97, 2 * 1024 + 17]
    qkv, bounds = inputs(n_heads, head_dim, lengths)
    qkv[:, 1] += 16  # keys are centred
    scale = head_dim**-0.5
    out = loop.attend(qkv, bounds, scale)
    assert left == []
    witness = Witness(reference.varlen_attention, *qkv.unbind(1), torch.tensor(bounds), scale)
    assert_as_good_as(out, witness, exact(qkv, bounds, scale))


@either
def test_a_long_cell_is_one_of_many_keys(loop: Loop, left: list[int]) -> None:
    """By itself, and its weights beyond float32 noticed in whatever chunk they are."""
    length = host_avx512._LONG + 101
    qkv, bounds = inputs(1, 32, [length])
    found, rows = loop.attend(qkv, bounds, 0.2), slice(length - 40, length)
    expected = torch.softmax(qkv[rows, 0, 0].double() @ qkv[:, 1, 0].double().T * 0.2, -1) @ qkv[:, 2, 0].double()
    torch.testing.assert_close(found[rows, 0].double(), expected, atol=2e-3, rtol=2e-2)
    assert left == []
    qkv[-1, :2] = 60.0
    loop.attend(qkv, bounds, 1.0)
    assert left == [length]


@either
def test_it_is_what_the_public_function_takes(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a CPU that has both, tiles; registers where it is held to them."""
    qkv, bounds = inputs(4, 64)
    fastest = sdpa._route("bfloat16", "cpu", None, True, False).route
    assert fastest == ("tiles" if "amx_bf16" in cpu_features() else "registers")
    if fastest != loop.route:
        monkeypatch.setattr(sdpa, "_route", lambda *_: TorchPlan("registers", "it is asked for", 64))
    asked, expected = [], loop.attend(qkv, bounds, 0.125)
    function = getattr(loop.module, loop.function)
    monkeypatch.setattr(loop.module, loop.function, lambda *call: asked.append(call) or function(*call))
    out = varlen_attention_qkv(qkv, cu_seqlens=torch.tensor(bounds))
    assert len(asked) == 1
    assert torch.equal(out, expected)


@either
def test_a_numba_for_a_lesser_cpu_is_not_asked(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, value in (("CPU_NAME", "generic"), ("CPU_FEATURES", "+sse2"), ("ENABLE_AVX", 0)):
        with monkeypatch.context() as changed:
            changed.setattr(numba.config, setting, value)
            assert not loop.module.serves(64)
    assert loop.module.serves(64)
    assert not loop.module.serves(24)


@on_tiles
def test_a_system_that_refuses_tiles(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch computes then, as for heads that are no multiples of 32."""
    monkeypatch.setattr(tiles, "_why_refused", lambda process: "the operating system refuses AMX")
    assert not loop.module.serves(64)
    monkeypatch.setattr(loop.module, loop.function, None)
    for head_dim in (64, 48):
        qkv, bounds = inputs(2, head_dim)
        out = varlen_attention_qkv(qkv, cu_seqlens=torch.tensor(bounds))
        by_torch = sdpa._sdpa_per_cell(*qkv.unbind(1), bounds, head_dim**-0.5, 0.0)
        assert torch.equal(out, by_torch)


@either
def test_any_strides(loop: Loop) -> None:
    """A head may begin at any even address; what has other strides is copied."""
    qkv, bounds = inputs(2, 32)
    expected = loop.attend(qkv, bounds, 0.2)
    shifted = torch.empty(qkv.numel() + 1, dtype=torch.bfloat16)[1:].view_as(qkv).copy_(qkv)
    heads_last = qkv.transpose(2, 3).contiguous().transpose(2, 3)
    padded = torch.full((len(qkv), 3, 2, 35), float("nan"), dtype=torch.bfloat16)[..., 1:33].copy_(qkv)
    for other in (shifted, heads_last, padded):
        assert torch.equal(loop.attend(other, bounds, 0.2), expected)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@either
@pytest.mark.parametrize("lengths", [LENGTHS, [77]])
def test_threads_change_nothing(loop: Loop, lengths: list[int], threads: Callable[[int], None]) -> None:
    qkv, bounds = inputs(4, 64, lengths)
    found = []
    for n_threads in (1, 2, 3):
        threads(n_threads)
        with torch.inference_mode():
            found.append(loop.attend(qkv, bounds, 0.125))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@either
def test_other_cells_change_nothing(loop: Loop) -> None:
    """Buffers hold what the cell before has left in them."""
    qkv, bounds = inputs(2, 64)
    together = loop.attend(qkv, bounds, 0.125)
    for start, stop in itertools.pairwise(bounds):
        if start < stop:
            assert torch.equal(loop.attend(qkv[start:stop], [0, stop - start], 0.125), together[start:stop])


@either
def test_keys_are_centred(loop: Loop, left: list[int]) -> None:
    """An offset that all keys of a cell share is nothing to the softmax, and no reason to compute otherwise."""
    qkv, bounds = inputs(4, 64)
    qkv[:, 0] += 2
    qkv[:, 1] += 16
    plain = reference.varlen_attention(*qkv.unbind(1), torch.tensor(bounds), 0.125)
    truth = exact(qkv, bounds, 0.125)
    error, stock = ((x.double() - truth).abs().max() for x in (loop.attend(qkv, bounds, 0.125), plain))
    assert error < stock / 2
    assert left == loop.short


@either
@pytest.mark.parametrize("factor", [4, 20, 300])
def test_weights_beyond_float32(loop: Loop, factor: float, left: list[int]) -> None:
    """Scores of any size: cells whose unshifted weights overflow are computed with a shift."""
    qkv, bounds = inputs(2, 64)
    qkv[:, 0] *= factor
    out, truth = loop.attend(qkv, bounds, 0.125), exact(qkv, bounds, 0.125)
    witness = Witness(reference.varlen_attention, *qkv.unbind(1), torch.tensor(bounds), 0.125)
    assert out.isfinite().all()
    assert (len(left) > len(loop.short)) == (factor > 4)
    assert_as_good_as(out, witness, truth)


@either
@pytest.mark.parametrize("row", [0, 40, 128, 129])
def test_one_row_beyond_float32(loop: Loop, row: int, left: list[int]) -> None:
    """Wherever it is in its cell, which alone is computed otherwise."""
    qkv, bounds = inputs(2, 64)
    start = bounds[LENGTHS.index(130)]
    qkv[start + row, 0, 1] *= 100
    out = loop.attend(qkv, bounds, 0.125)
    assert sorted(left) == sorted([*loop.short, 130])
    witness = Witness(reference.varlen_attention, *qkv.unbind(1), torch.tensor(bounds), 0.125)
    assert_as_good_as(out, witness, exact(qkv, bounds, 0.125))


@either
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("odd", [0x7FC0, 0xFFC0, 0x7F80, 0xFF80], ids=hex)
def test_nan_and_infinity_stay_in_their_cell(loop: Loop, part: int, odd: int) -> None:
    qkv, bounds = inputs(2, 64)
    cell = LENGTHS.index(130)
    row = bounds[cell] + 40
    clean = loop.attend(qkv, bounds, 0.125)
    qkv.view(torch.uint16)[row, part, 1, 3] = odd
    out = loop.attend(qkv, bounds, 0.125)
    inside = slice(bounds[cell], bounds[cell + 1])
    if part < 2 or odd & 0x7F:
        assert out[row if part == 0 else inside, 1].isnan().any(-1).all()
    else:  # an infinite value is infinite in every mean, or NaN
        assert not out[inside, 1].isfinite().all(-1).any()
    assert torch.equal(out[: bounds[cell]], clean[: bounds[cell]])
    assert torch.equal(out[bounds[cell + 1] :], clean[bounds[cell + 1] :])
    assert torch.equal(out[inside, 0], clean[inside, 0]) or part < 2


@on_tiles
def test_beside_the_tiles_of_onednn(loop: Loop) -> None:
    """Torch's own products, which configure tiles in their own way, in the same threads."""
    qkv, bounds = inputs(2, 64)
    x, w = torch.randn(70, 192).bfloat16(), torch.randn(80, 192).bfloat16()
    expected, product = loop.attend(qkv, bounds, 0.125), torch.nn.functional.linear(x, w)

    def both(_: int) -> bool:
        is_right = torch.equal(loop.attend(qkv, bounds, 0.125), expected)
        return is_right and torch.equal(torch.nn.functional.linear(x, w), product)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(both, range(12)))


@on_tiles
def test_tiles_are_released(loop: Loop, threads: Callable[[int], None]) -> None:
    threads(1)
    assert in_use_after_configuring()  # the question can be answered with yes
    loop.attend(*inputs(2, 64), 0.125)
    assert not in_use()
