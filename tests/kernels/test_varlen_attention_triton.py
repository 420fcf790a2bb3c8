"""The Triton kernels of varlen_attention against float64: interpreted on the CPU, compiled on a card (-m gpu)."""

from __future__ import annotations

import math

import pytest
import torch
from attention_inputs import DTYPES, LENGTHS, assert_right, by_reference, check_dtype, cumulative, inputs, run, tiles
from geneformer_kernels import varlen_attention, varlen_attention_qkv
from geneformer_kernels.ops.varlen_attention import launches
from geneformer_kernels.ops.varlen_attention.plan import AttentionPlan


@pytest.fixture
def small_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that short cells have several, interpreted; on a card the plan stays as it is."""

    def plan_for(q: torch.Tensor, dropout_p: float) -> AttentionPlan:
        return tiles(max(16, 1 << (q.shape[-1] - 1).bit_length()), (32, 32), (16, 32), (32, 64))

    if device == "cpu":
        monkeypatch.setattr(launches, "plan_for", plan_for)


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


@pytest.mark.usefixtures("small_tiles")
def test_dropout_seeds(device: str) -> None:
    qkv, d_out, cu_seqlens = inputs(torch.float32, 16, [33, 2], device)
    first, second = (torch.tensor([seed], device=device) for seed in (1, 2))
    a = run(qkv, d_out, cu_seqlens, dropout_p=0.5, seed=first)
    for x, again in zip(a, run(qkv, d_out, cu_seqlens, dropout_p=0.5, seed=first), strict=True):
        assert torch.equal(x, again)

    def out(**dropout) -> torch.Tensor:
        return varlen_attention_qkv(qkv, cu_seqlens=cu_seqlens, impl="triton", **dropout)

    assert not torch.equal(a[0], out(dropout_p=0.5, seed=second))
    drawn = []
    for torch_seed in (0, 0, 1):
        torch.manual_seed(torch_seed)
        drawn.append(out(dropout_p=0.5))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(out(), out(dropout_p=0.0, seed=first))
    assert not out(dropout_p=1 - 1e-9).any()


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
