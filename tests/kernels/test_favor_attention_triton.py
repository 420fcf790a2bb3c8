"""The Triton kernels of favor_attention against float64: interpreted on the CPU, compiled on a card (-m gpu)."""

from __future__ import annotations

import functools
from dataclasses import replace

import favor_inputs
import pytest
import torch
from favor_inputs import check, results
from fences import nan_behind
from geneformer_kernels import favor_attention
from geneformer_kernels.launch import Launch
from geneformer_kernels.ops.favor_attention import launches, reference
from geneformer_kernels.ops.favor_attention.plan import FavorPlan, TilePlan, plan
from geneformer_kernels.target import CARDS
from tolerance import Witness, assert_as_good_as

# Cells of nothing, of one token, of several tiles, and one that fills its tiles; the interpreter is slow.
LENGTHS = [5, 0, 1, 37, 16]
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # of a cell of NaN, in numpy

DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


inputs = functools.partial(favor_inputs.inputs, n_features=21)  # two blocks, the second one short


@pytest.fixture
def small_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that short cells have several, and sums in two parts; on a card the plan stays as it is."""

    def plan_for(q: torch.Tensor) -> FavorPlan:
        whole = plan(str(q.dtype).removeprefix("torch."), q.shape[-1], CARDS["A100"])
        tile = TilePlan(16, 16, Launch())
        return replace(whole, top=tile, sums=tile, fwd=replace(tile, block_t=32), bwd=tile)

    if device == "cpu":
        monkeypatch.setattr(launches, "plan_for", plan_for)
        monkeypatch.setattr(launches, "n_splits", lambda *_: 2)


def check_dtype(device: str, dtype: torch.dtype) -> None:
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 wrongly")


def factor_for(device: str, dtype: torch.dtype) -> float:
    """Three TF32 products keep 21 bits of float32's 24; Triton's interpreter computes plain float32."""
    return 4.0 if device == "cuda" and dtype == torch.float32 else 2.0


@pytest.mark.usefixtures("small_tiles", "poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "stabiliser"), [(32, "cell"), (7, "batch")])
def test_forward_and_gradients(device: str, dtype: torch.dtype, head_dim: int, stabiliser: str) -> None:
    check_dtype(device, dtype)
    check(inputs(dtype, head_dim, LENGTHS, device), "triton", stabiliser, factor=factor_for(device, dtype))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("stabiliser", ["cell", "batch"])
def test_float32_to_the_last_digits(device: str, stabiliser: str) -> None:
    """A large eps, with which much flows through the largest projections: a wrong one shows."""
    tensors = inputs(torch.float32, 32, LENGTHS, device)
    check(tensors, "triton", stabiliser, eps=0.05, factor=factor_for(device, torch.float32))


@pytest.mark.parametrize("lengths", [[64], [65], [128, 1], [0, 0, 3, 0], [3, 0, 130, 1]])
def test_lengths_around_blocks(device: str, lengths: list[int]) -> None:
    """The plan is the interpreter's own, or the card's."""
    check(inputs(torch.float16, 32, lengths, device, n_heads=1, n_features=70), "triton")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("n_features", [1, 16, 17])
def test_numbers_of_features(device: str, n_features: int) -> None:
    check(inputs(torch.float32, 32, [20, 3], device, n_features=n_features), "triton", factor=4.0)


@pytest.mark.usefixtures("small_tiles")
def test_projections_have_the_accuracy_of_float32(device: str) -> None:
    """In half precision, too: where exponents are large, a rounded projection would cost a hundred times as much."""
    qkv, projection, d_out, bounds = inputs(torch.float16, 32, [50], device, spread=3.0)
    options = dict(cu_seqlens=bounds)

    def wide():
        return [x.half() for x in results(reference.favor_attention, qkv.float(), projection, d_out.float(), **options)]

    doubles = (x.double() for x in (qkv, projection, d_out))
    truth = results(reference.favor_attention, *doubles, **options)[0]
    out = favor_attention(*qkv.unbind(1), projection, **options, impl="triton")
    # Features are rounded once before they are multiplied: one part in 2048 of the largest value.
    assert_as_good_as(out, Witness(wide)[0], truth, slack=2.0**-10 * qkv[:, 2].abs().max().item())


@pytest.mark.usefixtures("small_tiles")
def test_many_tokens_of_large_values(device: str) -> None:
    """Sums beyond the largest float16 number."""
    qkv, projection, d_out, bounds = inputs(torch.float16, 32, [80], device, n_heads=1)
    qkv[:, 2] += 1000
    assert qkv[:, 2].double().sum(0).min() > 65_504
    out, d_qkv = results(favor_attention, qkv, projection, d_out, cu_seqlens=bounds, impl="triton")
    truth = results(reference.favor_attention, *(x.double() for x in (qkv, projection, d_out)), cu_seqlens=bounds)
    assert (out - truth[0]).abs().max() < 2.0
    assert d_qkv.isfinite().all()


@pytest.mark.usefixtures("small_tiles")
def test_large_projections_do_not_overflow(device: str) -> None:
    qkv, projection, d_out, bounds = inputs(torch.float32, 32, [40, 3], device, spread=10.0)
    assert (qkv[:, 1] @ projection.T).abs().max() > 200
    out, d_qkv = check((qkv, projection, d_out, bounds), "triton", factor=factor_for(device, torch.float32))
    assert out.isfinite().all()
    assert d_qkv.isfinite().all()


@pytest.mark.usefixtures("small_tiles", "guarded")
def test_nothing_is_written_outside(device: str) -> None:
    qkv, projection, d_out, bounds = inputs(torch.float16, 32, LENGTHS, device)
    found = results(favor_attention, qkv, projection, d_out, cu_seqlens=bounds, impl="triton")
    assert not any(x.isnan().any() for x in found)


@pytest.mark.usefixtures("small_tiles")
def test_cells_do_not_see_each_other(device: str) -> None:
    qkv, projection, d_out, bounds = inputs(torch.float16, 32, LENGTHS, device)
    expected = results(favor_attention, qkv, projection, d_out, cu_seqlens=bounds, impl="triton")
    others, d_others = qkv.clone(), d_out.clone()
    others[:6], others[43:], d_others[:6], d_others[43:] = (float("nan"),) * 4  # all but the cell of 37 tokens
    again = results(favor_attention, others, projection, d_others, cu_seqlens=bounds, impl="triton")
    for x, other in zip(expected, again, strict=True):
        assert torch.equal(x[6:43], other[6:43])
        assert other[:6].isnan().all()
        assert other[43:].isnan().all()


@pytest.mark.usefixtures("small_tiles")
def test_nothing_is_read_outside(device: str) -> None:
    """NaN lies behind every head, between the parts of the projection, behind the last token and the last feature."""

    def among_nans(x):  # strides are multiples of 16: the kernels read it as it is
        whole = torch.full((len(x) + 64, *x.shape[1:-1], 48), float("nan"), dtype=x.dtype, device=device)
        whole[: len(x), ..., :32] = x
        return whole[: len(x), ..., :32]

    qkv, projection, d_out, bounds = inputs(torch.float16, 32, [70, 3], device)
    expected = results(favor_attention, qkv, projection, d_out, cu_seqlens=bounds, impl="triton")
    q, k, v = (among_nans(x).requires_grad_() for x in qkv.unbind(1))
    out = favor_attention(q, k, v, nan_behind(projection), cu_seqlens=bounds, impl="triton")
    gradients = torch.autograd.grad(out, (q, k, v), among_nans(d_out))
    assert torch.equal(out, expected[0])
    for i, gradient in enumerate(gradients):
        assert torch.equal(gradient, expected[1][:, i])


@pytest.mark.usefixtures("small_tiles")
def test_views(device: str) -> None:
    """Any strides: head first, elements apart, an expanded gradient."""
    qkv, projection, _, bounds = inputs(torch.float16, 32, [20, 3], device)
    ones = torch.ones((), dtype=torch.float16, device=device).expand(23, 2, 32)
    expected = results(favor_attention, qkv, projection, ones.clone(), cu_seqlens=bounds, impl="triton")
    for view in (qkv.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), qkv.mT.contiguous().mT):
        found = results(favor_attention, view, projection, ones, cu_seqlens=bounds, impl="triton")
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.usefixtures("small_tiles")
def test_more_room_than_the_longest_cell_changes_nothing(device: str) -> None:
    """A graph that is replayed on other cells has programs for as many tokens as there are."""
    qkv, projection, d_out, bounds = inputs(torch.float16, 32, LENGTHS, device)
    found = [
        results(favor_attention, qkv, projection, d_out, cu_seqlens=bounds, longest=longest, impl="triton")
        for longest in (37, len(qkv), None)
    ]
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens(device: str, lengths: list[int]) -> None:
    qkv, projection, d_out, bounds = inputs(torch.float16, 32, lengths, device)
    out, d_qkv = results(favor_attention, qkv, projection, d_out, cu_seqlens=bounds, impl="triton")
    assert out.shape == (0, 2, 32)
    assert d_qkv.shape == qkv.shape


def test_shapes_that_the_compiler_is_told(device: str) -> None:
    """The fakes say what the operators give."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for keeps, head_dim in ((True, 32), (False, 32), (True, 7)):
        qkv, projection, _, bounds = inputs(torch.float16, head_dim, [5, 3], device)
        arguments = (*qkv.unbind(1), projection, bounds)
        options = (5, False, 1e-4, keeps)
        real = launches.favor_attention_fwd(*arguments, *options)
        with FakeTensorMode() as mode:
            fake = launches.favor_attention_fwd(*(mode.from_tensor(x) for x in arguments), *options)
        assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


def test_projections_are_split_into_parts() -> None:
    projection = torch.randn(9, 20, generator=torch.Generator().manual_seed(0))
    for dtype, bits in ((torch.float16, 21), (torch.bfloat16, 16)):
        parts = launches.weight_parts(projection, dtype, plan(str(dtype).removeprefix("torch."), 20, CARDS["A100"]))
        assert parts.shape == (2, 9, 32)
        error = (parts.double().sum(0)[:, :20] - projection.double()).abs().max()
        assert error < 2.0**-bits * projection.abs().max() * 2
        assert not parts[..., 20:].any()
