"""Linear layers of int8 on the CPU, with the same bits on every instruction set, thread count and batch.

Sums of integers are exact; what follows them rounds number by number, in one order. Rows go to threads in pieces, each
of which is computed alone (``int8_loops.py``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from geneformer_kernels.cpu import int8_amx, int8_loops
from geneformer_kernels.cpu.instructions import is_compiled_for
from geneformer_kernels.cpu.int8_dot import SLACK
from geneformer_kernels.cpu.int8_loops import AMX, AVX512_VNNI, AVX_VNNI, PAIRS, UNSIGNED
from geneformer_kernels.cpu.int8_pack import GROUP, WIDTH_STEP, Packed, pack
from geneformer_kernels.cpu.lanes import LANES
from geneformer_kernels.cpu.row_arithmetic import ACTIVATION_CODES
from geneformer_kernels.cpu.shares import in_pieces
from geneformer_kernels.target import INT8_INSTRUCTIONS, cpu_features
from geneformer_kernels.workspace import Workspace

KINDS = {"avx2": PAIRS, "avx_vnni": AVX_VNNI, "avx512_vnni": AVX512_VNNI, "amx_int8": AMX}
#: Rows of a block: whole tiles of all sets. Of float32 hidden units so many bytes stay near, as far as rows allow.
_BLOCK_ROWS, _HIDDEN_BYTES = 96, 1 << 20

NO_ROWS = np.empty((0, 0), np.float32)
_NO_NUMBERS = np.empty(0, np.float32)
_NO_WEIGHT = (0, 0, 0, _NO_NUMBERS, _NO_NUMBERS, np.empty(0, np.int32))

_forced: list[str] = []


def instruction_sets() -> tuple[str, ...]:
    """Sets that can be used in this process, the fastest last; none on a CPU without AVX2."""
    return tuple(name for name in INT8_INSTRUCTIONS if name in cpu_features() and _is_compiled(name))


@functools.cache
def _is_compiled(name: str) -> bool:
    return int8_amx.why_not() is None if name == "amx_int8" else is_compiled_for(name)


def instruction_set() -> str | None:
    """The set that is used, None where there is none."""
    return _forced[-1] if _forced else next(iter(instruction_sets()[::-1]), None)


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Use one of :func:`instruction_sets` for a while, in all threads of the process: for tests and measurements."""
    if name not in instruction_sets():
        raise ValueError(f"{name!r} is not among the instruction sets of this process, {instruction_sets()}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def quantize_rows(x: torch.Tensor, smooth: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [T, K] and float32 scale [T] of floats [T, K], times ``smooth`` [K]."""
    n_rows, width = x.shape
    q, scale = torch.empty(n_rows, _whole(width, LANES), dtype=torch.int8), torch.empty(n_rows, dtype=torch.float32)
    source, factors, sums = Source(x, None), factors_of(smooth, width), torch.empty(0, dtype=torch.int32).numpy()

    def quantize(start: int, stop: int) -> None:
        row = _row(width)
        block = (q[start:stop].numpy(), scale[start:stop].numpy(), sums, row, row)
        layer = (factors, _NO_WEIGHT, AMX, ACTIVATION_CODES[None], block)
        int8_loops.compute_rows(
            source.arrays, layer, layer, 0, False, NO_ROWS, (0, 0, False), start, stop, stop - start
        )

    in_pieces(quantize, n_rows)
    return q[:, :width].contiguous(), scale


def workspace(shape: tuple[int, int], dtype: torch.dtype) -> Workspace:
    """Of :func:`linear` of a weight [N, K] whose results are of a dtype: float16 is made of float32."""
    row = 4 * shape[0] if dtype not in (torch.float32, torch.bfloat16) else 0
    kind = KINDS[the_set()]
    return Workspace(row, packed_bytes(*shape, kind), buffer_bytes(_BLOCK_ROWS, shape[1], kind))


def feed_forward_workspace(shapes: Sequence[tuple[int, int]], activation: str, dtype: torch.dtype) -> Workspace:
    """Of :func:`feed_forward` of two layers [N, K]."""
    kinds, (n_units, _), (width, _) = kinds_of(activation), *shapes
    row = 4 * width if dtype not in (torch.float32, torch.bfloat16) else 0
    own = sum(buffer_bytes(rows_at_once(n_units), shape[1], kind) for shape, kind in zip(shapes, kinds, strict=True))
    packed = sum(packed_bytes(*shape, kind) for shape, kind in zip(shapes, kinds, strict=True))
    return Workspace(row, packed, own + 4 * rows_at_once(n_units) * _whole(n_units, LANES))


def packed_bytes(n_columns: int, width: int, kind: int) -> int:
    """Of a layer that is packed: panels, a copy where those are larger than the weight, three numbers a column."""
    whole, wide = _whole(n_columns, GROUP), _whole(width, WIDTH_STEP)
    return (
        whole * wide * (2 if kind == PAIRS else 1)
        + (whole * wide if (n_columns % 16 or width % WIDTH_STEP) else 0)
        + 12 * whole
    )


def buffer_bytes(n_rows: int, width: int, kind: int) -> int:
    """Of :func:`buffers`, and factors of a row."""
    n_rows, wide = n_rows + SLACK, _whole(width, WIDTH_STEP)
    return n_rows * ((2 if kind == PAIRS else 1) * wide + 4 + 8 * GROUP) + 4 * (3 * (wide + LANES) + wide)


def linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``activation(x @ (weight * weight_scale).T + bias)`` of floats, or int8 rows with scales, [T, K]."""
    kind, width = KINDS[the_set()], x.shape[1]
    packed = packed_for(weight, weight_scale, bias, kind)
    out = _Result(len(x), len(weight), out_dtype)
    source, factors = Source(x, x_scale), factors_of(None, width)

    def compute(start: int, stop: int) -> None:
        n_rows = min(_BLOCK_ROWS, stop - start)
        layer = (factors, weight_of(packed), kind, ACTIVATION_CODES[activation], buffers(n_rows, width, kind))
        int8_loops.compute_rows(source.arrays, layer, layer, 1, False, NO_ROWS, out.arrays, start, stop, n_rows)

    in_pieces(compute, len(x))
    return out.tensor()


def feed_forward(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    up: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    down: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Two linear layers, each (weight, scale, bias); hidden units are rounded to int8 with one scale per row."""
    kind, down_kind = kinds_of(activation)
    n_units, width, hidden_width = len(up[0]), x.shape[1], down[0].shape[1]
    packed, down_packed = packed_for(*up, kind), packed_for(*down, down_kind)
    out = _Result(len(x), len(down[0]), out_dtype)
    source, factors, down_factors = Source(x, x_scale), factors_of(None, width), factors_of(None, hidden_width)

    def compute(start: int, stop: int) -> None:
        n_rows = min(rows_at_once(n_units), stop - start)
        hidden = np.zeros((n_rows, _whole(n_units, LANES)), np.float32)
        layer = (factors, weight_of(packed), kind, ACTIVATION_CODES[activation], buffers(n_rows, width, kind))
        block = buffers(n_rows, hidden_width, down_kind)
        down_layer = (down_factors, weight_of(down_packed), down_kind, ACTIVATION_CODES[None], block)
        is_gated = activation == "swiglu"
        int8_loops.compute_rows(source.arrays, layer, down_layer, 2, is_gated, hidden, out.arrays, start, stop, n_rows)

    in_pieces(compute, len(x))
    return out.tensor()


def kinds_of(activation: str) -> tuple[int, int]:
    """Kinds of the products on both sides of an activation."""
    kind = KINDS[the_set()]
    return kind, UNSIGNED if kind == PAIRS and activation == "relu" else kind


def rows_at_once(n_units: int) -> int:
    """Rows of a block with so many hidden units."""
    return min(max(32, _HIDDEN_BYTES // (4 * max(1, n_units)) // 32 * 32), _BLOCK_ROWS)


class _Result:
    """Rows to be written, in float32 or bfloat16; other dtypes are made of float32."""

    def __init__(self, n_rows: int, n_columns: int, dtype: torch.dtype) -> None:
        self._dtype, is_half = dtype, dtype == torch.bfloat16
        self._rows = torch.empty(n_rows, n_columns, dtype=dtype if is_half else torch.float32)
        self.arrays = (self._rows.data_ptr(), n_columns * self._rows.element_size(), is_half)

    def tensor(self) -> torch.Tensor:
        return self._rows.to(self._dtype)


def the_set() -> str:
    """:func:`instruction_set`, where there has to be one."""
    name = instruction_set()
    if name is None:
        raise RuntimeError("this CPU has no instructions for products of int8 that these loops know")
    return name


def _whole(size: int, step: int) -> int:
    return max(1, -(-size // step)) * step


def packed_for(weight: Any, scale: Any, bias: Any, kind: int) -> Packed:
    """A layer's weight as a kind of product takes it."""
    return pack(weight, scale, bias, is_wide=kind == PAIRS, is_shifted=kind in (AVX_VNNI, AVX512_VNNI))


def weight_of(packed: Packed) -> tuple[Any, ...]:
    """What loops take of it; it has to be kept alive meanwhile."""
    panels = packed.panels
    return (panels.ctypes.data, len(panels), packed.n_columns, packed.scale, packed.bias, packed.shift)


class Source:
    """Rows of floats, or int8 rows with scales, kept alive beside what the loops take."""

    def __init__(self, x: torch.Tensor, x_scale: torch.Tensor | None) -> None:
        given, given_scale = np.empty((0, 0), np.int8), np.empty(0, np.float32)
        x = x.detach().contiguous()
        if x_scale is not None:
            given, given_scale = x.numpy(), x_scale.detach().contiguous().numpy()
        elif x.dtype != torch.bfloat16:
            x = x.float()
        self._rows = x
        row_bytes, is_half = x.shape[1] * x.element_size(), x.dtype == torch.bfloat16
        self.arrays = (x.data_ptr(), row_bytes, x.shape[1], is_half, given, given_scale, x_scale is not None)


def factors_of(smooth: torch.Tensor | None, width: int) -> np.ndarray:
    """What is read beside the numbers of a row, and behind them."""
    if smooth is None:
        return np.empty(0, np.float32)
    out = np.ones(_whole(width, LANES), np.float32)
    out[:width] = smooth.detach().float().numpy()
    return out


def _row(width: int) -> np.ndarray:
    """For a row of float32, a copy of it with zeros behind, and one of int8."""
    return np.zeros(3 * _whole(width, LANES) + 3 * LANES, np.float32)


def buffers(n_rows: int, width: int, kind: int) -> tuple[np.ndarray, ...]:
    """Buffers of int8_loops.py; those of torch begin at whole registers."""
    n_rows, width = n_rows + SLACK, _whole(width, WIDTH_STEP)
    return (
        torch.empty(n_rows, 2 * width if kind == PAIRS else width, dtype=torch.int8).numpy(),
        np.empty(n_rows, np.float32),
        torch.empty(n_rows * GROUP, dtype=torch.int32).numpy(),
        torch.empty(n_rows * GROUP, dtype=torch.float32).numpy(),
        _row(width),
    )
