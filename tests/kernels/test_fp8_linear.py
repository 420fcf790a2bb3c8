"""fp8_linear: float8 weights, widened for the product, or multiplied as such where a card does it."""

from __future__ import annotations

import pytest
import torch
from geneformer_kernels import fp8_linear, int8_rows, quantize_rows_fp8, quantize_weight_fp8
from geneformer_kernels.dispatch import choose
from geneformer_kernels.ops.fp8_linear import op as operators
from geneformer_kernels.ops.fp8_linear import plan, reference
from geneformer_kernels.target import CARDS, Target
from tolerance import Witness, assert_as_good_as

IMPLS = ["torch", "reference"]
SHAPES = [(37, 131, 70), (64, 256, 128), (1, 1, 1)]


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[torch.Tensor, ...]:
    n_rows, width, n_columns = shape
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(n_rows, width, generator=generator) + 0.3
    weight = torch.randn(n_columns, width, generator=generator) * width**-0.5
    bias = torch.randn(n_columns, generator=generator) + 0.5
    return tuple(each.to(device) for each in (x.to(dtype), *quantize_weight_fp8(weight), bias))


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    """The layer without float8, in the dtype of x."""
    out = torch.nn.functional.linear(x, weight.to(x.dtype))
    return int8_rows.activate(out if bias is None else out + bias.to(x.dtype), activation)


def test_quantize_rows_fp8() -> None:
    x = torch.randn(7, 50, generator=torch.Generator().manual_seed(1)) * 3 + 1
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        q, scale = quantize_rows_fp8(x.to(dtype)[None])
        assert (q.dtype, q.shape, scale.dtype, scale.shape) == (
            torch.float8_e4m3fn, (1, 7, 50), torch.float32, (1, 7),
        )  # fmt: skip
        wide = q.double()[0] * scale.double()[0][:, None]
        exact = x.to(dtype).double()
        largest = exact.abs().amax(1, keepdim=True)
        # Three bits behind the point; below 2**-6 of the scale, steps of 2**-9.
        assert ((wide - exact).abs() <= exact.abs() * 2.0**-4 * (1 + 1e-5) + largest / 448 * 2.0**-10).all()
        assert (q.double().abs().amax(-1) == 448).all()
    smooth = torch.linspace(0.1, 2, 50)
    found, expected = quantize_rows_fp8(x, smooth=smooth), quantize_rows_fp8(x * smooth)
    for value, other in zip(found, expected, strict=True):
        assert torch.equal(value.float(), other.float())


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    x = torch.ones(5, 40)
    x[0] = 0
    x[1, 3] = float("nan")
    x[2, 39] = -float("inf")
    x[3] = 1e-38
    q, scale = quantize_rows_fp8(x)
    assert scale.isnan().tolist() == [False, True, True, False, False]
    assert (q.float()[[0, 3]] == 0).all()
    assert scale[[0, 3]].tolist() == [1.0, 1.0]
    assert (q.float()[4] == 448).all()
    assert not q.float().isnan().any()
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_weight_fp8(x)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_widened_weights_against_float64(impl: str, shape: tuple[int, int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, weight_q, weight_scale, bias = inputs(shape, dtype)
        weight = weight_q.double() * weight_scale.double()[:, None]
        for activation, each in (("gelu", bias), ("relu", None), (None, bias), ("gelu_tanh", bias)):
            out = fp8_linear(x, weight_q, weight_scale, each, activation=activation, impl=impl)
            exact = plain(x.double(), weight, each, activation)
            assert out.dtype == dtype
            assert_as_good_as(out, Witness(plain, x, weight, each, activation), exact)
    x, *layer = inputs(shape, torch.float64)
    assert fp8_linear(x, *layer, impl=impl).dtype == torch.float64


def test_rounded_rows_against_float64() -> None:
    """What a card computes: both factors in float8, sums in float32."""
    x, weight_q, weight_scale, bias = inputs((37, 256, 64))
    q, scale = quantize_rows_fp8(x)
    wide = q.double() * scale.double()[:, None]
    exact = wide @ (weight_q.double() * weight_scale.double()[:, None]).T + bias.double()
    out = reference.fp8_linear(x, weight_q, weight_scale, bias, None, True, torch.float64)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
    noise = (
        (out - (x.double() @ (weight_q.double() * weight_scale.double()[:, None]).T + bias.double())).square().mean()
    )
    assert 10 * torch.log10(exact.square().mean() / noise) > 28  # e4m3 has three bits behind the point


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_the_product_of_a_card(activation: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch._scaled_mm is given rows and scales as it wants them; here it is played by float64."""
    asked = []

    def scaled_mm(a, b, *, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        assert a.is_contiguous()
        assert b.T.is_contiguous()
        assert (a.dtype, b.dtype, scale_a.dtype, scale_b.dtype) == (*[torch.float8_e4m3fn] * 2, *[torch.float32] * 2)
        assert (scale_a.shape, scale_b.shape) == ((a.shape[0], 1), (1, b.shape[1]))
        assert out_dtype == torch.bfloat16
        assert bias is None or bias.dtype == torch.bfloat16
        asked.append(use_fast_accum)
        out = (a.double() @ b.double()) * scale_a.double() * scale_b.double()
        return (out if bias is None else out + bias.double()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(operators, "target_of", lambda _: CARDS["H100"])
    x, weight_q, weight_scale, bias = inputs((37, 256, 64), torch.bfloat16)
    for each in (bias, None):
        x = x.detach().requires_grad_()
        out = fp8_linear(x, weight_q.T.contiguous().T, weight_scale, each, activation=activation, impl="torch")
        true = reference.fp8_linear(x.detach(), weight_q, weight_scale, each, activation, True, torch.float64)
        torch.testing.assert_close(out.double(), true, rtol=2e-2, atol=2e-2)
        out.float().sum().backward()
        assert x.grad.isfinite().all()
    assert asked == [False] * (2 if activation is None else 4)
    asked.clear()
    for values, options in (
        (inputs((37, 256, 64), torch.float16), {}),
        (inputs((37, 256, 64), torch.bfloat16), {"out_dtype": torch.float32}),
        (inputs((37, 264, 64), torch.bfloat16), {}),
        (inputs((37, 256, 72), torch.bfloat16), {}),
    ):
        fp8_linear(*values, impl="torch", **options)
    assert fp8_linear(x[:0], weight_q, weight_scale, bias, activation=activation).shape == (0, 64)
    assert asked == []


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", [None, *plan.ACTIVATIONS])
def test_gradients(impl: str, activation: str | None) -> None:
    x, weight_q, weight_scale, bias = inputs((37, 131, 70))
    x, bias = x.requires_grad_(), bias.requires_grad_()
    out = fp8_linear(x, weight_q, weight_scale, bias, activation=activation, impl=impl)
    slopes = torch.linspace(-1, 2, out.numel()).view(out.shape)
    (out * slopes).sum().backward()
    true_x, true_bias = (each.detach().double().requires_grad_() for each in (x, bias))
    weight = weight_q.double() * weight_scale.double()[:, None]
    (int8_rows.activate(true_x @ weight.T + true_bias, activation) * slopes).sum().backward()
    torch.testing.assert_close(x.grad.double(), true_x.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(bias.grad.double(), true_bias.grad, rtol=1e-5, atol=1e-4)


def test_the_house_of_torch() -> None:
    x, weight_q, weight_scale, bias = inputs((5, 32, 16))
    tests = ("test_faketensor",)  # that of the schema cannot compare float8
    for impl, is_dynamic in (("torch", False), ("reference", False), ("reference", True)):
        arguments = (x, weight_q, weight_scale, bias, "gelu", is_dynamic, torch.float16, impl)
        torch.library.opcheck(operators.fp8_linear_fwd.overload, arguments, test_utils=tests)

    def step(x):
        return fp8_linear(x, weight_q, weight_scale, bias, activation="gelu", impl="torch")

    torch._dynamo.reset()
    x.requires_grad_()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
    compiled(x).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(step(x), compiled(x))


@pytest.mark.parametrize("target", [Target.cpu(), *CARDS.values()], ids=lambda target: target.name)
def test_who_multiplies_float8(target: Target) -> None:
    has_product = target.kind == "cuda" and target.sm >= 89
    assert target.has_fp8_product == plan.is_dynamic(768, 3072, "bfloat16", target) == has_product
    for sizes in ((760, 3072, "bfloat16"), (768, 3080, "bfloat16"), (768, 3072, "float16"), (0, 16, "bfloat16")):
        assert not plan.is_dynamic(*sizes, target)
    assert ("_scaled_mm" in choose("fp8_linear", "float16", target).reason) == has_product


@pytest.mark.gpu
def test_on_a_card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for shape in ((4099, 768, 3072), (33, 130, 70)):
        x, weight_q, weight_scale, bias = inputs(shape, torch.bfloat16, "cuda")
        if torch.cuda.get_device_capability() < (7, 5):
            x = x.half()
        out = fp8_linear(x, weight_q, weight_scale, bias, activation="gelu", impl="torch")
        is_dynamic = operators._is_dynamic(shape[1], shape[2], str(out.dtype)[6:], "cuda", x.device.index)
        true = reference.fp8_linear(x, weight_q, weight_scale, bias, "gelu", is_dynamic, torch.float64)
        noise = (out.double() - true).square().mean()
        assert 10 * torch.log10(true.square().mean() / noise) > 40
