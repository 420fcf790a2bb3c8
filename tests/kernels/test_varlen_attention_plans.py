"""Which implementation and which tiles of varlen_attention every card is given."""

from __future__ import annotations

import itertools

import pytest
from geneformer_kernels.dispatch import choose, use_impl
from geneformer_kernels.ops.varlen_attention.plan import kernel_cases, plan, torch_plan
from geneformer_kernels.target import CARDS, Target


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
