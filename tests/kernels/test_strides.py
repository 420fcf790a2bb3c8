"""Tensors laid out in any way give the numbers of contiguous ones: every input and every output gradient, in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from geneformer_kernels import (
    embed_tokens,
    feed_forward,
    feed_forward_layernorm,
    int8_feed_forward,
    int8_linear,
    mlm_cross_entropy,
    quantize_rows,
    quantize_weight,
    residual_layernorm,
    residual_layernorm_int8,
)

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {FP32: 1e-5, FP16: 2e-3, BF16: 2e-2}
ROWS = 5


class Case(NamedTuple):
    """An operation as a function of tensors, and the tensors; None for one that is left out."""

    run: Callable[..., Sequence[torch.Tensor]]
    inputs: dict[str, torch.Tensor | None]


def floats(*shape: int, dtype: torch.dtype = FP32, mean: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) + mean).to(dtype)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same values, the first axis with stride 1."""
    return x.t().contiguous().t()


def sliced(x: torch.Tensor) -> torch.Tensor:
    """The same values with others between them: columns of a wider matrix, or every second element of a vector."""
    if x.ndim == 1:
        return torch.stack([x, x.flip(0)], dim=1)[:, 0]
    return torch.cat([x.flip(0), x, x.flip(0)], dim=1)[:, x.shape[1] : 2 * x.shape[1]]


def expanded(x: torch.Tensor) -> torch.Tensor:
    """The first row, or element, in place of all others, with stride 0; what lies behind it in memory is no row."""
    buffer = torch.full((x.numel(),), float("nan") if x.is_floating_point() else 1, dtype=x.dtype)
    first = buffer[: x[0].numel()].view(x[:1].shape).copy_(x[:1])
    return first.expand(x.shape)


def of_layernorm(norm: str, has_residual: bool, dtype: torch.dtype, impl: str, width: int = 21) -> Case:
    def run(x, residual, weight, bias):
        return residual_layernorm(x, residual, weight, bias, eps=1e-5, norm=norm, impl=impl)

    residual = floats(ROWS, width, mean=-1) if has_residual else None
    x, weight, bias = floats(ROWS, width, dtype=dtype, mean=3), floats(width, mean=1), floats(width)
    return Case(run, {"x": x, "residual": residual, "weight": weight, "bias": bias})


def of_embedding(impl: str) -> Case:
    def run(*inputs):
        return embed_tokens(*inputs, eps=1e-5, out_dtype=FP16, impl=impl)

    inputs = {"token_ids": torch.tensor([1, 0, 3, 2, 1]), "cu_seqlens": torch.tensor([0, 3, ROWS])}
    tables = {"token_table": floats(4, 21), "position_table": floats(ROWS, 21)}
    return Case(run, {**inputs, **tables, "type_row": floats(21), "weight": floats(21, mean=1), "bias": floats(21)})


def of_feed_forward(activation: str, width: int, dtype: torch.dtype, impl: str) -> Case:
    def run(*inputs):
        return (feed_forward(*inputs, activation=activation, impl=impl),)

    return Case(run, layers(activation, width, dtype))


def layers(activation: str, width: int, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    n_units = 64 * (2 if activation == "swiglu" else 1)
    up, down = floats(n_units, width, dtype=dtype) / 16, floats(width, 64, dtype=dtype) / 16
    x, up_bias, down_bias = floats(ROWS, width, dtype=dtype), floats(n_units), floats(width)
    return {"x": x, "up_weight": up, "up_bias": up_bias, "down_weight": down, "down_bias": down_bias}


def of_block(norm: str, dtype: torch.dtype, impl: str) -> Case:
    def run(x, *inputs):
        *inner, residual, weight, bias = inputs
        return feed_forward_layernorm(
            x, residual, *inner, weight, bias, activation="gelu", eps=1e-5, norm=norm, impl=impl
        )

    norms = {"residual": floats(ROWS, 128, mean=-1), "weight": floats(128, mean=1), "bias": floats(128)}
    return Case(run, {**layers("gelu", 128, dtype), **norms})


def of_int8(mode: str, activation: str | None, impl: str) -> Case:
    def run(x, weight_q, weight_scale, bias):
        options = {"mode": mode, "activation": activation, "impl": impl}
        return (int8_linear(x, weight_q, weight_scale, bias, **options),)

    weight_q, weight_scale = quantize_weight(floats(7, 24))
    return Case(run, {"x": floats(40, 24), "weight_q": weight_q, "weight_scale": weight_scale, "bias": floats(7)})


def of_int8_rows(impl: str) -> Case:
    def run(q, scale, weight_q, weight_scale):
        return (int8_linear(q, weight_q, weight_scale, x_scale=scale, out_dtype=FP32, impl=impl),)

    (q, scale), (weight_q, weight_scale) = quantize_rows(floats(ROWS, 24)), quantize_weight(floats(7, 24))
    return Case(run, {"q": q, "scale": scale, "weight_q": weight_q, "weight_scale": weight_scale})


def of_int8_layers(impl: str) -> Case:
    def run(*inputs):
        return (int8_feed_forward(*inputs, activation="swiglu", impl=impl),)

    (up, up_scale), (down, down_scale) = quantize_weight(floats(14, 24)), quantize_weight(floats(9, 7))
    layers = {"up": up, "up_scale": up_scale, "up_bias": floats(14), "down": down, "down_scale": down_scale}
    return Case(run, {"x": floats(ROWS, 24), **layers, "down_bias": floats(9)})


def of_int8_layernorm(norm: str, impl: str) -> Case:
    @torch.no_grad()
    def run(x, residual, weight, bias, smooth):
        return residual_layernorm_int8(x, residual, weight, bias, eps=1e-5, norm=norm, smooth=smooth, impl=impl)

    vectors = {"weight": floats(21, mean=1), "bias": floats(21), "smooth": floats(21, mean=4)}
    return Case(run, {"x": floats(ROWS, 21), "residual": floats(ROWS, 21, mean=-1), **vectors})


def of_rows(impl: str) -> Case:
    return Case(lambda x: quantize_rows(x, impl=impl), {"x": floats(ROWS, 24)})


def of_loss(dtype: torch.dtype, impl: str) -> Case:
    def run(*inputs):
        return (mlm_cross_entropy(*inputs, reduction="none", impl=impl),)

    targets = torch.tensor([7, 0, -100, 2, 50])
    hidden, weight, bias = floats(ROWS, 21, dtype=dtype), floats(70, 21), floats(70)
    return Case(run, {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets})


CASES: dict[str, Case] = {
    **{
        f"residual_layernorm {norm} {'' if has_residual else 'alone '}{dtype} {impl}".replace(
            "torch.", ""
        ): of_layernorm(norm, has_residual, dtype, impl)
        for norm in ("post", "pre")
        for has_residual in (True, False)
        for dtype, impl in ((FP32, "triton"), (FP16, "triton"), (FP32, "torch"), (BF16, "torch"))
    },
    **{f"embed_tokens {impl}": of_embedding(impl) for impl in ("triton", "torch")},
    **{
        f"feed_forward {activation} {width} {impl}": of_feed_forward(activation, width, dtype, impl)
        for activation, width, dtype, impl in (
            ("swiglu", 24, FP16, "triton"),
            ("gelu", 24, FP32, "triton"),
            ("relu", 128, FP16, "triton"),
            ("relu", 24, FP32, "torch"),
            ("gelu", 24, BF16, "torch"),
        )
    },
    **{
        f"feed_forward_layernorm {norm} {impl}": of_block(norm, dtype, impl)
        for norm in ("post", "pre")
        for dtype, impl in ((FP16, "triton"), (FP32, "torch"))
    },
    **{
        f"int8_linear {mode} {activation} {impl}": of_int8(mode, activation, impl)
        for mode in ("dynamic", "weight_only")
        for activation in (None, "gelu")
        for impl in ("triton", "torch")
    },
    **{f"quantize_rows {impl}": of_rows(impl) for impl in ("triton", "torch")},
    **{f"int8_linear of rows {impl}": of_int8_rows(impl) for impl in ("triton", "torch")},
    "int8_feed_forward torch": of_int8_layers("torch"),
    **{
        f"residual_layernorm_int8 {norm} {impl}": of_int8_layernorm(norm, impl)
        for norm, impl in (("post", "triton"), ("pre", "torch"))
    },
    **{
        f"mlm_cross_entropy {dtype} {impl}".replace("torch.", ""): of_loss(dtype, impl)
        for dtype, impl in ((FP32, "triton"), (FP16, "triton"), (FP32, "torch"), (BF16, "torch"))
    },
}


#: Whose host code another case runs as well, with another dtype or activation: slow tests.
ALIKE = (
    *("residual_layernorm post float16 triton", "residual_layernorm post alone float32 triton"),
    *("residual_layernorm pre float32 triton", "residual_layernorm pre alone float16 triton"),
    *("int8_linear dynamic gelu triton", "int8_linear weight_only None triton", "mlm_cross_entropy float32 triton"),
)
IN_TURN = [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in CASES]
assert set(ALIKE) <= set(CASES)


def results(
    case: Case, inputs: dict[str, torch.Tensor | None], gradients: dict[int, torch.Tensor]
) -> list[torch.Tensor]:
    """What comes out, and the gradient of every float that goes in; ``gradients`` by the number of the output."""
    leaves = {
        name: x.detach().requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    outputs = case.run(*leaves.values())
    flowing = [(i, out) for i, out in enumerate(outputs) if out.requires_grad]
    found = [out.detach() for out in outputs]
    if flowing:
        wanted = [x for x in leaves.values() if x is not None and x.requires_grad]
        given = [gradients.get(i, floats(*out.shape, mean=0.5)).to(out.dtype) for i, out in flowing]
        of_leaves = torch.autograd.grad([out for _, out in flowing], wanted, given, allow_unused=True)
        found += [x for x in of_leaves if x is not None]
    return found


LAYOUTS = (transposed, sliced, expanded)


@pytest.mark.parametrize("name", IN_TURN)
def test_layout_of_inputs(name: str) -> None:
    case = CASES[name]
    plain = results(case, case.inputs, {})
    for tensor, x in case.inputs.items():
        for layout in LAYOUTS:
            # A vector has one axis, and cells that all begin at 0 would be none.
            if x is None or (layout is transposed and x.ndim == 1) or (layout is expanded and tensor == "cu_seqlens"):
                continue
            strided = layout(x)
            assert not strided.is_contiguous()
            compare(case, {**case.inputs, tensor: strided}, {}, plain, f"{tensor} {layout.__name__}")


@pytest.mark.parametrize("name", IN_TURN)
def test_layout_of_output_gradients(name: str) -> None:
    case = CASES[name]
    shapes = [out.shape for out in case.run(*case.inputs.values()) if out.is_floating_point()]
    plain = results(case, case.inputs, {})
    for i, shape in enumerate(shapes):
        for layout in LAYOUTS:
            if layout is transposed and len(shape) == 1:
                continue
            gradient = layout(floats(*shape, mean=0.5))
            compare(case, case.inputs, {i: gradient}, plain, f"output {i} {layout.__name__}")


def compare(
    case: Case,
    inputs: dict[str, torch.Tensor | None],
    gradients: dict[int, torch.Tensor],
    plain: list[torch.Tensor],
    what: str,
) -> None:
    """With what comes of contiguous tensors: ``plain``, unless the layout has changed the values, too."""
    found = results(case, inputs, gradients)
    if what.endswith(expanded.__name__):
        plain = results(
            case,
            {name: None if x is None else x.contiguous() for name, x in inputs.items()},
            {i: x.contiguous() for i, x in gradients.items()},
        )
    dtypes = {x.dtype for x in (*inputs.values(), *found) if x is not None}
    for value, expected in zip(found, plain, strict=True):
        # Libraries add up in another order where a matrix is laid out in another way.
        tolerance = max(TOLERANCE.get(dtype, 0.0) for dtype in dtypes) if value.is_floating_point() else 0.0
        largest = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(
            value, expected, rtol=tolerance, atol=tolerance * largest, msg=lambda m, w=what: f"{w}: {m}"
        )
