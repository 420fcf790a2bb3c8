"""Residual addition and LayerNorm on the CPU whose results leave as int8 rows, in one pass, for inference."""

from __future__ import annotations

import numba
import numpy as np
import torch

from geneformer_kernels.cpu.compiled import LOOP
from geneformer_kernels.cpu.lanes import (
    LANES,
    SIGNED,
    add_floats,
    add_halves,
    copy_floats,
    copy_halves,
    normalise,
    sum_of_squares,
)
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
    before = None if residual is None else residual.detach().float().contiguous()
    affine = affine_of(weight, bias, smooth)
    at = (x.data_ptr(), is_half, 0 if before is None else before.data_ptr(), stream.data_ptr(), q.data_ptr())
    size, has_smooth = (width, whole), smooth is not None

    def norm(start: int, stop: int) -> None:
        scratch = np.zeros((4, whole), np.float32)
        norm_rows(*at, scale.numpy(), *size, affine, has_smooth, np.float32(eps), is_post, scratch, start, stop)

    in_pieces(norm, n_rows)
    return stream, q if whole == width else q[:, :width].contiguous(), scale


def affine_of(weight: torch.Tensor, bias: torch.Tensor, smooth: torch.Tensor | None) -> np.ndarray:
    """[3, C], C rounded up to LANES: zeros behind weight and bias make zeros of what is behind a row."""
    width = len(weight)
    affine = np.zeros((3, -(-width // LANES) * LANES), np.float32)
    for i, each in enumerate((weight, bias, smooth)):
        if each is not None:
            affine[i, :width] = each.detach().float().numpy()
    return affine


@numba.njit(**LOOP)
def norm_rows(
    x, is_half, residual, stream, q, scale, width, whole, affine, has_smooth, eps, is_post, scratch, start, stop
):  # fmt: skip
    """Rows of ``width`` numbers at addresses; those of the stream are whole LANES or made in ``scratch``."""
    row_bytes, total_row = 4 * whole, address_of(scratch)
    normed_row, before_row, work_row = total_row + row_bytes, total_row + 2 * row_bytes, total_row + 3 * row_bytes
    n_blocks, size, is_whole = whole // LANES, np.float32(width), whole == width
    weight, bias = address_of(affine), address_of(affine) + row_bytes
    smooth = bias + row_bytes if has_smooth else 0
    x_bytes = width * (2 if is_half else 4)
    if not residual:
        scratch[2] = np.float32(-0.0)  # which adds nothing, not even to the sign of a zero
    for i in range(start, stop):
        x_row, stream_row = x + i * x_bytes, stream + 4 * width * i
        before = residual + 4 * width * i if residual else before_row
        if not is_whole:
            # A copy that zeros follow; the sum goes to where they are.
            if is_half:
                copy_halves(x_row, width, work_row)
            else:
                copy_floats(x_row, width, work_row)
            x_row = work_row
            if residual:
                copy_floats(before, width, before_row)
                before = before_row
        total = stream_row if is_whole and not is_post else total_row
        normed = stream_row if is_whole and is_post else normed_row
        if is_half and is_whole:
            mean = add_halves(x_row, before, n_blocks, total) / size
        else:
            mean = add_floats(x_row, before, n_blocks, total) / size
        if not is_whole:
            scratch[0, width:] = mean  # what is not there is not apart from it
        variance = sum_of_squares(total, mean, n_blocks) / size
        rstd = np.float32(1) / np.sqrt(variance + eps)
        normalise(total, mean, rstd, weight, bias, n_blocks, normed)
        if not is_whole:
            copy_floats(normed if is_post else total, width, stream_row)
        scale[i] = round_row(normed, False, smooth, whole, work_row, SIGNED, q + i * whole)
