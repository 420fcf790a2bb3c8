"""Problems of blocks with int8 weights: the LayerNorm before the feed-forward half and the half itself, and rivals."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from bench.gpu.measure import Unavailable, Work
from bench.gpu.providers.operations import EPS, Function, Problem, Tensors, draw, operation
from bench.gpu.providers.products import FEED_FORWARDS


def int8_block_problems(is_tiny: bool) -> list[Problem]:
    """Residual addition, LayerNorm and both layers; plain is the same in the card's 16-bit dtype."""
    if is_tiny:
        return [_block(64, 32, 48, "relu")]
    return [_block(n_tokens, *shape) for n_tokens in (16_384, 65_536) for shape in FEED_FORWARDS]


def _block(n_tokens: int, width: int, inner: int, activation: str) -> Problem:
    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        return {
            "x": draw(device, n_tokens, width).to(dtype),
            "residual": draw(device, n_tokens, width, seed=2),
            "weight": draw(device, width, mean=1.0, spread=0.1),
            "bias": draw(device, width, spread=0.1, mean=0.0, seed=3),
            "up": draw(device, inner, width, spread=width**-0.5, mean=0.0).to(dtype),
            "up_bias": draw(device, inner, spread=0.1, mean=0.1).to(dtype),
            "down": draw(device, width, inner, spread=inner**-0.5, mean=0.0, seed=1).to(dtype),
            "down_bias": draw(device, width, spread=0.1, mean=0.1).to(dtype),
        }

    def between(hidden: torch.Tensor) -> torch.Tensor:
        return F.relu(hidden) if activation == "relu" else F.gelu(hidden, approximate="tanh")

    def normed(t: Tensors) -> torch.Tensor:
        total = t["x"].to(t["residual"].dtype) + t["residual"]
        return F.layer_norm(total, (width,), t["weight"], t["bias"], EPS).to(t["x"].dtype)

    def plain(t: Tensors) -> Any:
        return F.linear(between(F.linear(normed(t), t["up"], t["up_bias"])), t["down"], t["down_bias"])

    def ours(inputs: Tensors) -> Function:
        norm = operation("residual_layernorm_int8")
        layers = operation("int8_feed_forward")
        quantize = operation("quantize_weight", "int8_linear")
        up, down = quantize(inputs["up"]), quantize(inputs["down"])

        def run(t: Tensors) -> Any:
            _, q, scale = norm(t["x"], t["residual"], t["weight"], t["bias"], eps=EPS, norm="post")
            return layers(
                q, *up, t["up_bias"], *down, t["down_bias"],
                x_scale=scale, activation=activation, out_dtype=t["x"].dtype,
            )  # fmt: skip

        return run

    def in_16_bits(_: Tensors) -> Function:
        """What a model of ours that is not quantized runs."""
        norm, layers = operation("residual_layernorm"), operation("feed_forward")

        def run(t: Tensors) -> Any:
            _, out = norm(t["x"], t["residual"], t["weight"], t["bias"], eps=EPS, norm="post")
            return layers(out, t["up"], t["up_bias"], t["down"], t["down_bias"], activation=activation)

        return run

    def with_layers(inputs: Tensors, layers: torch.nn.Module) -> Function:
        up, down = layers[0], layers[1]
        return lambda t: down(between(up(normed(t))))

    def by_torchao(inputs: Tensors) -> Function:
        if find_spec("torchao") is None:
            raise Unavailable("torchao is not installed")
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        layers = _linears(inputs)
        quantize_(layers, Int8DynamicActivationInt8WeightConfig())
        return with_layers(inputs, layers)

    def by_bitsandbytes(inputs: Tensors) -> Function:
        if find_spec("bitsandbytes") is None:
            raise Unavailable("bitsandbytes is not installed")
        if inputs["x"].device.type != "cuda":
            raise Unavailable("needs CUDA")
        import bitsandbytes

        made = torch.nn.ModuleList()
        for layer in _linears(inputs):
            quantized = bitsandbytes.nn.Linear8bitLt(
                layer.in_features, layer.out_features, has_fp16_weights=False, threshold=6.0
            )
            quantized.load_state_dict(layer.state_dict())
            made.append(quantized.to(inputs["x"].device))
        return with_layers(inputs, made)

    per_row = width * (2 + 4 + 4 + 2)  # x and the residual read, the stream and the result written
    return Problem(
        name=f"{n_tokens}x{width}",
        what=f"{n_tokens:,} rows, LayerNorm, {width} to {inner} and back, {activation}, int8 weights and activations",
        op="int8_feed_forward", shape={"width": width, "ff_width": inner},
        make=make, plain=plain, ours=ours,
        work=Work(
            flops=4 * n_tokens * width * inner,
            n_bytes=n_tokens * per_row + 2 * width * inner,
            unit="int8_product_tflops",
        ),
        rivals={
            "ours-16-bit": ("this project without quantisation", in_16_bits),
            "torchao-int8": ("torchao, int8 weights and dynamic int8 activations", by_torchao),
            "bitsandbytes-int8": ("bitsandbytes, LLM.int8 with outliers above 6", by_bitsandbytes),
        },
        row_inputs=("x", "residual"), tolerance=0.05,
    )  # fmt: skip


def _linears(inputs: Tensors) -> torch.nn.ModuleList:
    layers = torch.nn.ModuleList()
    for name in ("up", "down"):
        weight = inputs[name]
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
        layer.load_state_dict({"weight": weight, "bias": inputs[f"{name}_bias"]})
        layers.append(layer.requires_grad_(False))
    return layers
