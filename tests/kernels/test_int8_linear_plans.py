"""How int8_linear computes a layer here: its mode, who does it, and the plans of its kernels."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from geneformer_kernels import int8_linear, int8_mode, int8_rows, on_device
from geneformer_kernels.dispatch import ENVIRONMENT_VARIABLE, Impl, candidates
from geneformer_kernels.ops.int8_linear import launches as operators
from geneformer_kernels.ops.int8_linear import modes, plan, reference
from geneformer_kernels.ops.int8_linear import op as functional
from geneformer_kernels.target import CARDS, Target
from geneformer_kernels.target import target_of as real_target_of
from int8_inputs import IMPLS, inputs

KERNELS = importlib.import_module("geneformer_kernels.ops.int8_linear.kernel")


# Modes


def test_the_mode_that_nobody_asked_for(device: str) -> None:
    """On a card by the number of rows; on a CPU by the layer, so that a cell has the same numbers alone and among
    others."""
    target = real_target_of(device)
    for n_rows in (32, 33):
        values = inputs((n_rows, 40, 6), torch.float32, device)
        mode = int8_mode(40, 6, torch.float32, device)
        if device == "cuda":
            mode = plan.mode_for(n_rows, target.has_int8_product)
            assert mode == ("dynamic" if n_rows == 33 and target.sm >= 75 else "weight_only")
        for impl in IMPLS:
            assert torch.equal(int8_linear(*values, impl=impl), int8_linear(*values, mode=mode, impl=impl))
    assert plan.mode_for(10_000, has_product=False) == "weight_only"


def test_the_mode_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, by the layer most like it that was measured with the fastest instructions the CPU has."""
    amx, vnni, avx_vnni, plain_cpu = (
        Target.cpu({"avx2", *more})
        for more in (("int8_dot", "amx_bf16", "amx_int8"), ("int8_dot", "avx512_vnni"), ("int8_dot", "avx_vnni"), ())
    )
    measured = {
        ("avx512_vnni", "float32"): (((256, 256, 1.0, 2.25), (3072, 768, 1.0, 3.0)), "an EPYC"),
        ("avx_vnni", "float32"): (((256, 256, 1.0, 1.0), (768, 768, 1.01, 1.0)), "a Ryzen"),
    }
    monkeypatch.setattr(modes, "MEASURED_INT8", measured)
    assert {modes.mode_here(256, 768, dtype, amx).mode for dtype in ("bfloat16", "float32")} == {"dynamic"}
    assert modes.mode_here(9, 9, "float32", vnni) == (
        "dynamic", "integer products with avx512_vnni are 2.25 times as fast as float32 (256 -> 256; an EPYC)"
    )  # fmt: skip
    assert modes.mode_here(768, 768, "float16", vnni).mode == "dynamic"  # which the CPU computes in float32
    assert modes.mode_here(300, 300, "float32", avx_vnni).mode == "dynamic"
    assert modes.mode_here(800, 800, "float32", avx_vnni).mode == "weight_only"
    assert modes.mode_here(256, 256, "float32", plain_cpu).mode == "dynamic"  # for all layers of a model, or for none
    assert "no VNNI" in modes.mode_here(300, 300, "float32", Target.cpu({"avx2", "avx512"})).reason
    assert modes.mode_here(256, 768, "float32", Target.cpu({"int8_dot"})).mode == "dynamic"  # Arm's, by torch
    assert modes.mode_here(256, 768, "float32", Target.cpu()).mode == "weight_only"
    for card in CARDS.values():
        mode, reason = modes.mode_here(768, 3072, "bfloat16", card)
        assert mode == "weight_only"
        assert ("no product of int8" if card.sm < 75 else "not measured on a card yet") in reason
    for target in (amx, vnni, plain_cpu, *CARDS.values(), Target("mps")):
        mode, reason = modes.mode_here(133_145, 8, "float32", target)
        assert (mode, "int32" in reason) == ("weight_only", True)
        assert modes.mode_here(64, 8, "float32", target).mode in plan.MODES


@pytest.mark.parametrize(("n_rows", "asked"), [(32, []), (33, ["torch"])])
def test_many_rows_of_a_card_are_multiplied_by_the_library(
    n_rows: int, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that widens the weight costs less than what cuBLAS gains on a kernel that widens it again and again."""

    class OnCard:
        device = torch.device("cuda")

    wanted = functional._library_for_many_rows(OnCard(), n_rows, "weight_only", None)
    assert [wanted] == (asked or [None])
    assert functional._library_for_many_rows(OnCard(), n_rows, "weight_only", "triton") == "triton"
    assert functional._library_for_many_rows(OnCard(), n_rows, "dynamic", None) is None
    assert functional._library_for_many_rows(torch.ones(1), n_rows, "weight_only", None) is None
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    assert functional._library_for_many_rows(OnCard(), n_rows, "weight_only", None) is None


# Plans


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_cases_name_the_kernels_arguments(card: Target) -> None:
    cases = plan.kernel_cases(card)
    assert len({(case.kernel, case.problem, case.dtype) for case in cases}) == len(cases)
    for case in cases:
        assert sorted([*case.signature, *case.constexprs]) == sorted(getattr(KERNELS, case.kernel).arg_names)
        assert case.divisible <= set(case.signature)
        assert case.is_default == (card.sm >= 80 or case.kernel == "quantize_rows_kernel")


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_plans(card: Target) -> None:
    small, large, odd = (
        plan.dynamic_plan("bfloat16", *sizes, None, card) for sizes in ((1, 256), (1 << 20, 256), (1 << 20, 257))
    )
    assert small.block_rows < large.block_rows == odd.block_rows
    assert (odd.launch == large.launch) == (card.sm < 90)
    few = [plan.weight_only_plan(dtype, n, 768, None) for dtype in ("float16", "float32") for n in (1, 32, 33)]
    for planned in (small, large, odd, *few):
        one_stage = (planned.block_rows + planned.block_n) * planned.block_k
        assert card.sm < 80 or one_stage * planned.launch.num_stages <= card.smem_bytes
        assert plan.WIDTH_STEP % planned.block_k == 0
    tiles = [plan.weight_only_plan("float16", n, 768, "gelu").block_rows for n in (1, 16, 17, 32, 33)]
    assert tiles == [16, 16, 32, 32, 128]
    assert plan.weight_only_plan("float16", 33, 769, "gelu").block_rows == 64
    assert not plan.quantize_plan(768).launch.enable_fp_fusion
    assert [plan.quantize_plan(width).is_one_block for width in (1, 4096, 4097)] == [True, True, False]


@pytest.mark.parametrize("n_rows", [9, 21, 70])
def test_every_tile(device: str, n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles for few and many rows, and more than one group of blocks of rows."""
    cards = [Target.cuda(80, n_sms=n) for n in (1, 1000)]
    for card in cards:
        monkeypatch.setattr(operators, "target_of", lambda _, card=card: card)
        if n_rows == 70:  # blocks small enough that groups end in a short one
            small = plan.ProductPlan(16, 16, 32, 2, plan.Launch(4, 2))
            monkeypatch.setattr(operators, "dynamic_plan", lambda *_, small=small: small)
        for mode in plan.MODES:
            for width in (70,) if n_rows == 70 else (70, 80, 128):
                x, weight_q, weight_scale, bias = inputs((n_rows, width, 150), torch.float32, device)
                out = int8_linear(x, weight_q, weight_scale, bias, mode=mode, impl="triton")
                true = reference.int8_linear(x, None, weight_q, weight_scale, bias, None, mode, torch.float32)
                torch.testing.assert_close(out, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_choice(card: Target) -> None:
    able = [option.impl for option in candidates("int8_linear", "float16", card) if option.can_run]
    assert able[0] == (Impl.TRITON if card.sm >= 80 else Impl.TORCH)
    doubles = candidates("int8_linear", "float64", card)
    assert not next(option for option in doubles if option.impl == Impl.TRITON).can_run
    assert card.has_int8_product == (card.sm >= 75)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_who_quantises_before_a_product(card: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Turing the product is torch's and its rows are quantised by Triton, unless somebody asks for torch."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled for the card in this process")
    values, asked = inputs((40, 128, 16), torch.float16, "cpu"), []
    real = operators.quantize_rows_op
    monkeypatch.setattr(operators, "quantize_rows_op", lambda *of: asked.append(of[-1]) or real(*of))
    monkeypatch.setattr(int8_rows, "fast_int8_product", int8_rows.int8_product)  # this CPU may have none of its own
    for module in (operators, on_device):
        monkeypatch.setattr(module, "target_of", lambda _: card)
    out = int8_linear(*values, mode="dynamic")
    torch.testing.assert_close(out, int8_linear(*values, mode="dynamic", impl="torch"))
    assert asked == ["triton", "torch"]
