"""The Triton kernels of residual_layernorm against float64, interpreted or on a card."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fences import nan_behind
from geneformer_kernels import residual_layernorm
from geneformer_kernels.dispatch import ImplUnavailableError, choose
from geneformer_kernels.ops.residual_layernorm import op as operators
from geneformer_kernels.ops.residual_layernorm import plan as planner
from geneformer_kernels.ops.residual_layernorm.op import residual_layernorm_bwd, residual_layernorm_fwd
from geneformer_kernels.target import CARDS, Target
from philox import keep_mask
from tolerance import Witness, assert_as_good_as

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
EPS = 1e-12


class Case(NamedTuple):
    """Leaves and the gradients that flow in."""

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor
    d_stream: torch.Tensor
    d_out: torch.Tensor


def make(n: int, width: int, dtype: torch.dtype, device: str, *, has_residual: bool = True) -> Case:
    generator = torch.Generator().manual_seed(n * width)

    def normal(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return nan_behind((torch.randn(*shape, generator=generator) + mean).to(device))

    return Case(
        nan_behind(normal(n, width, mean=3).to(dtype)),
        normal(n, width, mean=-1) if has_residual else None,
        normal(width, mean=0.5),
        normal(width),
        normal(n, width, mean=0.3),
        nan_behind(normal(n, width, mean=-0.2).to(dtype)),
    )


def plain(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm: str,
    keep: torch.Tensor | None,
    dropout_p: float,
    eps: float,
    wide: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x.to(wide)
    if keep is not None:
        total = torch.where(keep, total / (1 - dropout_p) if dropout_p < 1 else total * 0, 0)
    if residual is not None:
        total = total + residual.to(wide)
    normed = F.layer_norm(total, x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return normed if norm == "post" else total, normed


def results(
    case: Case, function, *, uses: tuple[bool, bool] = (True, True), wide: torch.dtype | None = None
) -> list[torch.Tensor]:
    """[stream, out, gradients...] of a function of the leaves, which are made float64 first if ``wide`` says so."""
    tensors = [None if each is None else each.to(wide or each.dtype) for each in case]
    leaves = [None if each is None else nan_behind(each.detach()).requires_grad_() for each in tensors[:4]]
    stream, out = function(*leaves)
    pairs = [(stream, tensors[4].to(stream.dtype)), (out, tensors[5].to(out.dtype))]
    chosen = [(y, nan_behind(d)) for (y, d), is_used in zip(pairs, uses, strict=True) if is_used]
    torch.autograd.backward([y for y, _ in chosen], [d for _, d in chosen])
    return [stream.detach(), out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def check(
    case: Case,
    norm: str,
    *,
    out_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    eps: float = EPS,
    uses: tuple[bool, bool] = (True, True),
) -> list[torch.Tensor]:
    """Compares everything with float64 and returns what the kernels gave."""
    n, width = case.x.shape
    out_dtype = out_dtype or case.x.dtype
    seed = torch.tensor([(5 << 32) + n], device=case.x.device)
    keep = keep_mask(int(seed), n, width, dropout_p).to(case.x.device) if dropout_p else None

    def kernel(*leaves):
        return residual_layernorm(
            *leaves, eps=eps, norm=norm, out_dtype=out_dtype, dropout_p=dropout_p, seed=seed, impl="triton"
        )

    def witness(*leaves):
        stream, out = plain(*leaves, norm, keep, dropout_p, eps, FP32)
        return stream, out.to(out_dtype)

    def exact(*leaves):
        return plain(*leaves, norm, keep, dropout_p, eps, torch.float64)

    # Of one column the mean takes all: what is left is rounding times the reciprocal deviation, which is 1 / sqrt(eps).
    # A card fuses products into sums and leaves more of it.
    slack = 1e-6 * eps**-0.5 if case.x.is_cuda and width == 1 else 0.0
    found = results(case, kernel, uses=uses)
    truths = results(case, exact, uses=uses, wide=torch.float64)
    for value, other, truth in zip(found, Witness(results, case, witness, uses=uses), truths, strict=True):
        assert value.dtype == other.here.dtype
        # A card's reciprocal square root is off by up to two units in the last place.
        factor = 3.0 if value.is_cuda and out_dtype == FP32 else 2.0
        assert_as_good_as(value, other, truth, factor=factor, slack=slack)
    return found


def needs_card(dtype: torch.dtype, device: str) -> None:
    if dtype == BF16 and device == "cpu":
        pytest.skip("bfloat16 is for the card: Triton's interpreter gets it wrong")


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize(("n", "width"), [(21, 256), (3, 769), (1, 21)])
def test_everything(device: str, guarded: None, norm: str, n: int, width: int, dtype: torch.dtype) -> None:
    needs_card(dtype, device)
    check(make(n, width, dtype, device), norm)
    check(make(n, width, dtype, device), norm, dropout_p=0.1)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_programs_with_several_blocks_of_rows(
    device: str, guarded: None, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card with many rows: each part of the parameters' gradients is a sum over blocks."""
    monkeypatch.setattr(operators, "plan", lambda *arguments: replace(planner.plan(*arguments), n_programs=2))
    check(make(33, 256, FP16, device), norm)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("width", [4096, 2000, 1])
def test_widths(device: str, guarded: None, norm: str, width: int) -> None:
    check(make(3, width, FP32, device), norm, dropout_p=0.25, eps=1e-5)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize(("dtype", "out_dtype"), [(FP32, FP16), (FP16, FP32)])
def test_dtypes_of_x_and_out(device: str, guarded: None, norm: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    check(make(5, 130, dtype, device), norm, out_dtype=out_dtype)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("uses", [(True, False), (False, True)])
def test_one_gradient_comes_in(device: str, guarded: None, norm: str, uses: tuple[bool, bool]) -> None:
    case = make(5, 130, FP16, device)
    if norm == "pre" and not uses[1]:
        # Nothing flows through the normalisation: its parameters get zeros.
        found = results(case, lambda *a: residual_layernorm(*a, eps=EPS, norm=norm, impl="triton"), uses=uses)
        torch.testing.assert_close(found[3], case.d_stream)
        torch.testing.assert_close(found[2], case.d_stream.half())
        assert not found[4].any()
        assert not found[5].any()
    else:
        check(case, norm, uses=uses)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_no_residual(device: str, guarded: None, norm: str, dtype: torch.dtype, dropout_p: float) -> None:
    case = make(5, 130, dtype, device, has_residual=False)
    check(case, norm, dropout_p=dropout_p)
    stream, out = residual_layernorm(*case[:4], eps=EPS, norm=norm, impl="triton")
    assert (stream is case.x) == (norm == "pre" and dtype == FP32)
    assert (stream is out) == (norm == "post" and dtype == FP32)


def test_statistics_survive_a_large_mean(device: str) -> None:
    case = make(9, 256, FP32, device)
    check(case._replace(x=case.x * 1e-2 + 1000.0, residual=case.residual * 1e-2), "post")


def test_eps_counts(device: str) -> None:
    case = make(4, 64, FP32, device)
    small = case._replace(x=case.x * 1e-3, residual=case.residual * 1e-3)
    outs = [check(small, "post", eps=eps)[1] for eps in (1e-12, 1e-5)]
    assert (outs[0] - outs[1]).abs().max() > 0.5


def test_more_axes_and_strides(device: str) -> None:
    case = make(6, 64, FP32, device)
    flat = residual_layernorm(*case[:4], eps=EPS, norm="post", impl="triton")[0]
    x, residual = (t.view(2, 3, 64).transpose(0, 1).contiguous().transpose(0, 1) for t in case[:2])
    leaf = x.detach().requires_grad_()
    stream, out = residual_layernorm(leaf, residual, *case[2:4], eps=EPS, norm="post", out_dtype=FP16, impl="triton")
    assert stream.shape == out.shape == (2, 3, 64)
    # On a card another dtype of the result may mean another order of the sums.
    close = dict(rtol=0, atol=0) if device == "cpu" else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stream.reshape(6, 64), flat, **close)
    stream.sum().backward()  # an expanded gradient, stride 0
    assert leaf.grad.shape == leaf.shape


def test_no_rows(device: str) -> None:
    found = results(make(0, 64, FP16, device), lambda *a: residual_layernorm(*a, eps=EPS, norm="post", impl="triton"))
    assert [each.shape for each in found] == [(0, 64)] * 4 + [(64,)] * 2
    assert not found[4].any()
    assert not found[5].any()


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_frozen_tensors_cost_nothing(device: str, dtype: torch.dtype) -> None:
    case = make(5, 130, dtype, device)
    full = results(case, lambda *a: residual_layernorm(*a, eps=EPS, norm="post", impl="triton"))[2:]
    for wanted in range(4):
        leaves = [each.detach().clone().requires_grad_(i == wanted) for i, each in enumerate(case[:4])]
        stream, out = residual_layernorm(*leaves, eps=EPS, norm="post", impl="triton")
        torch.autograd.backward([stream, out], [case.d_stream, case.d_out])
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(4)]
        torch.testing.assert_close(leaves[wanted].grad, full[wanted], rtol=0, atol=0)


def test_mask_statistics(device: str) -> None:
    n, width, dropout_p = 160, 256, 0.1

    def mask(n: int = n, **kwargs) -> torch.Tensor:
        ones = torch.ones(n, width, device=device)
        stream, _ = residual_layernorm(ones, None, ones[0], ones[0], eps=EPS, norm="pre", impl="triton", **kwargs)
        assert set(stream.unique().tolist()) <= {0.0, stream.max().item()}
        return stream != 0

    seed = torch.tensor([11], device=device)
    keep = mask(dropout_p=dropout_p, seed=seed)
    assert torch.equal(keep.cpu(), keep_mask(11, n, width, dropout_p))
    dropped = (~keep).double()
    sigma = (dropout_p * (1 - dropout_p)) ** 0.5
    assert abs(dropped.mean().item() - dropout_p) < 4 * sigma / (n * width) ** 0.5
    assert (dropped.mean(0) - dropout_p).abs().max() < 5 * sigma / n**0.5
    assert (dropped.mean(1) - dropout_p).abs().max() < 5 * sigma / width**0.5
    centred = dropped - dropout_p
    for shift in ((0, 1), (0, 8), (1, 0), (4, 0)):
        rolled = centred.roll(shift, (0, 1))
        assert (centred * rolled).mean().abs() < 5 * sigma**2 / (n * width) ** 0.5
    other = mask(16, dropout_p=dropout_p, seed=seed + 1)
    assert 0.13 < (keep[:16] != other).double().mean() < 0.23
    torch.manual_seed(3)
    drawn = [mask(8, dropout_p=0.5) for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(mask(8, dropout_p=0.5), drawn[0])
    assert not torch.equal(*drawn)


def test_everything_dropped(device: str) -> None:
    found = check(make(5, 64, FP32, device), "pre", dropout_p=1.0)
    assert not found[2].any()


def test_same_bits_every_time(device: str) -> None:
    n = 60_000 if device == "cuda" else 50
    case = make(n, 256, FP16, device)

    def function(*leaves):
        return residual_layernorm(
            *leaves, eps=EPS, norm="post", dropout_p=0.1, seed=torch.tensor([1], device=device), impl="triton"
        )

    for first, second in zip(results(case, function), results(case, function), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("norm", "n_bytes"), [("post", 6 * 64 * 4), ("pre", 0)])
def test_kept_for_the_backward(device: str, norm: str, n_bytes: int) -> None:
    case, kept = make(6, 64, FP16, device), []
    leaves = [each.requires_grad_() for each in case[:4]]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stream, _ = residual_layernorm(*leaves, eps=EPS, norm=norm, impl="triton")
    own = [t for t in kept if t.data_ptr() not in {stream.data_ptr(), *(leaf.data_ptr() for leaf in leaves)}]
    # Two statistics per row, and in post-norm the sum.
    assert sum(t.numel() * t.element_size() for t in own) == n_bytes + 2 * 6 * 4
    with torch.no_grad():
        outputs = residual_layernorm_fwd(*case[:4], None, EPS, norm == "post", 0.0, FP16, False)
    assert [each.numel() for each in outputs[2:]] == [0, 0, 0]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_without_a_break(device: str, impl: str) -> None:
    case = make(5, 64, FP16, device)

    def function(*leaves):
        dropout_p = 0.2 if impl == "triton" else 0.0  # torch's mask may differ between eager and compiled
        stream, out = residual_layernorm(*leaves, eps=EPS, norm="post", dropout_p=dropout_p, impl=impl)
        return stream * 2, out + 1

    torch.manual_seed(0)
    expected = results(case, function)
    torch.manual_seed(0)
    found = results(case, torch.compile(function, fullgraph=True, backend="aot_eager"))
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth)


def test_operators(device: str) -> None:
    case = make(3, 40, FP16, device)
    leaves = [each.clone().requires_grad_() for each in case[:4]]
    seed = torch.tensor([2], device=device)
    torch.library.opcheck(residual_layernorm_fwd.overload, (*leaves, seed, EPS, True, 0.1, FP16, True))
    total, statistic = case.d_stream, case.d_stream[:, 0].contiguous()
    torch.library.opcheck(
        residual_layernorm_bwd.overload,
        (total, case.d_out, total, statistic, statistic, case.weight, seed, True, 0.1, FP16, True, False, True),
    )


def test_torch_drops_as_torch_does() -> None:
    case = make(4, 32, FP32, "cpu")
    torch.manual_seed(0)
    dropped = F.dropout(case.x, 0.3)
    expected = residual_layernorm(dropped, *case[1:4], eps=EPS, norm="post", impl="torch")
    for impl in ("torch", "reference"):
        torch.manual_seed(0)
        found = residual_layernorm(*case[:4], eps=EPS, norm="post", dropout_p=0.3, impl=impl)
        torch.testing.assert_close(found, expected)


def test_refusals(device: str) -> None:
    case = make(2, 32, FP32, device)
    with pytest.raises(ValueError, match="dropout_p"):
        residual_layernorm(*case[:4], eps=EPS, norm="post", dropout_p=1.5)
    wide = make(1, 4097, FP32, device)
    with pytest.raises(ImplUnavailableError, match=r"4,096.*4,097"):
        residual_layernorm(*wide[:4], eps=EPS, norm="post", impl="triton")
    with pytest.raises(ImplUnavailableError, match="computes in float32"):
        residual_layernorm(*(each.double() for each in case[:4]), eps=EPS, norm="post", impl="triton")


@pytest.mark.parametrize("card", CARDS)
def test_plans(card: str) -> None:
    target = CARDS[card]
    for width in (1, 128, 129, 256, 640, 768, 896, 1280, 2048, 4096):
        for n_rows in (0, 1, 1000, 10_000_000):
            plan = planner.plan(n_rows, width, target)
            assert plan.block_c >= width
            assert plan.block_c & (plan.block_c - 1) == 0
            assert plan.fwd_block_rows * plan.block_c == 512 * plan.fwd_launch.num_warps
            assert plan.bwd_block_rows * plan.block_c == 256 * plan.bwd_launch.num_warps
            assert 1 <= plan.n_programs <= 6 * target.n_sms
    for dtype in ("float16", "bfloat16", "float32"):
        is_able = dtype != "bfloat16" or target.sm >= 75
        if is_able:
            assert choose("residual_layernorm", dtype, target).impl == "triton"
        else:
            with pytest.raises(ImplUnavailableError, match="bfloat16"):
                choose("residual_layernorm", dtype, target)
    assert choose("residual_layernorm", "float64", target).impl == "torch"
    assert choose("residual_layernorm", "float32", Target("hip", name="MI300")).impl == "torch"
    assert choose("residual_layernorm", "float32", Target.cpu({"triton_interpreter"})).impl == "torch"


@pytest.mark.parametrize("card", CARDS)
def test_cases_fit_the_kernels(card: str) -> None:
    from geneformer_kernels.ops.residual_layernorm import kernel, kernel_int8

    cases = planner.kernel_cases(CARDS[card])
    assert len({(case.kernel, case.problem, case.dtype) for case in cases}) == len(cases)
    for case in cases:
        module = kernel_int8 if hasattr(kernel_int8, case.kernel) else kernel
        names = inspect.signature(getattr(module, case.kernel).fn).parameters
        assert sorted(names) == sorted([*case.signature, *case.constexprs])
        assert case.divisible <= set(case.signature)
        assert case.dtype != "bfloat16" or CARDS[card].sm >= 75


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize(("n", "width"), [(70_001, 256), (30_000, 768), (9_999, 1280)])
def test_full_size(norm: str, n: int, width: int, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if dtype == BF16 and torch.cuda.get_device_capability() < (7, 5):
        pytest.skip("this card has no bfloat16")
    check(make(n, width, dtype, "cuda"), norm, dropout_p=0.1)


@pytest.mark.gpu
def test_nobody_waits_for_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    case = make(500, 256, FP16, "cuda")

    def function(*leaves):
        return residual_layernorm(*leaves, eps=EPS, norm="post", dropout_p=0.1, impl="triton")

    results(case, function)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(case, function)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():  # compiled before the capture
        expected = residual_layernorm(*case[:4], eps=EPS, norm="pre", impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        outputs = residual_layernorm(*case[:4], eps=EPS, norm="pre", impl="triton")
    graph.replay()
    for value, truth in zip(outputs, expected, strict=True):
        assert torch.equal(value, truth)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31() -> None:
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GB of free GPU memory")
    n, width = (1 << 31) // 1024 + 5, 1024
    case = make(8, width, FP16, "cuda")
    x = case.x.repeat(n // 8 + 1, 1)[:n].requires_grad_()
    stream, out = residual_layernorm(x, None, *case[2:4], eps=EPS, norm="post", impl="triton")
    torch.testing.assert_close(stream[-8:], stream[n - 8 - 8 * 100 : n - 8 * 100], rtol=0, atol=0)
    d_out = case.d_out.repeat(n // 8 + 1, 1)[:n]
    (dx,) = torch.autograd.grad(out, x, d_out)
    torch.testing.assert_close(dx[-8:], dx[n - 8 - 8 * 100 : n - 8 * 100], rtol=0, atol=0)
