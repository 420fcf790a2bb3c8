"""Residual addition and LayerNorm of float32 on the CPU, in one pass over memory, for inference."""

from __future__ import annotations

import numba
import numpy as np
import torch

from geneformer_kernels.cpu.compiled import LOOP
from geneformer_kernels.cpu.lanes import LANES, add_floats, normalise, sum_of_squares
from geneformer_kernels.cpu.parameters import copied
from geneformer_kernels.cpu.row_arithmetic import address_of
from geneformer_kernels.cpu.shares import in_pieces
from geneformer_kernels.workspace import Workspace


def serves(width: int) -> bool:
    """Whether this loop takes rows of so many numbers."""
    return width > 0 and width % LANES == 0


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float, is_post: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(stream, normalised) of float32 x [..., C] and residual [..., C] or None; one tensor where they are equal.

    Numbers depend neither on the rows around them nor on threads.
    """
    width = x.shape[-1]
    rows = x.detach().contiguous().view(-1, width).numpy()
    has_residual = residual is not None
    before = rows if residual is None else residual.detach().contiguous().view(-1, width).numpy()
    stream = torch.empty(x.shape, dtype=torch.float32)
    out = stream if is_post else torch.empty(x.shape, dtype=torch.float32)
    affine = copied(weight), copied(bias), np.float32(eps)
    results = stream.view(-1, width).numpy(), out.view(-1, width).numpy()

    def norm(start: int, stop: int) -> None:
        piece = slice(start, stop)
        norm_rows(
            rows[piece], before[piece], has_residual, affine, is_post, results[0][piece], results[1][piece], room(width)
        )

    in_pieces(norm, len(rows))
    return stream, out


def room(width: int) -> np.ndarray:
    """For one row's sum, and one that adds nothing to it: of one thread."""
    rows = np.zeros((2, width), np.float32)
    rows[1] = -0.0  # not even to the sign of a zero
    return rows


def workspace(width: int) -> Workspace:
    """Of :func:`add_layer_norm`: copies of two parameters, and each thread's two rows."""
    return Workspace(call=2 * 4 * width, thread=2 * 4 * width)


@numba.njit(**LOOP)
def norm_rows(x, residual, has_residual, affine, is_post, stream, out, room):
    """Sums to ``stream`` and normalised rows to ``out``; of ``is_post`` these go on, and sums are kept in ``room``.

    ``x`` may be what is written, row by row.
    """
    weight, bias, eps = affine
    n_blocks, size = x.shape[1] // LANES, np.float32(x.shape[1])
    for i in range(x.shape[0]):
        total = address_of(room) if is_post else address_of(stream[i])
        before = address_of(residual[i]) if has_residual else address_of(room[1])
        mean = add_floats(address_of(x[i]), before, n_blocks, total) / size
        variance = sum_of_squares(total, mean, n_blocks) / size
        rstd = np.float32(1) / np.sqrt(variance + eps)
        normalise(total, mean, rstd, address_of(weight), address_of(bias), n_blocks, address_of(out[i]))
