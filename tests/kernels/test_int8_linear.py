"""int8_linear and quantize_rows: integers exactly, the rest by its signal-to-noise ratio against float64."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os

import pytest
import torch
from geneformer_kernels import int8_linear, int8_mode, int8_rows, on_device, quantize_rows, quantize_weight
from geneformer_kernels.dispatch import ENVIRONMENT_VARIABLE, Impl, candidates, choose
from geneformer_kernels.launch import MAX_DYNAMIC_WIDTH
from geneformer_kernels.ops.int8_linear import launches as operators
from geneformer_kernels.ops.int8_linear import modes, plan, reference
from geneformer_kernels.ops.int8_linear import op as functional
from geneformer_kernels.target import CARDS, Target
from geneformer_kernels.target import target_of as real_target_of
from tolerance import Witness, assert_as_good_as

IMPLS = ["triton", "torch", "reference"]
ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh"]
# Nothing is a multiple of anything; a multiple of every block; one of everything; less than a block; one column.
SHAPES = [(37, 131, 70), (64, 256, 128), (1, 1, 1), (3, 17, 5), (2, 1, 9)]


def dtypes_on(device: str) -> list[torch.dtype]:
    has_bfloat16 = device == "cuda" and torch.cuda.get_device_capability() >= (7, 5)
    return [torch.float16, torch.float32, *([torch.bfloat16] if has_bfloat16 else [])]


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, shift: float = 0.3
) -> tuple[torch.Tensor, ...]:
    n_rows, width, n_columns = shape
    generator = torch.Generator().manual_seed(width)
    x = (torch.randn(n_rows, width, generator=generator) + shift).to(dtype)
    weight = torch.randn(n_columns, width, generator=generator) * width**-0.5 + 0.01
    bias = torch.randn(n_columns, generator=generator) + 0.5
    return x.to(device), *(each.to(device) for each in quantize_weight(weight)), bias.to(device)


def sqnr_db(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Signal over noise in decibel: 20 log10 of the ratio of root mean squares."""
    noise = (value.double() - truth.double()).square().mean()
    return (10 * torch.log10(truth.double().square().mean() / noise)).item()


# Quantising


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(5, 33), (64, 128), (3, 4100), (1, 1), (0, 8), (2, 9000)], ids=str)
def test_quantize_rows(device: str, impl: str, shape: tuple[int, int], poisoned: None) -> None:
    for dtype in dtypes_on(device):
        x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3 + 1).to(dtype).to(device)
        q, scale = quantize_rows(x, impl=impl)
        assert (q.dtype, scale.dtype, q.shape, scale.shape) == (torch.int8, torch.float32, x.shape, x.shape[:1])
        expected_q, expected_scale = int8_rows.quantize_rows(x)
        assert torch.equal(q, expected_q)
        assert torch.equal(scale, expected_scale)
        if x.numel():
            largest = x.double().abs().amax(1, keepdim=True)
            assert ((q * scale.double()[:, None] - x.double()).abs() <= largest / 254 * (1 + 1e-5)).all()
            assert (q.abs().amax(1) == 127).all()


def test_wide_rows_of_which_a_program_takes_several(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan of today: rows that one block of columns does not hold come alone."""
    x = inputs((5, 150, 1), torch.float32, device)[0]
    monkeypatch.setattr(operators, "quantize_plan", lambda _: plan.QuantizePlan(4, 64, False, plan.Launch(1, 1)))
    q, scale = quantize_rows(x, impl="triton")
    q_true, scale_true = int8_rows.quantize_rows(x)
    assert torch.equal(q, q_true)
    assert torch.equal(scale, scale_true)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_even(device: str, impl: str) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0, 126.5, 0.49999997]], device=device)
    q, scale = quantize_rows(x, impl=impl)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, -127, 126, 0]]
    assert scale.tolist() == [1.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_zeros_and_rows_that_are_not_finite(device: str, impl: str) -> None:
    x = torch.ones(6, 40, device=device)
    x[0] = 0
    x[1, 3] = float("nan")
    x[2, 39] = float("inf")
    x[3] = 1e-38
    x[4, 0] = -float("inf")
    q, scale = quantize_rows(x, impl=impl)
    assert scale.isnan().tolist() == [False, True, True, False, True, False]
    assert (q[[0, 3]] == 0).all()
    assert scale[[0, 3]].tolist() == [1.0, 1.0]
    assert (q[5] == 127).all()
    wide = torch.ones(2, 4200, device=device)
    wide[1, 4150] = float("nan")
    assert quantize_rows(wide, impl=impl)[1].isnan().tolist() == [False, True]
    _, weight_q, weight_scale, bias = inputs((1, 40, 3), torch.float32, device)
    out = int8_linear(x, weight_q, weight_scale, bias, activation="relu", mode="dynamic", impl=impl)
    assert out.isnan().all(1).tolist() == [False, True, True, False, True, False]
    torch.testing.assert_close(out[0], bias.relu())


def test_quantize_weight() -> None:
    weight = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    q, scale = quantize_weight(weight.requires_grad_())
    assert not q.requires_grad
    assert not scale.requires_grad
    assert sqnr_db(q * scale[:, None], weight.detach()) > 40
    weight.data[2, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_weight(weight)
    with pytest.raises(ValueError, match=r"must be \[N, K\]"):
        quantize_weight(weight[0])


# Products


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 1030, 9)], ids=str)
def test_integers_are_exact(device: str, impl: str, shape: tuple[int, int, int], poisoned: None) -> None:
    """Rows that contain 127 quantise to themselves; with scales of one the output is the integer sum."""
    n_rows, width, n_columns = shape
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-127, 128, (n_rows, width), generator=generator)
    x[:, 0] = 127
    weight_q = torch.randint(-127, 128, (n_columns, width), generator=generator, dtype=torch.int8)
    exact = x @ weight_q.long().T
    one = torch.ones(n_columns, device=device)
    out = int8_linear(x.float().to(device), weight_q.to(device), one, mode="dynamic", impl=impl)
    assert exact.abs().max() < 2**24
    assert torch.equal(out.long().cpu(), exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_sums_do_not_overflow(device: str, impl: str) -> None:
    """The largest sum at a width of 2**16 is 2**30: it fits int32 exactly, and float32 after one rounding."""
    x = torch.full((1, 1 << 16), 127.0, device=device)
    weight_q = torch.full((2, 1 << 16), 127, dtype=torch.int8, device=device)
    weight_q[1] = -127
    weight_q[1, 0] = -126
    out = int8_linear(x, weight_q, torch.ones(2, device=device), mode="dynamic", impl=impl)
    exact = 127 * 127 * 65536
    assert out.tolist() == [torch.tensor([exact, -exact + 127], dtype=torch.int64).float().tolist()]


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("mode", plan.MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(device: str, impl: str, mode: str, shape: tuple[int, int, int], poisoned: None) -> None:
    for dtype in dtypes_on(device):
        x, weight_q, weight_scale, bias = inputs(shape, dtype, device)
        if mode == "dynamic":  # the rounded x is exact in float64
            q, row_scale = int8_rows.quantize_rows(x)
            wide = q.double() * row_scale.double()[:, None]
        else:
            wide = x.double()
        for activation in ACTIVATIONS if shape == SHAPES[0] else ["gelu"]:
            for each in (bias, None):
                out = int8_linear(x, weight_q, weight_scale, each, activation=activation, mode=mode, impl=impl)
                weight = weight_q.double() * weight_scale.double()[:, None]
                exact = torch.nn.functional.linear(wide, weight, None if each is None else each.double())
                exact = int8_rows.activate(exact, activation)
                if mode == "dynamic":  # which must not depend on a narrow dtype at all but for the last rounding
                    witness = exact.to(dtype)
                    error = 1e-6 * exact.abs().max().item()
                    assert (out.double() - witness.double()).abs().max() <= error + 2 * torch.finfo(
                        dtype
                    ).eps * exact.abs().max()
                else:
                    assert_as_good_as(out, Witness(plain, x, weight, each, activation), exact)
                assert out.dtype == dtype


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    """The layer without integers, in the dtype of x."""
    out = torch.nn.functional.linear(x, weight.to(x.dtype))
    return int8_rows.activate(out if bias is None else out + bias.to(x.dtype), activation)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", plan.MODES)
def test_signal_to_noise(device: str, impl: str, mode: str) -> None:
    """Against the layer before quantisation, on Gaussian data.

    Rounding to steps of m / 127, m the largest of K Gaussian numbers (3.0 deviations at K = 512), makes noise of
    (m / 127)**2 / 12: 43.3 dB below the signal, for each operand; both together 40.3 dB. The whole must come within
    1 dB of that, and above 35 dB.
    """
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(64, 512, generator=generator)
    weight = torch.randn(128, 512, generator=generator)
    exact = x.double() @ weight.double().T
    weight_q, weight_scale = quantize_weight(weight)
    largest = [each.abs().amax(1).square().mean().item() for each in (x, weight)]
    noises = [each / 127**2 / 12 for each in largest]
    expected = -10 * torch.log10(torch.tensor(sum(noises) if mode == "dynamic" else noises[1])).item()
    values = [each.to(device) for each in (x, weight_q, weight_scale)]
    out = int8_linear(*values, mode=mode, impl=impl)
    found = sqnr_db(out.cpu(), exact)
    assert found > 35
    assert abs(found - expected) < 1.0, (found, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_output_dtypes_and_leading_axes(device: str, impl: str) -> None:
    x, weight_q, weight_scale, bias = inputs((12, 33, 7), torch.float16, device)
    whole = int8_linear(x, weight_q, weight_scale, bias, mode="dynamic", out_dtype=torch.float32, impl=impl)
    parts = int8_linear(x.view(3, 4, 33), weight_q, weight_scale, bias, mode="dynamic", impl=impl)
    assert parts.shape == (3, 4, 7)
    torch.testing.assert_close(parts.view(12, 7), whole.half(), rtol=1e-3, atol=1e-3)
    strided = int8_linear(x.T.contiguous().T, weight_q, weight_scale, bias, mode="dynamic", impl=impl)
    assert torch.equal(strided, parts.view(12, 7))
    vector = int8_linear(x[0], weight_q, weight_scale, bias, mode="dynamic", impl=impl)
    assert torch.equal(vector, parts.view(12, 7)[0])
    for mode in plan.MODES:
        assert int8_linear(x[:0], weight_q, weight_scale, bias, mode=mode, impl=impl).shape == (0, 7)


@pytest.mark.parametrize("mode", plan.MODES)
def test_nothing_is_written_past_the_end(device: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    real = torch.empty

    def empty(size, **options):
        count = torch.Size(size).numel()
        buffer = real(count + 20_000, **options).fill_(7)
        kept.append((buffer, count))
        return buffer[:count].view(size)

    values = inputs((5, 131, 70), torch.float16, device)
    monkeypatch.setattr(torch, "empty", empty)
    int8_linear(*values, mode=mode, impl="triton")
    assert len(kept) == (3 if mode == "dynamic" else 1)
    assert all((buffer[count:] == 7).all() for buffer, count in kept)


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


def test_volta_multiplies_integers_exactly_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_rows, "target_of", lambda _: CARDS["V100"])
    q = torch.full((3, 2500), 127, dtype=torch.int8)
    weight_q = torch.full((2, 2500), -127, dtype=torch.int8)
    weight_q[0, 7] = 5
    assert torch.equal(int8_rows.fast_int8_product(q, weight_q), int8_rows.int8_product(q, weight_q))


@pytest.mark.parametrize("features", [{"avx2"}, {"avx2", "avx512"}, {"avx2", "int8_dot"}])
def test_a_cpu_without_an_instruction_for_it_multiplies_integers_exactly_too(
    features: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN adds pairs of products in 16 bits there, and cuts what does not fit: 127 times 127, twice, does not."""
    target = Target.cpu(features)
    assert target.has_int8_product == ("int8_dot" in features)
    if target.has_int8_product > real_target_of("cpu").has_int8_product:
        pytest.skip("this CPU has no such instruction")
    monkeypatch.setattr(int8_rows, "target_of", lambda _: target)
    q = torch.full((3, 2500), 127, dtype=torch.int8)
    assert torch.equal(int8_rows.fast_int8_product(q, q[:2]), int8_rows.int8_product(q, q[:2]))


def test_padding_for_cublas_changes_nothing() -> None:
    x, weight_q, *_ = inputs((3, 13, 5), torch.float32, "cpu")
    q, _ = quantize_rows(x)
    padded = int8_rows.padded(q, 17, 16), int8_rows.padded(weight_q, 8, 16)
    assert [[*each.shape] for each in padded] == [[17, 16], [8, 16]]
    assert torch.equal(int8_rows.int8_product(*padded)[:3, :5], int8_rows.int8_product(q, weight_q))
    assert int8_rows.padded(q, 3, 13) is q


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


# Rows that come as integers


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_that_were_rounded_before(device: str, impl: str, shape: tuple[int, int, int], poisoned: None) -> None:
    x, weight_q, weight_scale, bias = inputs(shape, torch.float32, device)
    q, scale = quantize_rows(x)
    for activation, each in (("gelu", bias), (None, None)):
        options = dict(activation=activation, impl=impl)
        expected = int8_linear(x, weight_q, weight_scale, each, mode="dynamic", **options)
        out = int8_linear(q, weight_q, weight_scale, each, x_scale=scale, out_dtype=torch.float32, **options)
        assert torch.equal(out, expected)
    half = int8_linear(q[None], weight_q, weight_scale, x_scale=scale[None], out_dtype=torch.float16, impl=impl)
    assert half.shape == (1, shape[0], shape[2])
    assert half.dtype == torch.float16


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("width", [1, 127, 128, 129, 300, 384])
def test_rows_with_a_scale_for_every_128_columns(device: str, impl: str, width: int, poisoned: None) -> None:
    """Against float64 of what the integers stand for."""
    x, weight_q, weight_scale, bias = inputs((21, width, 19), torch.float32, device)
    x = x * torch.logspace(-2, 2, width, device=device)  # groups of very different size
    q, scale = int8_rows.quantize_groups(x)
    assert scale.shape == (21, -(-width // 128))
    wide = q.double() * scale.double().repeat_interleave(128, 1)[:, :width]
    assert ((wide - x.double()).abs() <= 0.5 * scale.double().repeat_interleave(128, 1)[:, :width] * (1 + 1e-5)).all()
    exact = torch.nn.functional.gelu(wide @ (weight_q.double() * weight_scale.double()[:, None]).T + bias.double())
    out = int8_linear(
        q, weight_q, weight_scale, bias, x_scale=scale, activation="gelu", out_dtype=torch.float32, impl=impl
    )
    terms = wide.abs() @ (weight_q.double().abs() * weight_scale.double()[:, None]).T + bias.double().abs()
    assert ((out.double() - exact).abs() <= 1e-6 * terms).all()
    scale[3, -1] = float("nan")
    out = int8_linear(q, weight_q, weight_scale, bias, x_scale=scale, out_dtype=torch.float32, impl=impl)
    assert out.isnan().all(1).tolist() == [i == 3 for i in range(21)]


@pytest.mark.parametrize("impl", IMPLS)
def test_smoothed_rows(device: str, impl: str, poisoned: None) -> None:
    """The rows are those of x times smooth; a column that is large costs the others nothing once it is smoothed."""
    x = inputs((21, 150, 1), torch.float16, device)[0]
    x[:, 7] *= 100
    smooth = torch.ones(150, device=device)
    smooth[7] = 0.01
    q, scale = quantize_rows(x, smooth=smooth, impl=impl)
    expected = int8_rows.quantize_rows(x.float() * smooth)
    assert torch.equal(q, expected[0])
    assert torch.equal(scale, expected[1])
    assert torch.equal(quantize_rows(x, smooth=torch.ones_like(smooth), impl=impl)[0], quantize_rows(x)[0])
    smooth[7] = float("inf")
    assert quantize_rows(x, smooth=smooth, impl=impl)[1].isnan().all()


def test_rows_as_integers_need_what_belongs_to_them() -> None:
    x, weight_q, weight_scale, bias = inputs((5, 300, 7), torch.float32, "cpu")
    q, scale = quantize_rows(x)
    with pytest.raises(ValueError, match="x_scale must be given"):
        int8_linear(q, weight_q, weight_scale, bias, out_dtype=torch.float32)
    with pytest.raises(ValueError, match="out_dtype must be said"):
        int8_linear(q, weight_q, weight_scale, bias, x_scale=scale)
    with pytest.raises(ValueError, match='mode must be "dynamic" or None'):
        int8_linear(q, weight_q, weight_scale, bias, x_scale=scale, out_dtype=torch.float32, mode="weight_only")
    with pytest.raises(ValueError, match=r"x_scale \[4\] must be \[5\] or \[5, 3\]"):
        int8_linear(q, weight_q, weight_scale, bias, x_scale=scale[1:], out_dtype=torch.float32)
    with pytest.raises(ValueError, match="x_scale belongs to int8 rows"):
        int8_linear(x, weight_q, weight_scale, bias, x_scale=scale)


# Gradients


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", plan.MODES)
def test_gradients(device: str, impl: str, activation: str | None, mode: str) -> None:
    x, weight_q, weight_scale, bias = inputs((37, 131, 70), torch.float32, device)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    out = int8_linear(x, weight_q, weight_scale, bias, activation=activation, mode=mode, impl=impl)
    slopes = torch.linspace(-1, 2, out.numel(), device=device).view(out.shape)
    (out * slopes).sum().backward()
    true_x, true_bias = (each.detach().double().requires_grad_() for each in (x, bias))
    seen = true_x
    if mode == "dynamic":  # rounded forward, passed through backward
        q, row_scale = int8_rows.quantize_rows(x.detach())
        seen = true_x + (q.double() * row_scale.double()[:, None] - true_x).detach()
    weight = weight_q.double() * weight_scale.double()[:, None]
    pre = seen @ weight.T + true_bias
    (int8_rows.activate(pre, activation) * slopes).sum().backward()
    torch.testing.assert_close(x.grad.double(), true_x.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(bias.grad.double(), true_bias.grad, rtol=1e-5, atol=1e-4)


def test_gradient_of_a_half_keeps_its_dtype(device: str) -> None:
    x, weight_q, weight_scale, _ = inputs((37, 131, 70), torch.float16, device)
    x, weight_scale = x.requires_grad_(), weight_scale * 1e-3
    int8_linear(x, weight_q, weight_scale, None, activation="relu", impl="triton").sum().backward()
    assert x.grad.dtype == torch.float16
    assert (x.grad != 0).any()


# The house of torch


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("n_rows", [3, 40])
def test_compiles_without_a_graph_break(device: str, impl: str, n_rows: int) -> None:
    x, weight_q, weight_scale, bias = inputs((n_rows, 33, 7), torch.float32, device)

    def step(x):
        return (
            int8_linear(x, weight_q, weight_scale, bias, activation="gelu", impl=impl)
            * quantize_rows(x, impl=impl)[1][:, None]
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
    x.requires_grad_()
    compiled(x).sum().backward()
    assert x.grad is not None


def test_operators_are_registered_properly(device: str) -> None:
    x, weight_q, weight_scale, bias = inputs((5, 33, 7), torch.float32, device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for rows, impl in itertools.product((x, x.T), IMPLS):
        for smooth in (None, torch.ones(rows.shape[1], device=device)):
            torch.library.opcheck(operators.quantize_rows_op.overload, (rows, smooth, impl), test_utils=tests)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    for mode in plan.MODES:
        for impl in IMPLS:
            arguments = (x, None, weight_q, weight_scale, bias, "gelu", mode, torch.float16, impl, impl)
            torch.library.opcheck(operators.int8_linear_fwd.overload, arguments, test_utils=tests)


@pytest.mark.parametrize("mode", plan.MODES)
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("card", [None, "V100"])
def test_autocast_does_not_reach_inside(
    card: str | None, impl: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the float32 products that stand for integers on Volta nor those of the gradients become half."""
    if card is not None:
        monkeypatch.setattr(operators, "target_of", lambda _: CARDS[card])
    x, weight_q, weight_scale, bias = inputs((40, 2048, 9), torch.float32, "cpu")

    def results() -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        out = int8_linear(leaf, weight_q, weight_scale, bias, activation="gelu", mode=mode, impl=impl)
        out.sum().backward()
        return [out.detach(), leaf.grad]

    expected = results()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            found = results()
        for value, other in zip(found, expected, strict=True):
            assert value.dtype == torch.float32
            assert torch.equal(value, other)


def test_sums_that_int32_cannot_hold() -> None:
    width = MAX_DYNAMIC_WIDTH
    assert width * 127**2 < 2**31 <= (width + 1) * 127**2
    x, scale = torch.ones(33, width + 1), torch.ones(1)
    weight_q = torch.full((1, width + 1), 127, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"133,145 products of int8 .* up to 133,144"):
        int8_linear(x, weight_q, scale, mode="dynamic")
    torch.testing.assert_close(int8_linear(x, weight_q, scale), torch.full((33, 1), 127.0 * (width + 1)))
    widest = int8_linear(x[:, 1:], weight_q[:, 1:], scale, mode="dynamic")
    torch.testing.assert_close(widest, torch.full((33, 1), 127.0 * width))


@pytest.mark.parametrize("impl", IMPLS)
def test_transposed_rows(device: str, impl: str) -> None:
    """Results are contiguous whatever the strides of the rows, which is what the compiler is told."""
    x = torch.randn(33, 6, generator=torch.Generator().manual_seed(1)).to(device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: quantize_rows(x, impl=impl), backend="aot_eager", fullgraph=True)
    for q, scale in (quantize_rows(x.T, impl=impl), compiled(x.T)):
        assert q.is_contiguous()
        assert torch.equal(q, quantize_rows(x.T.contiguous(), impl=impl)[0])
        assert torch.equal(scale, quantize_rows(x.T.contiguous(), impl=impl)[1])


def test_bad_arguments() -> None:
    x, weight_q, weight_scale, bias = inputs((5, 33, 7), torch.float32, "cpu")
    with pytest.raises(ValueError, match="activation must be"):
        int8_linear(x, weight_q, weight_scale, bias, activation="swiglu")
    with pytest.raises(ValueError, match="mode must be"):
        int8_linear(x, weight_q, weight_scale, bias, mode="static")
    with pytest.raises(ValueError, match="do not fit"):
        int8_linear(x[:, :5], weight_q, weight_scale, bias)
    with pytest.raises(ValueError, match="weight_q must be int8"):
        int8_linear(x, weight_q.float(), weight_scale, bias)
    with pytest.raises(ValueError, match="bias"):
        int8_linear(x, weight_q, weight_scale, bias[:2])
    with pytest.raises(ValueError, match="weight_scale"):
        int8_linear(x, weight_q, weight_scale[:2], bias)


# Plans

KERNELS = importlib.import_module("geneformer_kernels.ops.int8_linear.kernel")


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


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_choice(card: Target) -> None:
    able = [option.impl for option in candidates("int8_linear", "float16", card) if option.can_run]
    assert able[0] == (Impl.TRITON if card.sm >= 80 else Impl.TORCH)
    doubles = candidates("int8_linear", "float64", card)
    assert not next(option for option in doubles if option.impl == Impl.TRITON).can_run
    assert card.has_int8_product == (card.sm >= 75)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_rows_are_quantised_by_triton_on_every_card(card: Target) -> None:
    """There is no product in it: Volta and Turing have the kernel too."""
    for dtype in ("float16", "float32", "bfloat16") if card.sm >= 75 else ("float16", "float32"):
        assert choose("quantize_rows", dtype, card).impl == Impl.TRITON
        assert choose("quantize_rows", dtype, card, "triton").impl == Impl.TRITON
        assert choose("quantize_rows", dtype, dataclasses.replace(card, triton=None)).impl == Impl.TORCH
    assert choose("quantize_rows", "float64", card).impl == Impl.TORCH
    assert choose("quantize_rows", "float16", Target.cpu()).impl == Impl.TORCH


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


# On a card, at full size


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(16389, 768, 3072), (4099, 3072, 768), (7, 1024, 4096), (32, 769, 1001)], ids=str)
def test_full_size(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    values = inputs(shape, dtype, "cuda")
    for mode in plan.MODES:
        out = int8_linear(*values, activation="gelu", mode=mode, impl="triton")
        true = reference.int8_linear(values[0], None, *values[1:], "gelu", mode, torch.float64)
        assert sqnr_db(out, true) > {torch.float16: 60, torch.bfloat16: 45, torch.float32: 90}[dtype]
    for got, expected in zip(quantize_rows(values[0], impl="triton"), int8_rows.quantize_rows(values[0]), strict=True):
        assert torch.equal(got, expected)
