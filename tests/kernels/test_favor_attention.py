"""favor_attention through torch and as the reference, against float64 and the published formula."""

from __future__ import annotations

import math

import pytest
import torch
from favor_inputs import LENGTHS, check, cumulative, inputs, results
from geneformer_kernels import favor_attention
from geneformer_kernels.ops.favor_attention import op, plan, reference
from geneformer_kernels.target import CARDS, Target
from test_mlm_cross_entropy import LargestTensor
from tolerance import Witness, assert_as_good_as

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[3, 1000], ids=["chunks of 3", "one chunk"])
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(op, "rows_per_chunk", lambda *_: request.param)
    return request.param


def published(q, k, v, projection, *, eps: float = 1e-4) -> torch.Tensor:
    """The formula of scBERT's attention for [B, H, L, D], step by step, with one stabiliser for all keys."""
    scale, ratio = q.shape[-1] ** -0.25, len(projection) ** -0.5
    features = []
    for x, is_query in ((q, True), (k, False)):
        dash = torch.einsum("bhid,jd->bhij", scale * x, projection)
        half = (x**2).sum(-1, keepdim=True) / 2 * scale**2
        largest = dash.amax(-1, keepdim=True) if is_query else dash.amax()
        features.append(ratio * (torch.exp(dash - half - largest) + eps))
    of_q, of_k = features
    inverse = 1 / torch.einsum("bhid,bhd->bhi", of_q, of_k.sum(-2))
    context = torch.einsum("bhid,bhie->bhde", of_k, v)
    return torch.einsum("bhde,bhid,bhi->bhie", context, of_q, inverse)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_one_stabiliser_for_the_batch_is_what_was_published(impl: str) -> None:
    qkv, projection, _, bounds = inputs(torch.float64, 8, [9, 9, 9])
    cells = qkv.view(3, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = published(*cells, projection).transpose(1, 2).reshape(27, 2, 8)
    out = favor_attention(*qkv.unbind(1), projection, cu_seqlens=bounds, stabiliser="batch", impl=impl)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    alone = torch.cat([published(*(x[i : i + 1] for x in cells), projection) for i in range(3)])
    by_cell = favor_attention(*qkv.unbind(1), projection, cu_seqlens=bounds, impl=impl)
    torch.testing.assert_close(by_cell, alone.transpose(1, 2).reshape(27, 2, 8), atol=1e-12, rtol=1e-12)
    assert (by_cell - out).abs().max() > 1e-4  # eps sees the difference


@pytest.mark.parametrize("stabiliser", ["cell", "batch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype: torch.dtype, stabiliser: str, chunk_rows: int) -> None:
    check(inputs(dtype, 7, LENGTHS), "torch", stabiliser)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_features_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    """Nothing but results is rounded: as good as float32 from the same numbers."""
    qkv, projection, d_out, bounds = inputs(dtype, 16, LENGTHS)

    def in_float32():
        wide = (x.float() for x in (qkv, projection, d_out))
        return [x.to(dtype) for x in results(reference.favor_attention, *wide, cu_seqlens=bounds)]

    doubles = (x.double() for x in (qkv, projection, d_out))
    truth = results(reference.favor_attention, *doubles, cu_seqlens=bounds)
    found = results(favor_attention, qkv, projection, d_out, cu_seqlens=bounds, impl="torch")
    for value, plain, true in zip(found, Witness(in_float32), truth, strict=True):
        assert_as_good_as(value, plain, true, factor=1.0)


@pytest.mark.parametrize("stabiliser", ["cell", "batch"])
def test_gradients_are_exact(stabiliser: str, chunk_rows: int) -> None:
    """By differences: with what flows through the largest projections, which is small but not nothing (a large eps)."""
    qkv, projection, _, bounds = inputs(torch.float64, 4, [4, 0, 1, 3], n_features=6)
    qkv.requires_grad_()

    def function(qkv: torch.Tensor) -> torch.Tensor:
        options = dict(cu_seqlens=bounds, stabiliser=stabiliser, eps=0.05, impl="torch")
        return favor_attention(*qkv.unbind(1), projection, **options)

    assert torch.autograd.gradcheck(function, qkv)


@pytest.mark.parametrize("stabiliser", ["cell", "batch"])
def test_gradients_are_those_of_the_reference(stabiliser: str, chunk_rows: int) -> None:
    qkv, projection, d_out, bounds = inputs(torch.float64, 7, LENGTHS)
    options = dict(cu_seqlens=bounds, stabiliser=stabiliser, eps=0.01)
    for ours, theirs in zip(
        results(favor_attention, qkv, projection, d_out, **options, impl="torch"),
        results(reference.favor_attention, qkv, projection, d_out, **options),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_cells_do_not_see_each_other(impl: str) -> None:
    """Bit for bit, whatever the others hold; with the batch's stabiliser they do."""
    qkv, projection, d_out, bounds = inputs(torch.float32, 16, LENGTHS)
    expected = results(favor_attention, qkv, projection, d_out, cu_seqlens=bounds, impl=impl)
    others, d_others = qkv.clone(), d_out.clone()
    others[:6], others[76:], d_others[:6], d_others[76:] = (float("nan"),) * 4
    for x, again in zip(
        expected, results(favor_attention, others, projection, d_others, cu_seqlens=bounds, impl=impl), strict=True
    ):
        assert torch.equal(x[6:76], again[6:76])
        assert again[:6].isnan().all()
    alone = favor_attention(*qkv[6:76].unbind(1), projection, cu_seqlens=cumulative([70]), impl=impl)
    assert torch.equal(alone, expected[0][6:76])
    batch = favor_attention(*qkv.unbind(1), projection, cu_seqlens=bounds, stabiliser="batch", impl=impl)
    assert not torch.equal(batch[:5], expected[0][:5])


def test_the_number_of_threads_changes_nothing() -> None:
    tensors = inputs(torch.float32, 16, LENGTHS)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            *others, bounds = tensors
            found.append(results(favor_attention, *others, cu_seqlens=bounds, impl="torch"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_large_projections_do_not_overflow(chunk_rows: int) -> None:
    qkv, projection, d_out, bounds = inputs(torch.float32, 16, [40, 3], spread=12.0)
    assert (qkv[:, 1] @ projection.T).abs().max() > 200
    out, d_qkv = check((qkv, projection, d_out, bounds), "torch")
    assert out.isfinite().all()
    assert d_qkv.isfinite().all()


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [1, 1]])
def test_no_cells_and_cells_of_nothing(impl: str, lengths: list[int]) -> None:
    """A cell of one token attends to itself."""
    for stabiliser in ("cell", "batch"):
        qkv, projection, d_out, bounds = inputs(torch.float32, 16, lengths)
        out, d_qkv = results(
            favor_attention, qkv, projection, d_out, cu_seqlens=bounds, stabiliser=stabiliser, impl=impl
        )
        torch.testing.assert_close(out, qkv[:, 2])
        torch.testing.assert_close(d_qkv[:, 2], d_out)
        torch.testing.assert_close(d_qkv[:, :2], torch.zeros_like(d_qkv[:, :2]), atol=1e-5, rtol=0)


def test_memory_does_not_grow_with_the_length() -> None:
    """Beside what comes in and goes out, no tensor: neither features of all tokens, nor anything of all pairs."""
    n_features, length = 64, 20_000
    qkv, projection, d_out, bounds = inputs(torch.float32, 16, [length], n_features=n_features)
    # Each by itself: of a part the whole would be seen.
    arguments, options = (*(x.contiguous() for x in qkv.unbind(1)), projection, bounds), (False, 1e-4)
    with LargestTensor() as forward:  # which sees what an operator does only where it is called as a function
        out, *kept = op.favor_attention_chunks.function(*arguments, *options, True)
    with LargestTensor() as backward:
        op.favor_attention_chunks_bwd.function(d_out, *arguments, out, *kept, *options)
    rows, chunk = out.nbytes, 2 * 1024**2
    features = length * 2 * n_features * 4
    assert rows <= max(forward.n_bytes, backward.n_bytes) <= 3 * chunk < features
    assert sum(x.nbytes for x in kept) < rows


def test_workspace_is_enough() -> None:
    q = torch.empty(0, 10, 64)
    found = op.favor_workspace(q, 266)
    context = 10 * 266 * 65 * 4
    assert context < found.thread < 12 * 1024**2
    assert found.row == 10 * 4


def test_it_is_compiled_without_a_break() -> None:
    qkv, projection, d_out, bounds = inputs(torch.float32, 16, [5, 9])
    function = lambda qkv: favor_attention(*qkv.unbind(1), projection, cu_seqlens=bounds, impl="torch")  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for each in (function, compiled):
        leaf = qkv.clone().requires_grad_()
        out = each(leaf)
        out.backward(d_out)
        if each is function:
            expected = out, leaf.grad
    assert torch.equal(out, expected[0])
    assert torch.equal(leaf.grad, expected[1])


def test_autocast_changes_nothing() -> None:
    qkv, projection, _, bounds = inputs(torch.float32, 16, [5, 9])
    plain = favor_attention(*qkv.unbind(1), projection, cu_seqlens=bounds, impl="torch")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(favor_attention(*qkv.unbind(1), projection, cu_seqlens=bounds, impl="torch"), plain)


def test_second_derivatives_are_refused() -> None:
    qkv, projection, _, bounds = inputs(torch.float64, 4, [4])
    qkv.requires_grad_()
    out = favor_attention(*qkv.unbind(1), projection, cu_seqlens=bounds, impl="torch")
    (first,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        first.sum().backward()


@pytest.mark.parametrize("card", CARDS)
def test_plans_of_every_card(card: str) -> None:
    """Tiles fill tensor cores, and sums of a long cell are spread over the card's multiprocessors."""
    target = CARDS[card]
    for dtype in ("float16", "bfloat16", "float32"):
        for head_dim in (5, 32, 64, 100, 128):
            whole = plan.plan(dtype, head_dim, target)
            assert whole.head_dim >= head_dim
            assert whole.n_parts == (1 if dtype == "float32" else 2)
            for tile in (whole.top, whole.sums, whole.fwd, whole.bwd):
                assert min(tile.block_t, tile.block_f) >= 16
    assert plan.n_splits(16_907, 50, 64, target) * 50 >= 4 * target.n_sms or plan.n_splits(16_907, 50, 64, target) > 30
    assert plan.n_splits(16_907, 10**6, 64, target) == 1
    assert plan.n_splits(100, 1, 64, target) == 1
    with pytest.raises(ValueError, match="up to 128, not 129"):
        plan.plan("float16", 129, target)


def test_chunks_are_near_on_a_cpu_and_large_on_a_card() -> None:
    cpu = Target.cpu(frozenset(), n_cores=2)
    assert 16 <= plan.rows_per_chunk(10, 266, 4, cpu) <= 512
    assert plan.rows_per_chunk(10, 266, 4, CARDS["T4"]) > 4_000
    assert plan.rows_per_chunk(1000, 10_000, 8, cpu) == 16


def test_a_tiny_eps_is_not_for_the_kernels_in_float16() -> None:
    assert "from 3.1e-05 on" in plan.why_not_triton("float16", 64, 1e-6)
    assert plan.why_not_triton("bfloat16", 64, 1e-6) == plan.why_not_triton("float16", 64, 1e-4) == ""
    assert "not 129" in plan.why_not_triton("float32", 129, 1e-4)


def test_it_approximates_softmax() -> None:
    """With many features it is the attention that it stands for."""
    qkv, _, _, bounds = inputs(torch.float64, 16, [30], spread=0.5)
    projection = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q, k, v = (x.transpose(0, 1) for x in qkv.unbind(1))
    exact = (torch.softmax(q @ k.transpose(1, 2) / math.sqrt(16), -1) @ v).transpose(0, 1)
    out = favor_attention(*qkv.unbind(1), projection, cu_seqlens=bounds, eps=1e-8, impl="torch")
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()
