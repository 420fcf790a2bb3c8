"""Residual addition and LayerNorm on the CPU whose results leave as int8 rows, in one pass, for inference."""

from __future__ import annotations

import numba
import numpy as np
import torch

from geneformer_kernels.cpu.compiled import LOOP, from_bfloat16
from geneformer_kernels.cpu.lanes import LANES, SIGNED, sum_of, sum_of_squares
from geneformer_kernels.cpu.row_arithmetic import address_of, round_row
from geneformer_kernels.cpu.shares import in_pieces


def add_layer_norm_int8(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    smooth: torch.Tensor | None,
    eps: float,
    is_post: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(float32 stream, int8 rows, float32 scales) of x [T, C] and float32 residual [T, C] or None."""
    n_rows, width = x.shape
    whole = -(-width // LANES) * LANES
    stream, scale = torch.empty(n_rows, width, dtype=torch.float32), torch.empty(n_rows, dtype=torch.float32)
    q = torch.empty(n_rows, whole, dtype=torch.int8)
    if not x.numel():
        return stream, q[:, :width], scale
    is_half = x.dtype == torch.bfloat16
    x = x.detach().contiguous() if is_half else x.detach().float().contiguous()
    nothing = torch.empty(0, 0)
    halves = x.view(torch.uint16) if is_half else nothing.to(torch.uint16)
    rows = (nothing if is_half else x).numpy(), halves.numpy(), is_half
    before = (nothing if residual is None else residual.detach().float().contiguous()).numpy()
    factors = torch.ones(0 if smooth is None else whole)
    if smooth is not None:
        factors[:width] = smooth.detach()
    affine = tuple(each.detach().float().contiguous().numpy() for each in (weight, bias, factors))

    def norm(start: int, stop: int) -> None:
        scratch = np.zeros(2 * whole, np.float32)
        _norm_rows(
            *rows,
            before,
            *affine,
            np.float32(eps),
            is_post,
            scratch,
            stream.numpy(),
            q.numpy(),
            scale.numpy(),
            start,
            stop,
        )

    in_pieces(norm, n_rows)
    return stream, q if whole == width else q[:, :width].contiguous(), scale


@numba.njit(**LOOP)
def _norm_rows(
    x, halves, is_half, residual, weight, bias, smooth, eps, is_post, scratch, stream, q, scale, start, stop
):  # fmt: skip
    width, whole = stream.shape[1], q.shape[1]
    total, normed = scratch[:whole], scratch[whole:]
    n_blocks, size = whole // LANES, np.float32(width)
    for i in range(start, stop):
        if is_half:
            from_halves = halves[i]
            for j in range(width):
                total[j] = from_bfloat16(from_halves[j])
        else:
            from_floats = x[i]
            for j in range(width):
                total[j] = from_floats[j]
        if len(residual):
            before = residual[i]
            for j in range(width):
                total[j] += before[j]
        total[width:] = 0
        mean = sum_of(address_of(total), n_blocks) / size
        total[width:] = mean  # what is not there is not apart from it
        variance = sum_of_squares(address_of(total), mean, n_blocks) / size
        rstd = np.float32(1) / np.sqrt(variance + eps)
        for j in range(width):
            normed[j] = (total[j] - mean) * rstd * weight[j] + bias[j]
        onward, going = stream[i], normed if is_post else total
        for j in range(width):
            onward[j] = going[j]
        scale[i] = round_row(
            address_of(normed), False, address_of(smooth) if len(smooth) else 0, whole, address_of(total), SIGNED,
            address_of(q) + i * whole,
        )  # fmt: skip
