"""How much a step computes, and how much this device could: model FLOP utilisation (Chowdhery et al., 2204.02311).

The peak is measured, by one large matrix product in the precision of the run, so that no table of cards is needed and
the share means the same everywhere: of what a good matrix product reaches here.
"""

from __future__ import annotations

import functools
import time

import torch
from torch import nn

from geneformer_fast.config import EncoderConfig
from geneformer_fast.encoder import Encoder
from geneformer_fast.heads import MLMHead

# Forward, and twice that backward: gradients of inputs and of weights. Recomputation is not credited.
_TRAINING = 3


def encoder_flops(config: EncoderConfig, n_tokens: int, sum_of_squares: int) -> float:
    """Operations of one forward pass through the blocks, without head.

    Parameters
    ----------
    config
        The geometry.
    n_tokens
        Tokens of all cells.
    sum_of_squares
        Sum of the squared lengths of all cells, which is what attention costs.
    """
    up = 2 if config.activation == "swiglu" else 1
    products = 4 * config.width**2 + (up + 1) * config.width * config.ff_width
    return config.n_layers * (2.0 * products * n_tokens + 4.0 * config.width * sum_of_squares)


def head_flops(config: EncoderConfig, n_rows: float) -> float:
    """Operations of the masked-gene head for so many rows."""
    return 2.0 * n_rows * config.width * (config.width + config.vocab_size)


def training_flops(model: nn.Module, n_tokens: int, sum_of_squares: int, n_rows: float) -> float | None:
    """Operations of one training step on this device.

    Parameters
    ----------
    model
        Holds an :class:`Encoder`.
    n_tokens, sum_of_squares
        Tokens of all cells, and the sum of their squared lengths.
    n_rows
        Rows that a masked-gene head computes; other heads cost next to nothing.

    Returns
    -------
    float or None
        None where the work is not known: no encoder, or frozen layers, which have no backward pass of their own.
    """
    encoder = next((module for module in model.modules() if isinstance(module, Encoder)), None)
    if encoder is None or not all(parameter.requires_grad for parameter in encoder.parameters()):
        return None
    flops = encoder_flops(encoder.config, n_tokens, sum_of_squares)
    if isinstance(encoder.head, MLMHead):
        flops += head_flops(encoder.config, n_rows)
    return _TRAINING * flops


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product, the best of a few; measured once per process."""
    size, n_runs = (8192, 6) if device.type == "cuda" else (1024, 4)
    generator = torch.Generator(device).manual_seed(0)  # not the run's random numbers
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    times = []
    for _ in range(n_runs):
        _wait(device)
        begin = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        times.append(time.perf_counter() - begin)
    return 2.0 * size**3 / min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
