"""The Triton kernels of varlen_attention against float64: interpreted on the CPU, compiled on a card (-m gpu)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from geneformer_kernels import varlen_attention, varlen_attention_qkv
from geneformer_kernels.dispatch import choose, use_impl
from geneformer_kernels.launch import Launch
from geneformer_kernels.ops.varlen_attention import launches, reference
from geneformer_kernels.ops.varlen_attention.plan import (
    AttentionPlan,
    TilePlan,
    kernel_cases,
    plan,
    torch_plan,
)
from geneformer_kernels.target import CARDS, Target
from tolerance import Witness, assert_as_good_as

LENGTHS = [5, 0, 1, 70, 33]
DTYPES = [torch.float16, torch.float32, torch.bfloat16]


def cumulative(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def inputs(dtype: torch.dtype, head_dim: int, lengths: list[int], device: str, n_heads: int = 2, seed: int = 0):
    """A fused projection and a gradient, with means away from zero (which hide no missing mask)."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, n_heads, head_dim, generator=generator) + 0.5
    d_out = torch.randn(sum(lengths), n_heads, head_dim, generator=generator) + 0.25
    return qkv.to(device, dtype), d_out.to(device, dtype), cumulative(lengths, device)


def tiles(block_d: int, fwd: tuple[int, int], dq: tuple[int, int], dkdv: tuple[int, int]) -> AttentionPlan:
    return AttentionPlan(block_d, *(TilePlan(*block, Launch()) for block in (fwd, dq, dkdv)))


@pytest.fixture
def small_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that short cells have several, interpreted; on a card the plan stays as it is."""

    def plan_for(q: torch.Tensor, dropout_p: float) -> AttentionPlan:
        return tiles(max(16, 1 << (q.shape[-1] - 1).bit_length()), (32, 32), (16, 32), (32, 64))

    if device == "cpu":
        monkeypatch.setattr(launches, "plan_for", plan_for)


def check_dtype(device: str, dtype: torch.dtype) -> None:
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 wrongly")


def by_reference(qkv, d_out, cu_seqlens, scale, keep=None, dropout_p=0.0):
    """(out, gradient of qkv) by autograd through the reference, in the dtype of qkv."""
    qkv = qkv.detach().clone().requires_grad_()
    q, k, v = qkv.unbind(1)
    out = torch.zeros_like(q) + reference.varlen_attention(q, k, v, cu_seqlens, scale, keep=keep, dropout_p=dropout_p)
    return out.detach(), torch.autograd.grad(out, qkv, d_out)[0]


def by_formula(qkv, d_out, cu_seqlens, scale, keep=None, dropout_p=0.0):
    """Gradient of qkv as FlashAttention writes it (Dao et al., arXiv:2205.14135, appendix B), in the dtype of qkv.

    A row's sum of weights times their gradients is there ``sum(d_out * out)``. Short rows lose digits to the difference
    of the two, which autograd of the reference does not: in a cell of one token its gradients are exactly 0.
    """
    d_qkv = torch.zeros_like(qkv)
    for i_cell, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        q, k, v = qkv[start:stop].permute(1, 2, 0, 3)
        d_cell = d_out[start:stop].transpose(0, 1)
        kept = 1.0 if keep is None else (keep[i_cell] / (1 - dropout_p)).to(qkv.dtype)
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, -1)
        out = (weights * kept) @ v
        d_scores = weights * (d_cell @ v.transpose(1, 2) * kept - (d_cell * out).sum(-1, keepdim=True)) * scale
        gradients = d_scores @ k, d_scores.transpose(1, 2) @ q, (weights * kept).transpose(1, 2) @ d_cell
        d_qkv[start:stop] = torch.stack(gradients).permute(2, 0, 1, 3)
    return d_qkv


def assert_right(out, d_qkv, qkv, d_out, cu_seqlens, scale, **dropout) -> None:
    """Outputs and gradients are as good as plain torch in their own dtype: gradients as the worse of two ways."""
    exact = by_reference(qkv.double(), d_out.double(), cu_seqlens, scale, **dropout)
    witness = Witness(by_reference, qkv, d_out, cu_seqlens, scale, **dropout)
    other = Witness(by_formula, qkv, d_out, cu_seqlens, scale, **dropout)
    # On a card products of float32 take three passes of TF32, which are nearly as good as scalar ones.
    factor = 6.0 if qkv.is_cuda and qkv.dtype == torch.float32 else 2.0
    assert_as_good_as(out, witness[0], exact[0], factor=factor)
    for i in range(3):
        assert_as_good_as(d_qkv[:, i], [witness[1][:, i], other[:, i]], exact[1][:, i], factor=factor)


def run(qkv, d_out, cu_seqlens, **arguments):
    """(out, gradient of qkv) by the Triton kernels."""
    qkv = qkv.detach().requires_grad_()
    out = varlen_attention_qkv(qkv, cu_seqlens=cu_seqlens, impl="triton", **arguments)
    return out.detach(), torch.autograd.grad(out, qkv, d_out)[0]


@pytest.mark.usefixtures("small_tiles", "poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 7, 48])
def test_forward_and_gradients(device: str, dtype: torch.dtype, head_dim: int) -> None:
    check_dtype(device, dtype)
    qkv, d_out, cu_seqlens = inputs(dtype, head_dim, LENGTHS, device)
    out, d_qkv = run(qkv, d_out, cu_seqlens)
    assert_right(out, d_qkv, qkv, d_out, cu_seqlens, head_dim**-0.5)


@pytest.mark.parametrize("lengths", [[64], [65], [128, 1], [0, 0, 3, 0], [1, 1, 1], [200, 2], [3, 0, 400, 1]])
def test_lengths_around_blocks(device: str, lengths: list[int]) -> None:
    """Full blocks have no tail, and one key more makes one; the plan is the interpreter's own, or the card's."""
    qkv, d_out, cu_seqlens = inputs(torch.float16, 16, lengths, device)
    out, d_qkv = run(qkv, d_out, cu_seqlens, scale=0.4)
    assert_right(out, d_qkv, qkv, d_out, cu_seqlens, 0.4)


@pytest.mark.usefixtures("small_tiles")
def test_large_scores(device: str) -> None:
    """Scores of -300 and 300 in one row, and rows whose sums are below the smallest float32: nothing overflows."""
    qkv, d_out, cu_seqlens = inputs(torch.float32, 16, [40, 3], device, n_heads=1)
    qkv[:, 1] -= 3
    qkv[:, :2] *= torch.linspace(1, 6, 43, device=device)[:, None, None, None]
    out, d_qkv = run(qkv, d_out, cu_seqlens)
    assert out.isfinite().all()
    assert d_qkv.isfinite().all()
    assert_right(out, d_qkv, qkv, d_out, cu_seqlens, 0.25)


@pytest.mark.usefixtures("small_tiles")
def test_nothing_is_written_outside(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer lies between guards, and inside it every element is written: NaN is in the guards only."""
    guarded = []

    def empty(*shape, dtype=torch.float32, device=None):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        size = math.prod(shape)
        poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
        whole = torch.full((size + 512,), poison, dtype=dtype, device=device)
        guarded.append((whole, size, dtype.is_floating_point))
        return whole[256 : 256 + size].view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: empty(x.shape, dtype=x.dtype, device=x.device))
    qkv, d_out, cu_seqlens = inputs(torch.float16, 48, LENGTHS, device)
    q, k, v = qkv.unbind(1)
    out, lse = launches.forward(q, k, v, cu_seqlens, None, 0.1, 0.0, None, launches.plan_for(q, 0.0))
    gradients = tuple(empty(q.shape, dtype=q.dtype, device=device) for _ in range(3))
    saved = (q, k, v, out, lse, cu_seqlens, None, None)
    launches.backward(d_out, *saved, 0.1, 0.0, None, gradients, launches.plan_for(q, 0.0))
    assert len(guarded) >= 8
    for whole, size, is_float in guarded:
        is_poison = whole.isnan() if is_float else whole == torch.iinfo(whole.dtype).min
        assert is_poison[:256].all()
        assert is_poison[256 + size :].all()
        assert not is_float or not is_poison[256 : 256 + size].any()


@pytest.mark.usefixtures("small_tiles")
def test_cells_do_not_see_each_other(device: str) -> None:
    qkv, d_out, cu_seqlens = inputs(torch.float16, 16, LENGTHS, device)
    seed = torch.tensor([5], device=device)
    for dropout_p in (0.0, 0.3):
        expected = run(qkv, d_out, cu_seqlens, dropout_p=dropout_p, seed=seed)
        others, d_others = qkv.clone(), d_out.clone()
        others[:6], others[76:], d_others[:6], d_others[76:] = (float("nan"),) * 4  # all but the cell of 70 tokens
        for x, again in zip(expected, run(others, d_others, cu_seqlens, dropout_p=dropout_p, seed=seed), strict=True):
            assert torch.equal(x[6:76], again[6:76])
            assert again[:6].isnan().all()
            assert again[76:].isnan().all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("lengths", [[70], [16, 64, 32]])
def test_nothing_is_read_outside(device: str, lengths: list[int]) -> None:
    """NaN lies behind every head, between the halves of the projection, and behind the last token."""

    def among_nans(x):  # strides are multiples of 16: the kernels read it as it is
        whole = torch.full((len(x) + 64, *x.shape[1:-1], 64), float("nan"), dtype=x.dtype, device=device)
        whole[: len(x), ..., : x.shape[-1]] = x
        return whole[: len(x), ..., : x.shape[-1]]

    qkv, d_out, cu_seqlens = inputs(torch.float16, 48, lengths, device)
    expected = run(qkv, d_out, cu_seqlens)
    for x, again in zip(expected, run(among_nans(qkv), among_nans(d_out), cu_seqlens), strict=True):
        if device == "cuda":  # other strides are read in another layout, and sums end in another last bit
            torch.testing.assert_close(again, x, rtol=4e-3, atol=4e-3)
        else:
            assert torch.equal(again, x)


@pytest.mark.usefixtures("small_tiles")
def test_views(device: str) -> None:
    """Any strides: a fused projection, head first, elements apart, an expanded gradient."""
    qkv, _, cu_seqlens = inputs(torch.float32, 16, [40, 3], device)
    one = torch.ones((), device=device)
    scale, gradients = 0.25, []
    expected = by_reference(qkv, one.expand(43, 2, 16), cu_seqlens, scale)
    for layout in (
        lambda x: x,
        lambda x: x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
        lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    ):
        leaf = layout(qkv).detach().requires_grad_()
        out = varlen_attention(*leaf.unbind(1), cu_seqlens=cu_seqlens.long(), impl="triton")
        torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=1e-5)
        gradients.append(torch.autograd.grad(out, leaf, one.expand(43, 2, 16))[0])
        fused = varlen_attention_qkv(leaf, cu_seqlens=cu_seqlens, impl="triton")
        assert torch.equal(fused, out)
        gradients.append(torch.autograd.grad(fused.sum(), leaf)[0])
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head_dim", [1, 16, 17, 100])
def test_kernels_are_given_what_they_are_compiled_for(head_dim: int) -> None:
    """Head dimensions and strides that are multiples of 16, elements that are adjacent; nothing is copied twice."""
    x = torch.randn(5, 3, 2, head_dim)
    for view in (x, x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), torch.randn(5, 3, 2, 128)[..., :head_dim]):
        rows = launches.rows_of(view)
        assert rows.stride(-1) == 1
        assert {size % 16 for size in (rows.shape[-1], *rows.stride()[:-1])} == {0}
        assert torch.equal(rows[..., :head_dim], view)
        assert (rows[..., head_dim:] == 0).all()
        assert launches.rows_of(rows) is rows
    assert (launches.rows_of(x) is x) == (head_dim % 16 == 0)


_FARTHEST = launches._LONGEST_STRIDE


@pytest.mark.parametrize(
    ("lengths", "n_heads", "strides"),
    [
        ([1] * 3, 1, (2**30, 16, 1)),
        ([1] * 3, 3, (16, 2**30, 1)),
        ([20], 1, (2**27, 16, 1)),  # a tile of it would reach beyond int32, so it is copied
        ([64, 66], 1, (_FARTHEST, 16, 1)),  # not copied
    ],
    ids=["rows", "heads", "rows of a tile", "the farthest rows"],
)
def test_more_elements_than_int32_counts(
    device: str, lengths: list[int], n_heads: int, strides: tuple[int, ...]
) -> None:
    """Rows, or heads, far apart; most of the storage is never touched."""
    try:
        storage = torch.empty(2**31 + 2**30 + 64, dtype=torch.float16, device=device)
    except RuntimeError:
        pytest.skip("not that much memory")
    n_tokens = sum(lengths)
    far = storage.as_strided((n_tokens, n_heads, 16), strides)
    near, _, cu_seqlens = inputs(torch.float16, 16, lengths, device, n_heads=n_heads)
    expected = varlen_attention(*near.unbind(1), cu_seqlens=cu_seqlens, impl="triton")
    for i in range(3):
        far.copy_(near[:, i])
        parts = [far if i == j else near[:, j] for j in range(3)]
        assert torch.equal(varlen_attention(*parts, cu_seqlens=cu_seqlens, impl="triton"), expected)
    leaf = near.clone().requires_grad_()
    out = varlen_attention_qkv(leaf, cu_seqlens=cu_seqlens, impl="triton")
    far.copy_(expected)
    (gradient,) = torch.autograd.grad(out, leaf, far, retain_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(out, leaf, expected)[0])


def test_no_tokens(device: str) -> None:
    for lengths in ([], [0, 0]):
        qkv = torch.zeros(0, 3, 2, 16, device=device, requires_grad=True)
        out = varlen_attention_qkv(qkv, cu_seqlens=cumulative(lengths, device), impl="triton")
        assert out.shape == (0, 2, 16)
        assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


class _WithoutGradient(torch.autograd.Function):
    """What hands no gradient down, as a loss does that does not depend on its input."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d_x):
        return None


def test_no_gradient_comes_back(device: str) -> None:
    qkv, _, cu_seqlens = inputs(torch.float32, 16, [5, 3], device)
    qkv.requires_grad_()
    for out in (
        varlen_attention_qkv(qkv, cu_seqlens=cu_seqlens, impl="triton"),
        varlen_attention(*qkv.unbind(1), cu_seqlens=cu_seqlens, impl="triton"),
    ):
        (_WithoutGradient.apply(out).sum() + qkv.sum()).backward()
        assert (qkv.grad == 1).all()
        qkv.grad = None


def test_second_derivatives_are_refused(device: str) -> None:
    qkv, d_out, cu_seqlens = inputs(torch.float32, 16, [5, 3], device)
    qkv.requires_grad_()
    expected = torch.autograd.grad(varlen_attention_qkv(qkv, cu_seqlens=cu_seqlens, impl="triton"), qkv, d_out)[0]
    for out in (
        varlen_attention_qkv(qkv, cu_seqlens=cu_seqlens, impl="triton"),
        varlen_attention(*qkv.unbind(1), cu_seqlens=cu_seqlens, impl="triton"),
    ):
        (gradient,) = torch.autograd.grad(out, qkv, d_out, create_graph=True)
        assert torch.equal(gradient, expected)
        with pytest.raises(NotImplementedError, match=r"varlen_attention_.*first derivatives only"):
            gradient.square().sum().backward()


def test_tokens_without_cells_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the values of cu_seqlens cannot be looked at."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    qkv = torch.zeros(2, 3, 1, 16, device=device)
    with pytest.raises(ValueError, match="from 0 to 2"):
        varlen_attention_qkv(qkv, cu_seqlens=cumulative([], device), impl="triton")


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


def expected_keep(seed: int, i_head: int, start: int, length: int, dropout_p: float) -> np.ndarray:
    """[length, length] booleans, from the definition: Philox4x32 with 7 rounds, 16 weights per call."""
    query, key = np.meshgrid(np.arange(length), np.arange(length), indexing="ij")
    mask32 = np.uint64(0xFFFFFFFF)
    place = [(x >> 4) * 16 + (x >> 1 & 3) for x in (query, key)]
    words = [x.astype(np.uint64) for x in (start + place[0], place[1], np.full_like(key, i_head), 0 * key)]
    round_keys = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(7):
        product0, product2 = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        high0, high2 = product0 >> np.uint64(32), product2 >> np.uint64(32)
        words = [
            high2 ^ words[1] ^ np.uint64(round_keys[0]),
            product2 & mask32,
            high0 ^ words[3] ^ np.uint64(round_keys[1]),
            product0 & mask32,
        ]
        round_keys = [(round_keys[0] + 0x9E3779B9) % 2**32, (round_keys[1] + 0xBB67AE85) % 2**32]
    word = np.choose((query & 1) * 2 + (key & 1), words)
    left = (((query & 8) * 2 + (key & 8)) & 31).astype(np.uint64)
    rotated = ((word << left) & mask32) | (word >> (np.uint64(32) - left))
    return rotated >= np.uint64(int(np.float32(dropout_p) * 2.0**32))


def kept_by_forward(seed: int, lengths: list[int], dropout_p: float, device: str, whole: AttentionPlan | None = None):
    """The mask of every cell [H, L, L]: equal scores, and values that are rows of the identity."""
    n_heads, cu_seqlens = 2, cumulative(lengths, device)
    q = torch.zeros(sum(lengths), n_heads, 128, device=device)
    v = torch.cat([torch.eye(128, device=device)[:length] for length in lengths])[:, None].expand(-1, n_heads, -1)
    seeds = torch.tensor([seed], device=device)
    whole = whole or launches.plan_for(q, dropout_p)
    out, _ = launches.forward(q, q, v, cu_seqlens, None, 1.0, dropout_p, seeds, whole)
    cells = out.split(lengths)
    return [cell.permute(1, 0, 2)[:, :, :length].cpu() > 0 for cell, length in zip(cells, lengths, strict=True)]


@pytest.mark.parametrize("blocks", [(64, 64), (16, 32), (32, 128)])
def test_dropout_mask_is_its_definition(device: str, blocks: tuple[int, int]) -> None:
    """Whatever the tiles; both halves of the seed count."""
    lengths, seed = [40, 0, 1, 70], (77 << 32) + 5
    if device == "cuda" and blocks == (32, 128):
        blocks = (32, 64)
    masks = kept_by_forward(seed, lengths, 0.3, device, tiles(128, blocks, blocks, blocks))
    for start, length, mask in zip((0, 40, 40, 41), lengths, masks, strict=True):
        for i_head in range(2):
            np.testing.assert_array_equal(mask[i_head].numpy(), expected_keep(seed, i_head, start, length, 0.3))


def test_dropout_statistics() -> None:
    """The right share survives, within five standard deviations, and neighbours of every kind are independent."""
    masks = np.stack(
        [[expected_keep(seed, i_head, start, 256, 0.1) for i_head in range(4)] for seed in (3, 4) for start in (0, 256)]
    )
    n = masks.size
    assert abs(masks.mean() - 0.9) < 5 * math.sqrt(0.09 / n)
    signs = (masks - 0.9) / 0.3
    pairs = [(signs[0], signs[1]), (signs[0], signs[2]), (signs[:, 0], signs[:, 1])]
    for bit in (1, 2, 4, 8, 16, 32):
        pairs += [(signs[..., bit:, :], signs[..., :-bit, :]), (signs[..., bit:], signs[..., :-bit])]
    for a, b in pairs:
        assert abs((a * b).mean()) < 5 / math.sqrt(a.size)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 24])
def test_dropout_forward_and_gradients(device: str, dtype: torch.dtype, head_dim: int, monkeypatch) -> None:
    """The mask is the same in all three kernels, though each cuts the scores differently."""
    check_dtype(device, dtype)
    lengths, seed = [70, 0, 1, 20], 123456789012
    qkv, d_out, cu_seqlens = inputs(dtype, head_dim, lengths, device)
    block_d = 1 << (head_dim - 1).bit_length()
    if device == "cpu":
        monkeypatch.setattr(launches, "plan_for", lambda q, p: tiles(block_d, (32, 32), (64, 64), (16, 32)))
    out, d_qkv = run(qkv, d_out, cu_seqlens, dropout_p=0.25, seed=torch.tensor([seed], device=device))
    keep = [
        torch.from_numpy(np.stack([expected_keep(seed, i, start, length, 0.25) for i in range(2)])).to(device)
        for start, length in zip((0, 70, 70, 71), lengths, strict=True)
    ]
    assert_right(out, d_qkv, qkv, d_out, cu_seqlens, head_dim**-0.5, keep=keep, dropout_p=0.25)


@pytest.mark.usefixtures("small_tiles")
def test_dropout_seeds(device: str) -> None:
    qkv, d_out, cu_seqlens = inputs(torch.float32, 16, [33, 2], device)
    first, second = (torch.tensor([seed], device=device) for seed in (1, 2))
    a = run(qkv, d_out, cu_seqlens, dropout_p=0.5, seed=first)
    for x, again in zip(a, run(qkv, d_out, cu_seqlens, dropout_p=0.5, seed=first), strict=True):
        assert torch.equal(x, again)
    assert not torch.equal(a[0], run(qkv, d_out, cu_seqlens, dropout_p=0.5, seed=second)[0])
    drawn = []
    for torch_seed in (0, 0, 1):
        torch.manual_seed(torch_seed)
        drawn.append(run(qkv, d_out, cu_seqlens, dropout_p=0.5)[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    plain = run(qkv, d_out, cu_seqlens)[0]
    assert torch.equal(plain, run(qkv, d_out, cu_seqlens, dropout_p=0.0, seed=first)[0])
    almost_nothing = run(qkv, d_out, cu_seqlens, dropout_p=1 - 1e-9)[0]
    assert not almost_nothing.any()


@pytest.mark.usefixtures("small_tiles")
def test_operators(device: str) -> None:
    qkv, d_out, cu_seqlens = inputs(torch.float32, 16, [3, 2], device, n_heads=1)
    qkv.requires_grad_()
    q, k, v = (x.detach().clone().requires_grad_() for x in qkv.unbind(1))
    seed = torch.tensor([1], device=device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    cells = (cu_seqlens, *(launches.varlen_attention_tiles(cu_seqlens, 5, rows) for rows in (16, 16, 32)))
    for given in (cells, (cu_seqlens, None, None, None)):
        torch.library.opcheck(
            launches.varlen_attention_fwd.overload, (q, k, v, *given, 0.2, 0.1, seed), test_utils=tests
        )
        torch.library.opcheck(
            launches.varlen_attention_qkv_fwd.overload, (qkv, *given, 0.2, 0.0, None), test_utils=tests
        )
    with torch.no_grad():
        out, lse = launches.varlen_attention_qkv_fwd(qkv, *cells, 0.2, 0.0, None)
        saved = (out, lse, cu_seqlens, *cells[2:], 0.2, 0.0, None)
        tests = ("test_schema", "test_faketensor")
        for n_cells in (0, 1, 3):
            bounds = torch.zeros(n_cells + 1, dtype=torch.int32, device=device)
            for arguments in ((bounds, 0, 16), (bounds, 40, 16)):
                torch.library.opcheck(launches.varlen_attention_tiles.overload, arguments, test_utils=tests)
        torch.library.opcheck(launches.varlen_attention_bwd.overload, (d_out, q, k, v, *saved), test_utils=tests)
        torch.library.opcheck(launches.varlen_attention_qkv_bwd.overload, (d_out, qkv, *saved), test_utils=tests)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dropout_p", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_compiled_without_a_break(device: str, dropout_p: float) -> None:
    qkv, d_out, cu_seqlens = inputs(torch.float32, 16, [3, 2], device, n_heads=1)
    seed = torch.tensor([9], device=device) if dropout_p else None

    def attend(qkv, cu_seqlens):
        whole = varlen_attention_qkv(qkv * 1, cu_seqlens=cu_seqlens, impl="triton", dropout_p=dropout_p, seed=seed)
        parts = varlen_attention(*qkv.unbind(1), cu_seqlens=cu_seqlens, impl="triton", dropout_p=dropout_p, seed=seed)
        return whole + parts

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        leaf = qkv.clone().requires_grad_()
        out = function(leaf, cu_seqlens)
        results.append((out.detach(), torch.autograd.grad(out, leaf, d_out)[0]))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("card", CARDS)
def test_choice_on_every_card(card: str) -> None:
    target = CARDS[card]
    if target.sm < 80:
        assert choose("varlen_attention", "float16", target).impl == "torch"
        assert "tensor cores" in choose_reason("float16", target, "triton")
    else:
        for dtype in ("float16", "bfloat16"):
            assert choose("varlen_attention", dtype, target).impl == "triton"
    # Three-fold TF32 spills: CUTLASS's float32 kernel comes first, Triton runs when asked.
    assert choose("varlen_attention", "float32", target).impl == "torch"
    with use_impl("triton", "varlen_attention"):
        if target.sm >= 80:
            assert choose("varlen_attention", "float32", target).impl == "triton"
    assert choose("varlen_attention", "float64", target).impl == "torch"


def choose_reason(dtype: str, target: Target, impl: str) -> str:
    from geneformer_kernels.dispatch import candidates

    return next(option.reason for option in candidates("varlen_attention", dtype, target) if option.impl == impl)


@pytest.mark.parametrize("target", [*CARDS.values(), Target.cuda(100), Target.cuda(120)], ids=lambda t: t.name)
def test_plans(target: Target) -> None:
    for dtype, head_dim in itertools.product(("float16", "bfloat16", "float32"), (1, 7, 16, 32, 33, 64, 80, 128)):
        whole = plan(dtype, head_dim, target)
        assert whole.block_d >= max(16, head_dim)
        assert whole.block_d & (whole.block_d - 1) == 0
        assert whole.block_d == 16 or whole.block_d < 2 * head_dim
        for tile in (whole.fwd, whole.dq, whole.dkdv):
            # A patch of dropout must not straddle two tiles.
            assert tile.block_m % 16 == 0
            assert tile.block_n % 32 == 0
            assert tile.block_m & (tile.block_m - 1) == tile.block_n & (tile.block_n - 1) == 0
            assert (tile.precision != "tf32") == (dtype == "float32")
        # Both operands of every product, double buffered, at the very least.
        size = 4 if dtype == "float32" else 2
        for rows, tile in ((whole.fwd.block_n, whole.fwd), (whole.dq.block_n, whole.dq)):
            assert 2 * rows * whole.block_d * size * tile.launch.num_stages <= target.smem_bytes or target.sm < 80
    with pytest.raises(ValueError, match="up to 128"):
        plan("float16", 129, target)


def test_large_tiles_need_much_shared_memory() -> None:
    assert plan("float16", 128, CARDS["H100"]).fwd.launch.num_stages == 4
    assert plan("float16", 128, CARDS["A10"]).fwd.launch.num_stages == 2
    assert plan("float16", 64, Target.cuda(100, triton=(3, 7))) != plan("float16", 64, CARDS["A10"])


def test_routes_through_torch() -> None:
    def route(dtype: str, card: str, torch: tuple[int, int] = (2, 11), **arguments) -> str:
        return torch_plan(dtype, CARDS[card], is_inference=False, torch=torch, **arguments).route

    assert route("bfloat16", "A100") == route("float16", "H100") == "varlen"
    assert route("bfloat16", "A100", (2, 10)) == route("bfloat16", "A100", has_dropout=True) == "efficient"
    assert route("float16", "T4") == route("float16", "V100") == route("float32", "V100") == "efficient"
    assert route("float32", "H100") == "efficient"
    assert route("float64", "H100") == route("bfloat16", "T4") == "cells"
    assert torch_plan("float16", Target("hip"), is_inference=False, torch=(2, 11)).route == "cells"


@pytest.mark.parametrize("target", CARDS.values(), ids=CARDS)
def test_cases_have_the_arguments_of_their_kernels(target: Target) -> None:
    from geneformer_kernels.ops.varlen_attention import kernel

    cases = kernel_cases(target)
    assert len({(case.kernel, case.problem, case.dtype) for case in cases}) == len(cases)
    for case in cases:
        names = getattr(kernel, case.kernel).arg_names
        assert sorted(names) == sorted([*case.signature, *case.constexprs])
        assert case.divisible <= set(case.signature)
        assert case.is_default == (case.dtype != "float32" and (target.sm >= 80 or not case.has_dot))
    if target.sm >= 80:
        kernels = {case.kernel for case in cases}
        assert len(kernels) == 4
        for name, has_dropout in itertools.product(kernels - {"varlen_attention_tiles_kernel"}, (True, False)):
            found = {(c.dtype, c.constexprs["HEAD_DIM"]) for c in cases if c.kernel == name and c.has_dot}
            assert {("bfloat16", 48), ("float16", 128), ("float16", 32)} <= found
            assert any(c.constexprs["HAS_DROPOUT"] == has_dropout for c in cases if c.kernel == name)
