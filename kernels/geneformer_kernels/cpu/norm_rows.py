"""Residual addition and LayerNorm on the CPU in one pass over bfloat16 rows, for inference."""

from __future__ import annotations

import numba
import numpy as np
import torch

from geneformer_kernels.cpu.compiled import LOOP, from_bfloat16, to_bfloat16
from geneformer_kernels.cpu.parameters import copied


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float, norm: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 stream, bfloat16 value to compute on) of bfloat16 x [..., C] and float32 residual [..., C] or None.

    Torch takes three passes over memory (addition, LayerNorm, conversion): 0.25 us a row of 256 against 0.10 us here,
    on one core of an EPYC with avx512_bf16 (4,096 rows, 2026-11-26).
    """
    width = x.shape[-1]
    stream = torch.empty(x.shape, dtype=torch.float32)
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    if not x.numel():
        return stream, out
    if residual is None:
        residual = torch.zeros(1, width, dtype=torch.float32).expand(x.numel() // width, width)
    _norm_rows(
        _bits(x.contiguous()),
        residual.contiguous().view(-1, width).numpy(),
        copied(weight),
        copied(bias),
        np.float32(eps),
        norm == "post",
        np.empty(width, np.float32),
        stream.view(-1, width).numpy(),
        _bits(out),
    )
    return stream, out


def _bits(x: torch.Tensor) -> np.ndarray:
    return x.view(-1, x.shape[-1]).view(torch.uint16).numpy()


# A row stays in the first-level cache between its acts. Each act may relax floating point as far as it is safe there:
# sums may be reordered, the rounding to bfloat16 may not. All stand inside the loop over rows: a sum that is compiled
# by itself as well is added in another order there, and which of the two runs depends on what earlier processes kept.
@numba.njit(**LOOP)
def _norm_rows(x, residual, weight, bias, eps, is_post, scratch, stream, out):
    for i in range(x.shape[0]):
        total = scratch if is_post else stream[i]
        mean = _add(x[i], residual[i], total) / np.float32(x.shape[1])
        variance = _squares(total, mean) / np.float32(x.shape[1])
        rstd = np.float32(1) / np.sqrt(variance + eps)
        if is_post:
            _scale(total, mean, rstd, weight, bias, stream[i])
            _round(stream[i], out[i])
        else:
            _scale(total, mean, rstd, weight, bias, scratch)
            _round(scratch, out[i])


@numba.njit(fastmath={"reassoc", "contract", "nsz"}, forceinline=True, **LOOP)
def _add(x, residual, total):
    found = np.float32(0)
    for j in range(len(x)):
        total[j] = residual[j] + from_bfloat16(x[j])
        found += total[j]
    return found


@numba.njit(fastmath={"reassoc", "contract", "nsz"}, forceinline=True, **LOOP)
def _squares(total, mean):
    found = np.float32(0)
    for j in range(len(total)):
        rest = total[j] - mean
        found += rest * rest
    return found


@numba.njit(fastmath={"contract", "nsz"}, forceinline=True, **LOOP)
def _scale(total, mean, rstd, weight, bias, normed):
    for j in range(len(total)):
        normed[j] = (total[j] - mean) * rstd * weight[j] + bias[j]


@numba.njit(**LOOP)
def _round(normed, out):
    for j in range(len(out)):
        out[j] = to_bfloat16(normed[j])
