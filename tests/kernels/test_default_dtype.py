"""Operations compute in the dtypes they say, whatever the default dtype is: loaders set it while they build a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from geneformer_kernels import (
    embed_tokens,
    favor_attention,
    feed_forward,
    feed_forward_layernorm,
    fp8_linear,
    int8_feed_forward,
    int8_linear,
    mlm_cross_entropy,
    quantize_weight,
    quantize_weight_fp8,
    residual_layernorm,
    residual_layernorm_int8,
    varlen_attention_qkv,
)

TOKENS, WIDTH = 5, 128


def floats(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float32) / 8 + 0.25).to(dtype)


def wide(*shape: int) -> torch.Tensor:
    return floats(*shape, dtype=torch.float32)


def norm(run: Callable, impl: str, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return run(*leaves, eps=1e-5, norm="post", impl=impl, dropout_p=0.25, seed=torch.tensor([3]))


def of_layernorm(impl, x, residual, weight, bias):
    return norm(residual_layernorm, impl, x, residual, weight, bias)


def of_layernorm_alone(impl, x, weight, bias):
    with torch.no_grad():
        return residual_layernorm(x.detach(), None, weight, bias, eps=1e-5, norm="pre", impl=impl)


def of_block(impl, x, residual, up, up_bias, down, down_bias, weight, bias):
    def run(*leaves, **options):
        return feed_forward_layernorm(*leaves, activation="relu", **options)

    return norm(run, impl, x, residual, up, up_bias, down, down_bias, weight, bias)


def of_embedding(impl, tokens, positions, type_row, weight, bias):
    cu_seqlens = torch.tensor([0, 3, TOKENS], dtype=torch.int32)
    ids = torch.tensor([1, 0, 1, 2, 1])
    return embed_tokens(ids, cu_seqlens, tokens, positions, type_row, weight, bias, impl=impl)[:1]


def of_attention(impl, qkv):
    cu_seqlens = torch.tensor([0, 3, TOKENS], dtype=torch.int32)
    dropout_p = 0.25 if impl == "torch" else 0.0
    return (varlen_attention_qkv(qkv, cu_seqlens=cu_seqlens, dropout_p=dropout_p, impl=impl),)


def of_favor(impl, qkv, projection):
    cu_seqlens = torch.tensor([0, 3, TOKENS], dtype=torch.int32)
    out = favor_attention(*qkv.unbind(1), projection, cu_seqlens=cu_seqlens, impl=impl)
    return (out + 0 * projection.sum(),)


def of_loss(impl, hidden, weight, bias):
    return (mlm_cross_entropy(hidden, weight, bias, torch.tensor([1, 0, -100, 2, 5]), impl=impl),)


def of_int8(impl, x, bias):
    q, scale = quantize_weight(wide(7, WIDTH))
    return tuple(int8_linear(x, q, scale, bias, mode=mode, impl=impl) for mode in ("dynamic", "weight_only"))


def of_int8_layers(impl, x, up_bias, down_bias):
    up, down = quantize_weight(wide(7, WIDTH)), quantize_weight(wide(9, 7))
    return (int8_feed_forward(x, *up, up_bias, *down, down_bias, activation="gelu", impl=impl),)


def of_int8_layernorm(impl, x, residual, weight, bias):
    with torch.no_grad():
        return residual_layernorm_int8(x, residual, weight, bias, eps=1e-5, norm="pre", smooth=weight, impl=impl)


def of_fp8(impl, x, bias):
    q, scale = quantize_weight_fp8(wide(7, WIDTH))
    return (fp8_linear(x, q, scale, bias, impl="torch" if impl == "triton" else impl),)


def of_feed_forward(impl, x, up, up_bias, down, down_bias):
    return (feed_forward(x, up, up_bias, down, down_bias, activation="swiglu", impl=impl),)


CASES: dict[str, tuple[Callable, list[torch.Tensor]]] = {
    "residual_layernorm": (of_layernorm, [floats(TOKENS, WIDTH), wide(TOKENS, WIDTH), wide(WIDTH), wide(WIDTH)]),
    "residual_layernorm alone": (of_layernorm_alone, [floats(TOKENS, WIDTH), wide(WIDTH), wide(WIDTH)]),
    "feed_forward_layernorm": (
        of_block,
        [
            floats(TOKENS, WIDTH), wide(TOKENS, WIDTH), wide(64, WIDTH), wide(64), wide(WIDTH, 64), wide(WIDTH),
            wide(WIDTH), wide(WIDTH),
        ],
    ),
    "feed_forward": (of_feed_forward, [floats(TOKENS, 24), wide(80, 24), wide(80), wide(24, 40), wide(24)]),
    "embed_tokens": (of_embedding, [wide(4, WIDTH), wide(3, WIDTH), wide(WIDTH), wide(WIDTH), wide(WIDTH)]),
    "varlen_attention": (of_attention, [floats(TOKENS, 3, 2, 16)]),
    "favor_attention": (of_favor, [floats(TOKENS, 3, 2, 16), wide(9, 16)]),
    "mlm_cross_entropy": (of_loss, [floats(TOKENS, WIDTH), wide(6, WIDTH), wide(6)]),
    "int8_linear": (of_int8, [floats(TOKENS, WIDTH), wide(7)]),
    "int8_feed_forward": (of_int8_layers, [floats(TOKENS, WIDTH), wide(7), wide(9)]),
    "residual_layernorm_int8": (
        of_int8_layernorm,
        [floats(TOKENS, WIDTH), wide(TOKENS, WIDTH), wide(WIDTH), wide(WIDTH)],
    ),
    "fp8_linear": (of_fp8, [floats(TOKENS, WIDTH), wide(7)]),
}  # fmt: skip


@pytest.fixture
def default_dtype() -> Iterator[Callable]:
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


# Half is for the kernels, which Triton's interpreter gets wrong in bfloat16; bfloat16 is what a CPU computes in.
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("triton", torch.float16), ("torch", torch.bfloat16), ("torch", torch.float32), ("reference", torch.float32)],
)
@pytest.mark.parametrize("name", CASES)
def test_the_default_dtype_changes_nothing(name: str, impl: str, dtype: torch.dtype, default_dtype: Callable) -> None:
    run, tensors = CASES[name]
    tensors = [tensor.to(dtype) if tensor.dtype == torch.float16 else tensor for tensor in tensors]
    found = []
    for default in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        default_dtype(default)
        torch.manual_seed(0)
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        outputs = run(impl, *leaves)
        flowing = [out.float().sum() for out in outputs if out.requires_grad]
        gradients = torch.autograd.grad(flowing, leaves) if flowing else ()
        found.append([*outputs, *gradients])
    for expected, *others in zip(*found, strict=True):
        for value in others:
            assert value.dtype == expected.dtype
            assert torch.equal(value, expected)
