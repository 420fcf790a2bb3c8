"""int8 weights laid out for products on the CPU.

A panel is 16 columns (output channels), and a step of it 64 bytes: four of K for each column, or two where they are
int16. A packed weight is int8 [panels, K / 4, 16, 4] or int16 [panels, K / 2, 16, 2], with zeros up to whole panels,
and up to a K that is a multiple of 64. Sixteen steps of int8 are what AMX takes at once, as they lie.

Weights are packed at every call: that takes as long as a few rows' products, and a copy from call to call would be a
second model in memory that knows nothing of weights changed by others.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import torch
import torch.nn.functional as F

from geneformer_kernels.cpu.compiled import LOOP
from geneformer_kernels.cpu.int8_transpose import pack_panels

COLUMNS = 16
#: Columns whose products are computed together; what belongs to columns is padded to whole groups.
GROUP = 4 * COLUMNS
#: K is padded to multiples of this.
WIDTH_STEP = 64


class Packed(NamedTuple):
    """Panels as above, and for each column, float32 scale and bias and what to take from its int32 sums."""

    panels: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    shift: np.ndarray
    width: int
    n_columns: int


def pack(
    weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, *, is_wide: bool, is_shifted: bool
) -> Packed:
    """``weight`` [N, K] int8, ``scale`` [N] and ``bias`` [N] or None for a product.

    ``is_wide``: to int16. ``is_shifted``: activations are given as q + 128, and the sums have to lose what that adds.
    """
    n_columns, width = weight.shape
    rest = (0, -width % WIDTH_STEP, 0, -n_columns % COLUMNS)
    padded = (F.pad(weight, rest) if any(rest) else weight).contiguous()
    n_panels, wide_width = padded.shape[0] // COLUMNS, padded.shape[1]
    taken = 2 if is_wide else 4
    n_steps = wide_width // taken
    panels = torch.empty(n_panels, n_steps, COLUMNS, taken, dtype=torch.int16 if is_wide else torch.int8)
    pack_panels(padded.data_ptr(), wide_width, n_panels, n_steps, is_wide, panels.data_ptr())
    length = -(-n_columns // GROUP) * GROUP
    scale_and_bias, shift = np.zeros((2, length), np.float32), np.zeros(length, np.int32)
    scale_and_bias[0, :n_columns] = scale.detach().numpy()
    # A product plus minus zero is itself, minus zero included.
    scale_and_bias[1] = -0.0
    if bias is not None:
        scale_and_bias[1, :n_columns] = bias.detach().float().numpy()
    if is_shifted:
        _sum_columns(padded.numpy(), shift)
    return Packed(panels.numpy(), scale_and_bias[0], scale_and_bias[1], shift, width, n_columns)


@numba.njit(**LOOP)
def _sum_columns(weight, shift):
    for column in range(weight.shape[0]):
        total = np.int32(0)
        for j in range(weight.shape[1]):
            total += np.int32(weight[column, j])
        shift[column] = np.int32(128) * total
