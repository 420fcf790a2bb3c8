"""Linear layers of float32 on a CPU with AVX2, whose numbers depend on neither threads nor the other rows.

Rows go to threads in pieces, and through a layer in blocks: what passes between two layers stays in the second-level
cache. Weights are packed at every call, as those of int8 are (``int8_pack.py``): that takes as long as the product of
some twenty rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch

from geneformer_kernels.cpu.compiled import LOOP
from geneformer_kernels.cpu.float32_tiles import COLUMNS, ROWS, STEP_BYTES, add_tile
from geneformer_kernels.cpu.int8_transpose import transpose_fours
from geneformer_kernels.cpu.lanes import copy_floats
from geneformer_kernels.cpu.parameters import copied
from geneformer_kernels.cpu.row_arithmetic import ACTIVATION_CODES, activate, address_of
from geneformer_kernels.cpu.shares import in_pieces
from geneformer_kernels.workspace import Workspace

#: Rows of a block: whole tiles, for which the weights are read once.
BLOCK_ROWS = 16 * ROWS
# Of K, what is taken at once: a panel of so much stays in the first-level cache.
_CHUNK = 256


class Packed(NamedTuple):
    """A layer's weight as panels [N / 16, K, 16], its bias [N], and room: for a tile of rows, for their results, and
    for a part of K of a block's rows."""

    panels: np.ndarray
    bias: np.ndarray
    tail: np.ndarray
    tail_out: np.ndarray
    part: np.ndarray


def serves(n_columns: int, width: int) -> bool:
    """Whether these loops take a weight [N, K]."""
    return n_columns > 0 and width > 0 and n_columns % COLUMNS == 0


def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> Packed:
    """A layer for loops; ``weight`` [N, K] and ``bias`` [N] or None, float32."""
    n_columns, width = weight.shape
    panels = torch.empty(n_columns // COLUMNS, width, COLUMNS, dtype=torch.float32).numpy()
    rows = weight.detach().contiguous()  # kept until the loop has read it
    _pack(rows.data_ptr(), panels)
    own_bias = np.zeros(n_columns, np.float32) if bias is None else copied(bias)
    return Packed(panels, own_bias, *room(n_columns, width))


def room(n_columns: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The room of one thread, as :class:`Packed` has it."""
    tail, tail_out, part = _rooms(n_columns, width)
    return np.zeros(tail, np.float32), np.zeros(tail_out, np.float32), np.empty(part, np.float32)


def _rooms(n_columns: int, width: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    return (ROWS, width), (ROWS, n_columns), (BLOCK_ROWS if width > _CHUNK else 0, _CHUNK)


def for_thread(packed: Packed) -> Packed:
    """The same with room of its own."""
    tail, tail_out, part = room(len(packed.bias), packed.panels.shape[1])
    return packed._replace(tail=tail, tail_out=tail_out, part=part)


def workspace(shapes: Sequence[tuple[int, int]], near: int = 0) -> Workspace:
    """Of layers [N, K] that are packed together; ``near``: numbers that a block keeps of a row between them.

    Weights are read where they lie, and only their panels take memory.
    """
    panels = sum(4 * n_columns * width for n_columns, width in shapes)
    rooms = sum(4 * n_rows * size for shape in shapes for n_rows, size in _rooms(*shape))
    return Workspace(
        call=panels + 4 * sum(n_columns for n_columns, _ in shapes) + rooms, thread=rooms + 4 * BLOCK_ROWS * near
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias`` of float32 [T, K]."""
    out = torch.empty(len(x), len(weight), dtype=torch.float32)
    packed, rows, results = pack(weight, bias), x.detach().contiguous().numpy(), out.numpy()

    def compute(start: int, stop: int) -> None:
        _linear(rows, for_thread(packed), results, start, stop)

    in_pieces(compute, len(x), whole=BLOCK_ROWS)
    return out


def feed_forward(
    x: torch.Tensor,
    up: tuple[torch.Tensor, torch.Tensor | None],
    down: tuple[torch.Tensor, torch.Tensor | None],
    activation: str,
) -> torch.Tensor:
    """Two linear layers, each (weight, bias), with an activation between; float32 [T, C]."""
    out = torch.empty(len(x), len(down[0]), dtype=torch.float32)
    packed, down_packed = pack(*up), pack(*down)
    rows, results, code = x.detach().contiguous().numpy(), out.numpy(), ACTIVATION_CODES[activation]

    def compute(start: int, stop: int) -> None:
        hidden = np.empty((min(BLOCK_ROWS, stop - start), len(packed.bias)), np.float32)
        layers = for_thread(packed), for_thread(down_packed)
        _feed_forward(rows, *layers, code, activation == "swiglu", hidden, results, start, stop)

    in_pieces(compute, len(x), whole=BLOCK_ROWS)
    return out


@numba.njit(**LOOP)
def _pack(weight, panels):
    """Rows of a weight from an address on to panels, sixteen steps at a time."""
    n_steps = panels.shape[1]
    row_bytes, whole = 4 * n_steps, n_steps // COLUMNS * COLUMNS
    for i_panel in range(panels.shape[0]):
        rows, panel = weight + i_panel * COLUMNS * row_bytes, address_of(panels) + i_panel * n_steps * STEP_BYTES
        for step in range(0, whole, COLUMNS):
            transpose_fours(rows + 4 * step, row_bytes, panel + step * STEP_BYTES)
        for step in range(whole, n_steps):
            for i in range(COLUMNS):
                copy_floats(rows + i * row_bytes + 4 * step, 1, panel + step * STEP_BYTES + 4 * i)


@numba.njit(**LOOP)
def _linear(x, layer, out, start, stop):
    for first in range(start, stop, BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, stop)
        multiply_rows(x[first:last], layer, out[first:last])


@numba.njit(**LOOP)
def _feed_forward(x, up, down, activation, is_gated, hidden, out, start, stop):
    for first in range(start, stop, BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, stop)
        two_layers(x[first:last], up, down, activation, is_gated, hidden[: last - first], out[first:last])


@numba.njit(**LOOP)
def two_layers(x, up, down, activation, is_gated, hidden, out):
    """A block's rows through both layers of a feed-forward half; ``hidden`` is room for what is between."""
    multiply_rows(x, up, hidden)
    width = down[0].shape[1]
    for i in range(hidden.shape[0]):
        activate(hidden[i, :width], activation)
        if is_gated:
            for j in range(width):
                hidden[i, j] *= hidden[i, width + j]
    multiply_rows(hidden, down, out)


@numba.njit(**LOOP)
def multiply_rows(x, layer, out):
    """Rows of ``x``, as far as a layer takes numbers of them, times its weight, plus its bias."""
    panels, bias, tail, tail_out, part = layer
    n_rows, width = x.shape[0], panels.shape[1]
    whole = n_rows // ROWS * ROWS
    _multiply_tiles(x, whole, panels, bias, out, part)
    if whole < n_rows:
        # Rows that are no whole tile, and others behind them whose results nobody sees.
        for i in range(n_rows - whole):
            tail[i] = x[whole + i, :width]
        _multiply_tiles(tail, ROWS, panels, bias, tail_out, part)
        for i in range(n_rows - whole):
            out[whole + i] = tail_out[i]


@numba.njit(**LOOP)
def _multiply_tiles(x, n_rows, panels, bias, out, part):
    width, out_row_bytes = panels.shape[1], 4 * out.shape[1]
    panel_bytes, first_panel, first_out = width * STEP_BYTES, address_of(panels), address_of(out)
    for chunk in range(0, width, _CHUNK):
        n_steps = min(_CHUNK, width - chunk)
        first_row, row_bytes = address_of(x), 4 * x.shape[1]
        if width > _CHUNK:
            # Parts of rows that are apart in memory are read ahead by no cache: without this, products of 768 columns
            # reach 75 GFLOP/s where those of 256 reach 100 (one core of a Xeon held to AVX2, 2026-11-30).
            first_row, row_bytes = address_of(part), 4 * _CHUNK
            for i in range(n_rows):
                for j in range(n_steps):
                    part[i, j] = x[i, chunk + j]
        for i_panel in range(panels.shape[0]):
            panel = first_panel + i_panel * panel_bytes + chunk * STEP_BYTES
            for row in range(0, n_rows, ROWS):
                to = first_out + row * out_row_bytes + i_panel * STEP_BYTES
                start, start_row_bytes = to, out_row_bytes
                if chunk == 0:
                    start, start_row_bytes = address_of(bias) + i_panel * STEP_BYTES, 0
                rows = first_row + row * row_bytes
                add_tile(start, start_row_bytes, rows, row_bytes, panel, n_steps, to, out_row_bytes)
