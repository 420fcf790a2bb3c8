"""How feed_forward is planned on every card, and blocks of full size on the card that is here."""

from __future__ import annotations

import importlib

import pytest
import torch
from feed_forward_inputs import ACTIVATIONS, check_block, inputs
from geneformer_kernels.dispatch import Impl, candidates, choose
from geneformer_kernels.ops.feed_forward import plan
from geneformer_kernels.target import CARDS, Target

KERNELS = importlib.import_module("geneformer_kernels.ops.feed_forward.kernel")


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_cases_name_the_kernels_arguments(card: Target) -> None:
    cases = plan.kernel_cases(card)
    assert len({(case.kernel, case.problem, case.dtype) for case in cases}) == len(cases)
    for case in cases:
        assert sorted([*case.signature, *case.constexprs]) == sorted(getattr(KERNELS, case.kernel).arg_names)
        assert case.divisible <= set(case.signature)
        is_by_library = card.sm >= 90 and case.dtype != "float32" and case.constexprs.get("ACTIVATION") != "swiglu"
        is_never = case.kernel == "feed_forward_up_kernel" or (
            case.problem.startswith("C=256 ") and "no norm" in case.problem
        )
        assert case.is_default == (card.sm >= 80 and not (is_by_library and is_never))


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_plans(card: Target, activation: str) -> None:
    for width, ff_width in ((128, 64), (256, 512), (256, 1024), (512, 1024), (768, 3072), (640, 2560)):
        planned = plan.fused_plan("bfloat16", width, ff_width, activation, card)
        assert (planned is not None) == (width in (128, 256) or (width == 512 and card.sm < 90))
        if planned is not None:
            # The input and one block of each weight; what the compiler adds is what tools/aot_matrix.py measures.
            n_weights = 3 if activation == "swiglu" else 2
            assert card.sm < 80 or 2 * width * (planned.block_rows + n_weights * planned.block_f) <= card.smem_bytes
            assert planned.block_rows % planned.block_norm == 0
            assert planned.block_norm % 16 == 0  # a mask is regenerated for 16 rows at least
            assert ff_width % planned.block_f == 0
    assert plan.fused_plan("bfloat16", 256, 500, activation, card) is None
    options = dict(activation=activation, target=card)
    is_one = [plan.is_one_kernel("bfloat16", 256, 512, **options, has_layernorm=norm) for norm in (True, False)]
    assert is_one == [card.sm < 90, card.sm < 90 or activation == "swiglu"]
    assert plan.is_one_kernel("bfloat16", 128, 512, **options, has_layernorm=True)
    assert not plan.is_up_by_library("float32", activation, card)
    assert plan.fused_plan("float32", 256, 512, activation, card) is None
    small, large = (plan.up_plan("bfloat16", n, 1024, activation, card) for n in (1, 1 << 20))
    assert small.block_rows * small.block_n < large.block_rows * large.block_n
    assert plan.activation_plan(1, 512, activation, card).n_programs == 1
    assert plan.activation_plan(1, 500, activation, card).block_rows == 16
    assert plan.layernorm_plan(1 << 20, 256, card).n_programs == 2 * card.n_sms


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_choice(card: Target) -> None:
    first = next(option for option in candidates("feed_forward", "float16", card) if option.can_run)
    assert first.impl == (Impl.TRITON if card.sm >= 80 else Impl.TORCH)
    # On Hopper what is asked for as Triton is cuBLAS's for the most part, and the reason says so.
    for dtype in ("float16", "bfloat16", "float32") if card.sm >= 80 else ():
        assert ("cuBLAS" in choose("feed_forward", dtype, card).reason) == (card.sm >= 90 and dtype != "float32")
    doubles = candidates("feed_forward", "float64", card)
    assert not next(option for option in doubles if option.impl == Impl.TRITON).can_run


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape", [(16389, 256, 512), (16389, 128, 512), (16389, 512, 1024), (4099, 768, 3072)], ids=str
)
def test_full_size(shape, activation: str, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tensors = inputs(shape, activation, dtype, "cuda", parameters=torch.float32)
    # Float32 is multiplied in three passes on tensor cores, which cut TF32 off instead of rounding it: measured on an
    # H200, errors are 1.3 to 6 times those of scalar products. One pass would have 1,000 times as much.
    factor = 10.0 if dtype == torch.float32 else 2.0
    check_block(tensors, activation, "post", eps=1e-12, low=dtype, factor=factor)
