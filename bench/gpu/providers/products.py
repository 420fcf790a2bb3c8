"""Problems of the operations with matrix products: feed-forward, int8, and the masked loss over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bench.gpu.measure import Unavailable, Work
from bench.gpu.providers.operations import EPS, Function, Problem, Tensors, draw, operation

#: Width, inner width and activation of V1-10M, BioNeMo 106M and V2-104M, V2-316M.
FEED_FORWARDS = ((256, 512, "relu"), (768, 3072, "gelu_tanh"), (1152, 4608, "relu"))


def feed_forward_problems(is_tiny: bool) -> list[Problem]:
    """feed_forward alone, and with residual and LayerNorm; inference, and with gradients."""
    sizes = [(64, 32, 48, "relu")] if is_tiny else [(65_536, *shape) for shape in FEED_FORWARDS]
    return [
        _feed_forward(*size, has_norm, has_gradients)
        for size in sizes
        for has_norm in (True, False)
        for has_gradients in (False, True)
    ]


def _feed_forward(
    n_tokens: int, width: int, inner: int, activation: str, has_norm: bool, has_gradients: bool
) -> Problem:
    names = ("x", "up", "up_bias", "down", "down_bias")
    norm_names = ("weight", "bias") if has_norm else ()

    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        found = {
            "x": draw(device, n_tokens, width).to(dtype),
            "up": draw(device, inner, width, spread=width**-0.5, mean=0.0).to(dtype),
            "up_bias": draw(device, inner, spread=0.1, mean=0.1).to(dtype),
            "down": draw(device, width, inner, spread=inner**-0.5, mean=0.0, seed=1).to(dtype),
            "down_bias": draw(device, width, spread=0.1, mean=0.1).to(dtype),
        }
        if has_norm:
            found["residual"] = draw(device, n_tokens, width, seed=2)
            found["weight"] = draw(device, width, mean=1.0, spread=0.1)
            found["bias"] = draw(device, width, spread=0.1, mean=0.0, seed=3)
        return found

    def plain(t: Tensors) -> Any:
        hidden = F.linear(t["x"], t["up"], t["up_bias"])
        hidden = F.relu(hidden) if activation == "relu" else F.gelu(hidden, approximate="tanh")
        out = F.linear(hidden, t["down"], t["down_bias"])
        if not has_norm:
            return out
        total = out.to(t["residual"].dtype) + t["residual"]
        stream = F.layer_norm(total, (width,), t["weight"], t["bias"], EPS)
        return stream, stream.to(out.dtype)

    def ours(_: Tensors) -> Function:
        if not has_norm:
            alone = operation("feed_forward")
            return lambda t: alone(*(t[name] for name in names), activation=activation)
        is_one_kernel = operation("has_layernorm_inside", "feed_forward")
        one_kernel = operation("feed_forward_layernorm", "feed_forward")
        alone, norm = operation("feed_forward"), operation("residual_layernorm")
        order = ("x", "residual", *names[1:], *norm_names)

        def as_in_the_encoder(t: Tensors) -> Any:
            if is_one_kernel(t["x"], inner, activation=activation):
                return one_kernel(*(t[name] for name in order), activation=activation, eps=EPS, norm="post")
            hidden = alone(*(t[name] for name in names), activation=activation)
            return norm(hidden, t["residual"], t["weight"], t["bias"], eps=EPS, norm="post")

        return as_in_the_encoder

    # Bytes: x (and the residual) read, the result written; weights are small beside them.
    per_element = (2 + 4 + 4 + 2) if has_norm else (2 + 2)
    factor = 3 if has_gradients else 1
    return Problem(
        name=f"{width}" + ("_layernorm" if has_norm else "") + ("_backward" if has_gradients else ""),
        what=f"{n_tokens:,} rows, {width} to {inner} and back, {activation}"
        + (", residual and LayerNorm" if has_norm else "")
        + (", forward and backward" if has_gradients else ""),
        op="feed_forward", shape={"width": width, "ff_width": inner, "has_layernorm": has_norm},
        make=make, plain=plain, ours=ours,
        work=Work(flops=factor * 4 * n_tokens * width * inner, n_bytes=factor * n_tokens * width * per_element),
        gradients=(*names, *(("residual",) if has_norm else ()), *norm_names) if has_gradients else (),
        row_inputs=("x", "residual"), tolerance=0.03,
    )  # fmt: skip


def int8_problems(is_tiny: bool) -> list[Problem]:
    """int8_linear at the shapes of feed-forward and attention projections, many rows; and few rows, weights only."""
    if is_tiny:
        return [_int8(32, 64, 48, "dynamic"), _int8(4, 64, 48, "weight_only")]
    many = [(32_768, 768, 3072), (32_768, 3072, 768), (32_768, 768, 2304), (32_768, 1152, 4608), (32_768, 256, 512)]
    few = [(16, 768, 3072), (16, 1152, 4608)]
    return [*(_int8(*shape, "dynamic") for shape in many), *(_int8(*shape, "weight_only") for shape in few)]


def _int8(n_rows: int, k: int, n: int, mode: str) -> Problem:
    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        return {
            "x": draw(device, n_rows, k).to(dtype),
            "weight": draw(device, n, k, spread=k**-0.5, mean=0.0).to(dtype),
            "bias": draw(device, n, spread=0.1, mean=0.1).to(dtype),
        }

    def plain(t: Tensors) -> Any:
        return F.linear(t["x"], t["weight"], t["bias"])

    def ours(inputs: Tensors) -> Function:
        function, quantize = operation("int8_linear"), operation("quantize_weight", "int8_linear")
        weight, scale = quantize(inputs["weight"])
        return lambda t: function(t["x"], weight, scale, t["bias"], mode=mode)

    def by_hand(inputs: Tensors) -> Function:
        """Rows quantised by their largest value, cuBLAS int8 product, scales applied: what torchao does."""
        if n_rows <= 16:
            raise Unavailable("torch._int_mm needs more than 16 rows")
        scale = inputs["weight"].abs().amax(1, keepdim=True).float() / 127
        weight = (inputs["weight"] / scale).round().to(torch.int8).T

        def run(t: Tensors) -> torch.Tensor:
            x_scale = t["x"].abs().amax(1, keepdim=True).float().clamp_min(1e-12) / 127
            x = (t["x"] / x_scale).round().to(torch.int8)
            product = torch._int_mm(x, weight).float() * x_scale * scale.T
            return (product + t["bias"]).to(t["x"].dtype)

        return run

    # Many rows are bound by arithmetic, few by reading the weight: one byte per number is the least.
    n_bytes = n_rows * (k + n) * 2 + k * n
    unit = "int8_product_tflops" if mode == "dynamic" else "product_tflops"
    return Problem(
        name=f"{n_rows}x{k}x{n}",
        what=f"{n_rows:,} rows, {k} to {n}, "
        + ("activations quantised on the way" if mode == "dynamic" else "int8 weights, 16-bit activations"),
        op="int8_linear", shape={"width": k, "n_columns": n, "is_dynamic": mode == "dynamic"},
        make=make, plain=plain, ours=ours, work=Work(flops=2 * n_rows * k * n, n_bytes=n_bytes, unit=unit),
        rivals={"int8-by-hand": ("torch._int_mm with quantising in torch", by_hand)} if mode == "dynamic" else {},
        row_inputs=("x",), tolerance=0.03,
    )  # fmt: skip


def loss_problems(is_tiny: bool) -> list[Problem]:
    """mlm_cross_entropy over V1's and V2's vocabulary at the widths of the presets, with gradients and without."""
    shapes = [(24, 32, 97)] if is_tiny else [(16_384, 256, 25_426), (16_384, 768, 25_472), (16_384, 1152, 20_275)]
    return [_loss(*shape, has_gradients) for shape in shapes for has_gradients in (True, False)]


def _loss(n_rows: int, width: int, n_vocab: int, has_gradients: bool) -> Problem:
    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        generator = torch.Generator(device).manual_seed(0)
        return {
            "hidden": draw(device, n_rows, width).to(dtype),
            "weight": draw(device, n_vocab, width, spread=2 * width**-0.5, mean=0.0).to(dtype),
            "bias": draw(device, n_vocab, spread=0.1, mean=0.0),
            "targets": torch.randint(0, n_vocab, (n_rows,), device=device, generator=generator),
        }

    def plain(t: Tensors) -> Any:
        logits = F.linear(t["hidden"], t["weight"], t["bias"].to(t["hidden"].dtype))
        return F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, t["targets"])

    def ours(_: Tensors) -> Function:
        function = operation("mlm_cross_entropy")
        return lambda t: function(t["hidden"], t["weight"], t["bias"], t["targets"])

    factor = 3 if has_gradients else 1
    return Problem(
        name=f"{width}" + ("_backward" if has_gradients else ""),
        what=f"{n_rows:,} masked rows of {width}, vocabulary {n_vocab:,}"
        + (", forward and backward" if has_gradients else ""),
        op="mlm_cross_entropy", shape={"width": width, "n_vocab": n_vocab},
        make=make, plain=plain, ours=ours, work=Work(flops=factor * 2 * n_rows * width * n_vocab),
        gradients=("hidden", "weight", "bias") if has_gradients else (),
        row_inputs=("hidden", "targets"), tolerance=0.03,
    )  # fmt: skip
