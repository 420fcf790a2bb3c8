"""What tests of products of int8 multiply, and how they judge it."""

from __future__ import annotations

import torch
from geneformer_kernels import quantize_weight

IMPLS = ["triton", "torch", "reference"]


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
